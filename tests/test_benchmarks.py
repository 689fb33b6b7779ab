"""The benchmark harness: that what it reports was verified, paired and written down rightly."""

import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import mylayers

ROOT = Path(__file__).resolve().parent.parent
SUITES = (
    "linear-forward",
    "linear-backward",
    "linear-backward-weights",
    "linear-module",
    "center-forward",
    "center-backward",
    "center-dim",
    "center-module",
    "networks-forward",
    "networks-training",
    "networks-backward",
    "networks-hindered",
)
# Candidates that take seconds to set up: few tests have them.
SLOW_TO_BUILD = {"compile", "reduce-overhead", "max-autotune", "onnxruntime"}
YARDSTICKS = {"clone", "one-linear", "frozen", "own-loop"}
DTYPES = ("float32", "float64", "bfloat16", "float16")


@pytest.fixture(scope="module")
def bench():
    """The harness's modules; it is run from the repository's root, not installed."""
    sys.path.insert(0, str(ROOT))
    try:
        modules = (ROOT / "benchmarks").glob("*.py")
        names = [module.stem for module in modules if module.stem != "__init__"]
        return SimpleNamespace(
            **{name.strip("_"): importlib.import_module(f"benchmarks.{name}") for name in names}
        )
    finally:
        sys.path.remove(str(ROOT))


def tiny_shape(bench, name):
    if name.startswith("linear"):
        return bench.cases.Shape((3, 5, 4))
    if name.startswith("networks"):
        return bench.cases.Shape((3, 5, 6, 4), activation="relu")
    return bench.cases.Shape((7, 3), (0,)) if name == "center-dim" else bench.cases.Shape((7,))


def tiny_case(bench, name, dtype="float32"):
    return bench.measure.Case(name, tiny_shape(bench, name), dtype, "cpu", threads=1)


def eager_suite(bench, name):
    suite = bench.cases.SUITES[name]
    eager = {key: value for key, value in suite.candidates.items() if key not in SLOW_TO_BUILD}
    return dataclasses.replace(suite, candidates=eager)


def with_candidate(bench, name, function, key="suspect"):
    suite = eager_suite(bench, name)
    candidate = bench.cases.Candidate(bench.peers.eager(bench.peers.operator(function)))
    return dataclasses.replace(suite, candidates={**suite.candidates, key: candidate})


def made_limits(bench, threads=1):
    """A machine of 1 GFLOP/s that copies 1 GB/s, 2 in cache, and needs 1 us for a call."""
    calls = dict.fromkeys(("pybind11 entry", "+ allocation", "nn.Module.__call__"), 1e-6)
    return bench.limits.Limits(
        threads=threads,
        peak=dict.fromkeys(DTYPES, 1e9),
        units={"float32": 1e9},
        copy={1 << 12: 1e8, 1 << 16: 2e9, 1 << 20: 1e9},
        calls=calls,
        nodes={1: 1e-5, 2: 2e-5, 3: 3e-5},
    )


@pytest.fixture
def tiny_suites(bench, monkeypatch):
    """The suites cut down to one tiny shape, no time spent beyond the fewest rounds."""
    for name in SUITES:
        shapes = (tiny_shape(bench, name),)
        tiny = dataclasses.replace(eager_suite(bench, name), shapes=shapes, quick=shapes)
        monkeypatch.setitem(bench.cases.SUITES, name, tiny)
    monkeypatch.setattr(bench.main, "SECONDS", 0.0)
    monkeypatch.setattr(bench.main, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(bench.limits, "measure", lambda threads: made_limits(bench, threads))


def check_timed(bench, suite, result):
    rows = {None, result.case.shape.sizes[0]}
    names = [name for name, candidate in suite.candidates.items() if candidate.rows in rows]
    assert list(result.seconds) == names
    assert set(result.ratios) == set(names) - {"mylayers"}
    assert result.best_peer in result.ratios.keys() - YARDSTICKS
    assert result.rounds >= bench.timing.LEAST_ROUNDS
    assert not result.left_out
    for spread in (*result.seconds.values(), *result.ratios.values()):
        assert 0 < spread.low <= spread.median <= spread.high < math.inf


def test_the_suites_are_those_tested_here(bench):
    assert tuple(bench.cases.SUITES) == SUITES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SUITES)
def test_every_eager_candidate_passes_verification_and_is_timed(bench, name, dtype):
    suite = eager_suite(bench, name)
    result = bench.measure.measure(suite, tiny_case(bench, name, dtype), seconds=0)
    check_timed(bench, suite, result)


@pytest.mark.parametrize(
    "name",
    [
        "linear-forward",
        "linear-backward",
        "linear-module",
        "center-backward",
        "networks-forward",
        "networks-training",
    ],
)
def test_compiled_candidates_pass_verification_in_silence(bench, name, capfd):
    suite = bench.cases.SUITES[name]
    candidates = {key: value for key, value in suite.candidates.items() if key != "onnxruntime"}
    suite = dataclasses.replace(suite, candidates=candidates)
    assert "compile" in candidates
    result = bench.measure.measure(suite, tiny_case(bench, name), seconds=0)
    check_timed(bench, suite, result)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("name", ["linear-forward", "networks-forward"])
def test_onnx_runtime_passes_verification(bench, name, dtype):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    suite = eager_suite(bench, name)
    onnx = bench.cases.SUITES[name].candidates["onnxruntime"]
    suite = dataclasses.replace(suite, candidates={**suite.candidates, "onnxruntime": onnx})
    result = bench.measure.measure(suite, tiny_case(bench, name, dtype), seconds=0)
    check_timed(bench, suite, result)


def test_every_obstacle_passes_verification(bench):
    suite = bench.cases.SUITES["networks-hindered"]
    assert [shape.obstacle for shape in suite.shapes] == list(bench.cases.OBSTACLES)
    for shape in suite.shapes:
        case = bench.measure.Case("networks-hindered", shape, "float32", "cpu", threads=1)
        check_timed(bench, suite, bench.measure.measure(suite, case, 0.0))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("name", ["networks-forward", "networks-training", "networks-backward"])
def test_a_network_of_eight_layers_passes_verification(bench, name, activation):
    suite, shape = eager_suite(bench, name), bench.cases.Shape((1, *[16] * 9), None, activation)
    assert suite.gradients_at(shape) in ((), tuple(range(1, 17)))
    result = bench.measure.measure(suite, bench.measure.Case(name, shape, "float32", "cpu", 1), 0)
    check_timed(bench, suite, result)
    assert ("numpy" in result.seconds) == (name == "networks-forward")  # for one row


def test_all_positions_of_the_deepest_networks_parameters_have_gradients(bench):
    for name in ("networks-training", "networks-backward"):
        suite = bench.cases.SUITES[name]
        for shape in suite.shapes:
            layers = len(shape.sizes) - 2
            assert 2 <= layers <= 8
            assert suite.gradients_at(shape) == tuple(range(1, 2 * layers + 1))


def test_a_step_of_training_leaves_gradients_of_the_loss_and_the_parameters_as_they_are(bench):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    target = torch.tensor([0.0, 5.0])
    learn = functools.partial(bench.peers.by_autograd, lambda: 2 * weight, target)
    step = bench.timing.training_step(learn, [weight])
    for _ in range(2):  # the gradient of the step before is dropped
        (of_weight,) = step()
        assert torch.equal(of_weight, torch.tensor([8.0, -4.0]))  # 2 * 2 * (output - target)
        assert weight.grad is None
    assert torch.equal(weight, torch.tensor([1.0, 2.0]))


def test_sides_of_a_kink_that_rounding_decides_about_leave_nothing_to_verify(bench):
    suite, case = eager_suite(bench, "networks-training"), tiny_case(bench, "networks-training")
    kinks = lambda *_, **__: torch.ones(3, 4, dtype=torch.bool)  # noqa: E731
    suite = dataclasses.replace(suite, layer=dataclasses.replace(suite.layer, kinks=kinks))
    with pytest.raises(bench.measure.VerificationError, match="rounding may decide"):
        bench.measure.measure(suite, case, seconds=0)


def test_rows_near_the_kink_of_a_hidden_unit_are_found(bench):
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    weights = torch.eye(2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    parameters = weights[0], torch.tensor([0.0, -1e-7]), weights[1], torch.zeros(3)
    for activation, near in (("relu", [True, False, False]), ("tanh", [False] * 3)):
        options = {"activation": activation, "dtype": torch.float32}
        found = bench.cases.NETWORK.kinks(x, *(p.double() for p in parameters), **options)
        assert found.shape == (3, 3)
        assert found.all(1).tolist() == found.any(1).tolist() == near


def test_a_missing_onnx_runtime_is_left_out_and_said_so(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    onnx = bench.cases.SUITES["linear-forward"].candidates["onnxruntime"]
    suite = eager_suite(bench, "linear-forward")
    suite = dataclasses.replace(suite, candidates={**suite.candidates, "onnxruntime": onnx})
    result = bench.measure.measure(suite, tiny_case(bench, "linear-forward"), seconds=0)
    assert "onnxruntime" not in result.seconds
    (line,) = bench.report.left_out_lines([result])
    assert re.fullmatch(r"onnxruntime is left out of 1 of 1 cases: ModuleNotFoundError: .+", line)


@pytest.mark.parametrize("name", ["linear-forward", "linear-backward"])
def test_a_peer_that_raises_is_left_out_with_its_reason(bench, name):
    def refuse(*_):
        raise ValueError("not on a Monday\nnor on a Tuesday")

    suite = with_candidate(bench, name, refuse)
    result = bench.measure.measure(suite, tiny_case(bench, name), seconds=0)
    assert result.left_out == {"suspect": "ValueError: not on a Monday"}
    assert "suspect" not in result.seconds
    assert "suspect" not in result.ratios


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("linear-forward", "mylayers"),
        ("linear-forward", "notebook"),
        ("networks-forward", "stock"),
    ],
)
def test_what_every_table_needs_may_not_raise(bench, name, key):
    def refuse(*_, **__):
        raise ValueError("no")

    suite = with_candidate(bench, name, refuse, key)
    with pytest.raises(ValueError, match="no"):
        bench.measure.measure(suite, tiny_case(bench, name), seconds=0)


def test_a_peer_that_is_far_too_slow_is_not_timed_in_turns(bench, monkeypatch):
    calls = []

    def crawl(x, weight, bias):
        calls.append(1)
        time.sleep(0.06)
        return (x @ weight + bias).relu()

    monkeypatch.setattr(bench.measure, "AFFORDABLE_SECONDS", 0.05)
    suite = with_candidate(bench, "linear-forward", crawl)
    result = bench.measure.measure(suite, tiny_case(bench, "linear-forward"), seconds=0)
    assert len(calls) == 3  # verified, and one step timed twice
    assert result.timed_once == {"suspect"}
    assert result.seconds["suspect"].median >= 0.06
    ratio, ours = result.ratios["suspect"], result.seconds["mylayers"]
    assert ratio.low == result.seconds["suspect"].median / ours.high
    assert bench.measure.TOO_SLOW < ratio.low <= ratio.median <= ratio.high


# Everything that relu(x @ w + b) could get wrong by little: each must be noticed.
WRONG_LINEAR = {
    "no bias": lambda x, w, b: (x @ w + 0 * b).relu(),
    "no activation": lambda x, w, b: x @ w + b,
    "off in one element": lambda x, w, b: (x @ w + b).relu() + 1e-5 * torch.eye(3, 4),
    "NaN": lambda x, w, b: (x @ w + b).relu() * torch.nan,
    "another dtype": lambda x, w, b: (x @ w + b).relu().double(),
    "another shape": lambda x, w, b: (x @ w + b).relu()[None],
}
WRONG_GRADIENTS = {
    "none for the weight": (1, lambda x, w, b: (x @ w.detach() + b).relu()),
    "half of the input's": (0, lambda x, w, b: ((x / 2 + x.detach() / 2) @ w + b).relu()),
    "bias's off by 1e-5": (2, lambda x, w, b: (x @ w + b + 1e-5 * (b - b.detach())).relu()),
}


@pytest.mark.parametrize("function", WRONG_LINEAR.values(), ids=WRONG_LINEAR)
def test_a_wrong_output_fails_verification_by_name_before_any_timing(bench, function, monkeypatch):
    suite = with_candidate(bench, "linear-forward", function)
    monkeypatch.setattr(bench.measure, "take_turns", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(bench.measure.VerificationError, match=r"suspect in .* 3x5x4 .* output"):
        bench.measure.measure(suite, tiny_case(bench, "linear-forward"), seconds=0)


@pytest.mark.parametrize(("which", "function"), WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS)
@pytest.mark.parametrize("name", ["linear-backward", "linear-backward-weights"])
def test_a_wrong_gradient_that_is_wanted_fails_verification(bench, name, which, function):
    suite, case = with_candidate(bench, name, function), tiny_case(bench, name)
    if which in suite.gradients:
        with pytest.raises(bench.measure.VerificationError, match=rf"suspect .* gradient {which}"):
            bench.measure.measure(suite, case, seconds=0)
    else:
        assert "suspect" in bench.measure.measure(suite, case, seconds=0).ratios


def network(x, *parameters, activation, first_bias=1.0, last_weight=1.0, act=None):
    act = act or getattr(torch, activation)
    w1, b1, w2, b2 = parameters
    return act(x @ w1.t() + first_bias * b1) @ (last_weight * w2).t() + b2


# Everything that two layers could get wrong by little: each must be noticed.
WRONG_NETWORK = {
    "no bias of the first layer": lambda *a, **o: network(*a, first_bias=0, **o),
    "no activation": lambda *a, **o: network(*a, act=lambda h: h, **o),
    "another activation": lambda *a, **o: network(*a, act=torch.sigmoid, **o),
    "an activation of the last layer": lambda *a, **o: network(*a, **o).relu(),
}
WRONG_NETWORK_GRADIENTS = {
    "none for the second weight": (
        3,
        lambda x, w1, b1, w2, b2, **o: network(x, w1, b1, w2.detach(), b2, **o),
    ),
    "first bias's off by 1e-4": (
        2,
        lambda x, w1, b1, *p, **o: network(x, w1, b1 + 1e-4 * (b1 - b1.detach()), *p, **o),
    ),
}


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("function", WRONG_NETWORK.values(), ids=WRONG_NETWORK)
def test_a_network_with_a_wrong_layer_fails_verification(bench, function, activation):
    suite, case = with_candidate(bench, "networks-forward", function), tiny_case(bench, "networks")
    case = dataclasses.replace(case, shape=dataclasses.replace(case.shape, activation=activation))
    with pytest.raises(bench.measure.VerificationError, match=r"suspect in .* output is off"):
        bench.measure.measure(suite, case, seconds=0)


@pytest.mark.parametrize(
    ("which", "function"), WRONG_NETWORK_GRADIENTS.values(), ids=WRONG_NETWORK_GRADIENTS
)
@pytest.mark.parametrize("name", ["networks-training", "networks-backward"])
def test_a_network_with_a_wrong_gradient_fails_verification(bench, name, which, function):
    suite = with_candidate(bench, name, function)
    with pytest.raises(bench.measure.VerificationError, match=rf"suspect .* gradient {which}"):
        bench.measure.measure(suite, tiny_case(bench, name), seconds=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "function", "what"),
    [
        ("center-forward", lambda x: x * 1, "output"),
        ("center-backward", lambda x: x - x.mean().detach(), "gradient 0"),
    ],
)
def test_a_mean_that_is_not_subtracted_fails_verification(bench, name, function, what, dtype):
    suite = with_candidate(bench, name, function)
    with pytest.raises(bench.measure.VerificationError, match=what):
        bench.measure.measure(suite, tiny_case(bench, name, dtype), seconds=0)


def test_the_gradient_of_a_large_float16_mean_overflows_in_no_candidate(bench):
    suite, shape = eager_suite(bench, "center-backward"), bench.cases.Shape((1 << 17,))
    case = dataclasses.replace(tiny_case(bench, "center-backward", "float16"), shape=shape)
    assert bench.measure.measure(suite, case, seconds=0).best_ratio.median > 0


def test_measuring_restores_threads_and_grad_mode(bench):
    before = torch.get_num_threads()
    case = dataclasses.replace(tiny_case(bench, "linear-forward"), threads=before + 1)
    seen = []

    def look(x, weight, bias):
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
        return (x @ weight + bias).relu()

    suite = with_candidate(bench, "linear-forward", look)
    bench.measure.measure(suite, case, seconds=0)
    assert set(seen) == {(before + 1, False)}
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()


def test_a_step_hands_over_its_gradients_and_keeps_none(bench):
    x, w = torch.ones(2, 3, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    step = bench.timing.backward_step(lambda: x @ w, [x, w], torch.ones(2, 4))
    for _ in range(2):
        output, of_x, of_w = step()
        assert torch.equal(of_x, torch.full_like(x, 4))
        assert torch.equal(of_w, torch.full_like(w, 2))
        assert x.grad is None
        assert w.grad is None
        assert torch.equal(output, torch.full_like(output, 3))


def test_a_turn_through_the_buffers_does_not_fit_in_the_cache(bench):
    suite = bench.cases.SUITES["center-forward"]
    problem = bench.measure.Problem(suite, tiny_case(bench, "center-forward"))
    (x,) = problem.arguments
    assert bench.measure.buffers(problem, 0) == [problem.arguments]
    for cache in (1, x.nbytes, 3 * x.nbytes + 1):
        copies = [copy for (copy,) in bench.measure.buffers(problem, cache)]
        assert (len(copies) - 1) * x.nbytes < 2 * cache <= len(copies) * x.nbytes
        assert len({copy.data_ptr() for copy in copies}) == len(copies)
        assert all(torch.equal(copy, x) for copy in copies)
    assert len(bench.measure.buffers(problem, 1 << 40)) == bench.measure.MOST_BUFFERS


def test_a_turn_is_timed_as_so_many_steps(bench, monkeypatch):
    done = []
    turn = bench.measure.one_after_the_other([lambda n=n: done.append(n) or n for n in range(3)])
    assert turn() == 2
    assert done == [0, 1, 2]

    buffers = bench.measure.buffers
    samples = {"mylayers": [4.0, 4.0], "notebook": [8.0, 8.0]}
    monkeypatch.setattr(bench.measure, "buffers", lambda problem, _: buffers(problem, 1) * 2)
    monkeypatch.setattr(bench.measure, "take_turns", lambda *_: samples)
    suite = eager_suite(bench, "center-forward")
    result = bench.measure.measure(suite, tiny_case(bench, "center-forward"), seconds=0)
    copies = len(buffers(bench.measure.Problem(suite, result.case), 1)) * 2
    assert result.seconds["mylayers"].median == 4 / copies
    assert result.ratios["notebook"].median == 2


def test_a_gpu_has_suites_with_peers_of_its_own_graphed_and_not(bench):
    suites = bench.cases.suites("cuda")
    assert bench.cases.suites("cpu") is bench.cases.SUITES
    assert set(suites) <= set(bench.cases.SUITES)
    for name, suite in suites.items():
        assert {"mylayers", suite.baseline} <= set(suite.candidates)
        assert set(suite.candidates) <= set(bench.cases.SUITES[name].candidates)
        assert set(suite.quick) <= set(suite.shapes)
    given = bench.main._parser().parse_args(["--device", "cuda", "--only", "linear-forward"])
    cases = bench.main._cases(bench.main._options(vars(given), None))
    assert len(cases) == 2 * len(suites["linear-forward"].shapes)
    assert {case.device for case in cases} == {"cuda", bench.measure.GRAPHED}
    assert {case.place for case in cases} == {"cuda"}


def test_a_suite_that_a_gpu_does_not_have_is_refused(bench, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arguments in (["center-dim"], ["networks", "linear-module", "center-dim"]):
        with pytest.raises(SystemExit):
            bench.main.main(["--device", "cuda", "--only", *arguments])
        refused = " ".join(name for name in arguments if name != "networks")
        assert f"--only: not measured with --device cuda: {refused}" in capsys.readouterr().err


def test_an_empty_kernel_bounds_a_step_on_a_gpu(bench):
    limits = dataclasses.replace(
        made_limits(bench), calls={bench.limits.KERNEL: 1e-6}, least_call=bench.limits.KERNEL
    )
    assert limits.of(bench.limits.Work(1, 1), "float32", 0) == (1e-6, "call")


def test_candidates_take_turns_in_an_order_that_turns_round(bench, monkeypatch):
    monkeypatch.setattr(bench.timing, "SAMPLE_SECONDS", 0.0)  # one step a sample
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = bench.timing.take_turns(steps, 0)
    rounds = bench.timing.LEAST_ROUNDS
    assert "".join(calls) == "aabbcc" + ("abccba" * rounds)[: 3 * rounds]
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", rounds)


def test_threads_sleep_between_restless_candidates_and_the_others(bench, monkeypatch):
    monkeypatch.setattr(bench.timing, "SAMPLE_SECONDS", 0.0)
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abx"}
    monkeypatch.setattr(bench.timing, "wait_for_sleep", lambda: calls.append("|"))
    monkeypatch.setattr(bench.timing, "warm_up", lambda step: step())
    bench.timing.take_turns(steps, 0, restless={"x"})
    # Each turn is an untimed step and a timed one. x follows itself where the order turns round,
    # and so does a: nobody's threads are in its way there.
    rounds = "|aabb|xx", "xx|bbaa", "aabb|xx", "xx|bbaa"
    assert "".join(calls).startswith("".join(("aabbxx", *rounds)))


def test_nobody_is_warmed_up_where_nobody_is_restless(bench, monkeypatch):
    warmed = []
    monkeypatch.setattr(bench.timing, "warm_up", warmed.append)
    bench.timing.take_turns({"a": int, "b": int}, 0)
    assert not warmed


@pytest.mark.parametrize("fastest", [0.009, 0.011])
def test_turns_begin_with_an_untimed_step_where_every_step_is_long(bench, fastest):
    calls, lasts = [], {"a": fastest, "b": 0.1}

    def clock(step):
        step()
        return lasts[calls[-1]]

    steps = {name: functools.partial(calls.append, name) for name in lasts}
    samples = bench.timing.take_turns(steps, 0, clock)
    turns = "aabbbbaa" if fastest > bench.timing.WARM_UP_SECONDS else "abba"
    assert "".join(calls).startswith("aabb" + turns * 3)
    assert samples == {name: [lasts[name]] * bench.timing.LEAST_ROUNDS for name in lasts}


def test_waiting_ends_when_other_threads_end_their_work(bench):
    end = time.perf_counter() + 0.05

    def spin():
        while time.perf_counter() < end:
            pass

    with concurrent.futures.ThreadPoolExecutor() as executor:
        executor.submit(spin)
        bench.timing.wait_for_sleep()
        assert time.perf_counter() >= end


def test_waiting_gives_up_on_a_thread_that_never_sleeps(bench, monkeypatch):
    monkeypatch.setattr(bench.timing, "MOST_NAPS", 2)
    monkeypatch.setattr(bench.timing.time, "process_time", itertools.count().__next__)
    naps = []
    monkeypatch.setattr(bench.timing.time, "sleep", naps.append)
    bench.timing.wait_for_sleep()
    assert naps == [bench.timing.NAP_SECONDS] * 2


def test_warming_up_goes_on_for_its_time(bench, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    bench.timing.warm_up(lambda: now.append(now.pop() + 0.003))
    assert now == [pytest.approx(0.012)]  # the first to end after 10 ms


def test_a_sample_holds_as_many_steps_as_the_clock_needs(bench, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(bench.timing, "time", clock)
    costs = {"short": 30e-6, "long": 1e-3}

    def step_of(cost):
        def step():
            now[0] += cost

        return step

    steps = {name: step_of(cost) for name, cost in costs.items()}
    samples = bench.timing.take_turns(steps, 0.1)
    for name, cost in costs.items():
        assert samples[name] == pytest.approx([cost] * len(samples[name]))
    # 8 short steps are the first power of two to fill 200 us; a round is then 240 us + 1 ms.
    assert len(samples["short"]) == len(samples["long"]) == math.ceil(0.1 / 1.24e-3)


def test_the_ratio_is_taken_within_a_round(bench, monkeypatch):
    # The machine is three times as slow in the second round, for both alike.
    samples = {"mylayers": [1.0, 3.0, 1.0], "notebook": [2.0, 6.0, 2.0]}
    monkeypatch.setattr(bench.measure, "take_turns", lambda *_: samples)
    suite = eager_suite(bench, "center-forward")
    result = bench.measure.measure(suite, tiny_case(bench, "center-forward"), seconds=0)
    assert result.ratios == {"notebook": (2.0, 2.0, 2.0)}
    assert result.seconds["mylayers"] == (1.0, 1.0, 2.0)
    assert not result.remeasured


def test_what_is_slower_than_the_threshold_is_measured_once_more_for_longer(bench, monkeypatch):
    asked = []

    def take_turns(_steps, seconds, *_):
        asked.append(seconds)
        time.sleep(0.01)
        return {"mylayers": [1.0] * 2, "notebook": [0.5 if len(asked) == 1 else 0.9] * 2}

    monkeypatch.setattr(bench.measure, "take_turns", take_turns)
    suite = eager_suite(bench, "center-forward")
    result = bench.measure.measure(suite, tiny_case(bench, "center-forward"), seconds=0.001)
    assert result.remeasured
    assert result.best_ratio.median == 0.9  # the second counts, and there is no third
    assert len(asked) == 2
    assert asked[1] >= 4 * 0.01


def test_a_yardstick_is_no_peer(bench):
    suite = eager_suite(bench, "center-forward")
    instant = bench.cases.Candidate(lambda x: lambda: x, yardstick=True)
    suite = dataclasses.replace(suite, candidates={**suite.candidates, "clone": instant})
    result = bench.measure.measure(suite, tiny_case(bench, "center-forward"), seconds=0)
    assert result.seconds["clone"].median < result.seconds["notebook"].median
    assert result.best_peer == "notebook"


@pytest.mark.parametrize(
    ("shape", "gradients", "limit"),
    [
        # 2 * 100**3 operations at 1 GFLOP/s; 30,100 elements of 4 bytes at 1 GB/s.
        ((100, 100, 100), (), (2e-3, "compute")),
        ((100, 100, 100), (0, 1, 2), ((6e6 + 1e4) / 1e9, "compute")),
        ((100, 100, 100), (1, 2), ((4e6 + 1e4) / 1e9, "compute")),
        # 103 elements of 4 bytes: at the rate of what lies in cache, not at that of tiny copies.
        ((1, 1, 51), (), (1e-6, "call")),
        ((1, 1, 51), (1, 2), (2e-5, "call")),
        # Two operations for 3 elements and less.
        ((100_000, 1, 1), (), ((1e5 + 2 + 1e5) * 4 / 1e9, "memory")),
    ],
)
def test_the_limit_is_the_largest_of_arithmetic_memory_and_call(bench, shape, gradients, limit):
    work = bench.cases.LINEAR.work(bench.cases.Shape(shape), gradients)
    found = made_limits(bench).of(work, "float32", len(gradients))
    assert found == (pytest.approx(limit[0]), limit[1])


def test_the_limit_of_a_network_adds_up_that_of_its_layers(bench):
    # 100 rows through 20, 30 and 10 units: 2 * 900 * 100 operations; 2,000 elements in, 630 + 310
    # parameters, 1,000 out; then those of 3,000 hidden units twice, the last weight and the
    # parameters' gradients, the output's gradient; no gradient of the input.
    shape, work = bench.cases.Shape((100, 20, 30, 10), None, "relu"), bench.cases.NETWORK.work
    assert work(shape, ()) == (180_000, 3_940)
    assert work(shape, (1, 2, 3, 4)) == (3 * 180_000 - 120_000, 3_940 + 6_000 + 300 + 940 + 1_000)
    limits = made_limits(bench)
    assert limits.of(work(shape, ()), "float32", 0) == (pytest.approx(180e-6), "compute")
    tiny = work(bench.cases.Shape((1, 1, 1, 1), None, "relu"), (1, 2, 3, 4))
    assert limits.of(tiny, "float32", 4) == (3e-5, "call")  # at least what three gradients cost


def test_fewer_bytes_are_copied_no_slower_than_more(bench):
    limits = made_limits(bench)
    assert limits.bandwidth(100) == limits.bandwidth(1 << 16) == 2e9
    assert limits.bandwidth((1 << 16) + 1) == limits.bandwidth(1 << 30) == 1e9


def test_limits_of_this_machine_are_sane(bench):
    before = torch.get_num_threads()
    limits = bench.limits.measure(threads=1)
    assert torch.get_num_threads() == before
    assert set(limits.peak) == set(DTYPES)
    assert 1e9 < limits.peak["float64"] < limits.peak["float32"] < 1e13
    assert limits.peak["float16"] == limits.peak["float32"] <= limits.peak["bfloat16"]
    assert list(limits.copy) == bench.limits.COPY_BYTES
    assert all(1e7 < rate < 1e13 for rate in limits.copy.values())
    assert 0 < limits.calls["pybind11 entry"] < limits.calls["+ allocation"] < 1e-3
    # A node is the call and the engine's round besides.
    assert limits.calls["+ allocation"] < limits.nodes[1] < 1e-2
    assert bench.report.limits_table({1: limits}).row_count > 10


def test_the_shapes_of_tiles_are_in_memory_when_they_are_read(tmp_path):
    """On any machine: a program without them dies where there are tiles."""
    source, assembly, program = (tmp_path / f"tiles.{kind}" for kind in ("cpp", "s", "o"))
    source.write_text(
        f'#include "{ROOT / "benchmarks" / "peaks.h"}"\n'
        "double peak() { return peaks(1, 0, 1)[0].second; }\n"
    )
    for options in (["-S", "-o", assembly], ["-c", "-o", program]):
        flags = ["-std=c++20", "-O3", "-march=sapphirerapids"]
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        subprocess.run([*compiler, *flags, *options, source], check=True)
    text = assembly.read_text()
    names = set(re.findall(r"ldtilecfg\s+(\w+)\(%rip\)", text))
    assert len(names) == text.count("ldtilecfg") == 1
    assert re.search(rf"\.size\s+{names.pop()}, 64\b", text)
    # Palette 1, then for each of eight tiles the bytes of a row and the number of rows.
    shapes = struct.pack("<BB14x8H16x8B8x", 1, 0, *[64] * 8, *[16] * 8)
    assert shapes in program.read_bytes()


def test_without_a_compiler_there_are_no_limits_and_the_reason_is_one_line(
    bench, tmp_path, monkeypatch
):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setattr(bench.limits, "BUILD", tmp_path)
    # By the shell, or by ccache where torch finds it.
    reason = r"\A.*/no-such-compiler(: not found| failed: No such file or directory)\Z"
    with pytest.raises(bench.limits.UnavailableError, match=reason):
        bench.limits._library.__wrapped__()


def made_result(bench, shape, times, name="linear-forward", **options):
    shape = bench.cases.Shape(shape, **options)
    spreads = {name: bench.timing.Spread(t, t, t) for name, t in times.items()}
    own = times["mylayers"]
    ratios = {
        name: bench.timing.Spread(t / own, t / own, t / own)
        for name, t in times.items()
        if name != "mylayers"
    }
    case = bench.measure.Case(name, shape, "float32", "cpu", 1)
    work = bench.cases.SUITES[name].layer.work(shape, ())
    return bench.measure.Result(
        case=case,
        size=math.prod(shape.sizes),
        work=work,
        limit=made_limits(bench).of(work, "float32", 0),
        rounds=7,
        remeasured=False,
        seconds=spreads,
        ratios=ratios,
        yardsticks=frozenset(ratios) & YARDSTICKS,
        timed_once=frozenset(),
        left_out={},
    )


def test_the_summary_is_of_geometric_means_and_names_the_worst_case(bench):
    results = [
        made_result(bench, (1, 2, 3), {"mylayers": 1.0, "notebook": 8.0, "linear": 4.0}),
        made_result(bench, (4, 5, 6), {"mylayers": 2.0, "notebook": 1.0}),
    ]
    suite = bench.cases.SUITES["linear-forward"]
    summary = bench.report.summarise(suite, results)
    assert summary["geometric_mean"] == pytest.approx({"notebook": 2.0, "linear": 4.0})
    assert summary["geometric_mean_best"] == pytest.approx(math.sqrt(4.0 * 0.5))
    assert summary["worst"] == 0.5
    assert summary["worst_shape"] == "4x5x6"
    assert summary["worst_peer"] == "notebook"
    line = bench.report.summary_line(summary)
    assert line == (
        "Geometric mean: best peer 1.41x, notebook 2.00x. Worst case: 0.50x notebook at 4x5x6."
    )


def test_the_summary_of_networks_names_the_stock_network(bench):
    times = {"mylayers": 1.0, "stock": 8.0, "compile": 4.0}
    results = [made_result(bench, (1, 2, 3, 4), times, "networks-forward", activation="tanh")]
    summary = bench.report.summarise(bench.cases.SUITES["networks-forward"], results)
    assert bench.report.summary_line(summary) == (
        "Geometric mean: best peer 4.00x, stock 8.00x. Worst case: 4.00x compile at 1x2x3x4 tanh."
    )


def test_the_share_of_the_peak_is_that_of_large_products_of_many_rows(bench):
    # At 1 GFLOP/s: 16.4 ms at least for the first two, of which only the first has rows enough.
    results = [
        made_result(bench, (64, 1000, 128), {"mylayers": 2 * 16.384e-3, "notebook": 1.0}),
        made_result(bench, (63, 1000, 130), {"mylayers": 1.0, "notebook": 1.0}),
        made_result(bench, (64, 64, 64), {"mylayers": 1.0, "notebook": 1.0}),
    ]
    suite, limits = bench.cases.SUITES["linear-forward"], {1: made_limits(bench)}
    summary = bench.report.summarise(suite, results, limits)
    assert summary["share_of_peak"] == summary["least_share_of_peak"] == pytest.approx(0.5)
    assert "large products: 50%" in bench.report.summary_line(summary)
    assert bench.report.summarise(suite, results[1:], limits)["share_of_peak"] is None


@pytest.mark.parametrize(
    ("name", "shape", "options", "longest"),
    [
        ("linear-forward", (1_000_000, 64, 64), {}, "max-autotune"),
        ("networks-forward", (4096, *[1024] * 9), {"activation": "tanh"}, "reduce-overhead"),
    ],
)
def test_the_table_fits_its_width_with_every_peer_and_the_largest_figures(
    bench, name, shape, options, longest
):
    suite = bench.cases.SUITES[name]
    times = dict.fromkeys(suite.candidates, 0.123456) | {longest: 0.12}
    results = [made_result(bench, shape, times, name, **options)]
    console = Console(width=bench.main.WIDTH, file=io.StringIO(), legacy_windows=False)
    console.print(bench.report.table(suite, results))
    lines = console.file.getvalue().splitlines()
    assert all(name in lines[2] for name in suite.candidates)
    (row,) = [line for line in lines if str(results[0].case.shape) in line]
    assert row.split().count("1.00x") == len(suite.candidates) - 2
    assert "…" not in row


def rows_of(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run_of(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.usefixtures("tiny_suites")
def test_a_run_writes_what_it_is_and_a_row_for_each_candidate(bench, tmp_path, capsys, monkeypatch):
    def without_calls(threads):
        nothing = {"calls": {"+ allocation": 1e-15}, "nodes": {1: 1e-15}}
        return dataclasses.replace(made_limits(bench, threads), **nothing)

    monkeypatch.setattr(bench.limits, "measure", without_calls)
    out = tmp_path / "new" / "folder"
    suites, dtypes, threads = SUITES[::3], ("float32", "bfloat16"), (1, 2)
    arguments = ["--quick", "--only", *suites, "--dtype", *dtypes, "--out", str(out)]
    arguments += ["--threads", *map(str, threads)]
    assert bench.main.main(arguments) == 0

    rows = rows_of(out)
    measured = {(row["suite"], row["dtype"], int(row["threads"])) for row in rows}
    assert measured == {(s, d, t) for s in suites for d in dtypes for t in threads}
    for row in rows:
        suite = bench.cases.SUITES[row["suite"]]
        assert row["shape"] == str(suite.quick[0])
        assert int(row["size"]) == suite.layer.size(suite.quick[0])
        assert row["candidate"] in suite.candidates
        assert row["yardstick"] == str(row["candidate"] in YARDSTICKS)
        limit, share = float(row["limit_seconds"]), float(row["share_of_limit"])
        assert share == pytest.approx(limit / float(row["seconds"]), rel=1e-3)
        assert row["limited_by"] in ("compute", "memory")
        assert 0 < float(row["seconds_low"]) <= float(row["seconds"]) <= float(row["seconds_high"])
        assert 0 < float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
    # Of each case's candidates one is the subject, and one of the others the best peer.
    cases = len(suites) * len(dtypes) * len(threads)
    assert sum(row["candidate"] == "mylayers" for row in rows) == cases
    assert sum(row["best_peer"] == "True" for row in rows) == cases

    document = run_of(out)
    here = bench.machine.describe("cpu")
    assert bench.record.difference(document["machine"], here) is None
    assert document["options"] == {
        "quick": True,
        "device": "cpu",
        "threads": list(threads),
        "dtype": list(dtypes),
        "only": list(suites),
        "shape": None,
    }
    assert [limits["threads"] for limits in document["limits"]] == list(threads)
    assert len((out / "run.json").read_text().splitlines()) < 60
    expected = {"run.json", "results.csv", "speedups.png", "roofline.png"}
    assert {file.name for file in out.iterdir()} == expected

    for name in ("speedups.png", "roofline.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    shown = capsys.readouterr().out
    assert shown.count("Geometric mean:") == cases
    assert "linear_act, forward without gradients: bfloat16, cpu, threads: 2" in shown
    assert "Limits of this machine" in shown


@pytest.mark.usefixtures("tiny_suites")
def test_only_the_suites_asked_for_run(bench, tmp_path):
    assert bench.main.main(["--only", "center-forward", "--out", str(tmp_path)]) == 0
    assert {row["suite"] for row in rows_of(tmp_path)} == {"center-forward"}


@pytest.mark.usefixtures("tiny_suites")
def test_a_family_of_suites_runs_and_has_its_baseline_in_the_summaries(bench, tmp_path, capsys):
    assert bench.main.main(["--only", "networks", "--out", str(tmp_path)]) == 0
    names = [name for name in SUITES if name.startswith("networks-")]
    assert list(dict.fromkeys(row["suite"] for row in rows_of(tmp_path))) == names
    assert (tmp_path / "speedups.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count(", stock ") == len(names)


@pytest.mark.parametrize(
    ("sizes", "options", "label"),
    [
        ((1, 64, 64, 64, 8), {"activation": "relu"}, "1x64x64x64x8 relu"),
        ((256, *[256] * 5), {"activation": "tanh"}, "256x256^5 tanh"),
        ((1024, 1024, 1024), {}, "1024x1024x1024"),
        ((4, 5, 6), {"dim": (0, 1)}, "4x5x6 dim=0,1"),
    ],
)
def test_a_shape_has_a_short_label(bench, sizes, options, label):
    assert str(bench.cases.Shape(sizes, **options)) == label


@pytest.mark.usefixtures("tiny_suites")
def test_only_the_shapes_asked_for_run(bench, tmp_path):
    assert bench.main.main(["--shape", "3x5x4", "7x3", "--out", str(tmp_path)]) == 0
    assert {row["shape"] for row in rows_of(tmp_path)} == {"3x5x4", "7x3 dim=0"}


@pytest.mark.usefixtures("tiny_suites")
def test_a_run_without_limits_says_why_and_has_no_roofline(bench, tmp_path, capsys, monkeypatch):
    def unavailable(threads):
        raise bench.limits.UnavailableError(f"no compiler [for {threads}]")

    monkeypatch.setattr(bench.limits, "measure", unavailable)
    arguments = ["--only", "linear-forward", "--threads", "1", "--out", str(tmp_path)]
    assert bench.main.main(arguments) == 0
    assert "No limits: no compiler [for 1]" in capsys.readouterr().out
    expected = {"run.json", "results.csv", "speedups.png"}
    assert {file.name for file in tmp_path.iterdir()} == expected
    assert run_of(tmp_path)["limits"] == []
    assert {row["share_of_limit"] for row in rows_of(tmp_path)} == {""}


@pytest.mark.usefixtures("tiny_suites")
@pytest.mark.parametrize(("check", "status"), [([], 0), (["--check"], 1)])
def test_check_fails_a_run_in_which_a_peer_is_faster(
    bench, tmp_path, capsys, monkeypatch, check, status
):
    def dawdle(x):
        time.sleep(0.001)
        return x - x.mean()

    dawdling = with_candidate(bench, "center-forward", dawdle, "mylayers")
    monkeypatch.setitem(bench.cases.SUITES, "center-forward", dawdling)
    arguments = ["--only", "center-forward", "--out", str(tmp_path), *check]
    assert bench.main.main(arguments) == status
    shown = capsys.readouterr().out
    assert ("Below 0.97x" in shown) == bool(check)
    here = bench.machine.name(bench.machine.describe("cpu"))
    verdict = r", \d+ threads?, float32: 1 of 1 cases below 0.97 of the best peer's speed"
    assert bool(re.search(f"On {re.escape(here)}{verdict}", shown)) == bool(check)
    assert {row["remeasured"] for row in rows_of(tmp_path)} == {"True"}


@pytest.mark.usefixtures("tiny_suites")
def test_check_passes_a_run_in_which_no_peer_is_faster(bench, tmp_path, capsys, monkeypatch):
    def dawdle(x):
        time.sleep(0.001)
        return x - x.mean()

    dawdling = with_candidate(bench, "center-forward", dawdle, "notebook")
    monkeypatch.setitem(bench.cases.SUITES, "center-forward", dawdling)
    arguments = ["--only", "center-forward", "--out", str(tmp_path), "--check"]
    assert bench.main.main(arguments) == 0
    assert ": none of 1 cases below 0.97 of the best peer's speed" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_suites")
def test_a_run_with_a_wrong_candidate_fails_and_writes_nothing_of_that_case(
    bench, tmp_path, capsys, monkeypatch
):
    wrong = with_candidate(bench, "center-forward", lambda x: x * 1)
    monkeypatch.setitem(bench.cases.SUITES, "center-forward", wrong)
    arguments = ["--only", "linear-forward", "center-forward", "--out", str(tmp_path)]
    assert bench.main.main(arguments) == 1
    assert "Wrong: suspect in center-forward" in capsys.readouterr().out
    assert {row["suite"] for row in rows_of(tmp_path)} == {"linear-forward"}
    assert {file.name for file in tmp_path.iterdir()} == {"run.json", "results.csv"}


# What tiny_suites does, in a process of its own, which waits in the fourth case to be killed.
WAITING_RUN = """
import dataclasses, itertools, sys, time
from benchmarks import __main__ as main, cases, limits, measure

def unavailable(threads):
    raise limits.UnavailableError("none are asked for")

def slowly(*arguments):
    if next(number) == 3:
        time.sleep(600)
    return measured(*arguments)

number = itertools.count()
measured, main.measure = measure.measure, slowly
main.SECONDS, limits.measure = 0.0, unavailable
suite = cases.SUITES["center-forward"]
two = {name: suite.candidates[name] for name in ("mylayers", "notebook")}
shapes = tuple(cases.Shape((size,)) for size in range(2, 12))
cases.SUITES["center-forward"] = dataclasses.replace(suite, candidates=two, shapes=shapes)
sys.exit(main.main())
"""


def complete_cases(folder):
    file = folder / "results.csv"
    text = file.read_text() if file.exists() else ""
    return text.count(",mylayers,") if (folder / "run.json").exists() else 0


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_keeps_its_cases_and_goes_on(bench, tmp_path, monkeypatch, sent):
    arguments = ["--only", "center-forward", "--threads", "1"]
    path = os.pathsep.join([*filter(None, sys.path), str(ROOT)])
    running = subprocess.Popen(
        [sys.executable, "-c", WAITING_RUN, *arguments, "--out", tmp_path],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "500"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with running:
        try:
            deadline = time.monotonic() + 120
            while complete_cases(tmp_path) < 2 and running.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            running.send_signal(sent)
            shown = running.communicate(timeout=60)[0]
        finally:
            running.kill()
    kept = complete_cases(tmp_path)
    assert 2 <= kept < 10, shown
    assert {file.name for file in tmp_path.iterdir()} == {"run.json", "results.csv"}
    if sent == signal.SIGKILL:
        assert running.returncode == -signal.SIGKILL
    else:
        assert running.returncode == bench.main.INTERRUPTED
        hint = f"Interrupted: {kept} of 10 cases are kept; --resume {tmp_path} goes on."
        assert hint in shown

    before = (tmp_path / "results.csv").read_bytes()
    suite = eager_suite(bench, "center-forward")
    two = {name: suite.candidates[name] for name in ("mylayers", "notebook")}
    shapes = tuple(bench.cases.Shape((size,)) for size in range(2, 12))
    tiny = dataclasses.replace(suite, candidates=two, shapes=shapes)
    monkeypatch.setitem(bench.cases.SUITES, "center-forward", tiny)
    monkeypatch.setattr(bench.main, "SECONDS", 0.0)
    assert bench.main.main(["--resume", str(tmp_path)]) == 0
    after = (tmp_path / "results.csv").read_bytes()
    assert after.startswith(before)
    assert [row["shape"] for row in rows_of(tmp_path)][::2] == list(map(str, range(2, 12)))
    assert complete_cases(tmp_path) == 10
    assert (tmp_path / "speedups.png").exists()


TWO_SUITES = ["--only", "linear-forward", "center-forward", "--threads", "1"]


@pytest.fixture
def finished(bench, tiny_suites, tmp_path):  # noqa: ARG001
    """The folder of a run of two cases, with all that it has."""
    assert bench.main.main([*TWO_SUITES, "--out", str(tmp_path)]) == 0
    return tmp_path


def forbid_measuring(bench, monkeypatch):
    monkeypatch.setattr(bench.main, "measure", lambda *_: pytest.fail("it was measured"))


@pytest.mark.parametrize("lost", [1, 2, 30, 200])
def test_a_case_that_was_torn_off_is_measured_again(bench, finished, lost, capsys):
    file = finished / "results.csv"
    whole, rows = file.read_bytes(), rows_of(finished)
    first = whole.index(b"center-forward")
    file.write_bytes(whole[:-lost])
    assert whole[:-lost].startswith(whole[:first])
    assert bench.main.main(["--resume", str(finished)]) == 0
    assert file.read_bytes().startswith(whole[:first])
    names = [(row["suite"], row["candidate"]) for row in rows]
    assert [(row["suite"], row["candidate"]) for row in rows_of(finished)] == names
    assert capsys.readouterr().out.count("Geometric mean:") == 2


@pytest.mark.parametrize("left", [0, 10])
def test_a_run_that_was_killed_before_its_first_case_goes_on(bench, finished, left):
    file = finished / "results.csv"
    file.write_bytes(file.read_bytes()[:left])
    assert bench.main.main(["--resume", str(finished)]) == 0
    assert {row["suite"] for row in rows_of(finished)} == {"linear-forward", "center-forward"}


def test_a_complete_run_is_only_shown_again_on_any_machine(bench, finished, capsys, monkeypatch):
    before = (finished / "results.csv").read_bytes()
    assert bench.main.main(["--resume", str(finished)]) == 0
    shown = capsys.readouterr().out
    picture = (finished / "speedups.png").read_bytes()
    (finished / "speedups.png").unlink()
    document = run_of(finished)
    elsewhere = document["machine"] | {"microarchitecture": "Other Cove"}
    (finished / "run.json").write_text(json.dumps(document | {"machine": elsewhere}))
    forbid_measuring(bench, monkeypatch)
    assert bench.main.main(["--resume", str(finished), *TWO_SUITES, "--check"]) in (0, 1)
    assert (finished / "results.csv").read_bytes() == before
    assert (finished / "speedups.png").read_bytes()[:8] == picture[:8]
    again = capsys.readouterr().out
    tables = slice(shown.index("linear_act"), shown.index("Limits of this machine"))
    assert shown[tables] in again
    assert "On Other Cove, 1 thread, float32: " in again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vendor": "Else"}, "vendor was Else, now is "),
        ({"commit": "0123abc"}, "commit was 0123abc, now is "),
        ({"versions": {"torch": "1.0"}}, "versions: "),
        ({"cores": 999}, "cores was 999, now is "),
    ],
)
def test_another_machine_does_not_go_on(bench, finished, capsys, monkeypatch, change, message):
    file = finished / "results.csv"
    file.write_bytes(file.read_bytes()[:-1])
    document = run_of(finished)
    document["machine"] |= change
    (finished / "run.json").write_text(json.dumps(document))
    forbid_measuring(bench, monkeypatch)
    with pytest.raises(SystemExit):
        bench.main.main(["--resume", str(finished)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--resume: the machine must be that of the run; {message}" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "quick was False, now is True"),
        (["--threads", "2"], "threads was 1, now is 2"),
        (["--dtype", "float64", "float32"], "dtype was float32, now is float64 float32"),
        (["--only", "center"], "only was linear-forward center-forward, now is center"),
        (["--shape", "7"], "shape was None, now is 7"),
    ],
)
def test_other_options_do_not_go_on(bench, finished, capsys, monkeypatch, arguments, message):
    forbid_measuring(bench, monkeypatch)
    with pytest.raises(SystemExit):
        bench.main.main(["--resume", str(finished), *arguments])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"--resume: the options must be those of the run; {message}")


def test_what_is_no_run_or_somebody_elses_is_refused(bench, finished, tmp_path_factory, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit):
            bench.main.main(list(map(str, arguments)))
        return capsys.readouterr().err.splitlines()[-1]

    empty = tmp_path_factory.mktemp("empty")
    assert "--resume: no run to go on with: " in refused("--resume", empty)
    assert "has results already; --resume goes on" in refused("--out", finished)
    assert "not allowed with argument" in refused("--out", finished, "--resume", finished)
    with contextlib.closing(bench.record.Record(finished)):
        assert "another process is at work in" in refused("--resume", finished)
    document, rows = run_of(finished), (finished / "results.csv").read_text()
    (finished / "run.json").write_text(json.dumps(document | {"limits": [{"threads": 1}]}))
    assert "run.json is not of this version" in refused("--resume", finished)
    (finished / "run.json").write_text(json.dumps(document))
    (finished / "results.csv").write_text(rows.replace("center-forward,7,", "center-forward,8,"))
    assert "has a case that is none of this run" in refused("--resume", finished)
    (finished / "results.csv").write_text(rows.replace("size", "length", 1))
    assert "results.csv is not of this version" in refused("--resume", finished)


def test_what_is_read_is_what_was_measured(bench, tmp_path):
    result = made_result(
        bench, (3, 5, 4), {"mylayers": 1.5, "notebook": 8.25, "linear": 4.0, "clone": 0.5}
    )
    spread = bench.timing.Spread(4.0, 3.0, 5.5)
    result = dataclasses.replace(
        result,
        remeasured=True,
        ratios=result.ratios | {"linear": spread},
        seconds=result.seconds | {"linear": spread},
        timed_once=frozenset(["notebook"]),
        left_out={"compile": 'ValueError: not, "on"  a Monday\r', "onnxruntime": "no"},
    )
    known = {1: made_limits(bench), 2: made_limits(bench, 2)}
    record = bench.record.Record.start(tmp_path, {"cpu": "x"}, {"quick": False}, known)
    with contextlib.closing(record):
        assert record.limits == known
        record.append(result)
        (found,) = record.results([tiny_case(bench, "center-forward"), result.case])
    left_out = {"compile": 'ValueError: not, "on" a Monday', "onnxruntime": "no"}
    limit = bench.limits.Limit(pytest.approx(result.limit.seconds, rel=1e-4), result.limit.binding)
    assert dataclasses.replace(found, limit=result.limit) == dataclasses.replace(
        result,
        left_out=left_out,
        ratios={
            name: bench.timing.Spread(*(pytest.approx(value, rel=1e-4) for value in ratio))
            for name, ratio in result.ratios.items()
        },
    )
    assert found.limit == limit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonsense"], r"--only: invalid choice: 'nonsense' .*linear-forward"),
        (["--dtype", "int8"], r"--dtype: invalid choice: 'int8' .*float32"),
        (["--device", "tpu"], r"--device: invalid choice: 'tpu' .*cuda"),
        (["--device", "cuda"], r"--device cuda: torch .* finds no GPU"),
        (["--threads", "0"], r"--threads: must be a whole number from 1; got '0'"),
        (["--threads", "two"], r"--threads: must be a whole number from 1; got 'two'"),
        (["--out", __file__], r"--out: .*test_benchmarks\.py"),
        (["--shape", "1x2"], r"--shape: no such shape in these suites: 1x2"),
    ],
)
def test_bad_arguments_are_refused_with_a_clear_message(
    bench, arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_info:
        bench.main.main(arguments)
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("name", SUITES)
def test_the_quick_shapes_are_a_proper_part_of_the_full_grid(bench, name):
    suite = bench.cases.SUITES[name]
    assert set(suite.quick) < set(suite.shapes)
    assert len(set(suite.shapes)) == len(suite.shapes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_giants_are_missing_from_the_grid_of_a_dtype(bench, dtype):
    suite = bench.cases.SUITES["linear-forward"]
    missing = set(suite.shapes) - set(suite.grid(dtype, quick=False))
    assert (not missing) == (dtype == "float32")
    assert all(math.prod(shape.sizes) >= 1 << 30 for shape in missing)


X86 = """processor	: 0
vendor_id	: {}
cpu family	: {}
model		: {}
model name	: Some: processor
stepping	: {}
flags		: fpu sse2 {}

processor	: 1
vendor_id	: Other
cpu family	: 1
"""
ARM = """processor	: 0
BogoMIPS	: 243.75
Features	: fp asimd {}
CPU implementer	: {}
CPU architecture: 8
CPU variant	: 0x3
CPU part	: {}
CPU revision	: 1
"""


@pytest.mark.parametrize(
    ("vendor", "family", "model", "stepping", "name"),
    [
        ("AuthenticAMD", 23, 1, 2, "Zen"),  # Naples
        ("AuthenticAMD", 23, 49, 0, "Zen 2"),  # Rome
        ("AuthenticAMD", 25, 1, 1, "Zen 3"),  # Milan
        ("AuthenticAMD", 25, 33, 0, "Zen 3"),  # Vermeer
        ("AuthenticAMD", 25, 17, 1, "Zen 4"),  # Genoa
        ("AuthenticAMD", 25, 97, 2, "Zen 4"),  # Raphael
        ("AuthenticAMD", 25, 160, 1, "Zen 4"),  # Bergamo
        ("AuthenticAMD", 26, 2, 1, "Zen 5"),  # Turin
        ("AuthenticAMD", 26, 68, 0, "Zen 5"),  # Granite Ridge
        ("AuthenticAMD", 26, 80, 0, "AuthenticAMD family 26 model 80 stepping 0"),
        ("AuthenticAMD", 21, 2, 0, "AuthenticAMD family 21 model 2 stepping 0"),
        ("HygonGenuine", 24, 0, 1, "Dhyana (Zen)"),
        ("GenuineIntel", 6, 63, 2, "Haswell"),
        ("GenuineIntel", 6, 79, 1, "Broadwell"),
        ("GenuineIntel", 6, 85, 4, "Skylake server"),
        ("GenuineIntel", 6, 85, 7, "Cascade Lake server"),
        ("GenuineIntel", 6, 85, 11, "Cooper Lake server"),
        ("GenuineIntel", 6, 106, 6, "Ice Lake server (Sunny Cove)"),
        ("GenuineIntel", 6, 143, 8, "Sapphire Rapids (Golden Cove)"),
        ("GenuineIntel", 6, 207, 2, "Emerald Rapids (Golden Cove)"),
        ("GenuineIntel", 6, 173, 1, "Granite Rapids (Redwood Cove)"),
        ("GenuineIntel", 6, 250, 1, "GenuineIntel family 6 model 250 stepping 1"),
        ("GenuineIntel", 15, 207, 1, "GenuineIntel family 15 model 207 stepping 1"),
    ],
)
def test_an_x86_processor_is_named_by_its_numbers(bench, vendor, family, model, stepping, name):
    cpuinfo = X86.format(vendor, family, model, stepping, "avx2 fma")
    processor = bench.machine.read_processor(cpuinfo)
    assert processor == (vendor, family, model, stepping, {"fpu", "sse2", "avx2", "fma"})
    assert bench.machine.microarchitecture(processor) == name


@pytest.mark.parametrize(
    ("implementer", "part", "name"),
    [
        ("0x41", "0xd0c", "Neoverse N1"),
        ("0x41", "0xd49", "Neoverse N2"),
        ("0x41", "0xd40", "Neoverse V1"),
        ("0x41", "0xd4f", "Neoverse V2"),
        ("0x41", "0xd42", "Cortex-A78AE"),
        ("0x6d", "0xd49", "Cobalt 100 (Neoverse N2)"),
        ("0x42", "0xd49", "0x42 family 8 model 3401 stepping 49"),
    ],
)
def test_an_arm_processor_is_named_by_its_part(bench, implementer, part, name):
    processor = bench.machine.read_processor(ARM.format("bf16", implementer, part))
    assert processor == (implementer, 8, int(part, 16), 0x31, {"fp", "asimd", "bf16"})
    assert bench.machine.microarchitecture(processor) == name


@pytest.mark.parametrize(
    ("numbers", "features", "title"),
    [
        ((207, 2), "avx2 avx512f amx_tile amx_bf16", "Emerald Rapids (Golden Cove, AMX)"),
        ((207, 2), "avx2 avx512f", "Emerald Rapids (Golden Cove, AVX-512)"),  # hidden from a guest
        ((85, 7), "avx2 avx512f", "Cascade Lake server (AVX-512)"),
        ((79, 1), "avx2", "Broadwell (AVX2)"),
        ((79, 1), "", "Broadwell"),
        ((250, 1), "avx2", "GenuineIntel family 6 model 250 stepping 1 (AVX2)"),
    ],
)
def test_a_title_has_the_widest_units_that_are_to_be_seen(bench, numbers, features, title):
    cpuinfo = X86.format("GenuineIntel", 6, *numbers, features)
    assert bench.machine.title(bench.machine.read_processor(cpuinfo)) == title


@pytest.mark.parametrize("cpuinfo", ["", "hart\t: 0\nisa\t: rv64imafdc\n", "vendor_id\t: Else\n"])
def test_a_processor_that_does_not_say_what_it_is_has_no_name(bench, cpuinfo):
    assert bench.machine.read_processor(cpuinfo) is None


def test_the_caches_are_those_that_hold_data(bench, tmp_path):
    kinds = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K")]
    for number, kind in enumerate([*kinds, ("3", "Unified", "300M")]):
        (tmp_path / f"index{number}").mkdir()
        for field, value in zip(("level", "type", "size"), kind, strict=True):
            (tmp_path / f"index{number}" / field).write_text(value + "\n")
    (tmp_path / "index4").mkdir()  # says nothing
    assert bench.machine.caches(tmp_path) == {"L1d": "48K", "L2": "2048K", "L3": "300M"}
    assert bench.machine.caches(tmp_path / "none") == {}


def test_the_commit_is_that_of_the_checkout_itself_with_changes_of_code_alone(bench, tmp_path):
    def git(*arguments):
        settings = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        ran = subprocess.run(
            ["git", "-C", tmp_path, *settings, *arguments],
            check=True,
            capture_output=True,
            text=True,
        )
        return ran.stdout.strip()

    for file in ("mylayers/code.py", "docs/page.md"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("1\n")
    assert bench.machine.commit(tmp_path) is None
    git("init", "-q")
    assert bench.machine.commit(tmp_path) is None  # nothing is committed yet
    git("add", ".")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", head)
    assert bench.machine.commit(tmp_path) == head
    assert bench.machine.commit(tmp_path / "mylayers") is None
    (tmp_path / "docs/page.md").write_text("2\n")
    (tmp_path / "benchmarks/results/now").mkdir(parents=True)
    (tmp_path / "benchmarks/results/now/results.csv").write_text("2\n")
    assert bench.machine.commit(tmp_path) == head
    (tmp_path / "mylayers/new.py").write_text("2\n")
    assert bench.machine.commit(tmp_path) == f"{head}+changes"
    (tmp_path / "mylayers/new.py").unlink()
    (tmp_path / "mylayers/code.py").write_text("2\n")
    assert bench.machine.commit(tmp_path) == f"{head}+changes"


def test_without_git_no_commit_is_known(bench, tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    assert bench.machine.commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench.machine.commit(tmp_path) is None


def test_the_machine_is_described_ready_for_json(bench):
    described = bench.machine.describe("cpu")
    assert json.loads(json.dumps(described)) == described
    assert described["microarchitecture"]
    assert described["gpu"] is None
    assert described["cores"] >= 1
    assert described["memory_gib"] > 0.1
    assert described["versions"]["torch"] == torch.__version__
    assert described["versions"]["mylayers"] == mylayers.__version__
    assert described["build"]["compiler"] == mylayers.build_info()["compiler"]
    if bench.machine.SYSTEM_CPUS.exists() and "x86" in described["system"]:
        assert isinstance(described["family"], int)
        assert isinstance(described["stepping"], int)
        assert {"L1d", "L2"} <= set(described["caches"]) or not described["caches"]


def texts(figure):
    (axes,) = figure.axes
    shown = [*axes.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    return [text.get_text() for text in shown]


def marks(figure):
    """How many places each colour of ``MARKS`` marks."""
    (axes,) = figure.axes
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label().partition(",")[0]: line.get_xydata().tolist() for line in lines}


def made_results(bench):
    results = []
    for dtype, ours in (("float32", 1.0), ("float32", 5.0), ("bfloat16", 0.5)):
        size = int(200 * ours)
        result = made_result(bench, (64, size, 100), {"mylayers": ours, "notebook": 4.0})
        results.append(
            dataclasses.replace(result, case=dataclasses.replace(result.case, dtype=dtype))
        )
    return results


def test_the_picture_of_speedups_has_a_line_at_1_and_names_the_worst_case(bench):
    figure = bench.pictures.speedups(made_results(bench), "Some Cove, torch 1")
    shape = "64x1000x100"
    worst = f"\N{WHITE CIRCLE} worst: 0.80x notebook, linear-forward {shape}, float32, threads: 1"
    assert texts(figure) == [worst, "float32, mean 1.79x", "bfloat16, mean 8.00x"]
    operations = 2 * 64 * 100 * 200
    assert marks(figure) == {
        "float32": [[operations, 4.0], [5 * operations, 0.8]],
        "bfloat16": [[operations / 2, 8.0]],
    }
    (axes,) = figure.axes
    assert [1, 1] in [list(line.get_ydata()) for line in axes.lines]
    trends = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    # Each is alone in its decade of work.
    for dtype, places in marks(figure).items():
        assert trends[f"_{dtype}"] == [pytest.approx(place) for place in places]
    assert axes.get_title(loc="left") == (
        "2 of 3 cases at least as fast as the best peer\nSome Cove, torch 1, threads: 1"
    )


def test_the_line_of_a_dtype_is_the_mean_in_each_decade_of_work(bench):
    shapes = {(64, 100, 100): 4.0, (64, 200, 100): 1.0, (1, 5, 5): 3.0}
    results = [
        made_result(bench, shape, {"mylayers": 1.0, "notebook": ratio})
        for shape, ratio in shapes.items()
    ]
    figure = bench.pictures.speedups(results, "Some Cove")
    (axes,) = figure.axes
    (trend,) = [line for line in axes.lines if line.get_label() == "_float32"]
    together = [1_280_000 * math.sqrt(2), 2.0]
    assert trend.get_xydata().tolist() == [pytest.approx([50, 3.0]), pytest.approx(together)]


def test_the_roofline_is_of_the_most_threads_and_names_what_is_farthest_from_its_limit(bench):
    results = made_results(bench)
    more = [
        dataclasses.replace(result, case=dataclasses.replace(result.case, threads=2))
        for result in results[1:]
    ]
    by_call = dataclasses.replace(more[0], limit=bench.limits.Limit(1e-6, "call"))
    limits = {1: made_limits(bench), 2: made_limits(bench, 2)}
    figure = bench.pictures.roofline([*results, *more, by_call], limits, "Some Cove")
    assert {dtype: len(places) for dtype, places in marks(figure).items()} == {
        "float32": 1,
        "bfloat16": 1,
    }
    shares = {result.case.dtype: bench.pictures._share(result) for result in more}
    assert min(shares, key=shares.get) == "float32"
    *roofs, worst, first, second = texts(figure)
    assert roofs == ["cache bandwidth", "memory bandwidth", "float32 and bfloat16 peak"]
    (axes,) = figure.axes
    half = statistics.median(shares.values())
    title = f"Half of the products reach {half:.0%} of their roof or more\nSome Cove, threads: 2"
    assert axes.get_title(loc="left") == title
    assert worst == (
        f"\N{WHITE CIRCLE} farthest from its limit: {shares['float32']:.0%} of it, "
        "linear-forward 64x1000x100, float32, threads: 2"
    )
    assert [first, second] == ["float32", "bfloat16"]
    assert bench.pictures.roofline([by_call], limits, "") is None
    assert bench.pictures.roofline([], {}, "") is None


def test_pictures_are_white_behind_and_1600_pixels_wide(bench, tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    name = "Sapphire Rapids (Golden Cove, AVX-512)"
    machine = {"gpu": None, "microarchitecture": name, "versions": {"torch": "2.13.0+cpu"}}
    shape, times = (262_144, 1024, 1024), {"mylayers": 1.0, "max-autotune": 0.5}
    longest = made_result(bench, shape, times, "linear-backward-weights")
    case = dataclasses.replace(longest.case, dtype="bfloat16")
    results = [*made_results(bench), dataclasses.replace(longest, case=case)]
    limits = {1: made_limits(bench)}
    files = bench.pictures.draw(results, limits, machine, tmp_path)
    assert [file.name for file in files] == ["speedups.png", "roofline.png"]
    for file in files:
        pixels = matplotlib_image.imread(file)
        assert pixels.shape == (900, 1600, 4)
        assert (pixels[:, :, 3] == 1).all()
        assert (pixels[:, [0, -1]] == 1).all()  # nothing is cut off at the sides


@pytest.mark.parametrize(
    ("times", "threads", "verdict"),
    [
        ((2.0, 0.98), (2, 2), "2 threads, float32: none of 2 cases"),
        ((0.5, 0.96), (1, 1), "1 thread, float32: 2 of 2 cases"),
        ((2.0, 0.96), (2, 1), "1 and 2 threads, float32: 1 of 2 cases"),
    ],
)
def test_the_verdict_is_of_the_machine_alone(bench, times, threads, verdict):
    results = []
    for peer, number in zip(times, threads, strict=True):
        result = made_result(bench, (1, 2, 3), {"mylayers": 1.0, "notebook": peer})
        case = dataclasses.replace(result.case, threads=number)
        results.append(dataclasses.replace(result, case=case))
    line = bench.report.verdict(results, "Emerald Rapids (Golden Cove, AMX)")
    assert line == (
        f"On Emerald Rapids (Golden Cove, AMX), {verdict} below 0.97 of the best peer's speed"
    )


def measured_run(bench, folder, date, results, name="Some Cove (AMX)"):
    """A run as the harness leaves it."""
    folder.mkdir()
    machine = {"microarchitecture": name, "gpu": None, "cpu": "x", "cores": 2, "load": 0.5}
    machine |= {
        "date": date,
        "caches": {"L2": "1M"},
        "memory_gib": 8.0,
        "commit": "0123456789abcdef",
    }
    machine |= {"family": 6, "model": 7, "stepping": 8, "build": {"compiler": "g++ 1"}}
    machine |= {"versions": {"torch": "2.13.0", "onnxruntime": None}}
    options = {"only": ["linear", "networks"]}
    record = bench.record.Record.start(folder, machine, options, {1: made_limits(bench)})
    with contextlib.closing(record):
        for result in results:
            record.append(result)
    return bench.publish.read(folder)


def test_a_published_run_is_read_back_as_it_was_to_four_digits(bench, tmp_path):
    times = {"mylayers": 1.23456e-5, "notebook": 2.5e-5, "clone": 1e-6}
    result = made_result(bench, (7,), times, "center-forward")
    other = made_result(bench, (64, 10, 8), {"mylayers": 1e-3, "notebook": 4e-3}, "linear-module")
    result = dataclasses.replace(result, left_out={"compile": "no"}, remeasured=True)
    run = measured_run(bench, tmp_path / "run", "2026-01-01T00:00:00", [result, other])
    (tmp_path / "kept").mkdir()
    bench.publish.write(run, tmp_path / "kept")
    kept = bench.publish.read(tmp_path / "kept")
    assert (kept.name, kept.slug, kept.threads) == ("Some Cove (AMX)", "some-cove-amx", [1])
    assert kept.runs == run.runs
    assert kept.limits == run.limits
    for before, after in zip(run.results, kept.results, strict=True):
        assert after.case == before.case
        for name in ("size", "work", "rounds", "remeasured", "yardsticks", "left_out", "best_peer"):
            assert getattr(after, name) == getattr(before, name)
        medians = [{n: s.median for n, s in r.seconds.items()} for r in (before, after)]
        assert medians[0] == medians[1]
        assert after.best_ratio == pytest.approx(before.best_ratio, rel=1e-3)
    # What was kept is kept again as it is.
    (tmp_path / "again").mkdir()
    bench.publish.write(kept, tmp_path / "again")
    for name in ("results.csv", "run.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()


def test_of_joined_runs_the_last_measurement_of_a_case_counts(bench, tmp_path):
    shape, other = (64, 10, 8), (1, 2, 3)
    old = [made_result(bench, size, {"mylayers": 1.0, "notebook": 2.0}) for size in (shape, other)]
    new = made_result(bench, shape, {"mylayers": 1.0, "notebook": 3.0})
    runs = [
        measured_run(bench, tmp_path / "new", "2026-01-02T00:00:00", [new]),
        measured_run(bench, tmp_path / "old", "2026-01-01T00:00:00", old),
    ]
    for parts in (runs, runs[::-1]):
        joined = bench.publish.join(parts)
        ratios = {result.case.shape.sizes: result.best_ratio.median for result in joined.results}
        assert ratios == {shape: 3.0, other: 2.0}
        assert [run["machine"]["date"][:10] for run in joined.runs] == ["2026-01-02", "2026-01-01"]
    elsewhere = measured_run(bench, tmp_path / "there", "2026-01-03T00:00:00", old, "Other Cove")
    with pytest.raises(bench.publish.PublishError, match="Other Cove and Some Cove"):
        bench.publish.join([*runs, elsewhere])


def test_a_section_has_the_machine_the_means_and_what_is_slow(bench, tmp_path):
    cases = [(64, 10, 8), (1, 64, 64)], ({"mylayers": 1e-6}, {"mylayers": 2e-6})
    results = [
        made_result(bench, shape, {**own, "notebook": 1.8e-6, "linear": 3e-6})
        for shape, own in zip(*cases, strict=True)
    ]
    run = measured_run(bench, tmp_path / "run", "2026-01-01T10:20:30", results)
    section = bench.publish.section(run)
    for line in (
        "## Some Cove (AMX)",
        "| run | 2026-01-01 10:20 |",
        "| its numbers | family 6, model 7, stepping 8 |",
        "| caches | L2 1M |",
        "| memory | 8.0 GiB |",
        "| ONNX Runtime | not recorded |",
        "| commit | 0123456789ab |",
        "| `linear_act`, forward without gradients | 1.27x |",
        "Of 2 cases 1 are below 1 and 1 below 0.97; all:",
        "| `linear_act`, forward without gradients | 1x64x64 | float32 | 1 "
        "| 0.90x (0.90 to 0.90) notebook |",
        "| 1x64x64 | 2.0 | 0.90x (0.90 to 0.90) | 0.90x (0.90 to 0.90) notebook |",
    ):
        assert line in section.splitlines(), line
    *_, row = bench.publish.readme_table([run]).splitlines()
    assert row == (
        "| [Some Cove (AMX)](docs/performance.md#some-cove-amx), 1 | 1.27x |  |  | 1 of 2 "
        "| 0.90x: 1x64x64, float32 |"
    )


def test_what_is_shown_of_the_suites_is_measured(bench):
    for suite, shapes in bench.publish.SHOWN.items():
        assert set(shapes) <= {str(shape) for shape in bench.cases.SUITES[suite].shapes}


def test_every_shape_is_read_as_it_is_written(bench):
    for suite in (*bench.cases.SUITES.values(), *bench.cases.GPU_SUITES.values()):
        for shape in suite.shapes:
            assert bench.cases.Shape.read(str(shape)) == shape


@pytest.mark.parametrize("quick", [False, True])
def test_the_results_folder_is_named_by_machine_and_time(bench, quick):
    described = {"microarchitecture": "Some Cove (Core, AMX)", "gpu": None, "cores": 2}
    machine = described | {"date": "2026-01-02T03:04:05+00:00"}
    expected = "some-cove-core-amx-2-cores-2026-01-02-0304" + ("-quick" if quick else "")
    assert bench.machine.folder_name(machine, quick) == expected
    on_gpu = bench.machine.folder_name(machine | {"gpu": "Big GPU"}, quick)
    assert on_gpu.startswith("big-gpu-2026")
