"""Candidates that take turns: what slows the machine for a while slows all of them."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Step = Callable[[], object]
Clock = Callable[[Step], float]  # the seconds that something takes

SAMPLE_SECONDS = 200e-6  # a thousand times what the clock and the loop around it may err by
LEAST_ROUNDS = 7  # the fewest that quartiles mean something for
NAP_SECONDS = 0.01  # Linux counts the time of threads on other cores in steps of up to 4 ms
MOST_NAPS = 20
WARM_UP_SECONDS = 0.01


class Spread(NamedTuple):
    """The median of some values, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of two values or more."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def wall_clock(step: Step) -> float:
    """What computes on the processor's own cores."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def cuda_clock(step: Step) -> float:
    """What a GPU computes: between two events on its stream, the first on an idle device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def backward_step(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], grad_output: Tensor
) -> Callable[[], list[Tensor | None]]:
    """Forward and backward with a given gradient; gives the output and the leaves' gradients.

    The gradients are taken from the leaves, so that they are freed when the step is over. Kept
    until the candidate's next turn, they decided for all turns who may use memory that malloc has
    ready: a gradient of 64 MiB in a gap of malloc's heap, paid for once, took 6 ms, and one in
    memory that the system hands out anew 31 ms, whichever candidate had come first.
    """

    def step() -> list[Tensor | None]:
        output = forward()
        output.backward(grad_output)
        found = [output, *(leaf.grad for leaf in leaves)]
        for leaf in leaves:
            leaf.grad = None
        return found

    return step


def training_step(
    learn: Callable[[torch.optim.Optimizer], object], parameters: Sequence[Tensor]
) -> Callable[[], list[Tensor | None]]:
    """A whole step of training with SGD; gives the gradients, and takes them as above.

    SGD's rate is 0, which costs as much as another: it leaves the parameters, which the candidates
    share, as they are.
    """
    optimizer = torch.optim.SGD(parameters, lr=0.0)

    def step() -> list[Tensor | None]:
        learn(optimizer)
        found = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return found

    return step


def take_turns(
    steps: Mapping[str, Step],
    seconds: float,
    clock: Clock = wall_clock,
    restless: Collection[str] = (),
) -> dict[str, list[float]]:
    """Time some candidates in rounds, each of which measures every one of them once.

    The order turns round after each round (A B, B A, A B): none always follows the same one,
    and a steady drift of the machine's speed favours none.

    Where every step takes longer than ``WARM_UP_SECONDS``, turns begin with an untimed one: the
    memory that a step gave back is otherwise as old as a round, save where the order turns round.
    On a virtual machine whose host takes free memory back, rounds of 2 s made a step 15 times as
    slow as after itself.

    Args:
        steps: what to time, by name.
        seconds: how long to go on; at least ``LEAST_ROUNDS`` rounds are made.
        clock: of the device that computes.
        restless: the names of those with threads of their own, which spin for a while after a
            step. Between theirs and the others' turns all threads go to sleep, so that every
            turn then begins with untimed steps. That takes a while; in return samples are ten
            times as long.

    Returns:
        For each name the seconds of one step, by round.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    with _no_garbage_collection():
        least = SAMPLE_SECONDS * (10 if restless else 1)
        loops, alone = {}, {}
        for name, step in steps.items():
            loops[name], alone[name] = _loops(step, least, clock)
        slow = min(alone.values()) > WARM_UP_SECONDS
        order = list(steps)
        before = order[-1]
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < LEAST_ROUNDS or time.perf_counter() < end:
            for name in order:
                if name != before and not {name, before}.isdisjoint(restless):
                    wait_for_sleep()
                if restless:
                    warm_up(steps[name])
                elif slow:
                    clock(steps[name])  # which waits for a GPU, as warm_up does not
                before = name
                samples[name].append(sample(steps[name], loops[name], clock) / loops[name])
            order.reverse()
            rounds += 1
    return samples


def wait_for_sleep() -> None:
    """Wait until no thread of this process computes.

    OpenMP's threads spin for 10 ms after a parallel region, ONNX Runtime's for 40 ms; what runs
    beside them takes twice its time and makes them spin for longer.
    """
    for _ in range(MOST_NAPS):
        busy = time.process_time()
        time.sleep(NAP_SECONDS)
        if time.process_time() - busy < NAP_SECONDS / 10:
            break


def warm_up(step: Step) -> None:
    """Run a step untimed for a while, so that it finds the caches as it left them, clock and all.

    Whoever is timed without this beside others that had it pays for them: a first pass over a
    weight of 64 MiB took 1.5 times as long as the tenth, since much of it stays in the cache.
    """
    end = time.perf_counter() + WARM_UP_SECONDS
    while True:
        step()
        if time.perf_counter() > end:
            break


def sample(step: Step, loops: int = 1, clock: Clock = wall_clock) -> float:
    """The seconds that some steps take one after the other."""

    def all_of_them() -> None:
        for _ in range(loops):
            step()

    return clock(all_of_them)


def _loops(step: Step, least: float, clock: Clock) -> tuple[int, float]:
    """How many steps a sample takes, and the seconds of one of them.

    Finding out warms up caches, allocator and threads.
    """
    sample(step, 1, clock)
    loops = 1
    while (seconds := sample(step, loops, clock)) < least:
        loops *= 2
    return loops, seconds / loops


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
