"""What is computed: the layers, the ways to compute each, the shapes, the suites.

A new way to compute a layer is one entry of its candidates, a new layer or setting one entry of
``SUITES``.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)
from torch.nn.utils import parametrizations, prune

from benchmarks.limits import Work
from benchmarks.peers import (
    Build,
    Call,
    Learn,
    by_autograd,
    compiled,
    eager,
    in_one_call,
    module,
    numpy_network,
    onnx_network,
    onnx_runtime,
    operator,
)
from mylayers import (
    CenteredLayer,
    Frozen,
    FusedSequential,
    MyLinear,
    freeze,
    functional,
    reference,
)

SUBJECT = "mylayers"  # the candidate that every suite has; the others are its peers
NOTEBOOK = "notebook"  # the baseline of a layer
STOCK = "stock"  # the baseline of a network


@dataclass(frozen=True)
class Shape:
    """The sizes of one case.

    Attributes:
        sizes: as the layer's ``draw`` reads them.
        dim: what ``center`` averages over; None for everything.
        activation: between the layers of a network; None for what is no network.
        obstacle: what keeps some of a network from being fused; None for nothing.
    """

    sizes: tuple[int, ...]
    dim: tuple[int, ...] | None = None
    activation: str | None = None
    obstacle: str | None = None

    def __str__(self) -> str:
        """For tables, files and ``--shape``; ``1x64^5`` is a row through five widths of 64."""
        rows, *rest = self.sizes
        runs = [(size, len(list(run))) for size, run in itertools.groupby(rest)]
        parts = ["x".join([f"{size}"] * n) if n < 4 else f"{size}^{n}" for size, n in runs]
        sizes = "x".join([f"{rows}", *parts])
        if self.activation is not None:
            return " ".join(filter(None, (sizes, self.activation, self.obstacle)))
        return sizes if self.dim is None else f"{sizes} dim={','.join(map(str, self.dim))}"

    @classmethod
    def read(cls, text: str) -> "Shape":
        """The shape that is written so; the inverse of ``str``."""
        sizes, *rest = text.split(" ", 1)
        runs = [part.partition("^") for part in sizes.split("x")]
        known = tuple(int(size) for size, _, times in runs for _ in range(int(times or 1)))
        if not rest:
            return cls(known)
        if rest[0].startswith("dim="):
            return cls(known, tuple(map(int, rest[0].removeprefix("dim=").split(","))))
        activation, _, obstacle = rest[0].partition(" ")
        return cls(known, None, activation, obstacle or None)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments beside the tensors."""
        options = {"dim": self.dim, "activation": self.activation, "obstacle": self.obstacle}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class Candidate:
    """One way to compute a layer.

    Attributes:
        build: takes the layer's arguments and gives the call that is timed.
        transposed: positions of the matrices that it wants transposed. They are laid out so
            beforehand, outside the timing, and their gradients are turned back.
        yardstick: whether it computes something else, which is only there to compare with.
        learn: given such a call, a target and an optimiser, makes a step of training.
        restless: whether it brings threads of its own, which spin after a step.
        rows: the only number of rows that it is there for; None for any.
    """

    build: Build
    transposed: tuple[int, ...] = ()
    yardstick: bool = False
    learn: Learn = by_autograd
    restless: bool = False
    rows: int | None = None


@dataclass(frozen=True)
class Layer:
    """What a layer is.

    Attributes:
        draw: random arguments for a shape, from a generator.
        define: the formula that all candidates must agree with; beside the arguments, in float64,
            it is given the ``dtype`` that results are stored in.
        kinks: given the same, at which elements of the output a gradient may jump by rounding
            alone; None if it nowhere does.
        terms: how many terms are added up for an element of the output, then of the gradient
            of each argument: what rounding grows with.
        stages: how many such sums follow one another, at most.
        work: the least that a step with the gradients of these arguments must do.
        size: multiply-adds, or elements where there are none.
        size_unit: what ``size`` counts.
    """

    draw: Callable[[Shape, torch.Generator], tuple[Tensor, ...]]
    define: Callable[..., Tensor]
    kinks: Callable[..., Tensor] | None
    terms: Callable[[Shape], tuple[int, ...]]
    stages: Callable[[Shape], int]
    work: Callable[[Shape, tuple[int, ...]], Work]
    size: Callable[[Shape], int]
    size_unit: str


@dataclass(frozen=True)
class Suite:
    """One table: a layer, with or without gradients, over some shapes.

    Attributes:
        title: for people.
        layer: what is computed.
        candidates: by name; ``SUBJECT``, ``baseline`` and others.
        gradients: the positions of the arguments whose gradients a step computes, as far as a
            shape has them; a step is forward without gradients if there are none.
        shapes: the full grid.
        quick: the part of it that ``--quick`` measures.
        baseline: the peer that summaries and plots name.
        trains: whether a step is one of training: forward, loss, backward, SGD.
    """

    title: str
    layer: Layer
    candidates: Mapping[str, Candidate]
    gradients: tuple[int, ...]
    shapes: tuple[Shape, ...]
    quick: tuple[Shape, ...]
    baseline: str = NOTEBOOK
    trains: bool = False

    def gradients_at(self, shape: Shape) -> tuple[int, ...]:
        """The positions of the arguments whose gradients a step computes at a shape."""
        arguments = len(self.layer.terms(shape)) - 1
        return tuple(position for position in self.gradients if position < arguments)

    def grid(self, dtype: str, quick: bool) -> list[Shape]:
        """The shapes to measure in a dtype."""
        return [
            shape
            for shape in (self.quick if quick else self.shapes)
            if shape not in SKIPPED.get(dtype, ())
        ]


def rounding(dtype: torch.dtype, terms: int) -> float:
    """The error that rounding explains, as a share of the largest element.

    Twice the last bit of the result, since a formula of several operators rounds more than
    once; and sums, formed in float32 at least, whose errors add up like a random walk.
    """
    accumulator = torch.promote_types(dtype, torch.float32)
    return 2 * (torch.finfo(dtype).eps + torch.finfo(accumulator).eps * math.sqrt(terms))


def _draw_linear(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    rows, in_units, units = shape.sizes
    return (
        torch.randn(rows, in_units, generator=generator),
        torch.randn(in_units, units, generator=generator) / math.sqrt(in_units),
        torch.randn(units, generator=generator),
    )


def _define_linear(x: Tensor, weight: Tensor, bias: Tensor, *, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    return reference.linear_act(x, weight, bias)


def _linear_kinks(x: Tensor, weight: Tensor, bias: Tensor, *, dtype: torch.dtype) -> Tensor:
    height = reference.linear_act(x, weight, bias, activation=None).abs()
    return height <= rounding(dtype, x.shape[1] + 1) * height.max()


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


def _define_center(x: Tensor, *, dtype: torch.dtype, **options: Any) -> Tensor:  # noqa: ARG001
    return reference.center(x, **options)


def _center_terms(shape: Shape) -> tuple[int, ...]:
    # Both the kernels and torch.mean sum in chunks or pairs, not one by one.
    depth = math.prod(shape.sizes).bit_length()
    return depth, depth


def _center_work(shape: Shape, gradients: tuple[int, ...]) -> Work:
    passes = 2 if gradients else 1  # the gradient is centered as the input is
    size = math.prod(shape.sizes)
    return Work(passes * 2 * size, passes * 2 * size)


def _draw_network(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    rows, *widths = shape.sizes
    drawn = [torch.randn(rows, widths[0], generator=generator)]
    for in_units, units in itertools.pairwise(widths):
        # As nn.Linear keeps it.
        drawn.append(torch.randn(units, in_units, generator=generator) / math.sqrt(in_units))
        drawn.append(torch.randn(units, generator=generator))
    return tuple(drawn)


def _layers(
    parameters: Sequence[Tensor], activation: str
) -> list[tuple[Tensor, Tensor, str | None]]:
    """Weight, bias and activation of each layer; the last has no activation."""
    hidden = len(parameters) // 2 - 1
    activations = [*[activation] * hidden, None]
    return list(zip(parameters[::2], parameters[1::2], activations, strict=True))


def _define_network(x: Tensor, *parameters: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    for weight, bias, name in _layers(parameters, activation):
        x = reference.linear_act(x, weight.t(), bias, name)
        # The next layer reads what was stored; on which side of its kink it lies depends on it.
        x = x + (x.detach().to(dtype).double() - x.detach())
    return x


def _network_kinks(x: Tensor, *parameters: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    near = torch.zeros(x.shape[0], 1, dtype=torch.bool, device=x.device)
    if activation == "relu":
        accumulator = torch.promote_types(dtype, torch.float32)
        for stage, (weight, bias, _) in enumerate(_layers(parameters, activation)[:-1], start=1):
            height = reference.linear_act(x, weight.t(), bias, None)
            share = stage * rounding(accumulator, x.shape[1] + 1)
            near |= (height.abs() <= share * height.abs().max()).any(1, keepdim=True)
            x = height.relu().to(dtype).double()
    return near.expand(-1, parameters[-1].shape[0])


def _network_terms(shape: Shape) -> tuple[int, ...]:
    rows, *widths = shape.sizes
    sums = max(widths) + 1
    return sums, sums, *[max(rows, sums)] * (2 * (len(widths) - 1))


def _network_work(shape: Shape, gradients: tuple[int, ...]) -> Work:
    rows, *widths = shape.sizes
    weights = [in_units * units for in_units, units in itertools.pairwise(widths)]
    parameters = sum(weights) + sum(widths[1:])
    products, output = [2 * rows * weight for weight in weights], rows * widths[-1]
    operations, elements = sum(products), rows * widths[0] + parameters + output
    if gradients:  # those of the parameters
        operations += 2 * sum(products) - products[0]
        # What came out of the layers between is kept and read, and so are all weights but the
        # first; the output's gradient comes in. Loss and optimiser are not counted.
        elements += 2 * rows * sum(widths[1:-1]) + sum(weights[1:]) + parameters + output
    return Work(operations, elements)


def _network_size(shape: Shape) -> int:
    rows, *widths = shape.sizes
    return rows * sum(in_units * units for in_units, units in itertools.pairwise(widths))


def _size(shape: Shape) -> int:
    return math.prod(shape.sizes)


LINEAR = Layer(
    draw=_draw_linear,
    define=_define_linear,
    kinks=_linear_kinks,
    terms=_linear_terms,
    stages=lambda _: 1,
    work=_linear_work,
    size=_size,
    size_unit="multiply-adds",
)

CENTER = Layer(
    draw=_draw_center,
    define=_define_center,
    kinks=None,
    terms=_center_terms,
    stages=lambda _: 1,
    work=_center_work,
    size=_size,
    size_unit="elements",
)

NETWORK = Layer(
    draw=_draw_network,
    define=_define_network,
    kinks=_network_kinks,
    terms=_network_terms,
    stages=lambda shape: 2 * (len(shape.sizes) - 2) - 1,  # through all layers, and back
    work=_network_work,
    size=_network_size,
    size_unit="multiply-adds",
)


def _unhindered(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, obstacle=None, **options: formula(*arguments, **options)  # noqa: ARG005


HINDERED_NETWORK = dataclasses.replace(
    NETWORK, define=_unhindered(_define_network), kinks=_unhindered(_network_kinks)
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
    # A parameter that is given stays itself: its gradient is looked at.
    made.weight, made.bias = (
        value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        for value in (weight, bias)
    )
    return made


def _my_linear(weight: Tensor, bias: Tensor) -> nn.Module:
    return _with_values(MyLinear(*weight.shape, device="meta"), weight, bias)


def _stock_linear(weight: Tensor, bias: Tensor) -> nn.Module:
    return nn.Sequential(_lone_linear(weight, bias), nn.ReLU())


def _lone_linear(weight: Tensor, bias: Tensor) -> nn.Module:
    units, in_units = weight.shape
    return _with_values(nn.Linear(in_units, units, device="meta"), weight, bias)


_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def _modules(parameters: Sequence[Tensor], activation: str) -> list[nn.Module]:
    made: list[nn.Module] = []
    for weight, bias, name in _layers(parameters, activation):
        made.append(_lone_linear(weight, bias))
        if name is not None:
            made.append(_ACTIVATIONS[name]())
    return made


def _fused_network(*parameters: Tensor, activation: str) -> nn.Sequential:
    return FusedSequential(*_modules(parameters, activation))


def _stock_network(*parameters: Tensor, activation: str) -> nn.Sequential:
    return nn.Sequential(*_modules(parameters, activation))


def _frozen_network(
    x: Tensor, *parameters: Tensor, activation: str
) -> tuple[Frozen, tuple[Tensor]]:
    return freeze(_fused_network(*parameters, activation=activation)), (x,)


def _watch(*_: object) -> None:
    """A hook that leaves everything as it is."""


class _OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class _Named(Tensor):
    """A class of its own, without a word on what operators do."""


def _hooked(net: nn.Sequential) -> nn.Sequential:
    net[2].register_forward_hook(_watch)
    return net


def _all_hooked(net: nn.Sequential) -> nn.Sequential:
    for layer in net:
        layer.register_forward_hook(_watch)
    return net


def _hooked_globally(net: nn.Sequential) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        handle = nn.modules.module.register_module_forward_hook(_watch)
        try:
            return net(x)  # type: ignore[no-any-return]
        finally:
            handle.remove()

    return call


def _normed(net: nn.Sequential) -> nn.Sequential:
    parametrizations.weight_norm(net[2])
    return net


def _pruned(net: nn.Sequential) -> nn.Sequential:
    prune.identity(net[2], "weight")  # type: ignore[no-untyped-call]
    return net


def _nothing_fused(net: nn.Sequential) -> nn.Sequential:
    for layer in net:
        if isinstance(layer, nn.Linear):
            layer.__class__ = _OwnLinear
    return net


def _iterating(net: nn.Sequential) -> nn.Sequential:
    class Own(type(net)):  # type: ignore[misc]
        def __iter__(self) -> Iterator[nn.Module]:
            return iter(self._modules.values())

    net.__class__ = Own
    return net


# Each computes what the network does, or what is given for it.
OBSTACLES: dict[str, Callable[[nn.Sequential], Callable[[Tensor], Tensor]]] = {
    "hook": _hooked,
    "hooks": _all_hooked,
    "global hook": _hooked_globally,
    "weight_norm": _normed,
    "pruned": _pruned,
    "subclass": lambda net: lambda x: net(x.as_subclass(_Named)).as_subclass(Tensor),
    "nothing fused": _nothing_fused,
    "own iter": _iterating,
}


def _hindered(make: Callable[..., nn.Sequential]) -> Build:
    def build(x: Tensor, *parameters: Tensor, activation: str, obstacle: str | None = None) -> Call:
        net = make(*parameters, activation=activation).eval()
        return functools.partial(OBSTACLES[obstacle](net) if obstacle else net, x)

    return build


def _first_linear(*parameters: Tensor, activation: str) -> nn.Module:
    return _modules(parameters, activation)[0]


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


def _center_candidates(
    formula: Callable[..., Tensor], autotune: str = "max-autotune"
) -> dict[str, Candidate]:
    return {
        SUBJECT: Candidate(eager(operator(functional.center))),
        NOTEBOOK: Candidate(eager(operator(formula))),
        "compile": Candidate(compiled(operator(formula))),
        "max-autotune": Candidate(compiled(operator(formula), mode=autotune)),
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


_NETWORK_EAGER = {
    SUBJECT: Candidate(eager(module(_fused_network))),
    STOCK: Candidate(eager(module(_stock_network))),
}
NETWORK_INFERENCE = {
    **_NETWORK_EAGER,
    "compile": Candidate(compiled(module(_stock_network))),
    "reduce-overhead": Candidate(compiled(module(_stock_network), mode="reduce-overhead")),
    "max-autotune": Candidate(compiled(module(_stock_network), mode="max-autotune", freezing=True)),
    "one-linear": Candidate(eager(module(_first_linear)), yardstick=True),  # its first layer alone
    "frozen": Candidate(eager(_frozen_network), yardstick=True),  # an immutable copy, for serving
    "onnxruntime": Candidate(onnx_network, restless=True),
    "numpy": Candidate(numpy_network, restless=True, rows=1),
}
NETWORK_TRAINING = {
    **_NETWORK_EAGER,
    "compile": Candidate(compiled(module(_stock_network))),
    "reduce-overhead": Candidate(compiled(module(_stock_network), mode="reduce-overhead")),
    "max-autotune": Candidate(compiled(module(_stock_network), mode="max-autotune")),
}
NETWORK_LEARNING = {
    **NETWORK_TRAINING,
    SUBJECT: Candidate(eager(module(_fused_network)), learn=in_one_call),
    "own-loop": Candidate(eager(module(_fused_network)), yardstick=True),  # as the peers learn
}

NETWORK_HINDERED = {
    SUBJECT: Candidate(_hindered(_fused_network)),
    STOCK: Candidate(_hindered(_stock_network)),
}


def _shapes(*sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(map(Shape, sizes))


def _networks(activation: str, *sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(Shape(each, activation=activation) for each in sizes)


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
    # Around the edges of AVX-512's microkernel, 6 rows and 64 columns, and of a task: 256 of the
    # sum's terms, 512 columns, 256 rows.
    *_shapes((5, 63, 65), (6, 256, 64), (7, 257, 129), (65, 255, 513), (257, 257, 257)),
    WIDE,
    TALL,
)
LINEAR_MODULE_SHAPES = LINEAR_SHAPES[1:12:2]
LINEAR_WEIGHTS_SHAPES = LINEAR_SHAPES[1:-2:2]
LINEAR_QUICK = _shapes((2, 64, 8), (32, 64, 64), (1, 1024, 1024), (256, 1024, 1024))
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

# Rows, then widths. A case costs 10 seconds of compiling, so each activation has half of them.
_POLICY = (64, 64, 64, 8)
POLICIES = tuple(
    Shape((rows, *_POLICY), activation=activation)
    for rows in (1, 32, 256)
    for activation in ("relu", "tanh")
)
HINDERED = tuple(Shape((1, *_POLICY), activation="relu", obstacle=name) for name in OBSTACLES)
NETWORK_SHAPES = (
    *POLICIES,
    *_networks(
        "relu",
        (1, *[16] * 3),
        (32, *[256] * 5),
        (4096, *[64] * 5),
        (1, *[1024] * 5),
        (32, *[1024] * 3),
        (256, *[1024] * 5),
    ),
    *_networks(
        "tanh",
        (4096, *[16] * 9),
        (1, *[256] * 5),
        (256, *[256] * 5),
        (4096, *[256] * 3),
        (4, *[1024] * 9),
        (4096, *[1024] * 3),
    ),
)
NETWORK_TRAINING_SHAPES = (*POLICIES, *NETWORK_SHAPES[6::2])
NETWORK_BACKWARD_SHAPES = (*POLICIES[1::2], *NETWORK_SHAPES[11:15:3])
MOST_PARAMETERS = 2 * 8  # of a network of the deepest kind

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
        LINEAR_WEIGHTS_SHAPES[2:3],
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
        CENTER_SHAPES[:-2:2],
    ),
    "center-backward": Suite(
        "center, forward and backward",
        CENTER,
        CENTER_WHOLE,
        (0,),
        CENTER_SHAPES[:-1],  # its gradients in float64 would take gigabytes to verify
        CENTER_SHAPES[:5:4],
    ),
    "center-dim": Suite(
        "center over some dimensions, forward without gradients",
        CENTER,
        CENTER_DIM,
        (),
        CENTER_DIM_SHAPES,
        CENTER_DIM_SHAPES[4:8:3],
    ),
    "center-module": Suite(
        "CenteredLayer called as a module, without gradients",
        CENTER,
        CENTER_MODULE,
        (),
        CENTER_SHAPES[:4],
        CENTER_SHAPES[:2],
    ),
    "networks-forward": Suite(
        "FusedSequential of nn.Linear and activations, without gradients",
        NETWORK,
        NETWORK_INFERENCE,
        (),
        NETWORK_SHAPES,
        POLICIES[:3:2],
        STOCK,
    ),
    "networks-training": Suite(
        "FusedSequential, a step of training: forward, loss, backward (CPU: in one call), SGD",
        NETWORK,
        NETWORK_LEARNING,
        tuple(range(1, MOST_PARAMETERS + 1)),
        NETWORK_TRAINING_SHAPES,
        POLICIES[:1],
        STOCK,
        trains=True,
    ),
    "networks-backward": Suite(
        "FusedSequential, forward and backward, gradients of all parameters",
        NETWORK,
        NETWORK_TRAINING,
        tuple(range(1, MOST_PARAMETERS + 1)),
        NETWORK_BACKWARD_SHAPES,
        POLICIES[1:2],
        STOCK,
    ),
    "networks-hindered": Suite(
        "FusedSequential with something in its way, without gradients",
        HINDERED_NETWORK,
        NETWORK_HINDERED,
        (),
        HINDERED,
        HINDERED[:1],
        STOCK,
    ),
}


def names(suite: str) -> set[str]:
    """What ``--only`` calls a suite: by its own name, or that of all that begin so."""
    return {suite, suite.partition("-")[0]}


FAMILIES = tuple(dict.fromkeys(name.partition("-")[0] for name in SUITES))


# On a GPU the harness itself captures every candidate in a graph.
_NO_GRAPHS = "max-autotune-no-cudagraphs"
LINEAR_GPU_TRAINING = {
    **_LINEAR_EAGER,
    "compile": Candidate(compiled(operator(_linear_formula))),
    "max-autotune": Candidate(compiled(operator(_linear_formula), mode=_NO_GRAPHS)),
}
LINEAR_GPU_INFERENCE = {**LINEAR_GPU_TRAINING, "addmm_act": LINEAR_INFERENCE["addmm_act"]}
CENTER_GPU = _center_candidates(_center_formula, _NO_GRAPHS)
NETWORK_GPU = {
    **_NETWORK_EAGER,
    "compile": Candidate(compiled(module(_stock_network))),
    "max-autotune": Candidate(compiled(module(_stock_network), mode=_NO_GRAPHS)),
}
LINEAR_GPU_SHAPES = _shapes(
    (128, 256, 256),
    (4096, 1024, 1024),
    (8192, 4096, 4096),
    (65536, 256, 256),
    (1 << 20, 64, 64),
)
CENTER_GPU_SHAPES = _shapes(*((1 << n,) for n in (10, 14, 17, *range(19, 27), 28, 30)))
_LINEAR_GPU_GRID = {"shapes": LINEAR_GPU_SHAPES, "quick": LINEAR_GPU_SHAPES[::2]}
_CENTER_GPU_GRID = {"shapes": CENTER_GPU_SHAPES, "quick": CENTER_GPU_SHAPES[::4]}

GPU_SUITES: dict[str, Suite] = {
    name: dataclasses.replace(SUITES[name], candidates=candidates, **grid)
    for name, candidates, grid in (
        ("linear-forward", LINEAR_GPU_INFERENCE, _LINEAR_GPU_GRID),
        ("linear-backward", LINEAR_GPU_TRAINING, _LINEAR_GPU_GRID),
        ("center-forward", CENTER_GPU, _CENTER_GPU_GRID),
        ("center-backward", CENTER_GPU, _CENTER_GPU_GRID),
        ("networks-forward", NETWORK_GPU, {}),
        ("networks-training", NETWORK_GPU, {}),
        ("networks-backward", NETWORK_GPU, {}),
    )
}


def suites(device: str) -> Mapping[str, Suite]:
    """What is measured on a device: all, or on a GPU some, against the peers that it has."""
    return SUITES if device == "cpu" else GPU_SUITES


DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
