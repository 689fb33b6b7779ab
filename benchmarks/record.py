"""What a run has measured so far: a folder that every case is added to as it ends.

``run.json`` says what the run is: machine, options, limits. ``results.csv`` has a row for each
candidate of each case. Whatever ends a run, the cases that are written stay, and it can go on.
"""

import csv
import dataclasses
import fcntl
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import DTYPES, SUBJECT, suites
from benchmarks.limits import Limit, Limits
from benchmarks.measure import Case, Result
from benchmarks.timing import Spread

DIGITS = 5  # of a figure: a hundred times what quartiles differ by
COLUMNS = (
    *("suite", "shape", "dtype", "device", "threads", "size", "operations", "bytes"),
    *("candidate", "best_peer", "yardstick", "rounds", "remeasured"),
    *("seconds", "seconds_low", "seconds_high", "ratio", "ratio_low", "ratio_high"),
    *("limit_seconds", "limited_by", "share_of_limit", "left_out"),
)
PASSING = ("date", "load")  # what a machine may change while it stays the same


class RecordError(Exception):
    """A folder cannot be written to, or is not that of such a run; the message says why."""


class Record:
    """The folder of a run.

    Attributes:
        folder: where it is.
        machine: what it was started on, as ``machine.describe`` gives it.
        options: how the harness was called, by name.
        limits: of the machine, by number of threads.
    """

    def __init__(self, folder: Path) -> None:
        """Open a run that was started there.

        Raises:
            RecordError: none was, or its files are not of this version.
        """
        self.folder = folder
        try:
            document = json.loads((folder / "run.json").read_text())
            self.machine: dict[str, Any] = document["machine"]
            self.options: dict[str, Any] = document["options"]
            self.limits = {made["threads"]: limits_of(made) for made in document["limits"]}
        except OSError as error:
            raise RecordError(f"no run to go on with: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RecordError(f"{folder / 'run.json'} is not of this version") from None
        self._file = (folder / "results.csv").open("a+", newline="")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._drop_what_is_unfinished()
        except BlockingIOError:
            self.close()
            raise RecordError(f"another process is at work in {folder}") from None
        except RecordError:
            self.close()
            raise

    @classmethod
    def start(
        cls,
        folder: Path,
        machine: Mapping[str, Any],
        options: Mapping[str, Any],
        limits: Mapping[int, Limits],
    ) -> "Record":
        """Begin a run.

        Args:
            folder: an existing one, without a run.
            machine: what it is measured on.
            options: how the harness was called.
            limits: of the machine; empty if they could not be measured.
        """
        document = {
            "machine": machine,
            "options": options,
            "limits": [_rounded(dataclasses.asdict(each)) for each in limits.values()],
        }
        (folder / "results.csv").touch(exist_ok=False)  # or it would be another run's
        # Renamed when it is complete: whoever finds it can go on.
        unfinished = folder / "run.json.new"
        unfinished.write_text("\n".join(lines_of(document)) + "\n")
        unfinished.rename(folder / "run.json")
        return cls(folder)

    def close(self) -> None:
        """Let another process write."""
        self._file.close()

    def append(self, result: Result) -> None:
        """Write the rows of a case; they are there whatever becomes of this process."""
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows_of(result))
        self._file.write(text.getvalue())
        self._file.flush()

    def results(self, cases: Sequence[Case]) -> list[Result]:
        """What was measured of some cases, in their order.

        Args:
            cases: all that the run is to measure.

        Raises:
            RecordError: another case was measured as well.
        """
        known = {_key(case): case for case in cases}
        found = {}
        self._file.seek(0)
        for key, rows in itertools.groupby(csv.DictReader(self._file), _key_of_row):
            if key not in known:
                raise RecordError(f"{self.folder} has a case that is none of this run: {key}")
            found[key] = result_of(known[key], list(rows))
        return [found[key] for key in known if key in found]

    def _drop_what_is_unfinished(self) -> None:
        """A case ends with the row of ``SUBJECT``; what follows the last of them was torn off."""
        header = ",".join(COLUMNS)
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # all but the last always are
        if whole and whole[0].strip() != header:
            raise RecordError(f"{self.folder / 'results.csv'} is not of this version")
        place = COLUMNS.index("candidate")
        rows = enumerate(csv.reader(whole))
        ends = [number for number, row in rows if row[place : place + 1] == [SUBJECT]]
        kept = whole[: ends[-1] + 1] if ends else [header + "\n"]
        if kept != lines:
            self._file.truncate(0)
            self._file.write("".join(kept))
            self._file.flush()


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first thing that differs between two machines or two sets of options, in words.

    Args:
        before: those of the run.
        now: those of the process that is to go on with it.
    """
    for name in sorted({*before, *now} - set(PASSING)):
        old, new = (json.loads(json.dumps(each.get(name))) for each in (before, now))
        if isinstance(old, dict) and isinstance(new, dict):
            inner = difference(old, new)
            if inner is not None:
                return f"{name}: {inner}"
        elif old != new:
            return f"{name} was {_words(old)}, now is {_words(new)}"
    return None


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _key(case: Case) -> tuple[str, ...]:
    return (case.suite, str(case.shape), case.dtype, case.device, str(case.threads))


def _key_of_row(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("suite", "shape", "dtype", "device", "threads"))


def rows_of(result: Result) -> Iterator[dict[str, Any]]:
    """One row for each candidate, the subject's, whose ratio to itself is 1, at the end."""
    moved = result.work.elements * DTYPES[result.case.dtype].itemsize
    shared = dataclasses.asdict(result.case) | {
        "shape": str(result.case.shape),
        "size": result.size,
        "operations": result.work.operations,
        "bytes": moved,
        "remeasured": result.remeasured,
    }
    if result.limit is not None:
        shared |= {"limit_seconds": result.limit.seconds, "limited_by": result.limit.binding}
    for name, reason in result.left_out.items():
        yield _rounded(shared | {"candidate": name, "left_out": " ".join(reason.split())})
    itself = Spread(1.0, 1.0, 1.0)
    for name in (*result.ratios, SUBJECT):
        seconds, ratio = result.seconds[name], result.ratios.get(name, itself)
        row = {
            "candidate": name,
            "best_peer": name == result.best_peer,
            "yardstick": name in result.yardsticks,
            "rounds": 1 if name in result.timed_once else result.rounds,
            **_columns("seconds", seconds),
            **_columns("ratio", ratio),
        }
        if result.limit is not None:
            row["share_of_limit"] = result.limit.seconds / seconds.median
        yield _rounded(shared | row)


def _columns(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}


def _spread(row: Mapping[str, str], name: str) -> Spread:
    return Spread(*(float(row[name + end]) for end in ("", "_low", "_high")))


def result_of(case: Case, rows: Sequence[Mapping[str, str]]) -> Result:
    """A case from its rows.

    Args:
        case: what was measured.
        rows: all of one case, the subject's at the end.
    """
    timed = [row for row in rows if not row["left_out"]]
    peers, own = timed[:-1], timed[-1]
    layer = suites(case.place)[case.suite].layer
    gradients = suites(case.place)[case.suite].gradients_at(case.shape)
    limited = own["limited_by"]
    return Result(
        case=case,
        size=layer.size(case.shape),
        work=layer.work(case.shape, gradients),
        limit=Limit(float(own["limit_seconds"]), limited) if limited else None,
        rounds=int(own["rounds"]),
        remeasured=own["remeasured"] == "True",
        seconds={row["candidate"]: _spread(row, "seconds") for row in (own, *peers)},
        ratios={row["candidate"]: _spread(row, "ratio") for row in peers},
        yardsticks=frozenset(row["candidate"] for row in peers if row["yardstick"] == "True"),
        # Turns are never as few as one.
        timed_once=frozenset(row["candidate"] for row in peers if row["rounds"] == "1"),
        left_out={row["candidate"]: row["left_out"] for row in rows if row["left_out"]},
    )


def limits_of(made: Mapping[str, Any]) -> Limits:
    """The limits of one number of threads, as a run's JSON has them."""
    numbered = {
        name: {int(key): value for key, value in made[name].items()} for name in ("copy", "nodes")
    }
    return Limits(**{**made, **numbered})


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def lines_of(value: Any, depth: int = 2, indent: str = "") -> Iterable[str]:
    """JSON whose outermost levels have a line for each entry."""
    if not depth or not isinstance(value, dict | list) or not value:
        yield json.dumps(value)
        return
    named = isinstance(value, dict)
    entries = list(value.items()) if named else [("", each) for each in value]
    yield "{" if named else "["
    for number, (name, each) in enumerate(entries, start=1):
        first, *rest = lines_of(each, depth - 1, indent + " ")
        lines = [indent + " " + (f"{json.dumps(name)}: " if named else "") + first, *rest]
        lines[-1] += "," if number < len(entries) else ""
        yield from lines
    yield indent + ("}" if named else "]")
