"""The command line of the benchmarks: ``python -m benchmarks --help``."""

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import limits, machine, pictures, report
from benchmarks.cases import DTYPES, FAMILIES, SUITES, names, suites
from benchmarks.measure import GRAPHED, THRESHOLD, Case, VerificationError, measure
from benchmarks.record import Record, RecordError, difference

RUNS = Path(__file__).resolve().parent / "runs"
SECONDS = 0.6  # of timing for a case
QUICK_SECONDS = 0.3
WIDTH = 200  # of the tables, where no terminal tells its own
INTERRUPTED = 130  # the exit status that shells expect after Ctrl-C


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
        f"if --check finds a case below {THRESHOLD} of the best peer's speed; 2 for bad arguments; "
        f"{INTERRUPTED} after Ctrl-C. Each case is written as it ends, and --resume goes on.",
        # What is not given is not set: a run that is gone on with has its own.
        argument_default=argparse.SUPPRESS,
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
        help="cuda: on the current GPU, ungraphed and graphed, with shapes of its own",
    )
    parser.add_argument(
        "--threads",
        type=_count,
        nargs="+",
        help=f"one measurement for each number; default: {torch.get_num_threads()}",
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", help="default: float32")
    parser.add_argument(
        "--only",
        choices=[*FAMILIES, *SUITES],
        nargs="+",
        help="these suites, or all whose names begin so; default: all",
    )
    parser.add_argument(
        "--shape", nargs="+", help="only these of the shapes, such as 32x64x64; default: all"
    )
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument(
        "--out", type=Path, help="folder for the results; default: benchmarks/runs/MACHINE-TIME"
    )
    folder.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="measure what is missing there, on the same machine, with the options of that run; "
        "of a run that is complete, only print the tables and draw the pictures",
    )
    return parser


def _options(given: Mapping[str, Any], before: Record | None) -> argparse.Namespace:
    """The options that decide what is measured."""
    options = {
        "quick": False,
        "device": "cpu",
        "threads": [torch.get_num_threads()],
        "dtype": ["float32"],
        "only": None,
        "shape": None,
    }
    if before is not None:
        options |= before.options
    return argparse.Namespace(**options | given)


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


def _limits(options: argparse.Namespace, console: Console) -> dict[int, limits.Limits]:
    measured = limits.measure if options.device == "cpu" else limits.measure_cuda
    try:
        return {threads: measured(threads) for threads in dict.fromkeys(options.threads)}
    except limits.UnavailableError as error:
        console.print(f"No limits: {error}", style="yellow", markup=False, soft_wrap=True)
        return {}


def _measure_all(
    cases: Sequence[Case], done: int, seconds: float, record: Record, console: Console
) -> None:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # It is redrawn between the cases only: a thread that redraws would disturb the timing.
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, auto_refresh=False
    ) as progress:
        task = progress.add_task("", total=done + len(cases), completed=done)
        for case in cases:
            progress.update(task, description=str(case), refresh=True)
            suite = suites(case.place)[case.suite]
            record.append(measure(suite, case, seconds, record.limits.get(case.threads)))
            progress.advance(task)
        progress.update(task, description="done", refresh=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Args:
        argv: the command line's arguments; those of the process if None.

    Returns:
        The exit status.
    """
    parser = _parser()
    given = vars(parser.parse_args(argv))
    check, out, resumed = (given.pop(name, None) for name in ("check", "out", "resume"))
    with contextlib.ExitStack() as opened:
        record = None
        if resumed is not None:
            try:
                record = opened.enter_context(contextlib.closing(Record(resumed)))
            except RecordError as error:
                parser.error(f"--resume: {error}")
        options = _options(given, record)
        if record and (differs := difference(record.options, vars(options))):
            parser.error(f"--resume: the options must be those of the run; {differs}")
        cases = _checked_cases(options, parser)
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        here = machine.describe(options.device)
        try:
            done = {result.case for result in record.results(cases)} if record else set()
        except RecordError as error:
            parser.error(f"--resume: {error}")
        missing = [case for case in cases if case not in done]
        if record and missing and (differs := difference(record.machine, here)):
            parser.error(f"--resume: the machine must be that of the run; {differs}")
        if missing and here["load"] > here["cores"]:
            console.print(
                f"This machine is busy (load {here['load']:.1f}, {here['cores']} cores): where "
                "threads wait for each other, times are those of the other processes.",
                style="yellow",
                soft_wrap=True,
            )
        if record is None:
            out = out or RUNS / machine.folder_name(here, options.quick)
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                parser.error(f"--out: {error}")
            if (out / "results.csv").exists():
                parser.error(f"--out: {out} has results already; --resume goes on with a run")
            record = Record.start(out, here, vars(options), _limits(options, console))
            opened.enter_context(contextlib.closing(record))
        return _run(cases, missing, bool(check), record, console)


def _checked_cases(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    """What the options ask for, if there is any and this machine can measure it."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU on this machine")
    measured = set().union(*map(names, suites(options.device)))
    if elsewhere := [name for name in options.only or () if name not in measured]:
        parser.error(f"--only: not measured with --device {options.device}: {' '.join(elsewhere)}")
    cases = _cases(options)
    if not cases:
        parser.error(f"--shape: no such shape in these suites: {' '.join(options.shape)}")
    return cases


def _run(
    cases: Sequence[Case],
    missing: Sequence[Case],
    check: bool,
    record: Record,
    console: Console,
) -> int:
    """Measure what is missing, then show, draw and judge everything; gives the exit status."""
    seconds = QUICK_SECONDS if record.options["quick"] else SECONDS
    try:
        _measure_all(missing, len(cases) - len(missing), seconds, record, console)
    except VerificationError as error:
        console.print(f"Wrong: {error}", style="bold red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        kept = f"{len(record.results(cases))} of {len(cases)} cases are kept"
        console.print(
            f"Interrupted: {kept}; --resume {record.folder} goes on.",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return INTERRUPTED

    results = record.results(cases)
    # Before anything is printed: the pictures shall survive a closed pipe.
    files = pictures.draw(results, record.limits, record.machine, record.folder)
    for (name, *_), group in report.grouped(results).items():
        console.print(report.table(SUITES[name], group))
        summary = report.summarise(SUITES[name], group, record.limits)
        console.print(report.summary_line(summary), soft_wrap=True)
        console.print()
    if record.limits:
        console.print(report.limits_table(record.limits))
    for line in report.left_out_lines(results):
        console.print(line, markup=False, soft_wrap=True)
    for file in (record.folder / "results.csv", *files):
        console.print(file, soft_wrap=True)

    if not check:
        return 0
    slow = report.slow(results)
    if slow:
        console.print(report.slow_table(slow), style="red")
    verdict = report.verdict(results, machine.name(record.machine))
    console.print(verdict, style="red" if slow else "green", markup=False, soft_wrap=True)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
