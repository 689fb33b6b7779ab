"""The benchmark harness: that what it reports was verified, paired and written down rightly."""

import csv
import dataclasses
import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mylayers

ROOT = Path(__file__).resolve().parent.parent
TINY = {"LINEAR": (3, 5, 4), "CENTER": (7,)}
SUITES = ("linear-forward", "linear-backward", "center-forward", "center-backward")
DTYPES = ("float32", "float64", "bfloat16", "float16")


@pytest.fixture(scope="module")
def bench():
    """The harness's modules; it is run from the repository's root, not installed."""
    sys.path.insert(0, str(ROOT))
    try:
        names = ("cases", "machine", "measure", "report", "timing", "__main__")
        return SimpleNamespace(
            **{name.strip("_"): importlib.import_module(f"benchmarks.{name}") for name in names}
        )
    finally:
        sys.path.remove(str(ROOT))


def tiny_shape(bench, suite):
    return TINY["LINEAR" if suite.layer is bench.cases.LINEAR else "CENTER"]


def tiny_case(bench, name, dtype="float32"):
    shape = tiny_shape(bench, bench.cases.SUITES[name])
    return bench.measure.Case(name, shape, dtype, "cpu", threads=1)


def with_candidate(bench, suite, function):
    layer = suite.layer
    candidates = {**layer.candidates, "suspect": bench.cases.Candidate(function)}
    return dataclasses.replace(suite, layer=dataclasses.replace(layer, candidates=candidates))


@pytest.fixture
def tiny_suites(bench, monkeypatch):
    """The suites cut down to one tiny shape, and no time spent beyond the fewest rounds."""
    for name, suite in bench.cases.SUITES.items():
        shapes = (tiny_shape(bench, suite),)
        tiny = dataclasses.replace(suite, shapes=shapes, quick=shapes)
        monkeypatch.setitem(bench.cases.SUITES, name, tiny)
    monkeypatch.setattr(bench.main, "SECONDS", 0.0)
    monkeypatch.setattr(bench.main, "QUICK_SECONDS", 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SUITES)
def test_every_candidate_passes_verification_and_is_timed(bench, name, dtype):
    suite = bench.cases.SUITES[name]
    result = bench.measure.measure(suite, tiny_case(bench, name, dtype), seconds=0)
    assert list(result.seconds) == list(suite.layer.candidates)
    assert set(result.ratios) == set(suite.layer.candidates) - {"mylayers"}
    assert result.rounds == bench.timing.LEAST_ROUNDS
    for spread in (*result.seconds.values(), *result.ratios.values()):
        assert 0 < spread.low <= spread.median <= spread.high < math.inf


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
    "none for the weight": lambda x, w, b: (x @ w.detach() + b).relu(),
    "half of the input's": lambda x, w, b: ((x / 2 + x.detach() / 2) @ w + b).relu(),
    "bias's off by 1e-5": lambda x, w, b: (x @ w + b + 1e-5 * (b - b.detach())).relu(),
}


@pytest.mark.parametrize("function", WRONG_LINEAR.values(), ids=WRONG_LINEAR)
def test_a_wrong_output_fails_verification_by_name_before_any_timing(bench, function, monkeypatch):
    suite = with_candidate(bench, bench.cases.SUITES["linear-forward"], function)
    monkeypatch.setattr(bench.measure, "take_turns", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(bench.measure.VerificationError, match=r"suspect in .*\(3, 5, 4\).* output"):
        bench.measure.measure(suite, tiny_case(bench, "linear-forward"), seconds=0)


@pytest.mark.parametrize("function", WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS)
def test_a_wrong_gradient_fails_verification(bench, function):
    suite = with_candidate(bench, bench.cases.SUITES["linear-backward"], function)
    with pytest.raises(bench.measure.VerificationError, match=r"suspect in .* gradient \d"):
        bench.measure.measure(suite, tiny_case(bench, "linear-backward"), seconds=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "function", "what"),
    [
        ("center-forward", lambda x: x * 1, "output"),
        ("center-backward", lambda x: x - x.mean().detach(), "gradient 0"),
    ],
)
def test_a_mean_that_is_not_subtracted_fails_verification(bench, name, function, what, dtype):
    suite = with_candidate(bench, bench.cases.SUITES[name], function)
    with pytest.raises(bench.measure.VerificationError, match=what):
        bench.measure.measure(suite, tiny_case(bench, name, dtype), seconds=0)


def test_the_gradient_of_a_large_float16_mean_overflows_in_no_candidate(bench):
    suite = bench.cases.SUITES["center-backward"]
    case = dataclasses.replace(tiny_case(bench, "center-backward", "float16"), shape=(1 << 17,))
    assert bench.measure.measure(suite, case, seconds=0).best_ratio.median > 0


def test_measuring_restores_threads_and_grad_mode(bench):
    before = torch.get_num_threads()
    case = dataclasses.replace(tiny_case(bench, "linear-forward"), threads=before + 1)
    seen = []

    def look(x, weight, bias):
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
        return (x @ weight + bias).relu()

    suite = with_candidate(bench, bench.cases.SUITES["linear-forward"], look)
    bench.measure.measure(suite, case, seconds=0)
    assert set(seen) == {(before + 1, False)}
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()


def test_candidates_take_turns_in_an_order_that_turns_round(bench, monkeypatch):
    monkeypatch.setattr(bench.timing, "SAMPLE_SECONDS", 0.0)  # one step a sample
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = bench.timing.take_turns(steps, 0, lambda: None)
    rounds = bench.timing.LEAST_ROUNDS
    assert "".join(calls) == "aabbcc" + ("abccba" * rounds)[: 3 * rounds]
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", rounds)


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
    samples = bench.timing.take_turns(steps, 0.1, lambda: None)
    for name, cost in costs.items():
        assert samples[name] == pytest.approx([cost] * len(samples[name]))
    # 8 short steps are the first power of two to fill 200 us; a round is then 240 us + 1 ms.
    assert len(samples["short"]) == len(samples["long"]) == math.ceil(0.1 / 1.24e-3)


def test_the_ratio_is_taken_within_a_round(bench, monkeypatch):
    # The machine is three times as slow in the second round, for both alike.
    samples = {"mylayers": [1.0, 3.0, 1.0], "notebook": [2.0, 6.0, 2.0]}
    monkeypatch.setattr(bench.measure, "take_turns", lambda *_: samples)
    suite = bench.cases.SUITES["center-forward"]
    result = bench.measure.measure(suite, tiny_case(bench, "center-forward"), seconds=0)
    assert result.ratios == {"notebook": (2.0, 2.0, 2.0)}
    assert result.seconds["mylayers"] == (1.0, 1.0, 2.0)


def made_result(bench, shape, times):
    spreads = {name: bench.timing.Spread(t, t, t) for name, t in times.items()}
    own = times["mylayers"]
    ratios = {
        name: bench.timing.Spread(t / own, t / own, t / own)
        for name, t in times.items()
        if name != "mylayers"
    }
    case = bench.measure.Case("linear-forward", shape, "float32", "cpu", 1)
    return bench.measure.Result(case, math.prod(shape), 7, spreads, ratios)


def test_the_summary_is_of_geometric_means_and_names_the_worst_case(bench):
    summary = bench.report.summarise(
        [
            made_result(bench, (1, 2, 3), {"mylayers": 1.0, "notebook": 8.0, "linear": 4.0}),
            made_result(bench, (4, 5, 6), {"mylayers": 2.0, "notebook": 1.0, "linear": 2.0}),
        ]
    )
    assert summary["geometric_mean"] == pytest.approx({"notebook": 2.0, "linear": 2.0})
    assert summary["geometric_mean_best"] == pytest.approx(math.sqrt(4.0 * 0.5))
    assert summary["worst"] == 0.5
    assert summary["worst_shape"] == (4, 5, 6)
    assert summary["worst_peer"] == "notebook"
    line = bench.report.summary_line(summary)
    assert line.endswith("best peer 1.41x. Worst case: 0.50x notebook at 4 x 5 x 6.")


@pytest.mark.usefixtures("tiny_suites")
def test_a_run_writes_csv_json_and_plot_that_agree(bench, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    dtypes, threads = ("float32", "bfloat16"), (1, 2)
    arguments = ["--quick", "--dtype", *dtypes, "--threads", *map(str, threads), "--out", str(out)]
    assert bench.main.main(arguments) == 0

    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = {(row["suite"], row["dtype"], int(row["threads"])) for row in rows}
    assert measured == {(s, d, t) for s in SUITES for d in dtypes for t in threads}
    for row in rows:
        suite = bench.cases.SUITES[row["suite"]]
        assert row["shape"] == "x".join(map(str, suite.quick[0]))
        assert int(row["size"]) == math.prod(suite.quick[0])
        assert row["candidate"] in suite.layer.candidates
        assert 0 < float(row["seconds_low"]) <= float(row["seconds"]) <= float(row["seconds_high"])
        assert 0 < float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
    # Of each case's candidates one is the subject, and one of the others the best peer.
    cases = len(SUITES) * len(dtypes) * len(threads)
    assert sum(row["candidate"] == "mylayers" for row in rows) == cases
    assert sum(row["best_peer"] == "True" for row in rows) == cases

    document = json.loads((out / "results.json").read_text())
    assert [{key: str(value) for key, value in row.items()} for row in document["results"]] == rows
    assert len(document["summaries"]) == cases
    assert document["machine"]["cpu"]
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert document["machine"]["versions"]["mylayers"] == mylayers.__version__
    assert document["settings"] == {"quick": True, "suites": list(SUITES)}

    assert (out / "ratios.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    shown = capsys.readouterr().out
    assert shown.count("Geometric mean:") == cases
    assert "MyLinear, forward without gradients: bfloat16, cpu, threads: 2" in shown


@pytest.mark.usefixtures("tiny_suites")
def test_only_the_suites_asked_for_run(bench, tmp_path):
    assert bench.main.main(["--only", "center-forward", "--out", str(tmp_path)]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        assert {row["suite"] for row in csv.DictReader(file)} == {"center-forward"}


@pytest.mark.usefixtures("tiny_suites")
def test_a_run_with_a_wrong_candidate_fails_and_writes_nothing(
    bench, tmp_path, capsys, monkeypatch
):
    wrong = with_candidate(bench, bench.cases.SUITES["center-forward"], lambda x: x * 1)
    monkeypatch.setitem(bench.cases.SUITES, "center-forward", wrong)
    assert bench.main.main(["--only", "center-forward", "--out", str(tmp_path)]) == 1
    assert "Wrong: suspect in center-forward" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("quick", [False, True])
def test_the_results_folder_is_named_by_machine_and_time(bench, quick):
    described = {"cpu": "Some(R) CPU @ 2.0GHz", "gpu": None, "cores": 2}
    machine = described | {"date": "2026-01-02T03:04:05+00:00"}
    expected = "some-r-cpu-2-0ghz-2-cores-2026-01-02-0304" + ("-quick" if quick else "")
    assert bench.machine.folder_name(machine, quick) == expected
    on_gpu = bench.machine.folder_name(machine | {"gpu": "Big GPU"}, quick)
    assert on_gpu.startswith("big-gpu-2026")
