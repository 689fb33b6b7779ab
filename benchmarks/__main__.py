"""The command line of the benchmarks: ``python -m benchmarks --help``."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import limits, machine, report
from benchmarks.cases import DTYPES, FAMILIES, SUITES, names, suites
from benchmarks.measure import GRAPHED, THRESHOLD, Case, Result, VerificationError, measure

RESULTS = Path(__file__).resolve().parent / "results"
SECONDS = 0.6  # of timing for a case
QUICK_SECONDS = 0.3
WIDTH = 180  # of the tables, where no terminal tells its own


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1; got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times mylayers against what else computes its layers, each candidate "
        "verified first, and against what the machine can do.",
        epilog="Exit status: 0; 1 if a candidate computes something else than the reference, or "
        f"if --check finds a case below {THRESHOLD} of the best peer's speed; 2 for bad arguments.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer shapes, less time: within two minutes"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"fail if a case is slower than {THRESHOLD} times the best peer",
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cuda: on the current GPU, ungraphed and graphed, with shapes of its own",
    )
    parser.add_argument(
        "--threads",
        type=_count,
        nargs="+",
        default=[torch.get_num_threads()],
        help="one measurement for each number; default: %(default)s",
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    parser.add_argument(
        "--only",
        choices=[*FAMILIES, *SUITES],
        nargs="+",
        help="these suites, or all whose names begin so; default: all",
    )
    parser.add_argument(
        "--shape", nargs="+", help="only these of the shapes, such as 32x64x64; default: all"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the results; default: benchmarks/results/MACHINE-TIME"
    )
    return parser


def _cases(arguments: argparse.Namespace) -> list[Case]:
    known = suites(arguments.device)
    return [
        Case(name, shape, dtype, device, threads)
        for name in known
        if not arguments.only or names(name) & set(arguments.only)
        for dtype in dict.fromkeys(arguments.dtype)
        for threads in dict.fromkeys(arguments.threads)
        for device in ([arguments.device, GRAPHED] if arguments.device == "cuda" else ["cpu"])
        for shape in known[name].grid(dtype, arguments.quick)
        if not arguments.shape or {str(shape), str(shape).split()[0]} & set(arguments.shape)
    ]


def _limits(arguments: argparse.Namespace, console: Console) -> dict[int, limits.Limits]:
    measured = limits.measure if arguments.device == "cpu" else limits.measure_cuda
    try:
        return {threads: measured(threads) for threads in dict.fromkeys(arguments.threads)}
    except limits.UnavailableError as error:
        console.print(f"No limits: {error}", style="yellow", markup=False, soft_wrap=True)
        return {}


def _measure_all(
    cases: Sequence[Case],
    seconds: float,
    known: Mapping[int, limits.Limits],
    console: Console,
) -> list[Result]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    # It is redrawn between the cases only: a thread that redraws would disturb the timing.
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, auto_refresh=False
    ) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case), refresh=True)
            suite = suites(case.place)[case.suite]
            results.append(measure(suite, case, seconds, known.get(case.threads)))
            progress.advance(task)
        progress.update(task, description="done", refresh=True)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Args:
        argv: the command line's arguments; those of the process if None.

    Returns:
        The exit status.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU on this machine")
    measured = set().union(*map(names, suites(arguments.device)))
    if elsewhere := [name for name in arguments.only or () if name not in measured]:
        parser.error(
            f"--only: not measured with --device {arguments.device}: {' '.join(elsewhere)}"
        )
    cases = _cases(arguments)
    if not cases:
        parser.error(f"--shape: no such shape in these suites: {' '.join(arguments.shape)}")
    here = machine.describe(arguments.device)
    out = arguments.out or RESULTS / machine.folder_name(here, arguments.quick)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if here["load"] > here["cores"]:
        console.print(
            f"This machine is busy (load {here['load']:.1f}, {here['cores']} cores): where threads "
            "wait for each other, times are those of the other processes.",
            style="yellow",
            soft_wrap=True,
        )
    known = _limits(arguments, console)
    try:
        results = _measure_all(cases, QUICK_SECONDS if arguments.quick else SECONDS, known, console)
    except VerificationError as error:
        console.print(f"Wrong: {error}", style="bold red", markup=False, soft_wrap=True)
        return 1

    settings = {
        "quick": arguments.quick,
        "suites": list(dict.fromkeys(case.suite for case in cases)),
        "shapes": arguments.shape,
    }
    # Before anything is printed: an hour's figures shall survive a closed pipe.
    files = report.write(results, known, here, settings, out)

    for (name, *_), group in report.grouped(results).items():
        console.print(report.table(SUITES[name], group))
        summary = report.summarise(SUITES[name], group, known)
        console.print(report.summary_line(summary), soft_wrap=True)
        console.print()
    if known:
        console.print(report.limits_table(known))
    for line in report.left_out_lines(results):
        console.print(line, markup=False, soft_wrap=True)
    for file in files:
        console.print(file, soft_wrap=True)

    slow = report.slow(results)
    if not arguments.check:
        return 0
    if slow:
        console.print(report.slow_table(slow), style="red")
    verdict = report.verdict(results, machine.name(here))
    console.print(verdict, style="red" if slow else "green", markup=False, soft_wrap=True)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
