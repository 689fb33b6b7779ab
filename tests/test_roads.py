"""The table of tests/certificate.py, at the end of a whole run."""

import pytest
from certificate import PAGE, Certificate, whole_numbers, written_table

REMEDY = "run python -m tests.certificate and look at what has changed"


@pytest.fixture(autouse=True)
def _whole(certificate: Certificate) -> None:
    if not certificate.whole:
        pytest.skip("only a run of all tests, without arguments, proves every road")


def test_every_road_is_proved(certificate: Certificate) -> None:
    assert not certificate.unproved()


def test_the_table_is_that_of_this_run(certificate: Certificate) -> None:
    now = certificate.table()
    assert whole_numbers(written_table()) == whole_numbers(now), f"{PAGE.name}: {REMEDY}"
