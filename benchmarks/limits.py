"""What no implementation can beat on this machine, measured in the same run.

Three things take time whatever is computed: the arithmetic, at the rate of the cores' multiply-add
units; the bytes that must move, at the rate of a copy of that many; and a call that does nothing.
The largest of them is the limit of a case. ``limits.cpp`` has what Python cannot measure.
"""

import contextlib
import fcntl
import functools
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.timing import Spread, Step, backward_step, cuda_clock, take_turns

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "benchmarks"

PEAK_SECONDS = 0.05  # of one run of a multiply-add loop
PEAK_RUNS = 5
CALL_SECONDS = 0.5
COPY_SECONDS = 0.5
COPY_BYTES = [1 << n for n in range(12, 28)]  # read and written

# Which units multiply what. float16 is widened first: there are processors with units for it,
# but these kernels use none.
UNITS = {
    "float32": ("float32",),
    "float64": ("float64",),
    "bfloat16": ("AMX bfloat16", "AVX-512 bfloat16", "float32"),
    "float16": ("float32",),
}


class UnavailableError(Exception):
    """The limits could not be measured; the message says why."""


class Work(NamedTuple):
    """The least that a step must do.

    Attributes:
        operations: additions and multiplications.
        elements: read from memory and written to it.
    """

    operations: int
    elements: int


class Limit(NamedTuple):
    """The least time that a step may take.

    Attributes:
        seconds: it takes at least.
        binding: what it cannot go below: "compute", "memory" or "call".
    """

    seconds: float
    binding: str


@dataclass(frozen=True)
class Limits:
    """What bounds a step on a number of threads.

    Attributes:
        threads: that share the work.
        peak: operations a second, by dtype.
        units: the same, by the kind of unit that was tried.
        copy: bytes read and written a second, by how many they are.
        calls: seconds of calls that compute nothing, each with one more step than the one before.
        nodes: seconds of forward and backward through an empty node, by number of gradients.
    """

    threads: int
    peak: dict[str, float]
    units: dict[str, float]
    copy: dict[int, float]
    calls: dict[str, float]
    nodes: dict[int, float]
    least_call: str = "+ allocation"  # the one of calls that no forward can do without

    def of(self, work: Work, dtype: str, gradients: int) -> Limit:
        """The limit of a step.

        Args:
            work: what it must do.
            dtype: of its elements.
            gradients: how many it computes; 0 for a forward without any.
        """
        moved = work.elements * getattr(torch, dtype).itemsize
        bounds = {
            "compute": work.operations / self.peak[dtype],
            "memory": moved / self.bandwidth(moved),
            # A node of more gradients than were measured costs no less.
            "call": self.nodes[min(gradients, max(self.nodes))]
            if gradients
            else self.calls[self.least_call],
        }
        binding = max(bounds, key=bounds.__getitem__)
        return Limit(bounds[binding], binding)

    def bandwidth(self, moved: int) -> float:
        """Bytes a second where so many are moved: the best that as many or more reach.

        Fewer bytes lie in no slower cache; where they are copied more slowly, it is the call
        that takes the time.
        """
        larger = [rate for size, rate in self.copy.items() if size >= moved]
        return max(larger, default=self.copy[max(self.copy)])


ENTRY, DISPATCHER, ALLOCATION = "pybind11 entry", "+ dispatcher", "+ allocation"
AUTOGRAD, MODULE = "+ autograd key", "nn.Module.__call__"


def measure(threads: int) -> Limits:
    """Measure the limits of this machine.

    Args:
        threads: as many as may work at once.

    Returns:
        Rates and times.

    Raises:
        UnavailableError: no compiler, or none that works.
    """
    library = _library()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        units = dict(library.peaks(threads, PEAK_SECONDS, PEAK_RUNS))
        return Limits(
            threads=threads,
            peak={
                dtype: max(units.get(name, 0) for name in names) for dtype, names in UNITS.items()
            },
            units=units,
            copy=_copy_rates(),
            calls=_calls(library),
            nodes=_nodes(library),
        )
    finally:
        torch.set_num_threads(before)


GPU_COPY_BYTES = [1 << n for n in range(16, 34)]
GPU_PRODUCT = 8192  # rows and columns of the product that is the peak
GPU_SECONDS = 0.05  # for each of its limits
KERNEL = "kernel in a graph"


def measure_cuda(threads: int) -> Limits:
    """Measure the limits of the current GPU: its largest product, its copies, an empty kernel.

    Args:
        threads: of the processor; they change nothing here.
    """
    peak = {}
    for dtype in UNITS:
        size = GPU_PRODUCT
        a, b = (torch.randn(size, size, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
        peak[dtype] = 2 * size**3 / _best_on_gpu(functools.partial(torch.mm, a, b))
        del a, b
    copy = {}
    for moved in GPU_COPY_BYTES:
        source = torch.ones(moved // 2, device="cuda", dtype=torch.uint8)
        copy[moved] = moved / _best_on_gpu(
            functools.partial(torch.empty_like(source).copy_, source)
        )
        del source
    kernel = _kernel_seconds()
    return Limits(
        threads=threads,
        peak=peak,
        units={f"{dtype} product": rate for dtype, rate in peak.items()},
        copy=copy,
        calls={KERNEL: kernel},
        nodes=dict.fromkeys((1, 2, 3), 2 * kernel),  # forward, and backward
        least_call=KERNEL,
    )


def _best_on_gpu(step: Step) -> float:
    return min(take_turns({"": step}, GPU_SECONDS, cuda_clock)[""])


def _kernel_seconds(count: int = 100) -> float:
    """Of one of many in a graph, the least that a kernel can take."""
    value = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            value.add_(1)
    return _best_on_gpu(graph.replay) / count


@functools.cache
def _library() -> ModuleType:
    # Each torch and Python has a folder of its own: what was built with one crashes in another.
    folder = BUILD / f"limits-torch{torch.__version__}-python{platform.python_version()}"
    try:
        from torch.utils import cpp_extension

        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            return cpp_extension.load(
                "mylayers_limits",
                [str(HERE / "limits.cpp")],
                extra_cflags=["-O3", "-march=native"],
                build_directory=str(folder),
            )
    except (ImportError, OSError, RuntimeError) as error:
        # A failed build's message is pages of commands and their output.
        lines = str(error).splitlines()
        telling = (line for line in lines if " error: " in line or line.endswith("not found"))
        raise UnavailableError(next(telling, lines[0])) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time builds there; a lock that a killed one left behind is dropped."""
    with (folder / "building").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)  # cpp_extension's, which nothing else would free
        yield


def _copy_rates() -> dict[int, float]:
    steps: dict[str, Step] = {}
    for size in COPY_BYTES:
        source = torch.ones(size // 2 // 4)
        steps[str(size)] = functools.partial(torch.empty_like(source).copy_, source)
    samples = take_turns(steps, COPY_SECONDS)
    return {size: size / min(samples[str(size)]) for size in COPY_BYTES}


class _Empty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _small_arguments() -> list[Tensor]:
    return [torch.ones(2, 64), torch.ones(64, 8), torch.ones(8)]


def _calls(library: ModuleType) -> dict[str, float]:
    arguments: list[Any] = [*_small_arguments(), "relu"]
    functions = {
        ENTRY: library.entry,
        DISPATCHER: library.dispatched,
        ALLOCATION: library.allocated,
        AUTOGRAD: library.differentiable,
    }
    steps: dict[str, Step] = {
        name: functools.partial(function, *arguments) for name, function in functions.items()
    }
    steps[MODULE] = functools.partial(_Empty(), arguments[0])
    with torch.no_grad():
        return _medians(steps)


def _nodes(library: ModuleType) -> dict[int, float]:
    steps: dict[str, Step] = {}
    for gradients in (1, 2, 3):
        arguments = _small_arguments()
        leaves = [argument.requires_grad_() for argument in arguments[:gradients]]
        forward = functools.partial(library.differentiable, *arguments, "relu")
        steps[str(gradients)] = backward_step(forward, leaves, torch.ones(2, 8))
    with torch.enable_grad():
        return {int(name): seconds for name, seconds in _medians(steps).items()}


def _medians(steps: dict[str, Step]) -> dict[str, float]:
    samples = take_turns(steps, CALL_SECONDS)
    return {name: Spread.of(values).median for name, values in samples.items()}
