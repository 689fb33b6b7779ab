"""One case: every candidate is verified against ``mylayers.reference``, then all are timed."""

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, SUBJECT, Candidate, Shape, Suite
from benchmarks.timing import Spread, Step, take_turns


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

    def __str__(self) -> str:
        """For the progress bar and for messages."""
        return f"{self.suite} {self.shape} {self.dtype}, {self.device}, threads: {self.threads}"


@dataclass(frozen=True)
class Result:
    """What came out of a case.

    Attributes:
        case: what was measured.
        size: how large it is, in the unit of its layer.
        rounds: how often each candidate was timed.
        seconds: of one step, by candidate.
        ratios: by peer, how many times faster than it ``mylayers`` is: the spread of the
            ratio within a round, where both ran one after the other.
    """

    case: Case
    size: int
    rounds: int
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]

    @property
    def best_peer(self) -> str:
        """The fastest candidate beside ``mylayers``."""
        return min(self.ratios, key=lambda name: self.seconds[name].median)

    @property
    def best_ratio(self) -> Spread:
        """The ratio to the fastest peer."""
        return self.ratios[self.best_peer]


def rounding(dtype: torch.dtype, terms: int) -> float:
    """The error that rounding explains, as a share of the largest element.

    Twice the last bit of the result, since a formula of several operators rounds more than
    once; and sums, formed in float32 at least, whose errors add up like a random walk.
    """
    accumulator = torch.promote_types(dtype, torch.float32)
    return 2 * (torch.finfo(dtype).eps + torch.finfo(accumulator).eps * math.sqrt(terms))


class Problem:
    """The arguments of a case, the gradient that comes in, and what must come out."""

    def __init__(self, suite: Suite, case: Case) -> None:
        dtype = DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(zlib.crc32(repr(case.shape).encode()))

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(case.device, dtype)

        self.dtype = dtype
        self.backward = suite.backward
        self.arguments = [place(drawn) for drawn in suite.layer.draw(case.shape, generator)]
        self.grad_output: Tensor | None = None
        self.terms = suite.layer.terms(case.shape)

        exact = [
            argument.to(torch.float64, copy=True).requires_grad_(self.backward)
            for argument in self.arguments
        ]
        output = suite.layer.define(*exact)
        self.expected = [output.detach()]
        if self.backward:
            # Away from a mean of 0, which would hide a gradient that is not centered; not so far
            # that a sum of it overflows float16, since the notebook's formula forms one.
            mean = min(1, torch.finfo(dtype).max / (4 * output.numel()))
            drawn = torch.randn(output.shape, generator=generator) + mean
            if suite.layer.kink is not None:
                # On which side of the kink an element lies may be a matter of rounding. No
                # gradient comes in there, so that every candidate has the same one to give.
                with torch.no_grad():
                    height = suite.layer.kink(*exact).abs()
                drawn[(height <= rounding(dtype, self.terms[0]) * height.max()).cpu()] = 0
            self.grad_output = place(drawn)
            output.backward(self.grad_output.double())
            self.expected += [argument.grad for argument in exact]

    def prepare(self, candidate: Candidate) -> tuple[Step, Callable[[], list[Tensor]]]:
        """The step that is timed, and what reads the gradients that it left behind.

        Candidates share the memory of the arguments that they take in the same layout, so
        that none is luckier than another in where its own copy lies.
        """
        arguments = [
            argument.t().contiguous() if position in candidate.transposed else argument.detach()
            for position, argument in enumerate(self.arguments)
        ]
        function, grad_output = candidate.function, self.grad_output
        if not self.backward:
            return functools.partial(function, *arguments), list
        for argument in arguments:
            argument.requires_grad_()

        def step() -> Tensor:
            for argument in arguments:
                argument.grad = None
            output = function(*arguments)
            output.backward(grad_output)
            return output

        def gradients() -> list[Tensor]:
            return [
                argument.grad.t() if position in candidate.transposed else argument.grad
                for position, argument in enumerate(arguments)
            ]

        return step, gradients

    def verify(self, got: list[Tensor], who: str) -> None:
        """Compare an output, and the gradients that follow it, with what must come out.

        Args:
            got: output and gradients.
            who: the candidate and its case, for the message.

        Raises:
            VerificationError: one of them is off.
        """
        names = ["the output", *(f"gradient {n} of the inputs" for n in range(len(got) - 1))]
        for name, value, right, terms in zip(names, got, self.expected, self.terms, strict=False):
            if value is None:
                raise VerificationError(f"{who}: {name} is missing")
            if (value.shape, value.dtype) != (right.shape, self.dtype):
                raise VerificationError(
                    f"{who}: {name} must be {self.dtype} {tuple(right.shape)}; "
                    f"got {value.dtype} {tuple(value.shape)}"
                )
            error = (value.detach().double() - right).abs().max().item()
            allowed = rounding(self.dtype, terms) * right.abs().max().item()
            if not error <= allowed:  # NaN is refused as well
                raise VerificationError(
                    f"{who}: {name} is off by {error:.2e}, where rounding explains {allowed:.2e}"
                )


def measure(suite: Suite, case: Case, seconds: float) -> Result:
    """Verify every candidate of a case, then time them in turns.

    Args:
        suite: what to compute.
        case: at which shape, in which dtype, where.
        seconds: how long to time.

    Returns:
        Times and ratios.

    Raises:
        VerificationError: a candidate is wrong; nothing was timed.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with torch.set_grad_enabled(suite.backward):
            steps = _verified_steps(suite, case)
            synchronize = torch.cuda.synchronize if case.device == "cuda" else lambda: None
            samples = take_turns(steps, seconds, synchronize)
    finally:
        torch.set_num_threads(threads_before)
    own = samples[SUBJECT]
    return Result(
        case=case,
        size=suite.layer.size(case.shape),
        rounds=len(own),
        seconds={name: Spread.of(values) for name, values in samples.items()},
        ratios={
            name: Spread.of([peer / ours for peer, ours in zip(values, own, strict=True)])
            for name, values in samples.items()
            if name != SUBJECT
        },
    )


def _verified_steps(suite: Suite, case: Case) -> dict[str, Step]:
    problem = Problem(suite, case)
    steps = {}
    for name, candidate in suite.layer.candidates.items():
        steps[name], gradients = problem.prepare(candidate)
        problem.verify([steps[name](), *gradients()], f"{name} in {case}")
    return steps
