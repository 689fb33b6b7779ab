"""That what watches over the compiled half sees what it is there to see.

Each of .ci/sanitize, tests/fuzz.py, tests/stress.py and tests/soak.py is given a fault of the sort
that it looks for, and sound code beside it.
"""

import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
from importlib.machinery import SourceFileLoader
from pathlib import Path

import fuzz
import pytest
import soak
import stress

from mylayers import functional
from mylayers._extension import _C

ROOT = Path(__file__).resolve().parent.parent


def load():
    loader = SourceFileLoader("sanitize", str(ROOT / ".ci" / "sanitize"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("sanitize", loader))
    sys.modules["sanitize"] = module  # where dataclasses looks for it
    loader.exec_module(module)
    return module


sanitize = load()


def compiled_once(compiled):
    """What compiles the same sources by the same flags takes what it has compiled before."""
    made = {}

    def compiled_or_copied(sources, output, flags):
        key = tuple(sources), tuple(flags)
        if key not in made:
            made[key] = compiled(sources, output, flags).read_bytes()
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(made[key])
        return output

    return compiled_or_copied


sanitize.compiled = compiled_once(sanitize.compiled)


# ---- the driver ------------------------------------------------------------------------


# What the driver does with a fault and with sound code can be seen of one that costs little.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.whole] * (name != "guard"))
        for name in sanitize.SANITIZERS
    ],
)
def runner(request, tmp_path_factory):
    if shutil.which(sanitize.COMPILER[0]) is None:
        pytest.skip("no compiler")
    try:
        return sanitize.Runner(
            sanitize.SANITIZERS[request.param], tmp_path_factory.mktemp(request.param)
        )
    except SystemExit as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def faults(runner):
    flags = (*runner.sanitizer.compiler_flags, *runner.sanitizer.flags, "-fopenmp", "-std=c++20")
    return sanitize.compiled([sanitize.HERE / "faults.cpp"], runner.folder / "faults.so", flags)


def calling(library, function):
    return [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r}).{function}()"]


def test_each_fault_is_found_and_sound_code_is_not_reported(runner):
    sanitize.prove(runner)


def test_a_sanitizer_that_finds_nothing_is_refused(runner):
    without = dataclasses.replace(runner.sanitizer, flags=(), preload=(), sources=())
    blind = sanitize.Runner(without, runner.folder / "blind")
    with pytest.raises(SystemExit, match="is not found"):
        sanitize.prove(blind)


def test_a_sanitizer_that_reports_sound_code_is_refused(runner, monkeypatch):
    first = next(iter(runner.sanitizer.faults))
    loud = dataclasses.replace(runner.sanitizer, sound=(first,), faults={})
    monkeypatch.setattr(runner, "sanitizer", loud)
    with pytest.raises(SystemExit, match=r"sound code .* is reported"):
        sanitize.prove(runner)


def test_a_command_with_a_fault_fails_and_shows_what_was_found(runner, faults):
    name, expected = next(iter(runner.sanitizer.faults.items()))
    outcome = runner.run(calling(faults, name))
    assert not outcome.clean
    assert expected in str(outcome)


def test_a_fault_in_a_process_whose_end_is_ignored_is_found(runner, faults):
    if not runner.sanitizer.options:
        pytest.skip("it writes no reports")
    name, expected = next(iter(runner.sanitizer.faults.items()))
    inner = f"import subprocess; subprocess.run({calling(faults, name)!r})"
    outcome = runner.run([sys.executable, "-c", inner])
    assert (outcome.status, outcome.clean) == (0, False)
    assert any(expected in report for report in outcome.reports)


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("place", ["t.data_ptr() - 1", "t.data_ptr() + t.nbytes"])
def test_every_second_tensor_is_guarded_behind_and_the_others_in_front(place, turn, tmp_path):
    guard = sanitize.Runner(sanitize.SANITIZERS["guard"], tmp_path)
    code = (
        "import ctypes, torch\n"
        f"for t in [torch.empty(17) for _ in range(3)][{turn}:{turn + 2}]:\n"
        "    ctypes.string_at(t.data_ptr(), t.nbytes)\n"
        f"    ctypes.string_at({place}, 1)"
    )
    outcome = guard.run([sys.executable, "-c", code])
    assert outcome.status == -signal.SIGSEGV, outcome


def test_a_command_that_fails_or_does_not_end_is_not_clean(runner):
    failed = runner.run([sys.executable, "-c", "print('so be it'); raise SystemExit(3)"])
    assert (failed.status, failed.reports, failed.clean) == (3, [], False)
    assert "so be it" in str(failed)
    endless = runner.run([sys.executable, "-c", "while True: pass"], limit=1)
    assert not endless.clean


def test_too_much_memory_asked_for_is_an_exception_and_no_report(runner):
    code = (
        "import ctypes; malloc = ctypes.CDLL(None).malloc; malloc.restype = ctypes.c_void_p\n"
        "assert malloc(ctypes.c_size_t(1 << 60)) is None"
    )
    outcome = runner.run([sys.executable, "-c", code])
    assert outcome.clean, outcome


@pytest.mark.parametrize("found", [True, False], ids=["a fault", "nothing"])
def test_the_run_ends_as_its_steps_do(runner, faults, found, monkeypatch, capsys):
    name = next(n for n, s in sanitize.SANITIZERS.items() if s is runner.sanitizer)
    sound, fault = runner.sanitizer.sound[0], next(iter(runner.sanitizer.faults))
    package = runner.folder / "package" / "mylayers"
    package.mkdir(parents=True, exist_ok=True)
    package.joinpath("__init__.py").write_text("from mylayers import _C\n")
    package.joinpath("_C.py").touch()
    steps = [("one", calling(faults, sound), {}), ("two", calling(faults, fault), {})]
    monkeypatch.setattr(sanitize, "built", lambda *_: package.parent)
    monkeypatch.setattr(sanitize, "steps", lambda *_: iter(steps if found else steps[:1]))
    monkeypatch.setattr(sanitize, "ROOT", runner.folder)
    assert sanitize.sanitize(name, whole=False) is not found
    assert ("two: FAILED" in capsys.readouterr().out) == found


def test_another_library_than_the_one_that_was_built_is_refused(runner, monkeypatch):
    if not runner.sanitizer.flags:
        pytest.skip("it builds none")
    name = next(n for n, s in sanitize.SANITIZERS.items() if s is runner.sanitizer)
    package = runner.folder / "other" / "mylayers"
    package.mkdir(parents=True, exist_ok=True)
    package.joinpath("__init__.py").write_text("class _C: __file__ = '/elsewhere'\n")
    monkeypatch.setattr(sanitize, "built", lambda *_: package.parent)
    monkeypatch.setattr(sanitize, "ROOT", runner.folder)
    monkeypatch.setattr(sanitize, "prove", lambda _: None)
    with pytest.raises(SystemExit, match="not what Python imports"):
        sanitize.sanitize(name, whole=False)


def test_a_whole_run_has_1e5_cases_every_instruction_set_and_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize, "kernels_of", str)
    cases = 0
    for name in sanitize.SANITIZERS:
        steps = list(sanitize.steps(name, True, tmp_path / "last"))
        drawn = [command for step, command, _ in steps if step.startswith("fuzz")]
        cases += sum(int(command[command.index("--cases") + 1]) for command in drawn)
        for label, capability in sanitize.CAPABILITIES.items():
            environments = [e for step, _, e in steps if step.endswith(f", {label}")]
            expected = {"MYLAYERS_PRODUCTS": "own"}
            expected |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
            assert environments == [expected] * 2, (name, label)
        said = str([command for _, command, _ in steps])
        for file in ("sequential", "layers", "training", "optimization", "threads"):
            assert f"tests/test_{file}.py" in said, (name, file)
        assert "what_a_module_may_do" in said
        assert "tests/stress.py" in said
    assert cases >= 100_000


def test_kernels_that_two_settings_have_are_tested_once_and_drawn_for_twice(tmp_path):
    steps = [step for step, _, _ in sanitize.steps("guard", True, tmp_path / "last")]
    different = {sanitize.kernels_of(c) for c in sanitize.CAPABILITIES.values()}
    assert "generic" in different
    assert sum("test_linear_act" in step for step in steps) == len(different)
    assert sum(step.startswith("fuzz") for step in steps) == len(sanitize.CAPABILITIES)


@pytest.mark.parametrize(
    ("source", "whole"), [("kernels_generic.cpp", True), ("kernels_avx2.cpp", False)]
)
def test_the_slice_leaves_wide_kernels_as_they_are(source, whole):
    flags = [*sanitize.SANITIZERS["address"].flags, *sanitize.SANITIZERS["address"].compiler_flags]
    compiler = sanitize.HERE / "all_but_wide_kernels"
    command = [str(compiler), *flags, "-O3", "-c", f"csrc/cpu/kernels/{source}"]
    said = subprocess.run(
        command,
        env={**os.environ, "SANITIZED_CXX": "echo"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert [flag for flag in said if "sanitize" in flag or "asan" in flag] == [
        flag for flag in flags if whole and ("sanitize" in flag or "asan" in flag)
    ]
    assert said[-3:] == command[-3:]


# ---- drawn calls -----------------------------------------------------------------------


def test_drawn_cases_of_every_kind_are_right():
    checked = fuzz.run(200, seed=1)
    assert set(checked) == set(fuzz.CHECKS)


def off_by_a_bit(operator):
    def wrong(input, *args, **kwargs):
        output = operator(input, *args, **kwargs)
        # In one place, where the batch is not what a caller would compare with.
        if output.numel() > 40 and not output.requires_grad:
            output[(-1,) * output.dim()] += 0.01
        return output

    return wrong


@pytest.mark.parametrize("name", ["linear_act", "center"])
def test_a_wrong_value_is_found_and_its_case_is_told(name, monkeypatch, capsys):
    monkeypatch.setattr(functional, name, off_by_a_bit(getattr(functional, name)))
    with pytest.raises(AssertionError) as found:
        fuzz.run(500, seed=1)
    assert f"'kind': '{name}'" in "".join(getattr(found.value, "__notes__", [])) + (
        capsys.readouterr().out
    )


def test_a_case_can_be_checked_again_from_what_was_printed(monkeypatch, tmp_path):
    file = tmp_path / "last"
    fuzz.run(20, seed=3, last=file)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--case", file.read_text()])
    fuzz.main()


def test_seeds_draw_other_cases_and_one_seed_the_same(monkeypatch):
    seen = []
    monkeypatch.setattr(fuzz, "check", lambda case: seen.append(str(case)))
    runs = []
    for seed in (1, 1, 2):
        fuzz.run(60, seed=seed)
        runs.append(list(seen))
        seen.clear()
    assert runs[0] == runs[1] != runs[2]


# ---- several threads -------------------------------------------------------------------


def test_threads_that_find_other_values_fail():
    run = stress.Stress()
    run.output = run.output + 1
    run.run(5)
    assert any("not close" in failure for failure in run.failures)


def test_an_exception_in_a_thread_ends_the_run(monkeypatch):
    run = stress.Stress()
    begin = threading.Event()

    def refuse():
        begin.set()
        raise KeyError("a hook")

    monkeypatch.setattr(run, "hook", refuse)
    run.run(60)
    assert begin.is_set()
    assert any("KeyError" in failure for failure in run.failures)


# ---- memory ----------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from Linux")
def test_a_leak_is_seen_and_sound_calls_are_flat():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import soak, torch; from mylayers import functional\n"
        "kept, x = [], torch.randn(8)\n"
        "assert soak.growth(lambda: kept.append(bytearray(4096)), 5_000) > soak.allowed(5_000)\n"
        "assert soak.growth(lambda: functional.center(x), 20_000) <= soak.allowed(20_000)"
    )
    # A process of its own: earlier tests leave memory free in this one, which a leak fills first.
    subprocess.run([sys.executable, "-c", code, str(ROOT / "tests")], cwd="/", check=True)


def test_of_fewer_calls_less_is_allowed():
    assert soak.allowed(1_000_000) == soak.allowed(100_000) == 1 << 20
    assert soak.allowed(5_000) < 5_000 * sys.getsizeof(0)


def test_every_entry_of_the_soak_is_a_call_that_works():
    entries = soak.entries()
    assert set(soak.SLOW) <= set(entries)
    for entry in entries.values():
        entry()


def test_the_soak_calls_every_function_of_the_extension():
    found = {f for name, f in vars(_C).items() if callable(f) and name[:2] != "__"}
    functions = {f for f in found if not isinstance(f, type)}
    entries, called = soak.entries(), set()

    def seen(_frame, event, function):
        if event == "c_call" and function in functions:
            called.add(function)

    sys.setprofile(seen)
    try:
        for entry in entries.values():
            entry()
    finally:
        sys.setprofile(None)
    assert {f.__name__ for f in functions - called} == set()
