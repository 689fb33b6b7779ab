"""On which of PyTorch's roads the layers go along, and which tests prove it.

A test marked ``@pytest.mark.road("ONNX")`` is a proof of that road. ``python -m tests.certificate``
runs the proofs and writes the table of PAGE; a run of pytest without arguments fails where a road
has no proof or the page another table than the run. Cases marked ``whole`` do not run there: they
are counted in the table, and prove nothing.
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- roads: python -m tests.certificate -->", "<!-- end of roads -->"
PAGE = ROOT / "docs" / "compatibility.md"

# What holds on each road, in the order of the table.
ROADS = {
    "autocast": "computes in autocast's dtype, eager and compiled; gradients in the parameters'",
    "gradient scaling": "`torch.amp.GradScaler` under autocast: scaled steps equal unscaled ones, "
    "and a step whose gradients overflow is left out",
    "gradient checkpointing": "both kinds and the selective one, to the same bits",
    "double backward": "gradients of three orders equal the formula's",
    "functorch": "`vmap`, `grad`, `jvp`, `jacrev`, per-sample gradients and ensembles, and "
    "forward-mode differentiation, equal the formula's",
    "torch.compile": "`fullgraph=True`, forward and backward, equal to eager",
    "torch.compile, dynamic shapes": "one compilation for every batch, where PyTorch learns by "
    "itself that it varies a second",
    "compiled autograd": "captures the backward of eager and of compiled steps",
    "torch.export": "programs of any batch, saved and loaded, to eager's bits",
    "torch.jit.trace": "records the operators; saved and loaded, to eager's bits",
    "C++ without Python": "AOTInductor's package of a network runs in a C++ program linked to "
    "`libmylayers.so`, any batch",
    "ONNX": "ONNX Runtime's results match: every activation, dtype and `dim`, any batch",
    "state_dict and pickle": "files, `weights_only`, `mmap`, `assign`, deepcopy and pickle, as "
    "stock modules",
    "meta device": "construction without memory, `to_empty`, fake tensors, symbolic sizes",
    "DistributedDataParallel": "trains to the parameters of one process, with uneven and empty "
    "shares of a batch",
    "FSDP2": "`fully_shard` trains to the parameters of one process; meta construction; "
    "checkpoints saved by two processes load in three",
    "centering over processes": "is that of one process on the whole batch, gradients of three "
    "orders and compiled; a missing peer ends in the group's timeout",
    "DTensor": "operators on even and uneven shards equal the unsharded ones, forward and backward",
    "tensor parallelism": "column- and row-wise styles train to the parameters of one process, "
    "alone and with FSDP2",
    "CUDA-free build": "compiled and run where neither torch nor the machine has CUDA",
}


# The property of a test's report that says what it proves: [roads, its file, its name].
PROVES = "proves"
# What a process of pytest-xdist's says at its end: the same of each case marked whole.
LEFT = "left to pytest -m whole"


def roads_of(item: pytest.Item) -> list[str]:
    return [mark.args[0] for mark in item.iter_markers("road")]


def name_of(item: pytest.Item) -> str:
    return getattr(item, "originalname", item.name)


class Certificate:
    """A plugin of pytest that collects each road's tests and how they ended.

    Of pytest-xdist's processes those that run the tests collect them, and the first one learns of
    them and of their ends by their reports.
    """

    def __init__(self) -> None:
        self.whole = True  # no test is left out, but those marked whole
        self.left: dict[str, list[Any]] = {}  # these: roads, file, name
        self.proofs: dict[str, dict[tuple[str, str], None]] = {road: {} for road in ROADS}
        self.roads: dict[str, list[str]] = {}  # of a case
        self.outcomes: dict[str, str] = {}
        self.faults: list[str] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        self.whole &= config.args_source is pytest.Config.ArgsSource.TESTPATHS

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            roads = roads_of(item)
            for road in roads:
                if road not in ROADS:
                    raise pytest.UsageError(
                        f"{item.nodeid}: no road {road!r} in tests/certificate.py"
                    )
            proves = [roads, item.path.name, name_of(item), self.whole]
            item.user_properties.append((PROVES, proves))

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            if item.get_closest_marker("whole"):
                self.left[item.nodeid] = [roads_of(item), item.path.name, name_of(item)]
            else:
                self.whole = False

    @pytest.hookimpl(optionalhook=True)  # pytest-xdist's
    def pytest_testnodedown(self, node: Any) -> None:
        self.left |= getattr(node, "workeroutput", {}).get(LEFT, {})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        roads, file, name, whole = dict(report.user_properties)[PROVES]
        self.whole &= whole
        self.roads[report.nodeid] = roads
        for road in roads:
            self.proofs[road][file, name] = None
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """At the end of a whole run: every road is proved, and the table is that of the run."""
        if hasattr(session.config, "workerinput"):
            session.config.workeroutput[LEFT] = self.left
            return
        if not self.whole or not self.outcomes or session.shouldstop:
            return
        for case, (roads, file, name) in self.left.items():
            self.roads[case], self.outcomes[case] = roads, "left"
            for road in roads:
                self.proofs[road][file, name] = None
        self.faults = [f"no test proves {road!r}, or one fails" for road in self.unproved()]
        if whole_numbers(written_table()) != whole_numbers(self.table()):
            self.faults.append(f"{PAGE.name}: run python -m tests.certificate and see what changed")
        if self.faults:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.faults:
            terminalreporter.section("roads", red=True)
        for fault in self.faults:
            terminalreporter.line(fault, red=True)

    def result(self, road: str) -> str:
        count = Counter(
            self.outcomes[case]
            for case, roads in self.roads.items()
            if road in roads and case in self.outcomes
        )
        parts = [f"{count['passed']} passed"]
        for other in ("skipped", "left"):
            if count[other]:
                parts.append(f"{count[other]} {other}")
        if count["failed"]:
            parts.append(f"**{count['failed']} failed**")
        return ", ".join(parts)

    def table(self) -> str:
        lines = ["| road | what holds | cases | proved by |", "|---|---|---|---|"]
        for road, holds in ROADS.items():
            files: dict[str, list[str]] = {}
            for file, name in sorted(self.proofs[road]):
                files.setdefault(file, []).append(f"`{name.removeprefix('test_')}`")
            proofs = "; ".join(f"{file}: {', '.join(names)}" for file, names in files.items())
            lines.append(f"| {road} | {holds} | {self.result(road)} | {proofs} |")
        return "\n".join(lines)

    def unproved(self) -> list[str]:
        """Roads of which no test has passed, or one has failed."""
        return [
            road
            for road in ROADS
            if self.result(road).startswith("0 ") or "failed" in self.result(road)
        ]


def written_table() -> str:
    """The page's present table."""
    _, _, rest = PAGE.read_text().partition(BEGIN)
    return rest.partition(END)[0].strip()


def whole_numbers(table: str) -> str:
    """The table with cases that could not run, or were left out, counted as those that did."""
    return re.sub(
        r"\d+ passed(, \d+ (skipped|left))+",
        lambda m: f"{sum(map(int, re.findall(r'[0-9]+', m[0])))} passed",
        table,
    )


def main() -> int:
    """Run the proofs and write the table; pytest's exit status."""
    certificate = Certificate()
    status = pytest.main(["-q", "-m", "road"], plugins=[certificate])
    text = PAGE.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{certificate.table()}\n{END}{tail}")
    print(PAGE)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
