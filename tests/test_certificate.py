"""A run of the tests fails where a road is not proved or the page has another table.

And what it leaves out, ``pytest -m whole`` runs.
"""

import itertools
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import certificate
import pytest
from certificate import BEGIN, END, LEFT, PROVES, ROADS, Certificate
from grids import by_turns


def run(
    outcomes: dict[str, str], whole: bool = True, left: dict[str, Any] | None = None, **session: Any
) -> tuple[Certificate, int]:
    """The certificate and the exit status of a run whose tests, one a road, ended so."""
    made = Certificate()
    made.pytest_testnodedown(SimpleNamespace(workeroutput={LEFT: left or {}}))
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
        {"config": SimpleNamespace(workerinput={}, workeroutput={})},
    ],
    ids=str,
)
def test_a_part_of_the_tests_is_not_judged(part):
    made, status = run({"ONNX": "failed"}, **part)
    assert not made.faults
    assert status == 0


# ---- what is left to pytest -m whole ---------------------------------------------------


def test_cases_that_are_left_count_in_the_table_and_prove_nothing(page):
    page.write_text(page.read_text().replace("1 passed", "2 passed", 1))
    road = next(iter(ROADS))
    left = {"another case": [[road], "test_x.py", f"test_{road}"]}
    made, status = run(PASSED, left=left)
    assert not made.faults
    assert status == 0
    made, status = run({**PASSED, road: "skipped"}, left=left)
    assert made.faults == [f"no test proves {road!r}, or one fails"]
    assert status == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    "sizes", [[1], [5], [4, 2], [2, 9, 4], [7, 2, 4], [2, 2, 2, 2], [6, 6], [12, 4, 3]], ids=str
)
def test_the_cases_of_a_grid_have_every_value_and_all_but_the_longest_every_combination(sizes):
    cases = by_turns(sizes)
    longest = sizes.index(max(sizes))
    others = [size for place, size in enumerate(sizes) if place != longest]
    assert len(cases) == max(max(sizes), math.prod(others))
    assert {case[longest] for case in cases} == set(range(max(sizes)))
    met = {case[:longest] + case[longest + 1 :] for case in cases}
    assert met == set(itertools.product(*map(range, others)))


GRIDS = """
import pytest

@pytest.mark.grid
@pytest.mark.parametrize("a", "xyz")
@pytest.mark.parametrize(("b", "c"), [(1, 2), (3, 4), (1, 4)])
def test_grid(a, b, c): pass

@pytest.mark.whole
def test_whole(): pass

def test_plain(): pass
"""


def collected(folder: Path, *arguments: str) -> list[str]:
    """The names that pytest with this repository's options and plugins collects."""
    tests = Path(__file__).resolve().parent
    folder.joinpath("test_made.py").write_text(GRIDS)
    folder.joinpath("conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(tests)!r})\n"
        "import pytest\nfrom grids import mark_the_rest\n"
        "@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_collection_modifyitems(items): mark_the_rest(items)\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", str(tests.parent / "pyproject.toml"), "-q"]
    command += ["--rootdir", str(folder), "-n0", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True)
    return sorted(line for line in done.stdout.splitlines() if "::" in line)


def test_the_default_run_and_the_rest_have_each_case_once(tmp_path):
    file = str(tmp_path / "test_made.py")
    some, rest, every = (collected(tmp_path, *m, file) for m in ([], ["-m", "whole"], ["-m", ""]))
    assert len(every) == 11
    assert sorted(some + rest) == every
    assert [name.partition("::")[2] for name in some] == [
        "test_grid[1-2-x]",
        "test_grid[1-4-z]",
        "test_grid[3-4-y]",
        "test_plain",
    ]
    # A case that is named runs.
    (named,) = [name for name in rest if "[1-2-y]" in name]
    assert collected(tmp_path, f"{file}::{named.partition('::')[2]}") == [named]
