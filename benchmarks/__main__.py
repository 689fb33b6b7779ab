"""The command line of the benchmarks: ``python -m benchmarks --help``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import machine, report
from benchmarks.cases import DTYPES, SUITES
from benchmarks.measure import Case, Result, VerificationError, measure

RESULTS = Path(__file__).resolve().parent / "results"
SECONDS = 1.5  # of timing for a case
QUICK_SECONDS = 0.5


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1; got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times mylayers against plain PyTorch, each candidate verified first.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer shapes, less time: within two minutes"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--threads",
        type=_count,
        nargs="+",
        default=[torch.get_num_threads()],
        help="one measurement for each number; default: %(default)s",
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    parser.add_argument("--only", choices=SUITES, nargs="+", help="these suites; default: all")
    parser.add_argument(
        "--out", type=Path, help="folder for the results; default: benchmarks/results/MACHINE-TIME"
    )
    return parser


def _measure_all(cases: Sequence[Case], seconds: float, console: Console) -> list[Result]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    # It is redrawn between the cases only: a thread that redraws would disturb the timing.
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, auto_refresh=False
    ) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case), refresh=True)
            results.append(measure(SUITES[case.suite], case, seconds))
            progress.advance(task)
        progress.update(task, description="done", refresh=True)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Args:
        argv: the command line's arguments; those of the process if None.

    Returns:
        0, or 1 if a candidate computes something else than the reference.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU on this machine")
    here = machine.describe(arguments.device)
    out = arguments.out or RESULTS / machine.folder_name(here, arguments.quick)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")

    cases = [
        Case(name, shape, dtype, arguments.device, threads)
        for name in dict.fromkeys(arguments.only or SUITES)
        for dtype in dict.fromkeys(arguments.dtype)
        for threads in dict.fromkeys(arguments.threads)
        for shape in (SUITES[name].quick if arguments.quick else SUITES[name].shapes)
    ]
    # Where no terminal tells its width, the tables take what they need.
    console = Console(width=None if sys.stdout.isatty() else 140)
    if here["load"] > here["cores"]:
        console.print(
            f"This machine is busy (load {here['load']:.1f}, {here['cores']} cores): where threads "
            "wait for each other, times are those of the other processes.",
            style="yellow",
            soft_wrap=True,
        )
    try:
        results = _measure_all(cases, QUICK_SECONDS if arguments.quick else SECONDS, console)
    except VerificationError as error:
        console.print(f"Wrong: {error}", style="bold red", markup=False, soft_wrap=True)
        return 1

    for (name, *_), group in report.grouped(results).items():
        console.print(report.table(SUITES[name], group))
        console.print(report.summary_line(report.summarise(group)), soft_wrap=True)
        console.print()
    settings = {"quick": arguments.quick, "suites": list(dict.fromkeys(c.suite for c in cases))}
    for file in report.write(results, SUITES, here, settings, out):
        console.print(file, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
