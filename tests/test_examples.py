"""examples/policy_latency.py: it runs, and tells ties from actions that differ."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "policy_latency.py"

for needed in ("gymnasium", "stable_baselines3"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install .[policies]")


@pytest.fixture(scope="module")
def example():
    return importlib.import_module(EXAMPLE.stem)


@pytest.mark.whole
def test_short_training_and_serving_end_in_agreement_and_a_plot(tmp_path):
    arguments = ["--training-steps", "1", "--steps", "1", "--out", tmp_path / "new"]
    run = subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    # Two blocks at least, two policies, optimized and frozen.
    assert run.stdout.count("500 of 500 actions agree") == 4
    assert "Frozen(Sequential: 4 -> 64 tanh, 64 -> 64 tanh, 64 -> 2; " in run.stdout
    assert "mlp_extractor.policy_net  Linear + Tanh + Linear + Tanh  yes" in run.stdout
    assert "q_net.q_net         Linear + ReLU + Linear + ReLU + Linear  yes" in run.stdout
    assert (tmp_path / "new" / "policy_latency.png").read_bytes().startswith(b"\x89PNG")


def test_another_action_is_a_tie_only_if_its_score_equals_but_for_rounding(example):
    scores = torch.tensor([[1.0, 2.0], [1.0, 1.0 + 1e-6], [1.0, 1.001], [3.0, 3.0]])
    actions = torch.tensor([1, 1, 1, 0])
    others = torch.tensor([1, 0, 0, 0])
    found = example.compare((actions, scores), (others, scores + 0.5))
    assert (found.same, found.ties, found.different, found.distance) == (2, 1, 1, 0.5)


def test_actions_that_differ_fail_the_example(example, monkeypatch, tmp_path):
    monkeypatch.setattr(example, "POLICIES", {"PPO, tanh": example.POLICIES["PPO, tanh"]})
    monkeypatch.setattr(example, "BLOCK", 10)
    monkeypatch.setattr(example, "balances", lambda _: 0.0)
    untrained = example.ppo(example.gymnasium.make("CartPole-v1")).policy
    monkeypatch.setattr(example, "learn", lambda *_: untrained)
    decide = example.decide

    def decide_otherwise(policy, *arguments):
        actions, scores = decide(policy, *arguments)
        fused = isinstance(policy.mlp_extractor.policy_net, example.mylayers.FusedSequential)
        return (1 - actions if fused else actions), scores

    monkeypatch.setattr(example, "decide", decide_otherwise)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    console = example.Console(quiet=True)
    assert example.run(20, 1, tmp_path, console) == ["PPO, tanh, optimized: 20 actions differ"]


@pytest.mark.parametrize("option", ["--steps", "--training-steps"])
def test_a_count_that_is_none_is_refused_with_a_clear_message(example, option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["policy_latency.py", option, "0"])
    with pytest.raises(SystemExit) as exit_info:
        example.main()
    assert exit_info.value.code == 2
    assert f"{option}: must be a whole number from 1; got '0'" in capsys.readouterr().err
