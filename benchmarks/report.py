"""Results for people and for programs: tables, a summary, CSV, JSON and a plot."""

import csv
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.cases import SUBJECT, Suite
from benchmarks.measure import Result
from benchmarks.timing import Spread

Group = tuple[str, str, str, int]  # suite, dtype, device, threads


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
    made = Table(
        title=f"{suite.title}: {case.dtype}, {case.device}, threads: {case.threads}",
        caption="µs a step, and how many times faster mylayers is (quartiles)",
    )
    made.add_column("shape")
    made.add_column(SUBJECT, justify="right")
    for peer in results[0].ratios:
        made.add_column(peer, justify="right")
    made.add_column("best peer", justify="right")
    for result in results:
        best = result.best_peer
        made.add_row(
            " x ".join(str(size) for size in result.case.shape),
            _microseconds(result.seconds[SUBJECT]),
            *(
                f"{_microseconds(result.seconds[peer])}  {ratio.median:.2f}x"
                for peer, ratio in result.ratios.items()
            ),
            f"{best} {_ratio(result.best_ratio)}",
            style="red" if result.best_ratio.median < 1 else None,
        )
    return made


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Geometric means of the ratios of one group, and its worst case."""
    worst = min(results, key=lambda result: result.best_ratio.median)
    return {
        "geometric_mean": {
            peer: statistics.geometric_mean(result.ratios[peer].median for result in results)
            for peer in results[0].ratios
        },
        "geometric_mean_best": statistics.geometric_mean(
            result.best_ratio.median for result in results
        ),
        "worst": worst.best_ratio.median,
        "worst_shape": worst.case.shape,
        "worst_peer": worst.best_peer,
    }


def summary_line(summary: Mapping[str, Any]) -> str:
    """A summary in one line."""
    means = ", ".join(f"{peer} {mean:.2f}x" for peer, mean in summary["geometric_mean"].items())
    shape = " x ".join(str(size) for size in summary["worst_shape"])
    return (
        f"Geometric mean: {means}, best peer {summary['geometric_mean_best']:.2f}x. "
        f"Worst case: {summary['worst']:.2f}x {summary['worst_peer']} at {shape}."
    )


def write(
    results: Sequence[Result],
    suites: Mapping[str, Suite],
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    out: Path,
) -> list[Path]:
    """Write ``results.csv``, ``results.json`` and ``ratios.png`` into a folder.

    Args:
        results: what was measured.
        suites: the suites they belong to, by name.
        machine: what it was measured on.
        settings: how the harness was called.
        out: an existing folder.

    Returns:
        The files.
    """
    files = [out / name for name in ("results.csv", "results.json", "ratios.png")]
    _write_csv(results, files[0])
    groups = grouped(results)
    document = {
        "machine": machine,
        "settings": settings,
        "summaries": [
            dict(zip(("suite", "dtype", "device", "threads"), key, strict=True)) | summarise(group)
            for key, group in groups.items()
        ],
        "results": list(itertools.chain.from_iterable(map(_rows, results))),
    }
    files[1].write_text(json.dumps(document, indent=1) + "\n")
    _plot(groups, suites, machine, files[2])
    return files


def _microseconds(seconds: Spread) -> str:
    value = 1e6 * seconds.median
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def _rows(result: Result) -> list[dict[str, Any]]:
    """One row for each candidate; the subject's ratio to itself is 1."""
    case, itself = result.case, Spread(1.0, 1.0, 1.0)
    rows = []
    for name, seconds in result.seconds.items():
        ratio = result.ratios.get(name, itself)
        rows.append(
            {
                "suite": case.suite,
                "dtype": case.dtype,
                "device": case.device,
                "threads": case.threads,
                "shape": "x".join(str(size) for size in case.shape),
                "size": result.size,
                "candidate": name,
                "best_peer": name == result.best_peer,
                "rounds": result.rounds,
                "seconds": seconds.median,
                "seconds_low": seconds.low,
                "seconds_high": seconds.high,
                "ratio": ratio.median,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
            }
        )
    return rows


def _write_csv(results: Sequence[Result], path: Path) -> None:
    rows = list(itertools.chain.from_iterable(map(_rows, results)))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _plot(
    groups: Mapping[Group, Sequence[Result]],
    suites: Mapping[str, Suite],
    machine: Mapping[str, Any],
    path: Path,
) -> None:
    """Ratio against size, one panel for each group."""
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(6.5 * columns, 4 * rows), layout="constrained")
    figure.suptitle(
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['versions']['torch']}"
    )
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    for panel, ((name, dtype, device, threads), results) in zip(
        panels, groups.items(), strict=False
    ):
        ordered = sorted(results, key=lambda result: result.size)
        sizes = [result.size for result in ordered]
        for peer in ordered[0].ratios:
            ratios = [result.ratios[peer] for result in ordered]
            errors = (
                [ratio.median - ratio.low for ratio in ratios],
                [ratio.high - ratio.median for ratio in ratios],
            )
            panel.errorbar(
                sizes, [ratio.median for ratio in ratios], errors, fmt="o", capsize=2, label=peer
            )
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set(
            title=f"{name}, {dtype}, {device}, threads: {threads}",
            xlabel=suites[name].layer.size_unit,
            ylabel="times faster than",
        )
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)
