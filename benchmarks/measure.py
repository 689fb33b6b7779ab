"""One case: every candidate is verified against ``mylayers.reference``, then all are timed."""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

from benchmarks.cases import DTYPES, SUBJECT, Candidate, Shape, Suite, rounding
from benchmarks.limits import Limit, Limits, Work
from benchmarks.timing import (
    Clock,
    Spread,
    Step,
    backward_step,
    cuda_clock,
    sample,
    take_turns,
    training_step,
    wall_clock,
)

THRESHOLD = 0.97  # of the fastest peer's speed: below it, ours is slower
TOO_SLOW = 20  # times slower than ours is not worth its time,
AFFORDABLE_SECONDS = 0.05  # unless a step takes no longer than this
ONCE_SECONDS = 1.0  # after a step of more, no second one tells how long it takes

GRAPHED = "cuda, graphed"  # as a device: its steps are captured once, then replayed
MOST_BUFFERS = 64


class VerificationError(Exception):
    """A candidate does not compute what the reference computes."""


@dataclass(frozen=True)
class Case:
    """What one row of a table measures."""

    suite: str
    shape: Shape
    dtype: str
    device: str
    threads: int

    @property
    def place(self) -> str:
        """The device as PyTorch names it."""
        return self.device.partition(",")[0]

    def __str__(self) -> str:
        """For the progress bar and for messages."""
        return f"{self.suite} {self.shape} {self.dtype}, {self.device}, threads: {self.threads}"


@dataclass(frozen=True)
class Result:
    """What came out of a case.

    Attributes:
        case: what was measured.
        size: how large it is, in the unit of its layer.
        work: the least that a step must do.
        limit: the least time that it may take on this machine; None if that is not known.
        rounds: how often each candidate was timed in turns.
        remeasured: whether these are figures of a second, longer measurement, the first one
            having been below ``THRESHOLD``.
        seconds: of one step, by candidate.
        ratios: by peer or yardstick, how many times faster than it ``mylayers`` is: the spread
            of the ratio within a round, where both ran one after the other.
        yardsticks: those of the ratios that are to no peer.
        timed_once: peers too slow to take turns: their figures are those of a single step.
        left_out: by peer that cannot compute this, why.
    """

    case: Case
    size: int
    work: Work
    limit: Limit | None
    rounds: int
    remeasured: bool
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    yardsticks: frozenset[str]
    timed_once: frozenset[str]
    left_out: dict[str, str]

    @property
    def best_peer(self) -> str:
        """The fastest candidate beside ``mylayers``."""
        peers = [name for name in self.ratios if name not in self.yardsticks]
        return min(peers, key=lambda name: self.seconds[name].median)

    @property
    def best_ratio(self) -> Spread:
        """The ratio to the fastest peer."""
        return self.ratios[self.best_peer]


class Problem:
    """The arguments of a case, the gradient or target that comes in, and what must come out."""

    def __init__(self, suite: Suite, case: Case) -> None:
        dtype = DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(zlib.crc32(str(case.shape).encode()))

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(case.place, dtype)

        self.dtype = dtype
        self.gradients = suite.gradients_at(case.shape)
        self.options = case.shape.options
        self.arguments = [place(drawn) for drawn in suite.layer.draw(case.shape, generator)]
        self.grad_output: Tensor | None = None
        self.target: Tensor | None = None
        output_terms, *gradient_terms = suite.layer.terms(case.shape)
        terms = [output_terms, *(gradient_terms[position] for position in self.gradients)]
        stages = suite.layer.stages(case.shape)
        self.allowed = [stages * rounding(dtype, each) for each in terms]

        exact = [
            argument.to(torch.float64, copy=True).requires_grad_(position in self.gradients)
            for position, argument in enumerate(self.arguments)
        ]
        output = suite.layer.define(*exact, dtype=dtype, **self.options)
        self.expected = [output.detach()]
        if self.gradients:
            # Away from a mean of 0, which would hide a gradient that is not centered; not so far
            # that a sum of it overflows float16, since the notebook's formula forms one.
            mean = min(1, torch.finfo(dtype).max / (4 * output.numel()))
            drawn = torch.randn(output.shape, generator=generator) + mean
            if suite.layer.kinks is not None:
                # No gradient comes in there, so that every candidate has the same one to give.
                with torch.no_grad():
                    kinks = suite.layer.kinks(*exact, dtype=dtype, **self.options)
                drawn[kinks.cpu()] = 0
                if not drawn.any():
                    raise VerificationError(f"{case}: rounding may decide about every gradient")
            if suite.trains:
                self.target = place(output.detach() - drawn.to(case.place))
                F.mse_loss(output, self.target.double(), reduction="sum").backward()
            else:
                self.grad_output = place(drawn)
                output.backward(self.grad_output.double())
            self.expected += [exact[position].grad for position in self.gradients]

    def prepare(
        self, candidate: Candidate, arguments: Sequence[Tensor] | None = None
    ) -> tuple[Step, Callable[[Any], list[Tensor | None]]]:
        """The step that is timed, and what makes of its result the output and the gradients.

        Candidates share the memory of the arguments that they take in the same layout, so
        that none is luckier than another in where its own copy lies.

        Args:
            candidate: what computes.
            arguments: other memory with the same values; the problem's own if None.
        """
        arguments = [
            argument.t().contiguous() if position in candidate.transposed else argument.detach()
            for position, argument in enumerate(arguments or self.arguments)
        ]
        for position in self.gradients:
            arguments[position] = nn.Parameter(arguments[position])
        leaves = [arguments[position] for position in self.gradients]
        call = candidate.build(*arguments, **self.options)
        if not leaves:
            return call, lambda output: [output]

        def upright(found: list[Tensor | None]) -> list[Tensor | None]:
            output, *gradients = found
            return [output] + [
                grad.t() if position in candidate.transposed and grad is not None else grad
                for position, grad in zip(self.gradients, gradients, strict=True)
            ]

        if self.target is not None:
            learn = functools.partial(candidate.learn, call, self.target)
            return training_step(learn, leaves), lambda found: upright([call(), *found])
        return backward_step(call, leaves, self.grad_output), upright

    def verify(self, got: Sequence[Tensor | None], who: str) -> None:
        """Compare an output, and the gradients that follow it, with what must come out.

        Args:
            got: output and gradients.
            who: the candidate and its case, for the message.

        Raises:
            VerificationError: one of them is off.
        """
        names = ["the output", *(f"gradient {n} of the inputs" for n in self.gradients)]
        for name, value, right, share in zip(names, got, self.expected, self.allowed, strict=True):
            if value is None:
                raise VerificationError(f"{who}: {name} is missing")
            if (value.shape, value.dtype) != (right.shape, self.dtype):
                raise VerificationError(
                    f"{who}: {name} must be {self.dtype} {tuple(right.shape)}; "
                    f"got {value.dtype} {tuple(value.shape)}"
                )
            error = (value.detach().double() - right).abs().max().item()
            allowed = share * right.abs().max().item()
            if not error <= allowed:  # NaN is refused as well
                raise VerificationError(
                    f"{who}: {name} is off by {error:.2e}, where rounding explains {allowed:.2e}"
                )


def buffers(problem: Problem, cache: int) -> list[list[Tensor]]:
    """Copies of a problem's arguments, so many that a turn through them does not fit in a cache.

    Args:
        problem: has the first of them.
        cache: bytes; 0 for no copies. ``MOST_BUFFERS`` of the smallest problems do fit.
    """
    size = sum(argument.nbytes for argument in problem.arguments)
    copies = min(MOST_BUFFERS, -(-2 * cache // size))
    own = list(problem.arguments)
    return [own, *([argument.clone() for argument in own] for _ in range(copies - 1))]


def one_after_the_other(steps: Sequence[Step]) -> Step:
    """All of them as one step."""

    def turn() -> object:
        output = None
        for step in steps:
            output = step()
        return output

    return steps[0] if len(steps) == 1 else turn


def captured(step: Step) -> Step:
    """The replay of a step's CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is chosen or compiled at first use is not captured
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> object:
        graph.replay()
        return output

    return replay


def measure(suite: Suite, case: Case, seconds: float, limits: Limits | None = None) -> Result:
    """Verify every candidate of a case, then time them in turns.

    What turns out slower than ``THRESHOLD`` is measured again, for four times as long.

    Args:
        suite: what to compute.
        case: at which shape, in which dtype, where.
        seconds: how long to time.
        limits: of this machine with as many threads, if known.

    Returns:
        Times and ratios.

    Raises:
        VerificationError: a candidate is wrong; nothing was timed.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    clock = wall_clock if case.place == "cpu" else cuda_clock
    try:
        with torch.set_grad_enabled(bool(suite.gradients)):
            steps, turn, first, left_out = _verified_steps(suite, case)
            once = _too_slow(steps, first, clock)
            turns = {name: step for name, step in steps.items() if name not in once}
            restless = {name for name in turns if suite.candidates[name].restless}
            start = time.perf_counter()
            samples = take_turns(turns, seconds, clock, restless)
            result = _result(suite, case, limits, samples, once, left_out, turn)
            if result.best_ratio.median < THRESHOLD:
                longer = 4 * (time.perf_counter() - start)
                samples = take_turns(turns, longer, clock, restless)
                again = _result(suite, case, limits, samples, once, left_out, turn)
                result = dataclasses.replace(again, remeasured=True)
    finally:
        torch.set_num_threads(threads_before)
        torch.compiler.reset()  # or each case would look for its code among that of all before
    return result


def _verified_steps(
    suite: Suite, case: Case
) -> tuple[dict[str, Step], int, dict[str, float], dict[str, str]]:
    """Verify all candidates.

    Returns:
        The steps of those that can compute the case, how often each computes it, the seconds that
        each would take by its first time, and why the others cannot.
    """
    problem = Problem(suite, case)
    on_gpu = case.place == "cuda"
    turn = buffers(problem, torch.cuda.get_device_properties().L2_cache_size if on_gpu else 0)
    finished = captured if case.device == GRAPHED else lambda step: step
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name, candidate in suite.candidates.items():
        if candidate.rows not in (None, case.shape.sizes[0]):
            continue
        try:
            step, upright = problem.prepare(candidate)
            ready = finished(step)
            start = time.perf_counter()
            found = ready()
            first[name] = (time.perf_counter() - start) * len(turn)
        except Exception as error:
            if name in (SUBJECT, suite.baseline):
                raise
            reason = str(error).strip().partition("\n")[0]
            left_out[name] = f"{type(error).__name__}: {reason}"
            continue
        if not candidate.yardstick:
            problem.verify(upright(found), f"{name} in {case}")
        others = [problem.prepare(candidate, arguments)[0] for arguments in turn[1:]]
        steps[name] = finished(one_after_the_other([step, *others]))
    return steps, len(turn), first, left_out


def _too_slow(
    steps: Mapping[str, Step], first: Mapping[str, float], clock: Clock
) -> dict[str, float]:
    """The peers that would take the time of all others, and the seconds of one step of theirs."""
    taken = {
        # The better of two: the machine may have been elsewhere in one.
        name: first[name]
        if first[name] > ONCE_SECONDS
        else min(sample(step, 1, clock) for _ in range(2))
        for name, step in steps.items()
    }
    return {
        name: seconds
        for name, seconds in taken.items()
        if seconds > max(TOO_SLOW * taken[SUBJECT], AFFORDABLE_SECONDS)
    }


def _result(
    suite: Suite,
    case: Case,
    limits: Limits | None,
    samples: Mapping[str, Sequence[float]],
    once: Mapping[str, float],
    left_out: dict[str, str],
    turn: int,
) -> Result:
    own = samples[SUBJECT]
    seconds = {
        name: Spread.of([value / turn for value in values]) for name, values in samples.items()
    }
    ratios = {
        name: Spread.of([peer / ours for peer, ours in zip(values, own, strict=True)])
        for name, values in samples.items()
        if name != SUBJECT
    }
    for name, single in ((name, value / turn) for name, value in once.items()):
        seconds[name] = Spread(single, single, single)
        ours = seconds[SUBJECT]
        ratios[name] = Spread(single / ours.median, single / ours.high, single / ours.low)
    gradients = suite.gradients_at(case.shape)
    work = suite.layer.work(case.shape, gradients)
    return Result(
        case=case,
        size=suite.layer.size(case.shape),
        work=work,
        limit=limits.of(work, case.dtype, len(gradients)) if limits else None,
        rounds=len(own),
        remeasured=False,
        seconds=seconds,
        ratios=ratios,
        yardsticks=frozenset(name for name in ratios if suite.candidates[name].yardstick),
        timed_once=frozenset(once),
        left_out=left_out,
    )
