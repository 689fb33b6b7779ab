"""What is computed: the layers, the ways to compute each, the shapes, the suites.

A new way to compute a layer is one entry of its candidates, a new layer or setting one entry of
``SUITES``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

from benchmarks.limits import Work
from benchmarks.peers import Build, compiled, eager, module, onnx_runtime, operator
from mylayers import CenteredLayer, MyLinear, functional, reference

SUBJECT = "mylayers"  # the candidate that every suite has; the others are its peers
NOTEBOOK = "notebook"  # the peer that every suite has


@dataclass(frozen=True)
class Shape:
    """The sizes of one case.

    Attributes:
        sizes: as the layer's ``draw`` reads them.
        dim: what ``center`` averages over; None for everything.
    """

    sizes: tuple[int, ...]
    dim: tuple[int, ...] | None = None

    def __str__(self) -> str:
        """For tables, files and ``--shape``."""
        sizes = "x".join(map(str, self.sizes))
        return sizes if self.dim is None else f"{sizes} dim={','.join(map(str, self.dim))}"

    @property
    def options(self) -> dict[str, tuple[int, ...]]:
        """The arguments beside the tensors."""
        return {} if self.dim is None else {"dim": self.dim}


@dataclass(frozen=True)
class Candidate:
    """One way to compute a layer.

    Attributes:
        build: takes the layer's arguments and gives the call that is timed.
        transposed: positions of the matrices that it wants transposed. They are laid out so
            beforehand, outside the timing, and their gradients are turned back.
        yardstick: whether it computes something else, which is only there to compare with.
        restless: whether it brings threads of its own, which spin after a step.
    """

    build: Build
    transposed: tuple[int, ...] = ()
    yardstick: bool = False
    restless: bool = False


@dataclass(frozen=True)
class Layer:
    """What a layer is.

    Attributes:
        draw: random arguments for a shape, from a generator.
        define: the formula that all candidates must agree with.
        kink: where this is zero the gradient jumps; None if it nowhere does.
        terms: how many terms are added up for an element of the output, then of the gradient
            of each argument: what rounding grows with.
        work: the least that a step with the gradients of these arguments must do.
        size: multiply-adds, or elements where there are none.
        size_unit: what ``size`` counts.
    """

    draw: Callable[[Shape, torch.Generator], tuple[Tensor, ...]]
    define: Callable[..., Tensor]
    kink: Callable[..., Tensor] | None
    terms: Callable[[Shape], tuple[int, ...]]
    work: Callable[[Shape, tuple[int, ...]], Work]
    size: Callable[[Shape], int]
    size_unit: str


@dataclass(frozen=True)
class Suite:
    """One table: a layer, with or without gradients, over some shapes.

    Attributes:
        title: for people.
        layer: what is computed.
        candidates: by name; ``SUBJECT``, ``NOTEBOOK`` and others.
        gradients: the positions of the arguments whose gradients a step computes; a step is
            forward without gradients if there are none.
        shapes: the full grid.
        quick: the part of it that ``--quick`` measures.
    """

    title: str
    layer: Layer
    candidates: Mapping[str, Candidate]
    gradients: tuple[int, ...]
    shapes: tuple[Shape, ...]
    quick: tuple[Shape, ...]

    def grid(self, dtype: str, quick: bool) -> list[Shape]:
        """The shapes to measure in a dtype."""
        return [
            shape
            for shape in (self.quick if quick else self.shapes)
            if shape not in SKIPPED.get(dtype, ())
        ]


def _draw_linear(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    rows, in_units, units = shape.sizes
    return (
        torch.randn(rows, in_units, generator=generator),
        torch.randn(in_units, units, generator=generator) / math.sqrt(in_units),
        torch.randn(units, generator=generator),
    )


def _linear_terms(shape: Shape) -> tuple[int, ...]:
    rows, in_units, units = shape.sizes
    return in_units + 1, units, rows, rows


def _linear_work(shape: Shape, gradients: tuple[int, ...]) -> Work:
    rows, in_units, units = shape.sizes
    product = 2 * rows * in_units * units
    x, weight, bias, output = rows * in_units, in_units * units, units, rows * units
    operations, elements = product, x + weight + bias + output
    if gradients:
        elements += 2 * output  # the gradient that comes in, and the output that masks it
    for position in gradients:
        # What is read beside those, and what is written.
        elements += (weight + x, x + weight, bias)[position]
        operations += (product, product, output)[position]
    return Work(operations, elements)


def _draw_center(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    # Away from a mean of 0, so that the input itself would be a wrong answer.
    return (torch.randn(shape.sizes, generator=generator) + 1,)


def _center_terms(shape: Shape) -> tuple[int, ...]:
    # Both the kernels and torch.mean sum in chunks or pairs, not one by one.
    depth = math.prod(shape.sizes).bit_length()
    return depth, depth


def _center_work(shape: Shape, gradients: tuple[int, ...]) -> Work:
    passes = 2 if gradients else 1  # the gradient is centered as the input is
    size = math.prod(shape.sizes)
    return Work(passes * 2 * size, passes * 2 * size)


def _size(shape: Shape) -> int:
    return math.prod(shape.sizes)


LINEAR = Layer(
    draw=_draw_linear,
    define=reference.linear_act,
    kink=lambda x, weight, bias: reference.linear_act(x, weight, bias, activation=None),
    terms=_linear_terms,
    work=_linear_work,
    size=_size,
    size_unit="multiply-adds",
)

CENTER = Layer(
    draw=_draw_center,
    define=reference.center,
    kink=None,
    terms=_center_terms,
    work=_center_work,
    size=_size,
    size_unit="elements",
)


def _linear_formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(torch.matmul(x, weight) + bias)


def _center_formula(x: Tensor) -> Tensor:
    return x - x.mean()


def _center_dim_formula(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    return x - x.mean(dim, keepdim=True)


class _NotebookLinear(nn.Module):
    """The notebook's layer, less its ``.data``: that cost time, and the layer never trained."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return _linear_formula(x, self.weight, self.bias)


class _NotebookCentered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _center_formula(x)


def _with_values(made: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    made.weight, made.bias = nn.Parameter(weight), nn.Parameter(bias)
    return made


def _my_linear(weight: Tensor, bias: Tensor) -> nn.Module:
    return _with_values(MyLinear(*weight.shape, device="meta"), weight, bias)


def _stock_linear(weight: Tensor, bias: Tensor) -> nn.Module:
    units, in_units = weight.shape
    return nn.Sequential(
        _with_values(nn.Linear(in_units, units, device="meta"), weight, bias), nn.ReLU()
    )


_LINEAR_EAGER = {
    SUBJECT: Candidate(eager(operator(functional.linear_act))),
    NOTEBOOK: Candidate(eager(operator(_linear_formula))),
    "linear": Candidate(
        eager(operator(lambda x, weight, bias: F.relu(F.linear(x, weight, bias)))), transposed=(1,)
    ),
}
LINEAR_INFERENCE = {
    **_LINEAR_EAGER,
    "addmm_act": Candidate(
        eager(operator(lambda x, weight, bias: torch._addmm_activation(bias, x, weight)))
    ),
    "compile": Candidate(compiled(operator(_linear_formula))),
    "max-autotune": Candidate(
        compiled(module(_NotebookLinear), mode="max-autotune", freezing=True)
    ),
    # The last: since the order turns round, its threads are waited for in every second round.
    "onnxruntime": Candidate(onnx_runtime, restless=True),
}
LINEAR_TRAINING = {
    **_LINEAR_EAGER,
    "compile": Candidate(compiled(operator(_linear_formula))),
    "max-autotune": Candidate(compiled(operator(_linear_formula), mode="max-autotune")),
}
LINEAR_MODULE = {
    SUBJECT: Candidate(eager(module(_my_linear))),
    NOTEBOOK: Candidate(eager(module(_NotebookLinear))),
    "linear": Candidate(eager(module(_stock_linear)), transposed=(1,)),
    "compile": Candidate(compiled(module(_stock_linear)), transposed=(1,)),
}


def _center_candidates(formula: Callable[..., Tensor]) -> dict[str, Candidate]:
    return {
        SUBJECT: Candidate(eager(operator(functional.center))),
        NOTEBOOK: Candidate(eager(operator(formula))),
        "compile": Candidate(compiled(operator(formula))),
        "max-autotune": Candidate(compiled(operator(formula), mode="max-autotune")),
        "clone": Candidate(eager(operator(lambda x, **_: x.clone())), yardstick=True),
    }


CENTER_WHOLE = _center_candidates(_center_formula)
CENTER_DIM = _center_candidates(_center_dim_formula)
CENTER_MODULE = {
    SUBJECT: Candidate(eager(module(CenteredLayer))),
    NOTEBOOK: Candidate(eager(module(_NotebookCentered))),
    "compile": Candidate(compiled(module(_NotebookCentered))),
    "clone": CENTER_WHOLE["clone"],
}


def _shapes(*sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(map(Shape, sizes))


TALL = Shape((262_144, 64, 64))
WIDE = Shape((4096, 1024, 1024))

# rows, in_units, units
LINEAR_SHAPES = (
    *_shapes(
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
        (1, 4096, 4096),
        (16, 4096, 4096),
        (256, 1024, 1024),
        (65536, 64, 64),
        (1024, 1024, 1024),
    ),
    # Around the edges of blocks: 6 rows and 64 columns in registers; in cache 256 of the sum's
    # terms, 512 columns and 256 rows.
    *_shapes((5, 63, 65), (6, 256, 64), (7, 257, 129), (65, 255, 513), (257, 257, 257)),
    WIDE,
    TALL,
)
LINEAR_MODULE_SHAPES = LINEAR_SHAPES[1:12:2]
LINEAR_WEIGHTS_SHAPES = LINEAR_SHAPES[1:-2:2]
LINEAR_QUICK = _shapes((2, 64, 8), (32, 64, 64), (33, 129, 65), (1, 1024, 1024), (256, 1024, 1024))
CENTER_SHAPES = _shapes((5,), *((1 << n,) for n in range(14, 28, 2)))
CENTER_DIM_SHAPES = tuple(
    Shape(sizes, dim)
    for size in (16, 256, 4096)
    for sizes, dim in (
        ((size, size), (-1,)),
        ((size, size), (0,)),
        ((size, 4, size // 4), (0, 1)),
        ((size, size // 4, 4), (1,)),
    )
)

# Minutes each: fresh memory for every output of the one; stock float16 at the other.
SKIPPED: Mapping[str, tuple[Shape, ...]] = {
    "float64": (TALL,),
    "bfloat16": (TALL,),
    "float16": (TALL, WIDE),
}

SUITES: dict[str, Suite] = {
    "linear-forward": Suite(
        "linear_act, forward without gradients",
        LINEAR,
        LINEAR_INFERENCE,
        (),
        LINEAR_SHAPES,
        LINEAR_QUICK,
    ),
    "linear-backward": Suite(
        "linear_act, forward and backward, all three gradients",
        LINEAR,
        LINEAR_TRAINING,
        (0, 1, 2),
        LINEAR_SHAPES,
        LINEAR_QUICK,
    ),
    "linear-backward-weights": Suite(
        "linear_act, forward and backward, no gradient of the input",
        LINEAR,
        LINEAR_TRAINING,
        (1, 2),
        LINEAR_WEIGHTS_SHAPES,
        LINEAR_WEIGHTS_SHAPES[1:3],
    ),
    "linear-module": Suite(
        "MyLinear called as a module, without gradients",
        LINEAR,
        LINEAR_MODULE,
        (),
        LINEAR_MODULE_SHAPES,
        LINEAR_MODULE_SHAPES[:2],
    ),
    "center-forward": Suite(
        "center, forward without gradients",
        CENTER,
        CENTER_WHOLE,
        (),
        CENTER_SHAPES,
        CENTER_SHAPES[:-2],
    ),
    "center-backward": Suite(
        "center, forward and backward",
        CENTER,
        CENTER_WHOLE,
        (0,),
        CENTER_SHAPES[:-1],  # its gradients in float64 would take gigabytes to verify
        CENTER_SHAPES[:5:2],
    ),
    "center-dim": Suite(
        "center over some dimensions, forward without gradients",
        CENTER,
        CENTER_DIM,
        (),
        CENTER_DIM_SHAPES,
        CENTER_DIM_SHAPES[4:8],
    ),
    "center-module": Suite(
        "CenteredLayer called as a module, without gradients",
        CENTER,
        CENTER_MODULE,
        (),
        CENTER_SHAPES[:4],
        CENTER_SHAPES[:2],
    ),
}

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
