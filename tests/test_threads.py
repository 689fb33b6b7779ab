"""Threads on the same modules: nothing is freed while a call computes with it.

tests/threads.py runs in a process of its own, for what it looks for may end one.
"""

import subprocess
import sys
from pathlib import Path

import pytest

STRESS = Path(__file__).parent / "threads.py"


# All of them beside each other, and few, so that each gets far.
@pytest.mark.parametrize(
    "scenario",
    [
        "everything",
        *(
            pytest.param(name, marks=pytest.mark.whole)
            for name in ("inference", "training", "parameters")
        ),
    ],
)
def test_threads_that_call_and_change_the_same_modules(scenario):
    ended = subprocess.run(
        [sys.executable, str(STRESS), "1.5", scenario], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
