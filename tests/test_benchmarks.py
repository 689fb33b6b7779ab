"""The benchmark harness: that what it reports was verified, and timed in turns."""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from harness import DTYPES, SUITES, YARDSTICKS, eager_suite, made_limits, tiny_case, with_candidate


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


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SUITES)
def test_every_eager_candidate_passes_verification_and_is_timed(bench, name, dtype):
    suite = eager_suite(bench, name)
    result = bench.measure.measure(suite, tiny_case(bench, name, dtype), seconds=0)
    check_timed(bench, suite, result)


# torch.compile's ways by which a suite takes minutes to set up: one of each family.
@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(name, marks=pytest.mark.whole)
            for name in ("linear-forward", "linear-backward", "linear-module", "networks-forward")
        ),
        "center-backward",
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


@pytest.mark.grid
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


@pytest.mark.whole
def test_every_obstacle_passes_verification(bench):
    suite = bench.cases.SUITES["networks-hindered"]
    assert [shape.obstacle for shape in suite.shapes] == list(bench.cases.OBSTACLES)
    for shape in suite.shapes:
        case = bench.measure.Case("networks-hindered", shape, "float32", "cpu", threads=1)
        check_timed(bench, suite, bench.measure.measure(suite, case, 0.0))


@pytest.mark.grid
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
