"""Results for people: tables, summaries and pictures."""

import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from benchmarks.cases import DTYPES, LINEAR, SUBJECT, SUITES, Suite
from benchmarks.limits import Limits
from benchmarks.machine import name as machine_name
from benchmarks.measure import THRESHOLD, Result
from benchmarks.timing import Spread

Group = tuple[str, str, str, int]  # suite, dtype, device, threads
LimitsByThreads = Mapping[int, Limits]

# The share of the peak is that of products large enough for the peak to be what limits them.
PEAK_OPERATIONS = 16_000_000
PEAK_ROWS = 64

ROOFLINE_SUITES = {"linear-forward": "o", "linear-backward": "^"}  # and their marks


def grouped(results: Sequence[Result]) -> dict[Group, list[Result]]:
    """The results of each table, in the order they were measured in."""
    groups: dict[Group, list[Result]] = {}
    for result in results:
        case = result.case
        groups.setdefault((case.suite, case.dtype, case.device, case.threads), []).append(result)
    return groups


def table(suite: Suite, results: Sequence[Result]) -> Table:
    """Times and ratios of one group of results."""
    case = results[0].case
    peers = [name for name in suite.candidates if any(name in r.ratios for r in results)]
    made = Table(
        title=f"{suite.title}: {case.dtype}, {case.device}, threads: {case.threads}",
        caption="µs a step, and how many times faster mylayers is (quartiles); ~ one step only",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    made.add_column("shape", no_wrap=True)
    for name in (SUBJECT, *peers, "best peer", "limit"):
        made.add_column(name, justify="right", no_wrap=True)
    for result in results:
        ratio = result.best_ratio.median
        made.add_row(
            str(result.case.shape),
            _microseconds(result.seconds[SUBJECT].median),
            *(_against(result, peer) for peer in peers),
            f"{result.best_peer} {_ratio(result.best_ratio)}",
            "-" if result.limit is None else f"{_share_of_limit(result, SUBJECT):.0%}",
            style="red" if ratio < THRESHOLD else "yellow" if ratio < 1 else None,
        )
    return made


def slow(results: Sequence[Result]) -> list[Result]:
    """The entries below ``THRESHOLD`` of the best peer's speed, the slowest first."""
    below = [result for result in results if result.best_ratio.median < THRESHOLD]
    return sorted(below, key=lambda result: result.best_ratio.median)


def verdict(results: Sequence[Result], machine_name: str) -> str:
    """What ``--check`` found, in one line that claims nothing of any other machine.

    Args:
        results: all that was measured.
        machine_name: what it was measured on.
    """
    cases = [result.case for result in results]
    threads = [str(each) for each in sorted({case.threads for case in cases})]
    dtypes = [dtype for dtype in DTYPES if any(case.dtype == dtype for case in cases)]
    noun = "thread" if threads == ["1"] else "threads"
    found = len(slow(results)) or "none"
    return (
        f"On {machine_name}, {_and(threads)} {noun}, {_and(dtypes)}: {found} of {len(cases)} cases "
        f"below {THRESHOLD} of the best peer's speed"
    )


def _and(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def slow_table(results: Sequence[Result]) -> Table:
    """The entries that ``--check`` fails for."""
    made = Table("case", "best peer", title=f"Below {THRESHOLD}x of the best peer's speed")
    for result in results:
        made.add_row(str(result.case), f"{result.best_peer} {_ratio(result.best_ratio)}")
    return made


def limits_table(limits: LimitsByThreads) -> Table:
    """What bounds any implementation on this machine, by number of threads."""
    made = Table(title="Limits of this machine", box=box.SIMPLE_HEAD)
    made.add_column("")
    for threads in limits:
        made.add_column(f"threads: {threads}", justify="right")
    columns = list(limits.values())

    def add(label: str, unit: str, values: list[float]) -> None:
        made.add_row(label, *(f"{value:,.{0 if value >= 100 else 2}f} {unit}" for value in values))

    for unit in columns[0].units:
        rates = [column.units[unit] / 1e9 for column in columns]
        add(f"multiply-adds, {unit} units", "GFLOP/s", rates)
    for size in list(columns[0].copy)[4::4]:
        rates = [column.bandwidth(size) / 1e9 for column in columns]
        add(f"copy, {size >> 10:,} KiB read and written", "GB/s", rates)
    for name in columns[0].calls:
        add(f"empty call: {name}", "µs", [1e6 * column.calls[name] for column in columns])
    for gradients in columns[0].nodes:
        times = [1e6 * column.nodes[gradients] for column in columns]
        add(f"empty node, gradients: {gradients}", "µs", times)
    return made


def left_out_lines(results: Sequence[Result]) -> list[str]:
    """Which peers are missing in how many cases, and why."""
    reasons = Counter(itertools.chain.from_iterable(r.left_out.items() for r in results))
    return [
        f"{name} is left out of {cases} of {len(results)} cases: {reason}"
        for (name, reason), cases in reasons.items()
    ]


def summarise(
    suite: Suite, results: Sequence[Result], limits: LimitsByThreads | None = None
) -> dict[str, Any]:
    """Geometric means of the ratios of one group, its worst case, its share of the peak."""
    worst = min(results, key=lambda result: result.best_ratio.median)
    ratios: dict[str, list[float]] = {}
    for result in results:
        for name, ratio in result.ratios.items():
            ratios.setdefault(name, []).append(ratio.median)
    peaks = [
        result.work.operations
        / result.seconds[SUBJECT].median
        / limits[result.case.threads].peak[result.case.dtype]
        for result in results
        if limits
        and suite.layer is LINEAR
        and result.work.operations >= PEAK_OPERATIONS
        and result.case.shape.sizes[0] >= PEAK_ROWS
    ]
    return {
        "geometric_mean": {name: statistics.geometric_mean(r) for name, r in ratios.items()},
        "baseline": suite.baseline,
        "geometric_mean_best": statistics.geometric_mean(r.best_ratio.median for r in results),
        "worst": worst.best_ratio.median,
        "worst_shape": str(worst.case.shape),
        "worst_peer": worst.best_peer,
        "share_of_peak": statistics.geometric_mean(peaks) if peaks else None,
        "least_share_of_peak": min(peaks, default=None),
    }


def summary_line(summary: Mapping[str, Any]) -> str:
    """A summary in one line."""
    baseline = summary["baseline"]
    line = (
        f"Geometric mean: best peer {_times(summary['geometric_mean_best'])}, "
        f"{baseline} {_times(summary['geometric_mean'][baseline])}. Worst case: "
        f"{summary['worst']:.2f}x {summary['worst_peer']} at {summary['worst_shape']}."
    )
    if summary["share_of_peak"] is not None:
        line += (
            f" Share of the multiply-add peak, large products: {summary['share_of_peak']:.0%}, "
            f"the least {summary['least_share_of_peak']:.0%}."
        )
    return line


def draw(
    results: Sequence[Result],
    limits: LimitsByThreads,
    machine: Mapping[str, Any],
    out: Path,
) -> list[Path]:
    """Draw ``ratios.png`` and ``roofline.png`` into a folder.

    Args:
        results: what was measured.
        limits: of the machine; empty if they could not be measured. There is no roofline then,
            nor without large linear suites.
        machine: what it was measured on.
        out: an existing folder.

    Returns:
        The files.
    """
    title = (
        f"{machine_name(machine)}, {machine['cores']} cores, torch {machine['versions']['torch']}"
    )
    figures = {
        "ratios.png": _ratios_figure(grouped(results), title),
        "roofline.png": _roofline_figure(results, limits, title),
    }
    files = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(out / name, dpi=110)
            files.append(out / name)
    return files


def _microseconds(seconds: float) -> str:
    value = 1e6 * seconds
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x" if ratio < 100 else f"{ratio:.0f}x"


def _ratio(ratio: Spread) -> str:
    return f"{_times(ratio.median)} {ratio.low:.2f}-{ratio.high:.2f}"


def _against(result: Result, peer: str) -> str:
    if peer not in result.ratios:
        return "-"
    mark = "~" if peer in result.timed_once else ""
    seconds, ratio = result.seconds[peer].median, result.ratios[peer].median
    return f"{mark}{_microseconds(seconds)} {_times(ratio):>5}"


def _share_of_limit(result: Result, candidate: str) -> float | None:
    if result.limit is None:
        return None
    return result.limit.seconds / result.seconds[candidate].median


def _bytes(result: Result) -> int:
    return result.work.elements * DTYPES[result.case.dtype].itemsize


def _ratios_figure(groups: Mapping[Group, Sequence[Result]], title: str) -> Figure:
    """Ratio against size: a row for each suite, a column for each dtype and number of threads.

    A single dtype and number of threads has its suites side by side instead.
    """
    settings = len({key[1:] for key in groups})
    by_suite = sorted(groups, key=lambda key: list(SUITES).index(key[0]))
    columns = settings if settings > 1 else min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 2.7 * rows + 0.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    explained: set[str] = set()
    for panel, key in zip(panels, by_suite, strict=False):
        _ratio_panel(panel, key, sorted(groups[key], key=lambda result: result.size))
        if SUITES[key[0]].baseline not in explained:
            explained.add(SUITES[key[0]].baseline)
            panel.legend(fontsize="small")
    return figure


def _ratio_panel(panel: Axes, key: Group, results: Sequence[Result]) -> None:
    name, dtype, device, threads = key
    for color, peer in (("C0", SUITES[name].baseline), ("C2", "compile")):
        timed = [result for result in results if peer in result.ratios]
        ratios = [result.ratios[peer].median for result in timed]
        # Rings, since one of them is often the best peer.
        settings = {"color": color, "label": peer, "markersize": 6, "fillstyle": "none"}
        panel.plot([result.size for result in timed], ratios, "o", **settings)
    best = [result.best_ratio for result in results]
    spans = [(r.median - r.low, r.high - r.median) for r in best]
    panel.errorbar(
        [result.size for result in results],
        [ratio.median for ratio in best],
        list(zip(*spans, strict=True)),
        fmt="o",
        color="C3",
        markersize=4,
        capsize=2,
        label="best peer",
    )
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_title(f"{name}\n{dtype}, {device}, threads: {threads}", fontsize="small")
    panel.set_xlabel(SUITES[name].layer.size_unit, fontsize="small")
    panel.set_ylabel("times faster than", fontsize="small")
    panel.tick_params(labelsize="small")
    panel.grid(alpha=0.3)


def _roofline_figure(
    results: Sequence[Result], limits: LimitsByThreads, title: str
) -> Figure | None:
    """Rate against operations a byte: a panel for each dtype, device and number of threads."""
    groups: dict[tuple[str, str, int], list[Result]] = {}
    for result in results:
        case = result.case
        if case.suite in ROOFLINE_SUITES and result.limit is not None:
            groups.setdefault((case.dtype, case.device, case.threads), []).append(result)
    if not groups:
        return None
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4.5 * columns + 0.6, 3.6 * rows + 0.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    for panel, ((dtype, device, threads), group) in zip(panels, groups.items(), strict=False):
        panel.set_title(f"{dtype}, {device}, threads: {threads}", fontsize="small")
        _roofline_panel(panel, group, limits[threads], dtype)
    panels[0].legend(fontsize="x-small")
    return figure


def _roofline_panel(panel: Axes, results: Sequence[Result], limits: Limits, dtype: str) -> None:
    def intensity(result: Result) -> float:
        return result.work.operations / _bytes(result)

    def rates(group: Sequence[Result], names: Sequence[str]) -> list[float]:
        return [
            result.work.operations / result.seconds[name].median / 1e9
            for result, name in zip(group, names, strict=True)
        ]

    peak = limits.peak[dtype] / 1e9
    most = max(map(intensity, results))
    least = min(map(intensity, results))
    for label, bandwidth, style in (
        ("copy in cache", max(limits.copy.values()) / 1e9, "--"),
        ("copy in memory", limits.copy[max(limits.copy)] / 1e9, ":"),
    ):
        ends = [least, max(most, peak / bandwidth)]
        knee = peak / bandwidth
        points = sorted({ends[0], min(max(knee, ends[0]), ends[1]), ends[1]})
        roof = [min(peak, bandwidth * point) for point in points]
        panel.plot(points, roof, style, color="black", linewidth=1, label=f"peak, {label}")
    for suite, mark in ROOFLINE_SUITES.items():
        group = [result for result in results if result.case.suite == suite]
        places = [intensity(result) for result in group]
        peers, own = [result.best_peer for result in group], [SUBJECT] * len(group)
        settings = {"marker": mark, "linestyle": "", "markersize": 4}
        peer_label, own_label = f"{suite}, best peer", f"{suite}, {SUBJECT}"
        panel.plot(places, rates(group, peers), color="C0", alpha=0.6, label=peer_label, **settings)
        panel.plot(places, rates(group, own), color="C3", label=own_label, **settings)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("operations a byte that must move", fontsize="small")
    panel.set_ylabel("GFLOP/s", fontsize="small")
    panel.tick_params(labelsize="small")
    panel.grid(alpha=0.3)
