"""mylayers::sequential against the layers one by one, to the bit: the oracle is ``one_by_one``."""

import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import samples
import torch
from chains import (
    MARKS,
    PROGRAMS,
    VARIED,
    arguments,
    assert_close,
    assert_same_bits,
    draw_parameters,
    every_dtype,
    every_program,
    flattened_sizes,
    followed_by,
    leaves,
    one_by_one,
    outputs_one_by_one,
    run,
    split,
    varied_programs,
)
from common import Calls
from samples import ACTIVATIONS, drawer, num_threads, outcome, same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from mylayers import (
    reference,
)

ops = torch.ops.mylayers

pytestmark = MARKS


# ---- the operator: bits ----------------------------------------------------------------

# Around the kernels' tiles, blocks of rows and shares of threads.
ROWS = (0, 1, 3, 6, 33, 64, 255, 256, 257, 600)


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.grid(one_in=2)
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


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.grid(one_in=2)
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


@pytest.mark.grid
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


@pytest.mark.grid
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
