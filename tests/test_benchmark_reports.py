"""The benchmark harness: limits, summaries, names of machines, pictures and pages."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shlex
import statistics
import struct
import subprocess

import pytest
import torch
from harness import DTYPES, ROOT, made_limits, made_result, made_results
from rich.console import Console

import mylayers


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


@pytest.mark.whole  # compiles
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
