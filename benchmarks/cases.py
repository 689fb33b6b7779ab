"""What is computed: two layers, the ways to compute each, the shapes, the suites.

A new way to compute a layer is one entry of its ``candidates``, a new layer or setting one
entry of ``SUITES``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

from mylayers import functional, reference

Shape = tuple[int, ...]
SUBJECT = "mylayers"  # the candidate that every layer has; the others are its peers


@dataclass(frozen=True)
class Candidate:
    """One way to compute a layer.

    Attributes:
        function: takes the layer's arguments, gives its output; this call is timed.
        transposed: positions of the matrices that it wants transposed. They are laid out so
            beforehand, outside the timing, and their gradients are turned back.
    """

    function: Callable[..., Tensor]
    transposed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layer:
    """What a layer is, and every way to compute it.

    Attributes:
        draw: random arguments for a shape, from a generator.
        define: the formula that all candidates must agree with.
        kink: where this is zero the gradient jumps; None if it nowhere does.
        terms: how many terms are added up for an element of the output, then of the gradient
            of each argument: what rounding grows with.
        size: multiply-adds, or elements where there are none.
        size_unit: what ``size`` counts.
        candidates: by name; ``SUBJECT`` and its peers.
    """

    draw: Callable[[Shape, torch.Generator], tuple[Tensor, ...]]
    define: Callable[..., Tensor]
    kink: Callable[..., Tensor] | None
    terms: Callable[[Shape], tuple[int, ...]]
    size: Callable[[Shape], int]
    size_unit: str
    candidates: Mapping[str, Candidate]


@dataclass(frozen=True)
class Suite:
    """One table: a layer, with or without gradients, over some shapes.

    Attributes:
        title: for people.
        layer: what is computed.
        backward: whether a step is forward and backward, or forward without gradients.
        shapes: the full grid.
        quick: the part of it that ``--quick`` measures.
    """

    title: str
    layer: Layer
    backward: bool
    shapes: tuple[Shape, ...]
    quick: tuple[Shape, ...]


def _draw_linear(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    rows, in_units, units = shape
    return (
        torch.randn(rows, in_units, generator=generator),
        torch.randn(in_units, units, generator=generator) / math.sqrt(in_units),
        torch.randn(units, generator=generator),
    )


def _linear_terms(shape: Shape) -> tuple[int, ...]:
    rows, in_units, units = shape
    return in_units + 1, units, rows, rows


def _draw_center(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    # Away from a mean of 0, so that the input itself would be a wrong answer.
    return (torch.randn(shape, generator=generator) + 1,)


def _center_terms(shape: Shape) -> tuple[int, ...]:
    # Both the kernels and torch.mean sum in chunks or pairs, not one by one.
    depth = math.prod(shape).bit_length()
    return depth, depth


LINEAR = Layer(
    draw=_draw_linear,
    define=reference.linear_act,
    kink=lambda x, weight, bias: reference.linear_act(x, weight, bias, activation=None),
    terms=_linear_terms,
    size=math.prod,
    size_unit="multiply-adds",
    candidates={
        SUBJECT: Candidate(functional.linear_act),
        "notebook": Candidate(lambda x, weight, bias: F.relu(torch.matmul(x, weight) + bias)),
        "linear": Candidate(
            lambda x, weight, bias: F.relu(F.linear(x, weight, bias)), transposed=(1,)
        ),
    },
)

CENTER = Layer(
    draw=_draw_center,
    define=reference.center,
    kink=None,
    terms=_center_terms,
    size=math.prod,
    size_unit="elements",
    candidates={
        SUBJECT: Candidate(functional.center),
        "notebook": Candidate(lambda x: x - x.mean()),
    },
)

# rows, in_units, units
LINEAR_SHAPES: tuple[Shape, ...] = (
    (2, 5, 3),
    (2, 64, 8),
    (1, 64, 64),
    (8, 64, 64),
    (32, 64, 64),
    (33, 129, 65),
    (1, 256, 256),
    (256, 64, 64),
    (32, 256, 256),
    (100, 784, 100),
    (128, 256, 256),
    (1, 1024, 1024),
    (16, 1024, 1024),
    (256, 256, 256),
    (1024, 256, 256),
    (256, 1024, 1024),
    (65536, 64, 64),
    (16, 4096, 4096),
    (1024, 1024, 1024),
    (4096, 1024, 1024),
)
LINEAR_QUICK: tuple[Shape, ...] = (
    (2, 64, 8),
    (1, 64, 64),
    (32, 64, 64),
    (33, 129, 65),
    (32, 256, 256),
    (1, 1024, 1024),
    (1024, 256, 256),
    (256, 1024, 1024),
)
CENTER_SHAPES: tuple[Shape, ...] = ((5,), *((1 << n,) for n in range(14, 28, 2)))
CENTER_QUICK = CENTER_SHAPES[:-2]

SUITES: dict[str, Suite] = {
    "linear-forward": Suite(
        "MyLinear, forward without gradients", LINEAR, False, LINEAR_SHAPES, LINEAR_QUICK
    ),
    "linear-backward": Suite(
        "MyLinear, forward and backward, all three gradients",
        LINEAR,
        True,
        LINEAR_SHAPES,
        LINEAR_QUICK,
    ),
    "center-forward": Suite(
        "CenteredLayer, forward without gradients", CENTER, False, CENTER_SHAPES, CENTER_QUICK
    ),
    "center-backward": Suite(
        "CenteredLayer, forward and backward",
        CENTER,
        True,
        CENTER_SHAPES[:-1],  # its gradients in float64 would take gigabytes to verify
        CENTER_QUICK,
    ),
}

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
