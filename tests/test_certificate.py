"""A whole run of the tests fails where a road is not proved or the page has another table."""

from types import SimpleNamespace
from typing import Any

import certificate
import pytest
from certificate import BEGIN, END, PROVES, ROADS, Certificate


def run(outcomes: dict[str, str], whole: bool = True, **session: Any) -> tuple[Certificate, int]:
    """The certificate and the exit status of a run whose tests, one a road, ended so."""
    made = Certificate()
    for road, outcome in outcomes.items():
        properties = [(PROVES, [[road], "test_x.py", f"test_{road}", whole])]
        made.pytest_runtest_logreport(
            SimpleNamespace(nodeid=road, when="call", outcome=outcome, user_properties=properties)
        )
    ended = SimpleNamespace(config=SimpleNamespace(), exitstatus=0, shouldstop=False)
    ended.__dict__.update(session)
    made.pytest_sessionfinish(ended)
    return made, int(ended.exitstatus)


PASSED = dict.fromkeys(ROADS, "passed")


@pytest.fixture(autouse=True)
def page(tmp_path, monkeypatch):
    """A page with the table of a run in which all passed."""
    file = tmp_path / "page.md"
    monkeypatch.setattr(certificate, "PAGE", file)
    file.write_text(f"{BEGIN}\n{END}")
    made, _ = run(PASSED)
    file.write_text(f"{BEGIN}\n{made.table()}\n{END}")
    return file


def test_a_run_as_the_page_has_it_passes():
    made, status = run(PASSED)
    assert not made.faults
    assert status == 0


@pytest.mark.parametrize("change", [{"ONNX": "failed"}, {"ONNX": "skipped"}])
def test_a_road_that_no_test_proves_is_named(change):
    made, status = run({**PASSED, **change})
    assert any("'ONNX'" in fault for fault in made.faults)
    assert status == pytest.ExitCode.TESTS_FAILED


def test_another_table_than_the_pages_says_how_to_write_it(page):
    page.write_text(page.read_text().replace("1 passed", "2 passed"))
    made, status = run(PASSED)
    assert made.faults == ["page.md: run python -m tests.certificate and see what changed"]
    assert status == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    "part",
    [
        {"whole": False},
        {"shouldstop": "at the first failure"},
        {"config": SimpleNamespace(workerinput={})},
    ],
    ids=str,
)
def test_a_part_of_the_tests_is_not_judged(part):
    made, status = run({"ONNX": "failed"}, **part)
    assert not made.faults
    assert status == 0
