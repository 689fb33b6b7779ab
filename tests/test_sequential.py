"""mylayers::sequential and FusedSequential against the layers one by one, to the bit.

The oracle of the operator is ``one_by_one``; that of the module is ``nn.Sequential`` of the very
same children, whose activations round elsewhere, so that it is close and not equal.
"""

import contextlib
import copy
import functools
import gc
import itertools
import sys
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import samples
import torch
from common import COPIES, Calls
from samples import ACTIVATIONS, KERNEL_DTYPES, OF_OUTPUT, drawer, num_threads, outcome, same_bits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import mylayers
from mylayers import (
    CenteredLayer,
    FusedSequential,
    LazyMyLinear,
    MyLinear,
    functional,
    reference,
    sequential,
)

ops = torch.ops.mylayers

pytestmark = [
    # torch scripts its own helpers when its compilers or forward mode are first used, and warns.
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning"),
    # Dynamo and opcheck read .grad of the tensors they are given.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d)[6:])


# ---- programs --------------------------------------------------------------------------


def followed_by(activation: str | None) -> str:
    """What a linear step is followed by in a program, for an activation behind it."""
    if activation is None:
        return ""
    return f"+{activation}" if activation in OF_OUTPUT else f"; {activation}"


# Each with the sizes of an input after its batch, and the units of its linear steps.
PROGRAMS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "linear": ((5,), (3,)),
    "linear_t+bias": ((5,), (3,)),
    **{
        f"linear+bias{a}; linear_t+bias{a}; linear{a}; linear_t{a}": ((5,), (4, 3, 3, 2))
        for a in map(followed_by, reference.ACTIVATIONS)
    },
    "linear_t+bias+tanh; linear_t+bias+tanh; linear_t+bias": ((5,), (7, 6, 3)),
    "linear+bias+sigmoid; center; linear_t+bias+elu": ((5,), (7, 3)),
    "linear; center(-1); linear_t+bias; center(0,1); tanh": ((5,), (7, 3)),
    "flatten(1,-1); linear_t+bias+tanh; linear": ((2, 3), (7, 3)),
    "linear+bias+relu; flatten(1,2); tanh; linear_t+bias; center(0)": ((2, 3), (4, 3)),
    "linear+bias+tanh; flatten(1,2); linear_t": ((2, 3), (4, 3)),
    "sigmoid; elu; linear+bias; tanh; relu; linear_t+tanh": ((5,), (6, 3)),
    "center; linear_t+bias; center(1); sigmoid": ((5,), (3,)),
    "tanh": ((5,), ()),
    "flatten(0,1); center(0)": ((5,), ()),
}
every_program = pytest.mark.parametrize("program", PROGRAMS)
# One of each kind, for what costs time.
VARIED = (
    "linear+bias+tanh; linear_t+bias+tanh; linear+tanh; linear_t+tanh",
    "linear+bias+sigmoid; center; linear_t+bias+elu",
    "linear+bias+relu; flatten(1,2); tanh; linear_t+bias; center(0)",
    "sigmoid; elu; linear+bias; tanh; relu; linear_t+tanh",
)
varied_programs = pytest.mark.parametrize("program", VARIED)


def arguments(
    program: str, lead: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """An input and the parameters, drawn."""
    sizes, units = PROGRAMS[program]
    return (drawer(program, dtype)(*lead, *sizes), *draw_parameters(program, sizes, units, dtype))


def draw_parameters(
    program: str, sizes: tuple[int, ...], units: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    draw, next_units, parameters = drawer(f"{program}{units}", dtype), iter(units), []
    for step in program.split("; "):
        name, options = split(step)
        if name == "flatten":
            sizes = (torch.Size(sizes).numel(),)
        if name.startswith("linear"):
            out = next(next_units)
            shape = (out, sizes[-1]) if name == "linear_t" else (sizes[-1], out)
            parameters.append(draw(*shape) / max(1, sizes[-1]) ** 0.5)
            if "bias" in options:
                parameters.append(draw(out))
            sizes = (*sizes[:-1], out)
    return parameters


def split(step: str) -> tuple[str, list[str]]:
    """A step's name, and its options: "bias", an activation, dimensions."""
    name, *options = step.replace("(", "+").rstrip(")").split("+")
    return name, options


def outputs_one_by_one(x: Tensor, parameters: Sequence[Tensor], program: str) -> list[Tensor]:
    """What each computing step gives, by itself."""
    left, outputs = iter(parameters), []
    for step in program.split("; "):
        name, options = split(step)
        if name.startswith("linear"):
            weight = next(left)
            bias = next(left) if "bias" in options else None
            activation = next((o for o in options if o != "bias"), None)
            if name == "linear_t":
                weight = weight.t()
            x = functional.linear_act(x, weight, bias, activation)
        elif name == "center":
            x = functional.center(x, [int(d) for d in options[0].split(",")] if options else None)
        elif name == "flatten":
            first, last = map(int, options[0].split(","))
            x = x.flatten(first, last)
            continue
        else:
            x = ops.sequential(x, [], name)
        outputs.append(x)
    return outputs


def flattened_sizes(x: Tensor, outputs: Sequence[Tensor], program: str) -> list[int]:
    """For each flatten the number of its input's dimensions and their sizes."""
    left, sizes = iter(outputs), []
    for step in program.split("; "):
        name, options = split(step)
        if name == "flatten":
            sizes += [x.dim(), *x.shape]
            x = x.flatten(*map(int, options[0].split(",")))
        else:
            x = next(left)
    return sizes


def one_by_one(x: Tensor, parameters: Sequence[Tensor], program: str) -> Tensor:
    return outputs_one_by_one(x, parameters, program)[-1]


def leaves(tensors: Sequence[Tensor], wanted: Sequence[bool] | None = None) -> list[Tensor]:
    wanted = [True] * len(tensors) if wanted is None else wanted
    return [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]


def run(
    operator: Callable[..., Tensor],
    program: str,
    args: Sequence[Tensor],
    wanted: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """Output and all gradients."""
    x, *parameters = made = leaves(args, wanted)
    output = operator(x, parameters, program)
    if output.requires_grad:
        output.backward(drawer("gradient", output.dtype)(*output.shape).to(output.device))
    return [output.detach(), *(t.grad for t in made)]


def assert_same_bits(
    actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], what: Any = ""
) -> None:
    for place, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e is None:
            assert a is None, (what, place)
        else:
            assert a is not None, (what, place)
            assert same_bits(a, e), (what, place)


def assert_close(actual: Any, expected: Any, terms: int = 4096) -> None:
    """Values within the rounding of sums of ``terms`` products; None equals None alone."""
    got, want = tree_leaves(actual), tree_leaves(expected)
    for a, e in zip(got, want, strict=True):
        if e is None:
            assert a is None
            continue
        magnitude = max([1.0, *e.detach().abs().flatten().tolist()])
        torch.testing.assert_close(
            a.detach(), e.detach(), rtol=0, atol=terms**0.5 * torch.finfo(e.dtype).eps * magnitude
        )


# ---- the operator: bits ----------------------------------------------------------------

# Around the kernels' tiles, blocks of rows and shares of threads.
ROWS = (0, 1, 3, 6, 33, 64, 255, 256, 257, 600)


@every_dtype
@every_program
@pytest.mark.parametrize("threads", [1, 2])
def test_outputs_and_gradients_have_the_bits_of_the_single_layers(threads, program, dtype):
    with num_threads(threads):
        for rows in ROWS:
            args = arguments(program, (rows,), dtype)
            if program.startswith("flatten(0"):
                args = (args[0][:, None], *args[1:])
            assert_same_bits(
                run(ops.sequential, program, args), run(one_by_one, program, args), rows
            )


# Register tiles, panels of 64 columns, depth blocks of 256, and past the widest block; the last
# is work enough for threads, by rows and by columns.
WIDTHS = [
    (1, 1, 1, 1),
    (15, 17, 16, 31),
    (64, 64, 64, 8),
    (65, 63, 257, 129),
    (300, 512, 256, 512),
    (256, 513, 40, 600),
    (600, 20, 700, 1),
]


@every_dtype
@pytest.mark.parametrize("layer", ["linear", "linear_t"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_widths_around_block_edges(widths, layer, dtype):
    program = f"{layer}+bias+relu; {layer}+bias+tanh; {layer}+bias"
    parameters = draw_parameters(program, widths[:1], widths[1:], dtype)
    for rows, threads in itertools.product((1, 7, 63, 64, 300), (1, 2)):
        args = (drawer("wide", dtype)(rows, widths[0]), *parameters)
        with num_threads(threads):
            assert_same_bits(
                run(ops.sequential, program, args),
                run(one_by_one, program, args),
                (rows, threads),
            )


@every_dtype
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layer", ["linear", "linear_t"])
def test_weights_that_leave_the_caches_together_are_read_to_the_same_bits(layer, threads, dtype):
    width = 1100  # of rows that do not lie in the same sets of the caches
    twice = f"{layer}+tanh; {layer}+bias+tanh"
    depth = (33 << 20) // (2 * width * width * dtype.itemsize) + 1
    program = "; ".join([twice] * depth)
    parameters = draw_parameters(twice, (width,), (width, width), dtype) * depth
    x = drawer("large", dtype)(65, width)
    with num_threads(threads):
        for rows in (1, 2, 4, 5, 16, 17, 64, 65):
            expected = one_by_one(x[:rows], parameters, program)
            assert_same_bits([ops.sequential(x[:rows], parameters, program)], [expected], rows)


@pytest.mark.parametrize("widths", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("rows", [0, 2])
def test_layers_of_no_units(rows, widths):
    program = "linear+bias+sigmoid; linear_t+bias"
    args = (
        torch.randn(rows, widths[0]),
        *draw_parameters(program, widths[:1], widths[1:], torch.float32),
    )
    assert_same_bits(run(ops.sequential, program, args), run(one_by_one, program, args))


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_has_the_same_bits_in_every_batch(activation, dtype):
    act = followed_by(activation)
    program = f"linear+bias{act}; linear_t+bias{act}; linear{act}; linear_t"
    parameters = draw_parameters(program, (40,), (64, 130, 64, 5), dtype)
    x = drawer("batch", dtype)(600, 40)
    gradient = drawer("batch gradient", dtype)(600, 5)

    def forward_and_input_gradient(rows: slice) -> tuple[Tensor, Tensor]:
        batch = x[rows].clone().requires_grad_()
        output = ops.sequential(batch, parameters, program)
        return output.detach(), torch.autograd.grad(output, batch, gradient[rows])[0]

    with num_threads(1):
        alone = [forward_and_input_gradient(slice(i, i + 1)) for i in range(600)]
    expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    for threads, rows in itertools.product((1, 2, 4), (2, 5, 33, 64, 65, 128, 255, 257, 600)):
        with num_threads(threads):
            actual = forward_and_input_gradient(slice(rows))
        assert_same_bits(actual, [e[:rows] for e in expected], (threads, rows))


@pytest.mark.parametrize("layout", samples.LAYOUTS)
@pytest.mark.parametrize("which", ["input", "linear", "bias", "linear_t"])
def test_any_strides(which, layout):
    program = "linear+bias+tanh; linear_t+bias; sigmoid"
    shapes = {"input": (33, 40), "linear": (40, 30), "bias": (30,), "linear_t": (20, 30)}
    for dtype in (torch.float32, torch.bfloat16):
        draw = drawer(f"{which}-{layout}", dtype)
        args = [
            samples.LAYOUTS[layout if name == which else "contiguous"](draw, shape)
            for name, shape in shapes.items()
        ]
        args.append(draw(20))
        assert_same_bits(run(ops.sequential, program, args), run(one_by_one, program, args), dtype)


@pytest.mark.parametrize("layout", samples.LAYOUTS)
@pytest.mark.parametrize("end", ["linear+bias", "linear_t+tanh", "center", "tanh"])
def test_grad_output_of_any_strides(end, layout):
    program = f"linear+bias+tanh; linear_t+bias; {end}"
    sizes = (30, 30, 30)
    for dtype in (torch.float32, torch.bfloat16):
        x, *parameters = made = leaves(
            [drawer("x", dtype)(33, 40), *draw_parameters(program, (40,), sizes, dtype)]
        )
        gradient = samples.LAYOUTS[layout](drawer("gradient", dtype), (33, 30))
        actual, expected = (
            torch.autograd.grad(operator(x, parameters, program), made, gradient)
            for operator in (ops.sequential, one_by_one)
        )
        assert_same_bits(actual, expected, dtype)


@every_dtype
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 0, 3), (2, 1, 40, 5)], ids=str)
def test_any_rank_of_input(lead, dtype):
    program = "linear+bias+relu; linear_t+bias; center(-1); linear_t+elu"
    args = (
        drawer("rank", dtype)(*lead, 12),
        *draw_parameters(program, (12,), (20, 30, 9), dtype),
    )
    assert_same_bits(run(ops.sequential, program, args), run(one_by_one, program, args))


@every_program
def test_outputs_operator_gives_every_computing_steps_output(program):
    args = arguments(program, dtype=torch.float32)
    for wanted in (False, True):
        x, *parameters = leaves(args, [wanted] * len(args))
        actual = ops.sequential_outputs(x, parameters, program)
        assert_same_bits(actual, outputs_one_by_one(x, parameters, program))
        assert all(t.requires_grad == wanted for t in actual)


def test_gradients_may_arrive_at_any_output():
    program = VARIED[1]
    args = arguments(program)
    x, *parameters = made = leaves(args)
    count = len(outputs_one_by_one(x, parameters, program))
    for places in itertools.product([False, True], repeat=count):
        if not any(places):
            continue
        results = []
        for operator in (ops.sequential_outputs, outputs_one_by_one):
            chosen = itertools.compress(operator(x, parameters, program), places)
            loss = sum(o.pow(3).sum() for o in chosen)
            results.append(torch.autograd.grad(loss, made, allow_unused=True))
        assert_close(*results)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@every_dtype
@every_program
def test_deterministic_mode_finds_no_unwritten_memory(program, dtype, request):
    args = arguments(program, (40,), dtype)
    expected = run(ops.sequential, program, args)
    request.getfixturevalue("deterministic")
    assert torch.empty(8).isnan().all(), "fresh memory is not filled with NaN"
    assert_same_bits(run(ops.sequential, program, args), expected)


def test_no_argument_is_written_to():
    program = VARIED[0]
    args = arguments(program, dtype=torch.float32)
    before = [t.clone() for t in args]
    run(ops.sequential, program, args)
    assert_same_bits(args, before)


# ---- the operator: which gradients, what is saved --------------------------------------

THREE_LAYERS = {
    "linear": "linear+bias+tanh; linear+bias+tanh; linear+bias",
    "linear_t": "linear_t+bias+relu; linear_t+bias+relu; linear_t+bias",
    "center": "center; linear+bias; center(0); linear_t+bias+elu; tanh; linear+bias",
    "flatten": "flatten(1,-1); linear+bias; sigmoid; linear_t+bias+tanh; center; linear+bias+elu",
}
three_layers = pytest.mark.parametrize("program", THREE_LAYERS.values(), ids=THREE_LAYERS)


def three_layer_arguments(program: str) -> tuple[Tensor, ...]:
    sizes = (2, 2) if program.startswith("flatten") else (4,)
    return (
        drawer("three", torch.float64)(5, *sizes),
        *draw_parameters(program, sizes, (6, 7, 3), torch.float64),
    )


def saved_by(operator: Callable[..., Tensor], *args: Any) -> list[tuple[int, ...]]:
    """Sizes, sorted, of the distinct memory that a call saves for backward."""
    saved: dict[int, tuple[int, ...]] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = tuple(sorted(t.flatten().shape))
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        operator(*args)
    return sorted(saved.values())


@three_layers
def test_only_the_gradients_that_are_due_and_only_what_they_read_is_saved(program):
    args = three_layer_arguments(program)
    for wanted in itertools.product([False, True], repeat=len(args)):
        assert_same_bits(
            run(ops.sequential, program, args, wanted),
            run(one_by_one, program, args, wanted),
            wanted,
        )
        x, *parameters = leaves(args, wanted)
        saved = Counter(saved_by(ops.sequential, x, parameters, program))
        single = Counter(saved_by(one_by_one, x, parameters, program))
        assert saved == single, wanted
        output = ops.sequential(x, parameters, program)
        assert output.requires_grad == any(wanted)
        assert (output.grad_fn is None) == (not any(wanted))


@three_layers
def test_one_operator_forward_and_one_backward_asked_for_what_is_due(program):
    args = three_layer_arguments(program)
    for wanted in itertools.product([False, True], repeat=len(args)):
        with Calls() as calls:
            run(ops.sequential, program, args, wanted)
        layers = ("sequential", "sequential_outputs", "sequential_backward")
        seen = [(name, a) for name, a in calls.seen if name in layers]
        if any(wanted):
            (forward, _), (backward, (*_, mask)) = seen
            assert (forward, backward) == ("sequential_outputs", "sequential_backward")
            assert list(mask) == list(wanted)
        else:
            assert [name for name, _ in seen] == ["sequential"]


def test_autograd_grad_computes_only_what_it_is_asked_for():
    program = THREE_LAYERS["linear_t"]
    args = three_layer_arguments(program)
    x, *parameters = made = leaves(args)
    for asked in range(len(made)):
        with Calls() as calls:
            (actual,) = torch.autograd.grad(
                ops.sequential(x, parameters, program).pow(3).sum(), made[asked]
            )
        (expected,) = torch.autograd.grad(
            one_by_one(x, parameters, program).pow(3).sum(), made[asked]
        )
        assert same_bits(actual, expected)
        name, (*_, mask) = calls.seen[-1]
        assert name == "sequential_backward"
        assert [i for i, want in enumerate(mask) if want] == [asked]


@three_layers
def test_the_backward_operator_gives_what_its_mask_asks_for_and_needs_nothing_else(program):
    x, *parameters = args = three_layer_arguments(program)
    outputs = outputs_one_by_one(x, parameters, program)
    gradient = drawer("gradient", torch.float64)(*outputs[-1].shape)
    grads = [*[None] * (len(outputs) - 1), gradient]
    flattened = flattened_sizes(x, outputs, program)
    for mask in itertools.product([False, True], repeat=len(args)):
        expected = run(one_by_one, program, args, mask)[1:]
        actual = ops.sequential_backward(grads, x, outputs, parameters, flattened, program, mask)
        assert_same_bits(actual, [e for e in expected if e is not None], mask)
    # The bias of the last layer alone.
    mask = [False] * len(args)
    mask[-1] = True
    nothing = [*[None] * (len(outputs) - 1), outputs[-1]]
    (actual,) = ops.sequential_backward(
        grads, None, nothing, [None] * len(parameters), flattened, program, mask
    )
    assert same_bits(actual, run(one_by_one, program, args, mask)[-1])


@every_dtype
@every_program
def test_gradients_have_the_strides_of_their_parameters(program, dtype):
    args = arguments(program, (33,), dtype)
    _, *gradients = run(ops.sequential, program, args)
    for argument, gradient in zip(args, gradients, strict=True):
        assert gradient.stride() == argument.stride()
        assert gradient.dtype == dtype


class _NoGradient(torch.autograd.Function):
    """The identity that hands no gradient to its input."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:  # noqa: ARG004
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> None:  # noqa: ARG004
        return None


def test_what_no_gradient_reaches_gets_none():
    x, *parameters = made = leaves(three_layer_arguments(THREE_LAYERS["linear"]))
    _NoGradient.apply(ops.sequential(x, parameters, THREE_LAYERS["linear"])).sum().backward()
    assert [t.grad for t in made] == [None] * len(made)
    # From the first output, no gradient reaches later layers.
    first, *_ = ops.sequential_outputs(x, parameters, THREE_LAYERS["linear"])
    first.sum().backward()
    assert [t.grad is None for t in made] == [False] * 3 + [True] * 4


@pytest.mark.parametrize("frozen", [True, False])
def test_input_lives_as_long_as_the_first_weights_gradient_needs_it(frozen):
    program = "linear+bias; linear_t+bias"
    args = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5), torch.randn(2, 5), torch.randn(2)
    x, *parameters = leaves(args, [True, not frozen, True, True, True])
    x = x * 1
    alive = weakref.ref(x)
    y = ops.sequential(x, parameters, program)
    del x
    gc.collect()
    assert (alive() is None) == frozen
    y.sum().backward()
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("place", range(8))
def test_in_place_edit_is_an_error_exactly_where_it_is_for_the_single_layers(place):
    program = "linear+bias+tanh; linear_t+bias+relu; linear+bias"
    args = three_layer_arguments(program)
    for wanted in itertools.product([False, True], repeat=len(args)):

        def edited(operator: Any, wanted: Any = wanted) -> list[Tensor | None]:
            made = leaves(args, wanted)
            x, *parameters = tensors = [t.clone() for t in made]
            output = operator(x, parameters, program)
            [*tensors, output][place].mul_(2)
            if output.requires_grad:
                output.sum().backward()
            return [t.grad for t in made]

        actual, expected = outcome(edited, ops.sequential), outcome(edited, one_by_one)
        if isinstance(expected, list):
            assert_same_bits(actual, expected, wanted)
        else:
            assert actual is expected is RuntimeError, wanted


def test_second_backward_needs_retain_graph():
    x, *parameters = leaves(arguments(VARIED[0]))
    loss = ops.sequential(x, parameters, VARIED[0]).sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert_same_bits(torch.autograd.grad(loss, parameters), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_the_same_tensor_in_several_places_gets_the_sum():
    program = "linear+bias+tanh; linear_t+bias; linear+tanh"
    square, bias = leaves(drawer("tied", torch.float64)(2, 4, 4)[0:1].unbind()), None
    (square,) = square
    bias = drawer("bias", torch.float64)(4).requires_grad_()
    results = []
    for operator in (ops.sequential, one_by_one):
        y = operator(square, [square, bias, square, bias, square], program)
        results.append(torch.autograd.grad(y.pow(3).sum(), (square, bias)))
    assert_close(*results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode):
    x, *parameters = leaves(arguments(VARIED[0]))
    recorded = ops.sequential(x, parameters, VARIED[0])
    with mode():
        y = ops.sequential(x, parameters, VARIED[0])
    assert not y.requires_grad
    assert y.is_inference() == (mode is torch.inference_mode)
    assert same_bits(y, recorded)


# ---- the operator: derivatives and transforms ------------------------------------------


def away_from_kinks(program: str) -> list[Tensor]:
    """Leaves in float64 at which no finite difference crosses a kink."""
    sizes, units = PROGRAMS[program]
    for attempt in itertools.count():
        draw = drawer(program, torch.float64, attempt)
        args = [draw(3, *sizes), *draw_parameters(program, sizes, units, torch.float64)]
        x, *parameters = args
        plain = program.replace("+relu", "; relu").replace("+elu", "; elu")
        before = [x, *outputs_one_by_one(x, parameters, plain)]
        steps = [s for s in plain.split("; ") if not s.startswith("flatten")]
        bent = [z for z, step in zip(before, steps, strict=False) if step in samples.KINKED]
        if all(bool((z.abs() > samples.KINK_MARGIN).all()) for z in bent):
            return leaves(args)
    raise AssertionError("unreachable")


@every_program
def test_gradcheck(program):
    assert gradcheck(
        lambda x, *p: ops.sequential(x, p, program),
        away_from_kinks(program),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@varied_programs
def test_gradcheck_of_all_outputs(program):
    assert gradcheck(
        lambda x, *p: tuple(ops.sequential_outputs(x, p, program)),
        away_from_kinks(program),
        check_forward_ad=True,
        check_batched_grad=True,
    )


@every_program
def test_gradgradcheck(program):
    assert gradgradcheck(
        lambda x, *p: ops.sequential(x, p, program),
        away_from_kinks(program),
        check_batched_grad=True,
        check_fwd_over_rev=True,
        gen_non_contig_grad_outputs=True,
    )


def loss_of(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *a: f(*a).pow(3).sum()


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, a, t: grad(loss_of(f), tuple(range(len(a))))(*a),  # noqa: ARG005
    "vjp": lambda f, a, t: vjp(f, *a)[1](f(*a)),  # noqa: ARG005
    "jvp": lambda f, a, t: jvp(f, a, t),
    "jvp of grad": lambda f, a, t: jvp(grad(loss_of(f), tuple(range(len(a)))), a, t),
    "jacrev": lambda f, a, t: jacrev(f, (0, 1))(*a),  # noqa: ARG005
    "jacfwd": lambda f, a, t: jacfwd(f, (0, 1))(*a),  # noqa: ARG005
    "hessian": lambda f, a, t: hessian(loss_of(f), (0, 1))(*a),  # noqa: ARG005
    "per-sample gradients": lambda f, a, t: vmap(  # noqa: ARG005
        grad(lambda x, *p: loss_of(f)(x[None], *p), (1, len(a) - 1)), (0, *[None] * (len(a) - 1))
    )(*a),
    "vmap over the input": lambda f, a, t: vmap(f, (1, *[None] * (len(a) - 1)))(  # noqa: ARG005
        torch.stack([a[0], -a[0]], 1), *a[1:]
    ),
    "vmap over everything": lambda f, a, t: vmap(f)(  # noqa: ARG005
        *(torch.stack([v, v * 2]) for v in a)
    ),
    "vmap of a weight": lambda f, a, t: vmap(  # noqa: ARG005
        lambda w: f(a[0], w, *a[2:]), in_dims=1
    )(torch.stack([a[1], -a[1]], 1)),
}


@varied_programs
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform_equals_that_of_the_single_formulas(transform, program):
    args = arguments(program)
    tangents = tuple(torch.cos(t) for t in args)
    actual, expected = (
        transform(lambda x, *p, f=f: f(x, p, program), args, tangents)
        for f in (ops.sequential, one_by_one)
    )
    assert_close(actual, expected)


@varied_programs
def test_batched_grad_of_a_plain_backward(program):
    results = []
    for operator in (ops.sequential, one_by_one):
        x, *parameters = made = leaves(arguments(program))
        y = operator(x, parameters, program)
        several = drawer("several", torch.float64)(3, *y.shape)
        results.append(torch.autograd.grad(y, made, several, is_grads_batched=True))
    assert_close(*results)


# ---- the operator: dtypes, devices, modes ----------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.float64, None], ids=str)
@every_program
def test_autocast_computes_what_the_single_layers_compute_under_it(program, given, dtype):
    args = arguments(program, (8,), given or dtype)
    if given is None:  # a mixture: parameters in float32
        args = (args[0], *(t.float() for t in args[1:]))
    if program.startswith("flatten(0"):
        args = (args[0][:, None], *args[1:])

    def under_autocast(operator: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return run(operator, program, args)

    actual, expected = outcome(under_autocast, ops.sequential), outcome(under_autocast, one_by_one)
    has_activation_alone = any(
        split(step)[0] in reference.ACTIVATIONS for step in program.split("; ")
    )
    if isinstance(expected, list) and has_activation_alone:
        # Alone, under autocast, an activation is PyTorch's own.
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    elif isinstance(expected, list):
        assert_same_bits(actual, expected)
    else:
        assert actual is expected


@every_program
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
def test_meta_tensors_give_the_shapes_strides_and_dtypes_of_the_kernels(requires_grad, program):
    for rows in (0, 1, 5):
        args = arguments(program, (rows,), torch.bfloat16)
        real, meta = (
            run(ops.sequential, program, [t.to(d) for t in args], [requires_grad] * len(args))
            for d in ("cpu", "meta")
        )
        for r, m in zip(real, meta, strict=True):
            if r is None:
                assert m is None
            else:
                assert m.device.type == "meta"
                assert (m.shape, m.stride(), m.dtype) == (r.shape, r.stride(), r.dtype)


def test_fake_tensors_carry_backward():
    program = VARIED[2]
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(t) for t in arguments(program)]
        results = run(ops.sequential, program, args)
    assert all(isinstance(t, FakeTensor) for t in results)
    assert [g.shape for g in results[1:]] == [t.shape for t in args]


@varied_programs
def test_symbolic_sizes_stay_symbolic(program):
    def gradients(*args: Tensor) -> list[Tensor]:
        x, *own = made = leaves(args)
        y = ops.sequential(x, own, program)
        return [y, *torch.autograd.grad(y.pow(3).sum(), made)]

    # No two sizes alike: torch gives equal ones a common symbol.
    graph = make_fx(gradients, tracing_mode="symbolic")(*arguments(program, (11,)))
    for rows in (2, 9, 300):
        args = arguments(program, (rows,))
        assert_same_bits(graph(*args), gradients(*args))
    names = [str(n.target) for n in graph.graph.nodes if "mylayers.sequential" in str(n.target)]
    assert names == [
        "mylayers.sequential_outputs.default",
        "mylayers.sequential_backward.default",
    ]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@varied_programs
def test_opcheck_of_sequential(program, requires_grad):
    args = arguments(program, dtype=torch.float32)
    x, *parameters = leaves(args, [requires_grad] * len(args))
    opcheck(ops.sequential, (x, parameters, program))


@varied_programs
def test_opcheck_of_sequential_outputs(program):
    x, *parameters = leaves(arguments(program, dtype=torch.float32))
    opcheck(ops.sequential_outputs, (x, parameters, program))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@varied_programs
def test_opcheck_of_sequential_backward(program, requires_grad):
    x, *parameters = arguments(program, dtype=torch.float32)
    outputs = outputs_one_by_one(x, parameters, program)
    grads = [None] * len(outputs)
    grads[-1] = torch.ones_like(outputs[-1]).requires_grad_(requires_grad)
    mask = [True] * (1 + len(parameters))
    flattened = flattened_sizes(x, outputs, program)
    opcheck(ops.sequential_backward, (grads, x, outputs, parameters, flattened, program, mask))
    mask[0] = False
    opcheck(ops.sequential_backward, (grads, x, outputs, parameters, flattened, program, mask))


@every_dtype
def test_opcheck_in_every_compiled_dtype(dtype):
    program = VARIED[1]
    x, *parameters = leaves(arguments(program, dtype=dtype))
    opcheck(ops.sequential, (x, parameters, program))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.complex64, torch.complex128, torch.float8_e5m2],
    ids=lambda d: str(d)[6:],
)
@every_program
def test_other_dtypes_end_as_the_single_layers_do(program, dtype):
    plain = [t * 4 for t in arguments(program)]
    args = [t.to(dtype) for t in plain]
    for x, *parameters in (args, [args[0], *plain[1:]]):
        actual = outcome(ops.sequential, x, parameters, program)
        expected = outcome(one_by_one, x, parameters, program)
        if isinstance(expected, Tensor):
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected)
        else:
            assert actual is expected


def test_complex_gradients_are_those_of_the_single_layers():
    program = "linear+bias+tanh; center; linear_t+sigmoid"
    draw = drawer("complex", torch.complex128)
    args = draw(5, 4), draw(4, 3), draw(3), draw(2, 3)
    for a, e in zip(
        run(ops.sequential, program, args), run(one_by_one, program, args), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-13)


# torch.nested says that it is a prototype.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("program", ["linear+relu", "linear_t+tanh; linear+bias", "center", "relu"])
def test_nested_tensors_end_as_the_single_layers_do(program):
    sizes = (4,)
    parameters = draw_parameters(program, sizes, (3, 2), torch.float32)
    for wanted in (False, True):
        x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], requires_grad=wanted)
        actual = outcome(ops.sequential, x, parameters, program)
        expected = outcome(one_by_one, x, parameters, program)
        if isinstance(expected, Tensor):
            for a, e in zip(actual.unbind(), expected.unbind(), strict=True):
                assert_close(a, e)
        else:
            assert actual is expected


# ---- the operator: bad input -----------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "",
        " ",
        "relu;tanh",
        "relu; ",
        "; relu",
        " relu",
        "Relu",
        "swish",
        "linear+gelu",
        "linear+",
        "linear++relu",
        "linear+bias+",
        "linear+relu+",
        "linear+relu+bias",
        "linear+bias+gelu",
        "linear_x",
        "lineart",
        "linear(1)",
        "center()",
        "center(",
        "center(0",
        "center(0,)",
        "center(,0)",
        "center(0)x",
        "center(0, 1)",
        "center(0.5)",
        "center(99999999999999999999)",
        "flatten; relu",
        "flatten(1); relu",
        "flatten(1,2,3); relu",
        "center; linear+bias+relu; what",
    ],
)
def test_a_program_outside_the_grammar_is_a_value_error_that_quotes_it(program):
    x = torch.randn(2, 3, 3)
    for operator in (ops.sequential, ops.sequential_outputs):
        with pytest.raises(ValueError, match="sequential: program must name steps") as error:
            operator(x, [torch.randn(3, 3), torch.randn(3)], program)
        assert f'in "{program}"' in str(error.value)


def test_a_program_must_end_in_a_step_that_computes():
    with pytest.raises(ValueError, match="sequential: program must not end in a flatten"):
        ops.sequential(torch.randn(2, 3), [], "relu; flatten(0,1)")


W, B = torch.zeros(4, 3), torch.zeros(3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("program", "shape", "parameters", "error", "message"),
    [
        ("linear", (2, 4), [], ValueError, "parameters must hold 1 tensors for .* got 0"),
        ("linear+bias", (2, 4), [W], ValueError, "parameters must hold 2 tensors for .* got 1"),
        ("linear; tanh", (2, 4), [W, B], ValueError, "parameters must hold 1 tensors .* got 2"),
        ("linear", (), [W], RuntimeError, "input must have at least one dimension"),
        ("linear", (2, 5), [W], RuntimeError, "weight must be .in_units, units. .*= 5"),
        ("linear_t", (2, 4), [W], RuntimeError, "weight must be .* = 4"),
        ("linear; linear", (2, 4), [W, W], RuntimeError, "weight must be .* = 3"),
        ("linear; linear_t", (2, 4), [W, W.T], RuntimeError, "weight must be .* = 3"),
        ("linear", (2, 3), [B], RuntimeError, "weight must be 2-D"),
        ("linear_t", (2, 3), [B], RuntimeError, "weight must be 2-D|t\\(\\) expects"),
        ("linear+bias", (2, 4), [W, W], RuntimeError, "bias must be 1-D"),
        ("linear+bias", (2, 4), [W, B[:2]], RuntimeError, "bias must be .units. with units = 3"),
        ("linear", (2, 4), [W.double()], RuntimeError, "weight must have the dtype of input"),
        ("linear+bias", (2, 4), [W, B.half()], RuntimeError, "bias must have the dtype of input"),
        ("linear; tanh; linear_t", (2, 4), [W, W.double()], RuntimeError, "weight must have the"),
        ("center(2)", (2, 4), [], IndexError, "center: dim must be in"),
        ("center(0,-2)", (2, 4), [], RuntimeError, "center: dim must name each dimension once"),
        ("flatten(0,2); tanh", (2, 4), [], IndexError, "Dimension out of range"),
    ],
)
def test_bad_arguments_are_refused_with_the_layers_own_messages(
    program, shape, parameters, error, message, device
):
    for requires_grad in (False, True):
        x = torch.zeros(shape, device=device, requires_grad=requires_grad)
        moved = [p.to(device) for p in parameters]
        for operator in (ops.sequential, ops.sequential_outputs):
            with pytest.raises(error, match=message):
                operator(x, moved, program)


@pytest.mark.parametrize("program", ["linear", "linear_t+relu", "relu; linear"])
def test_another_device_is_refused(program):
    square = torch.zeros(4, 4, device="meta")
    with pytest.raises(
        RuntimeError, match="linear_act: weight must be on cpu like input; got meta"
    ):
        ops.sequential(torch.zeros(2, 4), [square], program)
    with pytest.raises(
        RuntimeError, match="linear_act: weight must be on meta like input; got cpu"
    ):
        ops.sequential(square, [torch.zeros(4, 4)], program)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_mask": [True]}, "output_mask must have 4 entries"),
        ({"grad_outputs": [B]}, "grad_outputs must hold 2 tensors or None"),
        ({"outputs": []}, "outputs must hold 2 tensors or None"),
        ({"parameters": [W]}, "parameters must hold 3 tensors"),
        ({"input": None}, "input 0 must be a tensor for the gradients asked for"),
        ({"outputs": [torch.zeros(2, 3), None]}, "output 1 must be a tensor"),
        ({"outputs": [None, torch.zeros(2, 4)]}, "output 0 must be a tensor"),
        ({"parameters": [None, None, W]}, "parameter 0 must be a tensor"),
        ({"grad_outputs": [None, None]}, "asks for gradient 0 .* which no grad_outputs reach"),
        ({"grad_outputs": [torch.zeros(2, 3), None]}, "asks for gradient 3 .*no grad_outputs"),
        ({"flattened": []}, "flattened must hold.* got too few for flatten 0"),
        ({"flattened": [3, 2, 3]}, "flattened must hold.* got too few for flatten 0"),
        ({"flattened": [-1, 2, 3]}, "flattened must hold.* got too few for flatten 0"),
        ({"flattened": [2, 2, 3, 1]}, "the sizes of 1 flattened tensors.* got 1 numbers more"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_backward_operator(change, message):
    named = {
        "grad_outputs": [None, torch.zeros(2, 4)],
        "input": torch.zeros(2, 4),
        "outputs": [torch.zeros(2, 3), torch.zeros(2, 4)],
        "parameters": [W, B, W],
        "flattened": [2, 2, 3],
        "program": "linear+bias; flatten(0,0); linear_t+tanh",
        "output_mask": [True] * 4,
    }
    assert len(ops.sequential_backward(*named.values())) == 4
    with pytest.raises(ValueError, match=f"sequential.*{message}"):
        ops.sequential_backward(*(named | change).values())


# ---- FusedSequential: what it fuses ----------------------------------------------------


def programs(net: nn.Module, x: Tensor) -> list[str]:
    """The programs of the operator calls of one call of ``net``."""
    with torch.no_grad(), Calls() as calls:
        net(x)
    return [args[2] for name, args in calls.seen if name == "sequential"]


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class _Named(nn.Linear):
    """A subclass that computes what nn.Linear does."""


class _Called(nn.Linear):
    def __call__(self, *args: Any) -> Any:
        return 2 * super().__call__(*args)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def replaced(layer: nn.Module) -> nn.Module:
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.5)


def halved(layer: nn.Module, name: str) -> nn.Module:
    class Half(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value / 2

    parametrize.register_parametrization(layer, name, Half())
    return layer


def compiled(layer: nn.Module) -> nn.Module:
    layer.compile(backend="eager")
    return layer


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


# name -> (children, programs of its calls)
FUSED: dict[str, tuple[Callable[[], list[nn.Module]], list[str]]] = {
    "nothing": (list, []),
    "linear": (lambda: [linear()], ["linear_t+bias"]),
    "no bias": (lambda: [nn.Linear(4, 4, bias=False), nn.ReLU()], ["linear_t+relu"]),
    "own": (lambda: [MyLinear(4, 3), MyLinear(3, 4, False)], ["linear+bias+relu; linear+relu"]),
    "own without activation": (
        lambda: [MyLinear(4, 3, activation=None), nn.Sigmoid(), nn.Tanh()],
        ["linear+bias+sigmoid; tanh"],
    ),
    "own with two": (lambda: [MyLinear(4, 3), nn.ELU()], ["linear+bias+relu; elu"]),
    "activations": (
        lambda: [
            linear(),
            nn.ReLU(),
            linear(),
            nn.Tanh(),
            linear(),
            nn.Sigmoid(),
            linear(),
            nn.ELU(),
            linear(),
            nn.GELU(),
            linear(),
            nn.GELU("tanh"),
        ],
        ["; ".join(f"linear_t+bias{followed_by(a)}" for a in reference.ACTIVATIONS)],
    ),
    "in place": (
        lambda: [linear(), nn.ReLU(inplace=True), linear(), nn.ELU(inplace=True)],
        ["linear_t+bias+relu; linear_t+bias+elu"],
    ),
    "in place first": (lambda: [nn.ReLU(inplace=True), linear()], ["linear_t+bias"]),
    "in place on a view": (
        lambda: [nn.Flatten(), nn.Identity(), nn.ReLU(inplace=True), linear()],
        ["linear_t+bias"],
    ),
    "activation first": (lambda: [nn.Tanh(), linear()], ["tanh; linear_t+bias"]),
    "activations alone": (lambda: [nn.Tanh(), nn.ReLU(), nn.Dropout()], []),
    "centered": (
        lambda: [CenteredLayer(), linear(), CenteredLayer(-1), CenteredLayer((0, 1))],
        ["center; linear_t+bias; center(-1); center(0,1)"],
    ),
    "identity and dropout": (
        lambda: [nn.Identity(), linear(), nn.Dropout(), nn.Identity(), nn.Tanh(), nn.Dropout(0)],
        ["linear_t+bias+tanh"],
    ),
    "flatten": (
        lambda: [nn.Flatten(), linear(), nn.Flatten(0, -1), nn.Tanh()],
        ["flatten(1,-1); linear_t+bias; flatten(0,-1); tanh"],
    ),
    "flatten at the end": (lambda: [linear(), nn.Flatten(0)], ["linear_t+bias"]),
    "flatten alone": (lambda: [nn.Flatten(0)], []),
    "elu of another alpha": (lambda: [linear(), nn.ELU(2.0), linear()], ["linear_t+bias"] * 2),
    "another type": (
        lambda: [linear(), nn.LayerNorm(4), nn.Tanh(), linear(), nn.SiLU()],
        ["linear_t+bias", "tanh; linear_t+bias"],
    ),
    "own forward": (
        lambda: [linear(), _Doubled(4, 4), nn.Tanh(), linear()],
        ["linear_t+bias", "tanh; linear_t+bias"],
    ),
    "own call": (lambda: [_Called(4, 4), nn.Tanh(), linear()], ["tanh; linear_t+bias"]),
    "subclass": (lambda: [_Named(4, 4), nn.Tanh()], ["linear_t+bias+tanh"]),
    "hooked": (lambda: [linear(), hooked(nn.Tanh()), linear()], ["linear_t+bias"] * 2),
    "forward replaced": (lambda: [replaced(linear()), linear()], ["linear_t+bias"]),
    "weight norm": (
        lambda: [parametrizations.weight_norm(linear()), nn.Tanh(), linear()],
        ["tanh; linear_t+bias"],
    ),
    "spectral norm": (
        lambda: [parametrizations.spectral_norm(linear()), linear()],
        ["linear_t+bias"],
    ),
    "parametrised": (lambda: [halved(MyLinear(4, 4), "weight"), linear()], ["linear_t+bias"]),
    "parametrised bias": (lambda: [halved(linear(), "bias"), linear()], ["linear_t+bias"]),
    "pruned": (lambda: [pruned(linear()), linear()], ["linear_t+bias"]),
    "pruned for good": (lambda: [prune.remove(pruned(linear()), "weight")], ["linear_t+bias"]),
    "compiled": (lambda: [compiled(linear()), linear()], ["linear_t+bias"]),
    "nested": (
        lambda: [linear(), FusedSequential(nn.Tanh(), linear()), nn.Sequential(linear())],
        ["linear_t+bias", "tanh; linear_t+bias"],
    ),
}


def stock(net: nn.Sequential) -> nn.Sequential:
    """The very children in an nn.Sequential."""
    plain = nn.Sequential()
    plain._modules = dict(net._modules)
    plain.training = net.training
    return plain


def results(net: nn.Module, x: Tensor, inner: nn.Module | None = None) -> list[Tensor | None]:
    """Output, and the gradients of the input and of all parameters of ``inner``."""
    x = x.clone().requires_grad_()
    parameters = [p for p in (inner or net).parameters() if p.requires_grad]
    torch.manual_seed(1)  # dropout
    y = net(x * 1)
    return [y.detach(), *torch.autograd.grad(y.pow(3).sum(), [x, *parameters], allow_unused=True)]


def assert_like_stock(net: FusedSequential, x: Tensor) -> None:
    """Twice: the first call plans, the second is quick."""
    for _ in range(2):
        assert_close(results(net, x), results(stock(net), x))


@pytest.mark.parametrize(("make", "expected"), FUSED.values(), ids=FUSED)
def test_which_children_one_call_computes_and_their_results(make, expected):
    net, x = FusedSequential(*make()).eval(), torch.randn(5, 4)
    assert programs(net, x) == expected
    assert programs(net, x) == expected  # by the plan that is kept
    assert_like_stock(net, x)


def test_an_in_place_activation_first_changes_its_input_as_ever():
    net, x = FusedSequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), torch.randn(3, 4)
    net(x)
    assert x.min() == 0


def test_bits_of_a_fused_network_are_those_of_its_layers():
    net = FusedSequential(
        MyLinear(30, 40, activation="tanh"),
        CenteredLayer(0),
        MyLinear(40, 50, activation="elu"),
        nn.Dropout(),
        MyLinear(50, 3, bias=False, activation=None),
    ).eval()
    for rows in (1, 7, 300):
        x = torch.randn(rows, 30)
        assert_same_bits(results(net, x), results(stock(net), x), rows)


@every_dtype
def test_a_network_of_stock_layers_has_the_bits_of_ours(dtype):
    net = FusedSequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 9)).to(dtype)
    ours = nn.Sequential(MyLinear.from_linear(net[0], "tanh"), MyLinear.from_linear(net[2], None))
    x = torch.randn(33, 30, dtype=dtype)
    actual, expected = results(net, x), results(ours, x)
    assert_same_bits(actual, [e.T if i in (2, 4) else e for i, e in enumerate(expected)])


@every_dtype
@pytest.mark.parametrize("rows", [1, 4, 33])
def test_a_stock_weight_that_lies_in_out_in_memory_changes_no_bit(rows, dtype):
    net = FusedSequential(nn.Linear(70, 130), nn.Tanh(), nn.Linear(130, 9)).to(dtype)
    x = torch.randn(rows, 70, dtype=dtype)
    expected, parameters = results(net, x), list(net.parameters())
    for layer in (net[0], net[2]):
        layer.weight.data = layer.weight.data.T.contiguous().T
        assert layer.weight.T.is_contiguous()
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert_same_bits(results(net, x), expected)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 4), (2, 0, 4)], ids=str)
def test_any_rank_of_a_networks_input(shape):
    assert_like_stock(
        FusedSequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(shape)
    )


# ---- FusedSequential: one of nn.Sequential's kind --------------------------------------


def small() -> FusedSequential:
    """One chain; every kind of layer."""
    torch.manual_seed(0)
    net = FusedSequential(
        MyLinear(4, 6, activation="tanh"),
        nn.ELU(),
        CenteredLayer(0),
        nn.Dropout(0.5),
        nn.Identity(),
        nn.Linear(6, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    return net.eval()


def split_net() -> FusedSequential:
    """Two chains around a layer that runs by itself."""
    torch.manual_seed(0)
    return FusedSequential(
        nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Dropout(0.5), nn.Linear(6, 3), nn.ReLU()
    ).eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def x() -> Tensor:
    return drawer("input", torch.float32)(5, 4)


def test_constructor_forms_names_and_repr():
    layers = [nn.Linear(4, 3), nn.Tanh()]
    named = FusedSequential(OrderedDict(first=layers[0], then=layers[1]))
    assert [name for name, _ in named.named_children()] == ["first", "then"]
    assert named.first is layers[0]
    assert [n for n, _ in FusedSequential(*layers).named_parameters()] == ["0.weight", "0.bias"]
    assert repr(FusedSequential(*layers)) == "Fused" + repr(nn.Sequential(*layers))
    assert isinstance(named, nn.Sequential)
    with pytest.raises(TypeError, match="is not a Module subclass"):
        FusedSequential(3)


def test_indexing_slicing_iteration_and_arithmetic(x):
    net = small()
    children = list(net.children())
    assert len(net) == 8
    assert list(net) == children
    assert net[0] is children[0]
    assert net[-1] is children[-1]
    with pytest.raises(IndexError):
        net[8]
    part = net[5:]
    assert type(part) is FusedSequential
    assert list(part) == children[5:]
    hidden = net[:5](x)
    assert_close(part(hidden), net(x))
    assert list(net + nn.Sequential(nn.Tanh()))[:8] == children
    assert list(net * 2) == children * 2
    seen = []
    assert net.apply(seen.append) is net
    assert seen == [*children, net]


def test_state_dict_goes_both_ways(x):
    net, other = small(), stock(copy.deepcopy(small()))
    state = net.state_dict()
    assert list(state) == list(other.state_dict())
    other.load_state_dict({k: v + 1 for k, v in state.items()})
    net(x)
    net.load_state_dict(other.state_dict())
    assert_close(net(x), other(x))


# Every one changes the result of a network that was called before.
EDITS: dict[str, Callable[[FusedSequential], Any]] = {
    "data": lambda n: n[0].weight.data.mul_(2),
    "data replaced": lambda n: setattr(n[0].weight, "data", n[0].weight.data * 2),
    "in place": lambda n: torch.no_grad()(n[5].bias.add_)(1),
    "new parameter": lambda n: setattr(n[5], "weight", nn.Parameter(n[5].weight.detach() + 1)),
    "bias removed": lambda n: setattr(n[0], "bias", None),
    "bias made": lambda n: setattr(n[7], "bias", nn.Parameter(torch.ones(3))),
    "both biases": lambda n: (setattr(n[5], "bias", None), setattr(n[0], "bias", None)),
    "activation": lambda n: setattr(n[0], "activation", "sigmoid"),
    "no activation": lambda n: setattr(n[0], "activation", None),
    "elu alpha": lambda n: setattr(n[1], "alpha", 2.0),
    "center dim": lambda n: setattr(n[2], "dim", 1),
    "center list": lambda n: setattr(n[2], "dim", [0, 1]),
    "dropout trains": lambda n: n[3].train(),
    "all train": lambda n: n.train(),
    "replaced by another type": lambda n: n.__setitem__(6, nn.Tanh()),
    "replaced by an unfused type": lambda n: n.__setitem__(6, nn.Hardtanh(0.1, 0.2)),
    "replaced by its own type": lambda n: n.__setitem__(5, nn.Linear(6, 5)),
    "replaced by a subclass": lambda n: n.__setitem__(7, _Doubled(5, 3)),
    "append": lambda n: n.append(nn.Linear(3, 2)),
    "append what is not fused": lambda n: n.append(nn.Softmax(-1)),
    "insert": lambda n: n.insert(0, nn.Linear(4, 4)),
    "extend": lambda n: n.extend([nn.Tanh(), nn.Linear(3, 1)]),
    "pop": lambda n: n.pop(-1),
    "delete": lambda n: n.__delitem__(2),
    "delete a slice": lambda n: n.__delitem__(slice(5, None)),
    "add": lambda n: n.__iadd__(nn.Sequential(nn.Linear(3, 4))),
    "add_module": lambda n: n.add_module("last", nn.Linear(3, 2)),
    "hook": lambda n: n[6].register_forward_hook(lambda m, a, y: y + 1),  # noqa: ARG005
    "pre-hook": lambda n: n[5].register_forward_pre_hook(lambda m, a: (a[0] + 1,)),  # noqa: ARG005
    "parametrised": lambda n: halved(n[5], "weight"),
    "bias parametrised": lambda n: halved(n[0], "bias"),
    "pruned": lambda n: pruned(n[0]),
    "forward of one child": lambda n: replaced(n[5]),
    "loaded": lambda n: n.load_state_dict({k: v + 1 for k, v in n.state_dict().items()}),
    "loaded by assignment": lambda n: n.load_state_dict(
        {k: v + 1 for k, v in n.state_dict().items()}, assign=True
    ),
    "modules reversed": lambda n: setattr(
        n, "_modules", {k: n._modules[k] for k in sorted(n._modules, key=lambda k: k in "12")}
    ),
    "optimiser step": lambda n: torch.optim.SGD(n.parameters(), 0.1).step(
        lambda: n(torch.ones(5, 4)).sum().backward()
    ),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_after_a_call_takes_effect_at_once(edit, x):
    net = small()
    net[7].bias = None
    before = [net(x), net(x)][-1]
    edit(net)
    after = results(net, x)
    assert after[0].shape != before.shape or not torch.equal(after[0], before)
    assert_close(after, results(stock(net), x))
    assert_close(results(net, x), after)


@pytest.mark.parametrize(
    ("kind", "change"), [("forward", lambda y: y + 1), ("pre", lambda y: y * 2)]
)
def test_a_hook_of_its_own_changes_what_passes(kind, change, x):
    net = small()
    plain = net(x)
    if kind == "forward":
        handle = net.register_forward_hook(lambda m, a, y: change(y))  # noqa: ARG005
        expected = change(plain)
    else:
        handle = net.register_forward_pre_hook(lambda m, a: (change(a[0]),))  # noqa: ARG005
        expected = net[:](change(x))
    assert_close(net(x), expected)
    handle.remove()
    assert same_bits(net(x), plain)


def test_edits_to_one_part_of_several_take_effect(x):
    for edit in (
        lambda n: setattr(n[0], "bias", None),
        lambda n: n[3].train(),
        lambda n: n.__setitem__(1, nn.Sigmoid()),
        lambda n: n.__setitem__(2, nn.Tanh()),
        lambda n: setattr(n[4], "weight", nn.Parameter(n[4].weight.detach() * 2)),
        lambda n: n[5].register_forward_hook(lambda m, a, y: y + 1),  # noqa: ARG005
        lambda n: n.train(),
        lambda n: n.append(nn.Tanh()),
        lambda n: n.__delitem__(0) or n.insert(0, nn.Linear(4, 6)),
    ):
        net = split_net()
        before = [net(x), net(x)][-1]
        edit(net)
        assert_like_stock(net, x)
        assert not torch.equal(results(net, x)[0], before)


@pytest.mark.parametrize("cls", [nn.Linear, MyLinear, nn.Tanh, nn.ELU, CenteredLayer])
def test_a_class_whose_forward_is_replaced_is_called_by_it(cls, monkeypatch, x):
    layers = [nn.Linear(4, 4), nn.Tanh(), MyLinear(4, 4), nn.ELU(), CenteredLayer()]
    net = FusedSequential(*layers)
    before = [net(x), net(x)][-1]
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, v: 2 * own(self, v))
    for called in (net, FusedSequential(*layers)):
        assert not torch.equal(called(x), before)
        assert_like_stock(called, x)
    monkeypatch.undo()
    assert same_bits(net(x), before)


def test_nn_modules_own_call_may_be_replaced(monkeypatch, x):
    net = small()
    net(x)
    seen, own = [], nn.Module.__call__

    def spy(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(self).__name__)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", spy)
    fused = net(x)
    assert seen == ["FusedSequential", *(type(m).__name__ for m in net)]
    assert_close(fused, stock(net)(x))


def test_a_subclass_with_its_own_forward_is_called_by_it(x):
    class Doubled(FusedSequential):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    net = Doubled(*small())
    expected = 2 * stock(net)(x)
    for _ in range(3):
        assert_close(net(x), expected)


def test_a_replaced_forward_of_its_own_is_called(monkeypatch, x):
    net = small()
    y = net(x)
    own = net.forward
    net.forward = lambda v: 2 * own(v)
    assert_close(net(x), 2 * y)
    assert_close(net(x), 2 * y)
    del net.forward
    assert same_bits(net(x), y)
    class_own = FusedSequential.forward
    monkeypatch.setattr(FusedSequential, "forward", lambda self, v: 3 * class_own(self, v))
    assert_close(net(x), 3 * y)


def test_a_subclass_that_iterates_otherwise_computes_in_that_order(x):
    class Reversed(FusedSequential):
        def __iter__(self) -> Iterator[nn.Module]:
            return reversed(list(self._modules.values()))

    net = Reversed(nn.Linear(4, 4), nn.Linear(4, 4))
    for _ in range(3):
        assert_close(net(x), net[0](net[1](x)))


def test_a_subclass_that_looks_at_each_result_before_it_gives_the_next_child(x):
    class Exit(FusedSequential):
        def __iter__(self) -> Iterator[nn.Module]:
            for child in self._modules.values():
                if self.done:
                    return
                yield child

    net = Exit(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4))
    net.done = False
    net[1].register_forward_hook(lambda *_: setattr(net, "done", True))
    for _ in range(3):
        net.done = False
        assert_close(net(x), net[0](x))


@pytest.mark.parametrize("way", ["__iter__", "_modules"])
def test_what_gives_its_children_in_a_way_of_its_own_is_not_planned_at_each_call(
    way, x, monkeypatch
):
    class Own(FusedSequential):
        if way == "__iter__":

            def __iter__(self) -> Iterator[nn.Module]:
                return iter(self._modules.values())

    net = Own(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    if way == "_modules":
        net._modules = OrderedDict(net._modules)
    expected = nn.Sequential.forward(net, x)
    for function in ("plan", "_parts"):
        monkeypatch.setattr(sequential, function, lambda *_: pytest.fail("planned"))
    for _ in range(3):
        assert same_bits(net(x), expected)


def _iterating(net: FusedSequential) -> None:
    class Own(FusedSequential):
        def __iter__(self) -> Iterator[nn.Module]:
            return iter(self._modules.values())

    net.__class__ = Own


def _forwarding(net: FusedSequential) -> None:
    class Own(FusedSequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    net.__class__ = Own


def _getting(net: FusedSequential) -> None:
    class Own(FusedSequential):
        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name)

    net.__class__ = Own


# Of these nothing but forward is the network's own.
OWN_FORWARDS: dict[str, Callable[[FusedSequential], Any]] = {
    "iter of its class": _iterating,
    "forward of its class": _forwarding,
    "getattr of its class": _getting,
    "forward": lambda n: setattr(n, "forward", functools.partial(FusedSequential.forward, n)),
    "ordered children": lambda n: setattr(n, "_modules", OrderedDict(n._modules)),
}


def calls_through_nn_module(net: FusedSequential, x: Tensor) -> int:
    """How often a call of the network goes through ``nn.Module``'s own."""
    count = 0

    def seen(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        own = frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is net
        count += own and event == "call"

    sys.setprofile(seen)
    try:
        net(x)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("change", OWN_FORWARDS.values(), ids=OWN_FORWARDS)
def test_a_call_goes_straight_to_a_forward_of_its_own(change, x):
    net = small()
    change(net)
    expected = nn.Sequential.forward(net, x)
    for _ in range(2):
        assert_close(net(x), expected)
    assert calls_through_nn_module(net, x) == 0
    for register in (nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook):
        seen: list[Any] = []
        handle = register(net, lambda *given, seen=seen: seen.append(given))
        assert_close(net(x), expected)
        assert len(seen) == 1
        assert calls_through_nn_module(net, x) == 1
        handle.remove()
    with net_hooks() as events:
        assert_close(net(x), expected)
    assert events[-1] is net
    assert calls_through_nn_module(net, x) == 0
    net._call_impl = lambda v: 2 * nn.Module._call_impl(net, v)
    assert_close(net(x), 2 * expected)
    del net._call_impl
    net.forward = lambda v: 3 * nn.Sequential.forward(net, v)
    assert_close(net(x), 3 * expected)


@contextlib.contextmanager
def net_hooks() -> Iterator[list[nn.Module]]:
    """The modules that are called meanwhile, as a hook on all modules sees them."""
    events: list[nn.Module] = []
    handle = global_hooks.register_module_forward_hook(lambda m, *_: events.append(m))
    try:
        yield events
    finally:
        handle.remove()


@pytest.mark.parametrize("change", OWN_FORWARDS.values(), ids=OWN_FORWARDS)
def test_a_network_that_is_as_ever_again_is_fused_again(change, x):
    net = small()
    children = net._modules
    change(net)
    net(x)
    net.__class__, net._modules = FusedSequential, children
    vars(net).pop("forward", None)
    net(x)
    assert calls_through_nn_module(net, x) == 0
    with Calls() as calls:
        net(x)
    assert [name for name, _ in calls.seen if name.startswith("sequential")] != []


@pytest.mark.parametrize("place", [None, 0, 1], ids=["network", "linear", "activation"])
@pytest.mark.parametrize("calls", [0, 2])
def test_a_module_that_was_compiled_taken_back_and_compiled_again(place, calls, x):
    net = FusedSequential(nn.Linear(4, 4), nn.Tanh())
    module = net if place is None else net[place]
    module._compiled_call_impl = None
    for _ in range(calls):
        net(x)
    expected = net(x)
    own = type(module).forward
    module._compiled_call_impl = lambda v: 2 * own(module, v)
    for _ in range(2):
        assert_close(net(x), stock(net)(x) * (2 if place is None else 1))
    assert not torch.equal(net(x), expected)
    module._compiled_call_impl = None
    assert same_bits(net(x), expected)


def test_children_in_an_ordered_dictionary_that_was_reordered(x):
    net = FusedSequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net(x)
    net._modules = OrderedDict(net._modules)
    net._modules.move_to_end("0")
    assert_like_stock(net, x)


@pytest.mark.parametrize("dims", [[0], (0,), torch.tensor(0).numpy()[()]], ids=str)
def test_a_centered_layer_may_hold_any_dim_that_center_takes(dims, x):
    net = FusedSequential(nn.Linear(4, 4), CenteredLayer(1))
    net(x)
    net[1].dim = dims
    assert_like_stock(net, x)
    if isinstance(dims, list):
        dims[0] = 1
        assert_like_stock(net, x)


def test_flatten_may_change_its_dimensions():
    net, x = FusedSequential(nn.Flatten(), CenteredLayer(-1)), torch.randn(2, 3, 4, 5)
    assert_like_stock(net, x)
    net[0].start_dim = 2
    assert_like_stock(net, x)
    net[0].end_dim = 2
    assert_like_stock(net, x)


def test_moving_to_another_dtype(x):
    net = small()
    expected = net(x)
    assert copy.deepcopy(net).to("meta")(x.to("meta")).shape == expected.shape
    assert net.to(torch.float64)(x.double()).dtype == torch.float64
    assert_like_stock(net, x.double())
    with pytest.raises(RuntimeError, match="weight must have the dtype of input"):
        net(x)


def test_tied_weights_within_and_across_networks(x):
    net, other = (
        FusedSequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
        FusedSequential(nn.Linear(4, 4)),
    )
    net[2].weight = net[0].weight
    other[0].weight = net[0].weight
    assert len(list(net.parameters())) == 3
    for n in (net, other):
        assert_like_stock(n, x)
        before = n(x)
        net[0].weight.data.mul_(2)
        assert not torch.equal(n(x), before)
        assert_like_stock(n, x)


def test_one_child_in_several_places(x):
    layer = nn.Linear(4, 4)
    net = FusedSequential(layer, nn.Tanh(), layer, nn.Tanh(), layer)
    assert programs(net, x) == ["linear_t+bias+tanh; linear_t+bias+tanh; linear_t+bias"]
    assert_like_stock(net, x)


@pytest.mark.parametrize("make", [small, split_net])
def test_functional_call_and_transforms(make, x):
    net = make()
    net(x)
    given = {name: p.detach() * 0.5 + 0.1 for name, p in net.named_parameters()}
    plain = stock(net)

    def loss(module: nn.Module) -> Callable[..., Tensor]:
        return lambda p, v: functional_call(module, p, (v,)).pow(3).sum()

    assert_close(functional_call(net, given, (x,)), functional_call(plain, given, (x,)))
    assert_close(grad(loss(net))(given, x), grad(loss(plain))(given, x))
    stacked = {name: torch.stack([p, p * 2]) for name, p in given.items()}
    assert_close(
        vmap(lambda p: functional_call(net, p, (x,)))(stacked),
        vmap(lambda p: functional_call(plain, p, (x,)))(stacked),
    )
    assert_like_stock(net, x)  # its own parameters again


@pytest.mark.parametrize("make", [small, split_net])
def test_frozen_layers_and_modes(make, x):
    net = make()
    net(x)
    for frozen in (("0.",), ("0.bias",), ("4.", "5."), ("",)):
        for name, p in net.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        assert_like_stock(net, x)
    y = net(x)
    assert not y.requires_grad
    net.requires_grad_(True)
    assert net(x).requires_grad
    with torch.no_grad():
        assert not net(x).requires_grad
    with torch.inference_mode():
        assert net(x).is_inference()
    assert same_bits(net(x), y)


@pytest.mark.parametrize("make", [small, split_net])
def test_dropout_in_training_is_stocks(make, x):
    net = make()
    for training in (False, True, False, True):
        net.train(training)
        torch.manual_seed(3)
        actual = net(x)
        torch.manual_seed(3)
        assert_close(actual, stock(net)(x))
    net.eval()
    net[3].train()
    assert not torch.equal(net(x), net(x))
    net[3].eval()
    assert torch.equal(net(x), net(x))
    net.train()
    net[3].eval()
    assert torch.equal(net(x), net(x))


# ---- FusedSequential: hooks ------------------------------------------------------------

HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward pre": lambda m, f: m.register_forward_pre_hook(lambda m, a: f(a[0].shape)),  # noqa: ARG005
    "forward pre with kwargs": lambda m, f: m.register_forward_pre_hook(
        lambda m, a, k: f(a[0].shape, k),  # noqa: ARG005
        with_kwargs=True,
    ),
    "forward": lambda m, f: m.register_forward_hook(lambda m, a, y: f(a[0].shape, y.shape)),  # noqa: ARG005
    "always": lambda m, f: m.register_forward_hook(
        lambda m, a, y: f(y.shape),  # noqa: ARG005
        always_call=True,
    ),
    "full backward pre": lambda m, f: m.register_full_backward_pre_hook(lambda m, g: f(g[0].shape)),  # noqa: ARG005
    "full backward": lambda m, f: m.register_full_backward_hook(
        lambda m, i, o: f(o[0].shape)  # noqa: ARG005
    ),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("place", [0, 1, 5, None], ids=str)
@pytest.mark.parametrize("make", [small, split_net])
def test_hooks_are_called_with_what_stock_gives_them(make, place, register, x):
    runs = []
    for fused in (True, False):
        net = make()
        net(x)
        net = net if fused else stock(net)
        events: list[Any] = []
        handle = register(
            net if place is None else net[place],
            lambda *seen, events=events: events.append(seen),
        )
        found = results(net, x)
        assert len(events) == 1
        handle.remove()
        net(x)
        assert len(events) == 1
        runs.append((events, found))
    (events, actual), (expected_events, expected) = runs
    assert events == expected_events
    assert_close(actual, expected)


@pytest.mark.parametrize(
    "register",
    [
        global_hooks.register_module_forward_pre_hook,
        global_hooks.register_module_forward_hook,
        global_hooks.register_module_full_backward_pre_hook,
        global_hooks.register_module_full_backward_hook,
    ],
)
def test_global_hooks_see_every_layer(register, x):
    runs = []
    for wrap in (lambda n: n, stock):
        net = small()
        net(x)
        net = wrap(net)
        events: list[Any] = []
        handle = register(lambda m, *_, events=events: events.append(len(list(m.modules()))))
        try:
            found = results(net, x)
        finally:
            handle.remove()
        count = len(events)
        results(net, x)
        assert len(events) == count
        runs.append((events, found))
    (events, actual), (expected_events, expected) = runs
    assert len(events) == 9
    assert events == expected_events
    assert_close(actual, expected)


def test_hooks_on_all_modules_are_found_where_their_dictionary_is_another(monkeypatch, x):
    """PyTorch's own tests put one in its place between them."""
    net, seen = small(), []
    net(x)
    monkeypatch.setattr(global_hooks, "_global_forward_hooks", OrderedDict())
    handle = global_hooks.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    results(net, x)
    assert seen == [*map(type, net), type(net)]
    handle.remove()
    with Calls() as calls:
        results(net, x)
    assert len(seen) == len(net) + 1
    assert [name for name, _ in calls.seen if name.startswith("sequential")] != []


# Of the parameters that torch.nn.functional.linear takes, those that our operators refuse.
SHAPES: dict[str, Callable[[nn.Linear], Any]] = {
    "a bias of one": lambda m: setattr(m, "bias", nn.Parameter(torch.rand(1))),
    "a scalar bias": lambda m: setattr(m, "bias", nn.Parameter(torch.rand(()))),
    "a bias of two dimensions": lambda m: setattr(m, "bias", nn.Parameter(torch.rand(1, 3))),
    "a bias for each row": lambda m: setattr(m, "bias", nn.Parameter(torch.rand(5, 3))),
    "a vector for a weight": lambda m: (
        setattr(m, "bias", None),
        setattr(m, "weight", nn.Parameter(torch.rand(6))),
    ),
}


@pytest.mark.parametrize("edit", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.filterwarnings("error")
def test_parameters_of_shapes_that_pytorchs_linear_takes(edit, calls, traced):
    x = torch.rand(5, 4)
    net = FusedSequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    for _ in range(calls):
        net(x)
    edit(net[2])
    expected = results(stock(net), x)
    if traced:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            torch.testing.assert_close(torch.jit.trace(net, x)(x), stock(net)(x))
    for _ in range(3):
        assert_close(results(net, x), expected)
    (found,) = (row for row in mylayers.optimize(net).findings if not row.fused)
    assert found.path == "2"


@pytest.mark.parametrize("cls", [nn.Tanh, nn.Linear, MyLinear])
def test_a_child_that_was_not_initialised_fails_as_in_stock(cls, x):
    net = FusedSequential(nn.Linear(5, 4), nn.Tanh())
    net._modules["1"] = cls.__new__(cls)
    assert outcome(net, x) == outcome(stock(net), x)
    net._modules["1"] = cls.__new__(cls)
    net._modules["1"].__dict__["_parameters"] = None
    assert outcome(net, x) == outcome(stock(net), x)


@pytest.mark.parametrize(
    "child", [nn.Flatten(10**25), nn.Flatten(0, -(10**25)), CenteredLayer(10**25)], ids=repr
)
def test_dims_beyond_64_bits_fail_as_the_layer_does(child, x):
    net = FusedSequential(nn.Linear(5, 4), child, nn.Linear(4, 3))
    assert outcome(net, x) == outcome(stock(net), x)


OBSTACLES: dict[str, Callable[[FusedSequential], Any]] = {
    "nothing": lambda n: None,  # noqa: ARG005
    "hook": lambda n: hooked(n[5]),
    "hooks": lambda n: [hooked(child) for child in n],
    "hook of its own": hooked,
    "weight norm": lambda n: parametrizations.weight_norm(n[5]),
    "pruned": lambda n: pruned(n[5]),
    "forward replaced": lambda n: replaced(n[5]),
    "forward of its own": replaced,
    "alpha": lambda n: setattr(n[1], "alpha", 2.0),
    "dims in a list": lambda n: setattr(n[2], "dim", [0]),
    "class with its own forward": lambda n: n.__setitem__(7, _Counted(5, 3)),
    "in training": lambda n: n.train(),
    "foreign weight": lambda n: setattr(n[5], "weight", nn.Parameter(_Tagged(n[5].weight))),
    "attribute that came and went": lambda n: (setattr(n[5], "note", 1), delattr(n[5], "note")),
}


class _Counted(nn.Linear):
    """Changes its class at every call."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(input)


def planned(net: FusedSequential, x: Tensor, monkeypatch: pytest.MonkeyPatch, calls: int) -> int:
    """How many plans so many calls make."""
    made, module = [], sys.modules["mylayers.sequential"]
    keep_plan = module._keep_plan
    with monkeypatch.context() as patch:
        patch.setattr(module, "_keep_plan", lambda n: (made.append(n), keep_plan(n))[1])
        for _ in range(calls):
            net(x)
    return len(made)


@pytest.mark.parametrize("change", OBSTACLES.values(), ids=OBSTACLES)
def test_a_plan_is_made_once_whatever_is_in_the_way(change, monkeypatch, x):
    net = small()
    assert planned(net, x, monkeypatch, 4) == 1
    change(net)
    net(x)
    assert planned(net, x, monkeypatch, 4) == 0
    assert planned(net, _Tagged(x), monkeypatch, 4) == 0
    with torch.device("cpu"):
        assert planned(net, x, monkeypatch, 4) == 0
    handle = global_hooks.register_module_forward_hook(lambda *_: None)
    try:
        assert planned(net, x, monkeypatch, 4) == 0
    finally:
        handle.remove()
    torch.manual_seed(0)
    expected = stock(net)(x) * (2 if "forward" in vars(net) else 1)
    torch.manual_seed(0)
    assert_close(net(x), expected)


def test_a_plan_is_found_again_while_a_function_is_replaced(monkeypatch, x):
    net, calls = small(), []
    wanted = sum(isinstance(layer, nn.Linear) for layer in net)
    assert planned(net, x, monkeypatch, 4) == 1
    own = F.linear

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return own(*args)

    for first in (1, 0):
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", counted)
            assert planned(net, x, monkeypatch, 4) == first
        assert len(calls) == 4 * wanted
        calls.clear()
        assert planned(net, x, monkeypatch, 4) == 0
        assert not calls


def test_what_changes_back_and_forth_is_not_planned_anew(monkeypatch, x):
    net = small()

    def round_trip() -> None:
        for change in (net.train, net.eval):
            change()
            net(x)
        handle = hook(net[5])
        net(x)
        handle.remove()

    def hook(layer: nn.Module) -> Any:
        return layer.register_forward_hook(lambda *_: None)

    round_trip()
    made, module = [], sys.modules["mylayers.sequential"]
    monkeypatch.setattr(module, "_keep_plan", made.append)
    for _ in range(3):
        round_trip()
    assert not made


def test_a_dropout_of_no_probability_is_refused_as_ever(x):
    net = small()
    net(x)
    net[3].p = 2.0
    for called in (net, stock(net)):
        with pytest.raises(ValueError, match="dropout probability"):
            called(x)


def test_a_child_may_change_those_behind_it_while_it_runs(x):
    """As where nn.Sequential iterates over them."""
    for edit in (
        lambda n: n.__setitem__(4, nn.Linear(6, 3).requires_grad_(False)),
        lambda n: n.__setitem__(5, nn.Sigmoid()),
        lambda n: hooked(n[4]),
        lambda n: setattr(n[4], "weight", nn.Parameter(n[4].weight * 2)),
        lambda n: n.append(nn.Tanh()),
        lambda n: n.__delitem__(5),
    ):
        found = []
        for kind in (FusedSequential, nn.Sequential):
            net = kind(*split_net())
            net(x)
            once = []

            def change(*_: Any, net: Any = net, once: Any = once, edit: Any = edit) -> None:
                if not once:
                    once.append(torch.manual_seed(0))
                    edit(net)

            net[2].register_forward_hook(change)
            results = []
            for _ in range(2):
                try:
                    results.append(net(x))
                except RuntimeError as e:
                    results.append(str(e))
            found.append(results)
        for ours, stocks in zip(*found, strict=True):
            assert type(ours) is type(stocks)
            assert ours == stocks if isinstance(ours, str) else torch.allclose(ours, stocks)


def test_a_child_may_replace_a_function_that_those_behind_it_call(monkeypatch, x):
    net, calls, own = split_net(), [], F.relu

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return own(*args, **kwargs)

    net[2].register_forward_hook(lambda *_: monkeypatch.setattr(F, "relu", counted))
    for _ in range(3):
        net(x)
        assert len(calls) == 1
        calls.clear()
        monkeypatch.setattr(F, "relu", own)


def test_hooks_on_tensors_and_parameters_fire(x):
    net, events = small(), []
    net[5].weight.register_hook(lambda g: events.append(g.shape))
    net[0].bias.register_post_accumulate_grad_hook(lambda p: events.append(p.grad.shape))
    y = net(x)
    y.register_hook(lambda g: g * 0)
    y.sum().backward()
    assert sorted(events) == [(5, 6), (6,)]
    assert all(p.grad.eq(0).all() for p in net.parameters())


# ---- FusedSequential: lazy layers, copies, threads -------------------------------------


@pytest.mark.parametrize("make", [small, split_net])
def test_gradient_penalty_is_stocks(make, x):
    """The gradient of a gradient, as in training with a penalty on the input's."""
    net, found = make(), []
    for called in (net, net, stock(net)):
        v = x.clone().requires_grad_()
        (inner,) = torch.autograd.grad(called(v).pow(2).sum(), v, create_graph=True)
        loss = (inner.norm(dim=1) - 1).pow(2).sum()
        found.append(torch.autograd.grad(loss, tuple(net.parameters()), allow_unused=True))
    for actual in found[:2]:
        zeros = [torch.zeros_like(p) for p in net.parameters()]
        assert_close(
            *(
                [z if g is None else g for g, z in zip(f, zeros, strict=True)]
                for f in (actual, found[2])
            )
        )


def test_lazy_layers_take_their_sizes_and_are_fused_from_then_on(x):
    net = FusedSequential(nn.LazyLinear(5), nn.Tanh(), LazyMyLinear(3))
    assert net(x).shape == (5, 3)
    assert type(net[0]) is nn.Linear
    assert type(net[2]) is MyLinear
    assert programs(net, x) == ["linear_t+bias+tanh; linear+bias+relu"]
    assert_like_stock(net, x)


every_copy = pytest.mark.parametrize(
    "make_copy", [*COPIES.values(), copy.copy], ids=[*COPIES, "copy"]
)


@every_copy
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("make", [small, split_net])
def test_copies_compute_the_same_and_share_nothing_they_should_not(make, calls, make_copy, x):
    net = make()
    for _ in range(calls):
        net(x)
    expected = stock(net)(x)
    twin = make_copy(net)
    assert type(twin) is FusedSequential
    for _ in range(2):
        assert_close(twin(x), expected)
    twin.train()
    assert not net.training
    if make_copy is not copy.copy:
        twin[0].weight.data.zero_()
        assert_close(net(x), expected)


@every_copy
def test_a_compiled_network_is_copied_as_a_stock_one_is(make_copy, x):
    net = FusedSequential(nn.Linear(4, 3), nn.Tanh())
    net.compile(backend="eager")
    y = net(x)
    assert_close(make_copy(net)(x), y)


@pytest.mark.parametrize("toggle", [False, True])
def test_threads_on_one_network_compute_the_same_bits(toggle, x):
    """Also while the first call plans, or another thread's change makes a plan anew."""
    threads, interval = 4, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            net = FusedSequential(
                nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)
            ).eval()
            expected = nn.Sequential(net[:2], net[2], net[3:])(x)
            start = threading.Barrier(threads)

            def work(_: int, net: Any = net, start: Any = start) -> list[Tensor]:
                start.wait()
                found = []
                for call in range(6):
                    if toggle:
                        net.training = call % 2 == 0
                    found.append(net(x))
                return found

            with ThreadPoolExecutor(threads) as pool:
                for found in pool.map(work, range(threads)):
                    assert_same_bits(found, [expected] * 6)
    finally:
        sys.setswitchinterval(interval)


def test_threads_train_one_network_while_another_replaces_its_parameters():
    """A call holds what it read: the replaced parameter may die while it computes."""
    net, x, stop = (
        FusedSequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 3)),
        torch.rand(40, 300),
        [],
    )

    def replace() -> None:
        while not stop:
            net[0].weight = nn.Parameter(torch.zeros(300, 300))
            net[0].bias = nn.Parameter(torch.zeros(300))

    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    expected = net(x)
    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(100):
            assert same_bits(net(x), expected)
    finally:
        stop.append(True)
        thread.join()


def test_nothing_keeps_a_network_its_parameters_or_its_input_alive(x):
    net = small()
    net(x).sum().backward()
    with pytest.raises(RuntimeError, match="weight must be"):
        net(torch.randn(5, 5))
    layer = net[5]
    counts = [sys.getrefcount(t) for t in (layer.weight, layer.bias, x, layer)]
    for _ in range(50):
        net(x)
        with contextlib.suppress(RuntimeError):
            net(x[:, :3])
    assert [sys.getrefcount(t) for t in (layer.weight, layer.bias, x, layer)] == counts
    alive = [weakref.ref(net), weakref.ref(layer), weakref.ref(layer.weight)]
    del net, layer
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


# ---- FusedSequential: what watches calls -----------------------------------------------


def test_a_default_device_changes_nothing(x):
    net = small()
    expected = net(x)
    torch.set_default_device("cpu")
    try:
        assert same_bits(net(x), expected)
    finally:
        torch.set_default_device(None)
    with torch.device("cpu"):
        assert same_bits(net(x), expected)


def test_a_function_mode_sees_the_operator(x):
    net, seen = small(), []
    net(x)

    class Spy(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Spy():
        net(x)
    assert [s for s in seen if "mylayers" in s] == ["mylayers.sequential"]


class _Tagged(Tensor):
    """A tensor that overrides what operators do, and counts them."""

    seen: tuple[str, ...] = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _Tagged.seen = (*_Tagged.seen, getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("make", [small, split_net])
@pytest.mark.parametrize("which", ["input", "weight"])
def test_tensor_subclasses_are_given_to_the_children(which, make, x):
    net = make()
    expected = stock(net)(x)
    net(x)
    _Tagged.seen = ()
    if which == "input":
        y = net(x.as_subclass(_Tagged))
    else:
        weight = net[5 if make is small else 4].weight.detach().as_subclass(_Tagged)
        layer = net[5 if make is small else 4]
        del layer._parameters["weight"]
        layer._parameters["weight"] = weight
        y = net(x)
    assert type(y) is _Tagged
    assert "linear" in _Tagged.seen
    assert_close(y.as_subclass(Tensor), expected)


@pytest.mark.parametrize("value", [None, 3.0, [1.0], "text"])
@pytest.mark.parametrize("calls", [0, 1])
def test_an_input_that_is_no_tensor_is_a_type_error(calls, value, x):
    net = small()
    for _ in range(calls):
        net(x)
    with pytest.raises(TypeError, match=r"FusedSequential: input must be a torch\.Tensor; got"):
        net(value)


def test_wrong_ways_to_call_end_as_stocks(x):
    net = small()
    net(x)
    assert_close(net(input=x), net(x))
    for args, kwargs in (((), {}), ((x, x), {}), ((x,), {"input": x}), ((), {"unknown": x})):
        assert outcome(net, *args, **kwargs) is outcome(stock(net), *args, **kwargs) is TypeError


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_profiler_shows_one_operator(grad_mode, x):
    net = small()
    net(x)
    with (
        grad_mode(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        net(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["mylayers::sequential"] == 1
    assert "mylayers::linear_act" not in counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_network(dtype, x):
    net = small()
    net(x)
    with torch.autocast("cpu", dtype=dtype):
        actual, expected = results(net, x), results(stock(net), x)
    assert actual[0].dtype == dtype
    # Stock rounds to the dtype before each activation, and ours once after it.
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        atol = 64 * torch.finfo(dtype).eps * max(1.0, e.abs().max().item())
        torch.testing.assert_close(a, e, rtol=0, atol=atol)


def test_checkpointing_gives_the_same_bits(x):
    net = small()
    expected = results(net, x)
    for reentrant in (True, False):
        v = x.clone().requires_grad_()
        net.zero_grad()
        y = torch.utils.checkpoint.checkpoint(net, v, use_reentrant=reentrant)
        y.pow(3).sum().backward()  # the reentrant kind knows no torch.autograd.grad
        assert_same_bits([y.detach(), v.grad, *(p.grad for p in net.parameters())], expected)


def test_symbolic_trace_computes_the_same(x):
    net = split_net()
    net(x)
    traced = torch.fx.symbolic_trace(net)
    assert_close(traced(x), net(x))
    assert_like_stock(net, x)


def test_jit_trace_records_the_operator(tmp_path, x):
    net = small()
    net(x)
    traced = torch.jit.trace(net, x)
    kinds = [n.kind() for n in traced.inlined_graph.nodes()]
    assert kinds.count("mylayers::sequential") == 1
    traced.save(tmp_path / "traced.pt")
    other = torch.randn(9, 4)
    assert same_bits(torch.jit.load(tmp_path / "traced.pt")(other), net(other))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize(
    ("make", "backend"), [(small, "aot_eager"), (split_net, "aot_eager"), (small, "inductor")]
)
def test_compile_without_a_graph_break(make, backend, calls, x):
    net = make()
    for _ in range(calls):
        net(x)
    compiled_net = torch.compile(net, fullgraph=True, backend=backend)
    actual, expected = results(compiled_net, x, net), results(net, x)
    if backend == "aot_eager" and make is small:
        assert_same_bits(actual, expected)
    assert_close(actual, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_dynamic_batch_compiles_once():
    net, counter = small(), CompileCounterWithBackend("aot_eager")
    compiled_net = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    frames = 0
    for rows in (9, 7, 2, 129):  # first a number that no layer has
        v = torch.randn(rows, 4)
        assert_same_bits(results(compiled_net, v, net), results(net, v))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_network_notices_changes(x):
    net = small()
    compiled_net = torch.compile(net, fullgraph=True, backend="aot_eager")
    for edit in (
        "data",
        "activation",
        "bias removed",
        "replaced by another type",
        "dropout trains",
    ):
        compiled_net(x)
        EDITS[edit](net)
        torch.manual_seed(1)
        actual = compiled_net(x)
        torch.manual_seed(1)
        assert_close(actual, stock(net)(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("calls", [0, 1])
def test_exported_program_holds_the_operator_and_takes_any_batch(calls, strict, tmp_path, x):
    net = small()
    for _ in range(calls):
        net(x)
    program = torch.export.export(
        net, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=strict
    )
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets == ["mylayers.sequential.default"]
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for rows in (1, 5, 130):
        v = torch.randn(rows, 4)
        assert same_bits(loaded(v), net(v))
