"""examples/train_digits.py: it runs, and tells when something is wrong."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "train_digits.py"

for needed in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install .[examples]")


@pytest.fixture(scope="module")
def example():
    return importlib.import_module(EXAMPLE.stem)


@pytest.mark.whole
def test_three_ways_learn_the_digits_and_end_in_a_plot(tmp_path):
    arguments = ["--epochs", "10", "--out", tmp_path / "new"]
    run = subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    for column in ("the layers", "stock modules", "one call"):
        assert column in run.stdout
    assert "The losses of a batch lie" in run.stdout
    assert "outputs bit-identical" in run.stdout
    assert (tmp_path / "new" / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_too_little_training_and_another_step_fail_the_example(example, monkeypatch, tmp_path):
    monkeypatch.setattr(example, "same_in_another_process", lambda *_: False)
    one_call = example.one_call

    def twice(*arguments):
        one_call(*arguments)
        return one_call(*arguments)

    monkeypatch.setattr(example, "one_call", twice)
    monkeypatch.setattr(example, "REQUIRED_ACCURACY", 1.01)
    problems = example.run(1, tmp_path, example.Console(quiet=True))
    assert [problem.partition(":")[0] for problem in problems[:3]] == list(example.make_ways())
    assert problems[3].startswith("the losses lie")
    assert problems[4].endswith("got different outputs")


def test_stock_modules_compute_what_the_layers_do(example):
    pixels = example.load()[1].pixels
    net = example.build()
    torch.testing.assert_close(example.as_stock(net)(pixels), net(pixels))
