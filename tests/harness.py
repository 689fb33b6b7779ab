"""The benchmark harness for its tests: tiny cases, made-up limits and results."""

import csv
import dataclasses
import json
import math
from pathlib import Path

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


def rows_of(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run_of(folder):
    return json.loads((folder / "run.json").read_text())


def made_results(bench):
    results = []
    for dtype, ours in (("float32", 1.0), ("float32", 5.0), ("bfloat16", 0.5)):
        size = int(200 * ours)
        result = made_result(bench, (64, size, 100), {"mylayers": ours, "notebook": 4.0})
        results.append(
            dataclasses.replace(result, case=dataclasses.replace(result.case, dtype=dtype))
        )
    return results
