"""examples/policy_training.py: it runs, and fuses all networks and optimisers of an algorithm."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "policy_training.py"

for needed in ("gymnasium", "stable_baselines3"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install .[policies]")


@pytest.fixture(scope="module")
def example():
    return importlib.import_module(EXAMPLE.stem)


@pytest.mark.whole  # the other examples run
def test_short_runs_of_all_algorithms_end_in_a_table_and_a_plot(tmp_path):
    arguments = ["--steps", "150", "--runs", "1", "--out", tmp_path / "new"]
    run = subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("PPO", "DQN", "SAC", "TD3"):
        assert f"{name}:\n" in run.stdout
        assert f"│ {name}" in run.stdout
    assert (tmp_path / "new" / "policy_training.png").read_bytes().startswith(b"\x89PNG")


OPTIMIZERS = {"PPO": 1, "DQN": 1, "SAC": 3, "TD3": 2}  # of SAC one is for the entropy


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_networks_and_optimizers_are_fused(example, name):
    task = example.TASKS[name]
    algorithm = task.algorithm("MlpPolicy", task.environment, device="cpu")
    example.optimize(algorithm)
    found = example.optimizers_of(algorithm)
    assert len(found) == OPTIMIZERS[name]
    assert all(type(optimizer).__module__ == "mylayers.optimizers" for optimizer in found)
    networks = [m for m in algorithm.policy.modules() if isinstance(m, torch.nn.Sequential)]
    assert any(isinstance(m, example.mylayers.FusedSequential) for m in networks)
    assert all(isinstance(m, example.mylayers.FusedSequential) for m in networks if len(m))


def test_an_unknown_algorithm_is_refused(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["policy_training.py", "--algorithms", "A3C"])
    with pytest.raises(SystemExit) as exit_info:
        example.main()
    assert exit_info.value.code == 2
    assert "invalid choice: 'A3C'" in capsys.readouterr().err
