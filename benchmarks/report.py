"""Results for people: tables and summaries."""

import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.cases import DTYPES, LINEAR, SUBJECT, Suite
from benchmarks.limits import Limits
from benchmarks.measure import THRESHOLD, Result
from benchmarks.timing import Spread

Group = tuple[str, str, str, int]  # suite, dtype, device, threads
LimitsByThreads = Mapping[int, Limits]

# The share of the peak is that of products large enough for the peak to be what limits them.
PEAK_OPERATIONS = 16_000_000
PEAK_ROWS = 64


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
            microseconds(result.seconds[SUBJECT].median),
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


def microseconds(seconds: float) -> str:
    """A time in microseconds, for tables."""
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
    return f"{mark}{microseconds(seconds)} {_times(ratio):>5}"


def _share_of_limit(result: Result, candidate: str) -> float | None:
    if result.limit is None:
        return None
    return result.limit.seconds / result.seconds[candidate].median
