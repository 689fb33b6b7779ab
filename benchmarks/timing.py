"""Candidates that take turns: what slows the machine for a while slows all of them."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

Step = Callable[[], object]

SAMPLE_SECONDS = 200e-6  # a thousand times what the clock and the loop around it may err by
LEAST_ROUNDS = 7  # the fewest that quartiles mean something for


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


def take_turns(
    steps: Mapping[str, Step], seconds: float, synchronize: Callable[[], None]
) -> dict[str, list[float]]:
    """Time some candidates in rounds, each of which measures every one of them once.

    The order turns round after each round (A B, B A, A B): none always follows the same one,
    and a steady drift of the machine's speed favours none.

    Args:
        steps: what to time, by name.
        seconds: how long to go on; at least ``LEAST_ROUNDS`` rounds are made.
        synchronize: waits until the device has done what it was given.

    Returns:
        For each name the seconds of one step, by round.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    with _no_garbage_collection():
        loops = {name: _loops(step, synchronize) for name, step in steps.items()}
        order = list(steps)
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < LEAST_ROUNDS or time.perf_counter() < end:
            for name in order:
                samples[name].append(_sample(steps[name], loops[name], synchronize) / loops[name])
            order.reverse()
            rounds += 1
    return samples


def _sample(step: Step, loops: int, synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(loops):
        step()
    synchronize()
    return time.perf_counter() - start


def _loops(step: Step, synchronize: Callable[[], None]) -> int:
    """How many steps a sample takes; finding out warms up caches, allocator and threads."""
    _sample(step, 1, synchronize)
    loops = 1
    while _sample(step, loops, synchronize) < SAMPLE_SECONDS:
        loops *= 2
    return loops


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
