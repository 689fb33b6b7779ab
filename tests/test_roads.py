"""The tables of tests/certificate.py, at the end of a whole run."""

import pytest
from certificate import Certificate, tables, whole_numbers

REMEDY = "run python -m tests.certificate and look at what has changed"


@pytest.fixture(autouse=True)
def _whole(certificate: Certificate) -> None:
    if not certificate.whole:
        pytest.skip("only a run of all tests, without arguments, proves every road")


def test_every_road_is_proved(certificate: Certificate) -> None:
    assert not certificate.unproved()


def test_the_tables_are_those_of_this_run(certificate: Certificate) -> None:
    for page, (table, with_tests) in tables().items():
        now = certificate.table(with_tests)
        assert whole_numbers(table) == whole_numbers(now), f"{page.name}: {REMEDY}"
