"""What this repository keeps of runs, and the pages that show it.

``python -m benchmarks.publish RUN...`` joins the runs of one machine into a folder of ``results/``
and draws its pictures; then, as without a run, it writes docs/performance.md and README's table.
"""

import argparse
import csv
import io
import itertools
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import pictures, record, report
from benchmarks.cases import DTYPES, SUBJECT, SUITES, Shape
from benchmarks.limits import Limits
from benchmarks.measure import THRESHOLD, Case, Result
from benchmarks.timing import Spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- python -m benchmarks.publish -->", "<!-- end -->"
# What follows from the others: the work from the shape, the best peer from the seconds.
FOLLOWS = {"size", "operations", "bytes", "best_peer", "share_of_limit"}
KEPT = tuple(name for name in record.COLUMNS if name not in FOLLOWS)
OF_THE_CASE = {"remeasured", "limit_seconds", "limited_by"}  # on the subject's row alone
DIGITS = 4  # of a figure: ten times finer than quartiles differ; the seconds tell the best peer
LISTED = 12  # of the cases below 1
SHOWN = {
    "linear-forward": (
        *("2x64x8", "1x64x64", "32x64x64", "1x256x256", "128x256x256", "1x1024x1024"),
        *("1x4096x4096", "16x1024x1024", "16x4096x4096", "1024x1024x1024", "65536x64x64"),
    ),
    "linear-backward": (
        *("2x64x8", "32x64x64", "1x256x256", "128x256x256", "1x1024x1024", "16x1024x1024"),
        "1024x1024x1024",
    ),
    "center-forward": ("5", "65536", "1048576", "4194304", "16777216"),
    "center-backward": ("5", "65536", "1048576", "4194304", "16777216"),
    "networks-forward": (
        *("1x64x64x64x8 relu", "1x64x64x64x8 tanh", "32x64x64x64x8 relu", "32x64x64x64x8 tanh"),
        *("256x256^5 tanh", "4x1024^9 tanh"),
    ),
}
SHOWN["networks-training"] = SHOWN["networks-forward"]
# README's columns.
FAMILIES = {
    "`linear_act`": "linear-forward",
    "`linear_act`, forward + backward": "linear-backward",
    "`center`": "center-forward",
}


class PublishError(Exception):
    """Runs that cannot be joined; the message says why."""


@dataclass(frozen=True)
class Published:
    """One microarchitecture.

    Attributes:
        runs: machine, options and limits of each run, as its JSON has them; the last first.
        results: a case is that of the last run that has it.
    """

    runs: Sequence[Mapping[str, Any]]
    results: Sequence[Result]

    @property
    def name(self) -> str:
        """What the figures are true of."""
        return str(pictures.machine_name(self.runs[0]["machine"]))

    @property
    def slug(self) -> str:
        """Its folder, and its heading's anchor."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def limits(self) -> dict[int, Limits]:
        """Of the last run."""
        return {made["threads"]: record.limits_of(made) for made in self.runs[0]["limits"]}

    @property
    def threads(self) -> list[int]:
        """Those that it was measured with, the most first."""
        return sorted({result.case.threads for result in self.results}, reverse=True)


def read(folder: Path) -> Published:
    """A run, or what was made of several.

    Args:
        folder: with ``run.json`` and ``results.csv``, whose columns may be ``KEPT`` alone.
    """
    document = json.loads((folder / "run.json").read_text())
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = ("suite", "shape", "dtype", "device", "threads")
    results = []
    for _, group in itertools.groupby(rows, lambda row: [row[name] for name in key]):
        of_case = list(group)
        suite, shape, dtype, device, threads = (of_case[0][name] for name in key)
        case = Case(suite, Shape.read(shape), dtype, device, int(threads))
        results.append(record.result_of(case, of_case))
    return Published(document.get("runs") or [document], results)


def join(parts: Sequence[Published]) -> Published:
    """Several as one.

    Args:
        parts: of one machine; of a case that several have, the last measured is kept.

    Raises:
        PublishError: they are of different machines.
    """
    parts = sorted(parts, key=lambda part: str(part.runs[0]["machine"]["date"]), reverse=True)
    for part in parts:
        if part.name != parts[0].name:
            raise PublishError(f"runs of two machines: {parts[0].name} and {part.name}")
    places = {name: place for place, name in enumerate(SUITES)}
    kept: dict[Case, Result] = {}
    for part in reversed(parts):
        kept |= {result.case: result for result in part.results}
    ordered = sorted(kept.values(), key=lambda result: places[result.case.suite])
    return Published([run for part in parts for run in part.runs], ordered)


def write(published: Published, folder: Path) -> None:
    """Keep it.

    Args:
        published: what to keep.
        folder: an existing one; its files are replaced.
    """
    text = io.StringIO()
    table = csv.DictWriter(text, KEPT, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for result in published.results:
        for row in record.rows_of(result):
            left_out = OF_THE_CASE if row["candidate"] != SUBJECT else ()
            table.writerow({k: _kept(k, v) for k, v in row.items() if k not in left_out})
    (folder / "results.csv").write_text(text.getvalue())
    runs = "\n".join(record.lines_of({"runs": list(published.runs)}, depth=4))
    (folder / "run.json").write_text(runs + "\n")
    pictures.draw(published.results, published.limits, published.runs[0]["machine"], folder)


def published() -> list[Published]:
    """All that is kept, by name."""
    return [read(file.parent) for file in sorted(RESULTS.glob("*/run.json"))]


def readme_table(all_of_them: Sequence[Published]) -> str:
    """A row for each microarchitecture: mean speed-ups of float32, and the slowest case."""
    lines = [
        f"| processor, threads | {' | '.join(FAMILIES)} | cases below {THRESHOLD} | slowest case |",
        "|---" * (len(FAMILIES) + 3) + "|",
    ]
    for each in all_of_them:
        threads = each.threads[0]
        means = [_mean(_of(each, suite, "float32", threads)) for suite in FAMILIES.values()]
        worst = min(each.results, key=_ratio)
        below = len(report.slow(each.results))
        link = f"[{each.name}](docs/performance.md#{each.slug}), {threads}"
        lines.append(
            f"| {link} | {' | '.join(means)} | {below} of {len(each.results)} "
            f"| {worst.best_ratio.median:.2f}x: {worst.case.shape}, {worst.case.dtype} |"
        )
    return "\n".join(lines)


def section(each: Published) -> str:
    """A microarchitecture's part of docs/performance.md."""
    folder = f"../benchmarks/results/{each.slug}"
    parts = [
        f"## {each.name}",
        _table(["run", *(_date(run) for run in each.runs)], _machine_rows(each)),
        f"![Speed-up over the best peer on {each.name}]({folder}/speedups.png)",
        f"![Roofline of products on {each.name}]({folder}/roofline.png)",
        "Mean speed-up over the best peer (geometric, over all shapes), "
        + _with_threads(each)
        + ":",
        _means(each),
        _below_one(each),
        *(
            text
            for suite, shapes in SHOWN.items()
            if (text := _shapes(each, suite, shapes)) is not None
        ),
        f"All figures: [results.csv]({folder}/results.csv).",
    ]
    return "\n\n".join(part for part in parts if part)


def pages(all_of_them: Sequence[Published]) -> dict[Path, str]:
    """The files that show them, as they ought to be."""
    parts = {
        PAGE: "\n\n".join(section(each) for each in all_of_them),
        ROOT / "README.md": readme_table(all_of_them),
    }
    written = {}
    for page, text in parts.items():
        head, rest = page.read_text().split(BEGIN)
        written[page] = f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"
    return written


def _kept(name: str, value: Any) -> Any:
    if isinstance(value, float) and name != "seconds":
        return float(f"{value:.{DIGITS}g}")
    return "" if value is False else value


def _of(each: Published, suite: str, dtype: str, threads: int) -> list[Result]:
    wanted = (suite, dtype, threads)
    cases = [(result, result.case) for result in each.results]
    return [result for result, c in cases if (c.suite, c.dtype, c.threads) == wanted]


def _ratio(result: Result) -> float:
    return result.best_ratio.median


def _mean(results: Sequence[Result]) -> str:
    return _times(statistics.geometric_mean(map(_ratio, results))) if results else ""


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def _spread(spread: Spread) -> str:
    return f"{_times(spread.median)} ({spread.low:.2f} to {spread.high:.2f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _date(run: Mapping[str, Any]) -> str:
    return str(run["machine"]["date"])[:16].replace("T", " ")


def _with_threads(each: Published) -> str:
    first, *others = each.threads
    words = f"threads: {first}"
    return f"{words} ({', '.join(map(str, others))})" if others else words


def _title(suite: str) -> str:
    names = r"\b(linear_act|center|MyLinear|CenteredLayer|FusedSequential|nn\.Linear)\b"
    return re.sub(names, r"`\1`", SUITES[suite].title)


def _machine_rows(each: Published) -> list[list[str]]:
    def unknown(value: Any) -> str:
        return "not recorded" if value in (None, "", {}) else str(value)

    def row(label: str, value: Any) -> list[str]:
        return [label, *(unknown(value(run["machine"])) for run in each.runs)]

    def numbers(machine: Mapping[str, Any]) -> str | None:
        keys = ("family", "model", "stepping")
        known = [f"{key} {machine[key]}" for key in keys if machine.get(key) is not None]
        return ", ".join(known)

    def caches(machine: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {size}" for name, size in (machine.get("caches") or {}).items())

    def cases(run: Mapping[str, Any]) -> str:
        named = run["options"].get("only") or run["options"].get("suites") or SUITES
        return ", ".join(dict.fromkeys(name.partition("-")[0] for name in named))

    return [
        ["suites", *(cases(run) for run in each.runs)],
        row("processor", lambda machine: machine["cpu"]),
        row("its numbers", numbers),
        row("cores", lambda machine: machine["cores"]),
        row("caches", caches),
        row("memory", lambda m: m.get("memory_gib") and f"{m['memory_gib']} GiB"),
        row("compiler", lambda machine: machine["build"]["compiler"]),
        row("torch", lambda machine: machine["versions"]["torch"]),
        row("ONNX Runtime", lambda machine: machine["versions"]["onnxruntime"]),
        row("commit", lambda machine: (machine.get("commit") or "")[:12]),
        row("load at the start", lambda machine: f"{machine['load']:.1f}"),
    ]


def _means(each: Published) -> str:
    dtypes = [name for name in DTYPES if any(r.case.dtype == name for r in each.results)]
    rows = []
    for name in SUITES:
        cells = []
        for dtype in dtypes:
            first, *others = (_mean(_of(each, name, dtype, threads)) for threads in each.threads)
            cells.append(f"{first} ({', '.join(others)})" if first and others else first)
        if any(cells):
            rows.append([_title(name), *cells])
    return _table(["", *dtypes], rows)


def _below_one(each: Published) -> str:
    below = sorted((result for result in each.results if _ratio(result) < 1), key=_ratio)
    slow, count = len(report.slow(each.results)), len(each.results)
    if not below:
        return f"None of {count} cases is below 1."
    shown = "all" if len(below) <= LISTED else f"the slowest {LISTED}"
    head = f"Of {count} cases {len(below)} are below 1 and {slow} below {THRESHOLD}; {shown}:"
    rows = [
        [
            _title(result.case.suite),
            str(result.case.shape),
            result.case.dtype,
            str(result.case.threads),
            f"{_spread(result.best_ratio)} {result.best_peer}",
        ]
        for result in below[:LISTED]
    ]
    return head + "\n\n" + _table(["suite", "shape", "dtype", "threads", "speed-up"], rows)


def _shapes(each: Published, suite: str, shapes: Sequence[str]) -> str | None:
    found = {
        str(result.case.shape): result for result in _of(each, suite, "float32", each.threads[0])
    }
    baseline = SUITES[suite].baseline
    rows = []
    for shape in shapes:
        if (result := found.get(shape)) is not None:
            rows.append(
                [
                    shape,
                    report.microseconds(result.seconds[SUBJECT].median),
                    _spread(result.ratios[baseline]),
                    f"{_spread(result.best_ratio)} {result.best_peer}",
                ]
            )
    if not rows:
        return None
    title = f"{_title(suite)}, float32, threads: {each.threads[0]}:"
    return (
        title
        + "\n\n"
        + _table(
            ["shape", "µs a step", f"speed-up over {baseline}", "speed-up over the best peer"], rows
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of one machine")
    folders = parser.parse_args(arguments).runs
    if folders:
        try:
            joined = join([read(folder) for folder in folders])
        except (OSError, PublishError) as error:
            parser.error(str(error))
        folder = RESULTS / joined.slug
        folder.mkdir(exist_ok=True)
        write(joined, folder)
        print(folder)
    for page, text in pages(published()).items():
        page.write_text(text)
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
