"""The two pictures of a run, each of which says one thing: ``speedups.png`` and ``roofline.png``.

They are read at 800 pixels, on light pages and on dark ones: their background is white.
"""

import io
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.cases import DTYPES, SUBJECT
from benchmarks.limits import Limits
from benchmarks.machine import name as machine_name
from benchmarks.measure import Result

SIZE = (8, 4.5)  # inches, so that a point of text is a seventieth of them
DPI = 200
COLORS = 64  # of a file's palette: a third of the bytes, and nobody sees it
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}
# Told apart by whoever sees few colours, and by their marks where none are printed.
MARKS = {
    "float32": ("#0072B2", "o"),
    "float64": ("#8C6BB1", "D"),
    "bfloat16": ("#D55E00", "s"),
    "float16": ("#009E73", "^"),
}
LEGEND = {"frameon": False, "handletextpad": 0.0, "columnspacing": 1.0, "fontsize": 10}
ROOFLINE_SUITES = ("linear-forward", "linear-backward")


def draw(
    results: Sequence[Result],
    limits: Mapping[int, Limits],
    machine: Mapping[str, Any],
    out: Path,
) -> list[Path]:
    """Draw them into a folder.

    Args:
        results: what was measured.
        limits: of the machine by number of threads; empty if they could not be measured. There
            is no roofline then, nor without products that they bound.
        machine: what it was measured on.
        out: an existing folder.

    Returns:
        The files.
    """
    where = f"{machine_name(machine)}, torch {machine['versions']['torch']}"
    files = []
    with mpl.rc_context(STYLE):
        figures = {
            "speedups.png": speedups(results, where),
            "roofline.png": roofline(results, limits, where),
        }
        for name, figure in figures.items():
            if figure is not None:
                _save(figure, out / name)
                files.append(out / name)
    return files


def speedups(results: Sequence[Result], where: str) -> Figure:
    """Speed-up over the best peer, over the operations of a step; the line at 1.

    A line for each dtype is the mean of its marks in each decade of work.

    Args:
        results: each of which is a mark.
        where: they were measured, for the title.
    """
    figure, axes = _figure()
    threads = _threads({result.case.threads for result in results})
    faster = sum(result.best_ratio.median >= 1 for result in results)
    title = f"{faster:,} of {len(results):,} cases at least as fast as the best peer"
    axes.set_title(f"{title}\n{where}, {threads}", loc="left")
    for dtype, (color, mark) in MARKS.items():
        group = [result for result in results if result.case.dtype == dtype]
        if group:
            ratios = [result.best_ratio.median for result in group]
            mean = statistics.geometric_mean(ratios)
            axes.plot(
                [_operations(result) for result in group],
                ratios,
                mark,
                color=color,
                markersize=4,
                markeredgewidth=0,
                alpha=0.4,
                label=f"{dtype}, mean {mean:.2f}x",
            )
            axes.plot(*_trend(group), color=color, linewidth=2.2, label=f"_{dtype}")
    axes.axhline(1, color="black", linewidth=1.2)
    worst = min(results, key=lambda result: result.best_ratio.median)
    ratio = worst.best_ratio.median
    _logarithmic(axes, "work: operations of a step", "speed-up over the best peer", base=2)
    _name(
        axes,
        (_operations(worst), ratio),
        f"worst: {ratio:.2f}x {worst.best_peer}, {_case(worst)}",
    )
    _legend(figure)
    return figure


def roofline(results: Sequence[Result], limits: Mapping[int, Limits], where: str) -> Figure | None:
    """Operations a second over operations a byte, below what the machine can do.

    Of the numbers of threads the largest alone; of the cases those of ``ROOFLINE_SUITES`` that
    arithmetic or memory bounds, not an empty call.

    Args:
        results: each of which is a mark.
        limits: the roofs, by number of threads.
        where: they were measured, for the title.
    """
    shown = [
        result
        for result in results
        if result.case.suite in ROOFLINE_SUITES
        and result.limit is not None
        and result.limit.binding != "call"
    ]
    threads = max((result.case.threads for result in shown), default=None)
    shown = [result for result in shown if result.case.threads == threads]
    if threads is None:
        return None
    known = limits[threads]
    figure, axes = _figure()
    reached = statistics.median(_share(result) for result in shown)
    title = f"Half of the products reach {reached:.0%} of their roof or more"
    axes.set_title(f"{title}\n{where}, {_threads({threads})}", loc="left")
    places = [_intensity(result) for result in shown]
    left, right = min(places) / 1.5, max(places) * 1.5
    rates: list[float] = []
    for dtype, (color, mark) in MARKS.items():
        group = [result for result in shown if result.case.dtype == dtype]
        if group:
            rates += [_rate(result) for result in group]
            axes.plot(
                [_intensity(result) for result in group],
                [_rate(result) for result in group],
                mark,
                color=color,
                markersize=5,
                markeredgewidth=0,
                alpha=0.75,
                label=dtype,
            )
    # One line for all dtypes whose products have the same units.
    peaks: dict[float, list[str]] = {}
    for dtype in MARKS:
        if any(result.case.dtype == dtype for result in shown):
            peaks.setdefault(known.peak[dtype] / 1e9, []).append(dtype)
    highest = max(peaks)
    largest = max(known.copy)
    bandwidths = {
        "cache": max(known.copy.values()) / 1e9,
        "memory": known.copy[largest] / 1e9,
    }
    for label, bandwidth in bandwidths.items():
        end = min(highest / bandwidth, right)
        axes.plot([left, end], [left * bandwidth, end * bandwidth], color="0.45", linewidth=1.2)
        axes.text(
            left * 1.05,
            left * 1.15 * bandwidth,
            f"{label} bandwidth",
            color="0.35",
            fontsize="small",
            rotation=math.degrees(math.atan(bandwidth)),  # as the line has it before scaling
            rotation_mode="anchor",
            transform_rotates_text=True,
        )
    for peak, dtypes in peaks.items():
        start = min(max(peak / bandwidths["cache"], left), right)
        axes.plot([start, right], [peak, peak], color=MARKS[dtypes[0]][0], linewidth=1.5)
        axes.annotate(
            f"{_and(dtypes)} peak",
            (right, peak),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=MARKS[dtypes[0]][0],
            fontsize="small",
        )
    _logarithmic(axes, "operations for each byte that must move", "GFLOP/s", base=10)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left, right)
    axes.set_ylim(min(rates) / 2, highest * 2)
    worst = min(shown, key=_share)
    _name(
        axes,
        (_intensity(worst), _rate(worst)),
        f"farthest from its limit: {_share(worst):.0%} of it, {_case(worst)}",
    )
    _legend(figure)
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.subplots()


def _logarithmic(axes: Axes, across: str, up: str, base: int) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log", base=base)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _save(figure: Figure, file: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    colors = Image.open(drawn).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    colors.save(file, optimize=True)


def _trend(results: Sequence[Result]) -> tuple[list[float], list[float]]:
    """Geometric means of work and speed-up in each decade of work."""
    decades = defaultdict(list)
    for result in results:
        decades[int(math.log10(_operations(result)))].append(result)
    groups = [group for _, group in sorted(decades.items())]
    return (
        [statistics.geometric_mean(map(_operations, group)) for group in groups],
        [statistics.geometric_mean(each.best_ratio.median for each in group) for group in groups],
    )


def _legend(figure: Figure) -> None:
    # Nowhere inside is sure to be empty.
    legend = figure.legend(loc="outside lower center", ncols=len(MARKS), **LEGEND)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _name(axes: Axes, point: tuple[float, float], text: str) -> None:
    """A ring around a point, and what it is at the foot of the picture."""
    axes.plot(*point, "o", color="black", fillstyle="none", markersize=10, markeredgewidth=1.3)
    low, high = axes.get_ylim()
    scale = axes.yaxis.get_transform()
    bottom, top = scale.transform([low, high])
    axes.set_ylim(scale.inverted().transform(bottom - 0.14 * (top - bottom)), high)
    text = f"\N{WHITE CIRCLE} {text}"
    axes.text(0.01, 0.04, text, transform=axes.transAxes, fontsize="small")


def _threads(numbers: Iterable[int]) -> str:
    return f"threads: {_and(map(str, sorted(numbers)))}"


def _and(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _case(result: Result) -> str:
    case = result.case
    device = "" if case.device == "cpu" else f"{case.device}, "
    return f"{case.suite} {case.shape}, {case.dtype}, {device}threads: {case.threads}"


def _operations(result: Result) -> int:
    return result.work.operations


def _intensity(result: Result) -> float:
    moved = result.work.elements * DTYPES[result.case.dtype].itemsize
    return result.work.operations / moved


def _rate(result: Result) -> float:
    return result.work.operations / result.seconds[SUBJECT].median / 1e9


def _share(result: Result) -> float:
    assert result.limit is not None
    return result.limit.seconds / result.seconds[SUBJECT].median
