"""The benchmark harness: what a run writes, how it goes on after its end, what it refuses."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from harness import (
    DTYPES,
    ROOT,
    SUITES,
    YARDSTICKS,
    eager_suite,
    made_limits,
    made_result,
    rows_of,
    run_of,
    tiny_case,
    with_candidate,
)


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
@pytest.mark.parametrize(
    ("check", "status"), [pytest.param([], 0, marks=pytest.mark.whole), (["--check"], 1)]
)
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
import dataclasses, itertools, signal, sys, time
from benchmarks import __main__ as main, cases, limits, measure

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

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


@pytest.mark.parametrize(
    "sent", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.whole)]
)
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


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    return tmp_path_factory.mktemp("run_of_two")


@pytest.fixture
def finished(bench, tiny_suites, run_of_two, tmp_path):  # noqa: ARG001
    """The folder of a run of two cases, with all that it has: a copy of one that was made once."""
    if not any(run_of_two.iterdir()):
        assert bench.main.main([*TWO_SUITES, "--out", str(run_of_two)]) == 0
    return shutil.copytree(run_of_two, tmp_path, dirs_exist_ok=True)


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
        (["--out", __file__], r"--out: .*test_benchmark_runs\.py"),
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
