"""linear_act: values and gradients against float64, and the promise of identical bits."""

import functools
import itertools
from collections.abc import Callable

import hypothesis
import pytest
import samples
import torch
from hypothesis import strategies as st
from samples import (
    ACTIVATIONS,
    KERNEL_DTYPES,
    OF_INPUT,
    OF_OUTPUT,
    Sample,
    activation_tolerance,
    assert_within,
    in_float64,
    integer_of,
    num_threads,
    outcome,
    product_tolerance,
    same_bits,
    units_apart,
)
from torch import Tensor

from mylayers import build_info, functional, reference
from mylayers.activations import find

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


@functools.cache
def by_name(dtype: torch.dtype) -> dict[str, Sample]:
    return {s.name: s for s in samples.linear_act_samples(dtype)}


every_sample = pytest.mark.parametrize("name", list(by_name(torch.float32)))
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d)[6:])
any_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def slope(activation: str) -> Callable[[Tensor], Tensor]:
    def derivative(z: Tensor) -> Tensor:
        leaf = z.detach().clone().requires_grad_()
        return torch.autograd.grad(find(activation).formula(leaf).sum(), leaf)[0]

    return derivative


# The derivative of each activation as a function of what ours reads: its output, or its input.
DERIVATIVES = {
    **{activation: slope(activation) for activation in OF_INPUT},
    "relu": lambda y: (y > 0).to(y.dtype),
    "tanh": lambda y: 1 - y * y,
    "sigmoid": lambda y: y * (1 - y),
    "elu": lambda y: y.clamp(max=0) + 1,
    "elu(0.5)": lambda y: torch.where(y > 0, 1, y + 0.5),
    "leaky_relu": lambda y: torch.where(y > 0, 1, torch.full_like(y, 0.01)),
    "leaky_relu(0.2)": lambda y: torch.where(y > 0, 1, torch.full_like(y, 0.2)),
    "selu": lambda y: torch.where(y > 0, SELU_SCALE, y + SELU_SCALE * SELU_ALPHA),
    "celu": lambda y: y.clamp(max=0) + 1,
    "celu(2.0)": lambda y: y.clamp(max=0) / 2 + 1,
    "celu(0.25)": lambda y: y.clamp(max=0) * 4 + 1,
    "softplus": lambda y: torch.where(y > 20, 1, -torch.expm1(-y)),
    "logsigmoid": lambda y: -torch.expm1(y),
    "hardtanh": lambda y: (y.abs() < 1).to(y.dtype),
    "relu6": lambda y: ((y > 0) & (y < 6)).to(y.dtype),
    None: torch.ones_like,
}
# The steepest slope of that function, between its jumps; of those that are constants there, none.
STEEPEST = {
    **dict.fromkeys(("tanh", "softsign"), 2),
    **dict.fromkeys(("leaky_relu", "leaky_relu(0.2)"), 0),
    **dict.fromkeys(("sigmoid", "elu", "elu(0.5)", "selu", "celu", "celu(2.0)"), 1),
    **dict.fromkeys(("softplus", "logsigmoid"), 1),
    **dict.fromkeys(("gelu", "gelu_tanh", "silu", "mish", "hardswish", "hardsigmoid"), 1),
    "celu(0.25)": 4,
}
# Where the derivative jumps, by the activation's input.
JUMPS = {
    **dict.fromkeys(("relu", "leaky_relu", "leaky_relu(0.2)", "selu", "elu(0.5)"), (0,)),
    "hardtanh": (-1, 1),
    "relu6": (0, 6),
    **dict.fromkeys(("hardswish", "hardsigmoid"), (-3, 3)),
}
# The steepest slope of those that move two values further apart.
SLOPE = {
    **dict.fromkeys(("gelu", "gelu_tanh", "silu", "mish"), 1.13),
    "hardswish": 1.5,
    "selu": SELU_SCALE * SELU_ALPHA,
}


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def rows_of(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def forward_tolerance(
    dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """For the output."""
    exact = reference.linear_act(x, weight, bias, activation)
    magnitude = torch.matmul(x.abs(), weight.abs()) + (0 if bias is None else bias.abs())
    slope = SLOPE.get(activation, 1)
    if activation in OF_INPUT:  # which is rounded before
        result = torch.finfo(dtype)
        moved = slope * forward_tolerance(dtype, x, weight, bias, None)
        rounded = result.eps * (exact.abs() + result.tiny)
        return moved + activation_tolerance(activation, dtype, exact) + rounded
    summed = slope * product_tolerance(dtype, x.shape[-1], magnitude, exact)
    return summed + activation_tolerance(activation, dtype, exact)


def check_forward(operator, sample: Sample) -> None:
    before = [None if t is None else t.clone() for t in sample.args]
    actual = operator(*sample.args, **sample.kwargs)
    exact_args = in_float64(*sample.args)
    dtype = sample.args[0].dtype
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert_within(
        actual,
        reference.linear_act(*exact_args, **sample.kwargs),
        forward_tolerance(dtype, *exact_args, **sample.kwargs),
    )
    for argument, copy in zip(sample.args, before, strict=True):
        assert argument is copy or torch.equal(argument, copy)


def dz_tolerance(
    dtype: torch.dtype, activation: str | None, grad: Tensor, dz: Tensor, output: Tensor
) -> Tensor:
    """For ``dz = grad * act'``, where ``output`` is the tolerance of the output.

    act' is computed from the rounded output, with its product in at most 3 roundings of the
    accumulator, to at most 1; then comes one rounding to ``dtype``. relu's and none's are exact.
    selu's is up to 1.8; gelu's is computed from its input, in exponentials that take more.
    """
    if activation not in STEEPEST:
        return torch.zeros_like(dz)
    accumulator = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype)
    result = torch.finfo(dtype)
    roundings = 16 if activation in OF_INPUT else 3 if activation == "selu" else 1.5
    computed = grad.abs() * (STEEPEST[activation] * output + roundings * accumulator.eps)
    if activation == "hardsigmoid" and dtype == torch.float64:
        computed += 1e-8 * grad.abs()  # PyTorch's own, the yardstick, has a factor of float32
    return computed + result.eps / 2 * (dz.abs() + computed) + result.eps / 2 * result.tiny


def check_gradients(sample: Sample) -> None:
    args, exact_args = leaves(*sample.args), leaves(*in_float64(*sample.args))
    dtype, activation = args[0].dtype, sample.kwargs["activation"]
    output = functional.linear_act(*args, activation)
    exact_output = reference.linear_act(*exact_args, activation)

    x, weight, bias = in_float64(*sample.args)
    output_tolerance = forward_tolerance(dtype, x, weight, bias, activation)
    grad = samples.drawer(f"{sample.name}-grad", dtype)(*output.shape).to(output.device)
    for jump in JUMPS.get(activation, ()):
        # Where rounding may put the pre-activation on either side, neither gradient is wrong:
        # nothing flows there.
        z = reference.linear_act(x, weight, bias, activation=None)
        grad = grad * ((z - jump).abs() > forward_tolerance(dtype, x, weight, bias, None))
    output.backward(grad)
    exact_output.backward(grad.double())

    read, read_tolerance = exact_output.detach(), output_tolerance
    if activation in OF_INPUT:
        read = reference.linear_act(x, weight, bias, activation=None)
        read_tolerance = forward_tolerance(dtype, x, weight, bias, None)
    dz = grad.double() * DERIVATIVES[activation](read)
    error = dz_tolerance(dtype, activation, grad.double(), dz, read_tolerance)
    sizes = {"input": weight.shape[1], "weight": rows_of(x).shape[0], "bias": rows_of(x).shape[0]}
    # How each gradient gathers dz.
    gathered = {
        "input": lambda t: torch.matmul(t, weight.abs().T),
        "weight": lambda t: rows_of(x.abs()).T @ rows_of(t),
        "bias": lambda t: rows_of(t).sum(0),
    }
    for name, argument, exact in zip(sizes, args, exact_args, strict=True):
        if argument is not None:
            assert argument.grad.dtype == dtype, name
            magnitude, inherited = gathered[name](dz.abs() + error), gathered[name](error)
            tolerance = inherited + product_tolerance(
                dtype, sizes[name], magnitude, exact.grad.abs() + inherited
            )
            assert_within(argument.grad, exact.grad, tolerance)


@pytest.mark.grid
@every_dtype
@every_sample
def test_forward_is_the_float64_reference_rounded_once(name, dtype):
    sample = by_name(dtype)[name]
    check_forward(functional.linear_act, sample)
    expected = functional.linear_act(*sample.args, **sample.kwargs)
    assert same_bits(torch.ops.mylayers.linear_act(*sample.args, **sample.kwargs), expected)


@pytest.mark.grid
@every_dtype
@every_sample
def test_gradients_are_the_float64_references(name, dtype):
    check_gradients(by_name(dtype)[name])


@st.composite
def drawn_samples(draw: st.DrawFn) -> Sample:
    dtype = draw(st.sampled_from(KERNEL_DTYPES))
    lead = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    in_units, units = draw(st.integers(0, 270)), draw(st.integers(0, 140))
    layout = st.sampled_from(list(samples.LAYOUTS))
    layouts = draw(layout), draw(layout), draw(st.none() | layout)
    values = samples.drawer(f"{dtype}{lead}{in_units}{units}{layouts}", dtype)
    args = tuple(
        None if layout is None else samples.LAYOUTS[layout](values, shape)
        for layout, shape in zip(
            layouts, ((*lead, in_units), (in_units, units), (units,)), strict=True
        )
    )
    return Sample("drawn", args, {"activation": draw(st.sampled_from(ACTIVATIONS))})


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(drawn_samples())
def test_any_shape_and_strides_forward_and_gradients(sample):
    check_forward(functional.linear_act, sample)
    check_gradients(sample)


@pytest.mark.grid
@pytest.mark.parametrize(
    "wanted", list(itertools.product([False, True], repeat=3)), ids=lambda w: str(w).strip("()")
)
@any_activation
@pytest.mark.parametrize("rows", [5, 4200])
def test_only_the_gradients_asked_for_are_computed(wanted, activation, rows):
    draw = samples.drawer("wanted", torch.float64)
    values = draw(rows, 7), draw(7, 3), draw(3)
    args = [t.clone().requires_grad_(want) for t, want in zip(values, wanted, strict=True)]
    output = functional.linear_act(*args, activation)
    assert output.requires_grad == any(wanted)
    if not any(wanted):
        assert output.grad_fn is None
        return
    grad = draw(rows, 3)
    output.backward(grad)

    read = reference.linear_act(*values, None) if activation in OF_INPUT else output.detach()
    dz = grad * DERIVATIVES[activation](read)
    expected = (dz @ values[1].T, values[0].T @ dz, dz.sum(0))
    for argument, want, exact in zip(args, wanted, expected, strict=True):
        if want:
            torch.testing.assert_close(argument.grad, exact, rtol=0, atol=1e-15 * rows)
        else:
            assert argument.grad is None


@pytest.mark.grid
@pytest.mark.parametrize("activation", ["relu", "tanh", "elu"])
@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)), ids=str)
def test_the_backward_operator_leaves_out_what_its_mask_leaves_out(mask, activation):
    draw = samples.drawer("mask", torch.float64)
    grad, x, weight = draw(5, 3), draw(5, 7), draw(7, 3)
    y = reference.ACTIVATIONS[activation](draw(5, 3))
    gradients = torch.ops.mylayers.linear_act_backward(
        grad, x if mask[1] else None, weight if mask[0] else None, y, activation, mask
    )
    dz = grad * DERIVATIVES[activation](y)
    for gradient, want, exact in zip(
        gradients, mask, (dz @ weight.T, x.T @ dz, dz.sum(0)), strict=True
    ):
        if want:
            torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-14)
        else:
            assert gradient is None


def numbers_of_every_exponent(dtype: torch.dtype) -> Tensor:
    """The 16-bit dtypes' bit patterns, all of them; of the wider ones 400 thousand all over, and
    as many again between 2^-15 and 2^7, where activations bend."""
    bits = torch.iinfo(integer_of(dtype))
    count = min(2**bits.bits, 400_000)
    # An odd step: no low bit is the same throughout.
    step = 2**bits.bits // count | 1
    everywhere = (torch.arange(count) * step + bits.min).to(integer_of(dtype)).view(dtype)
    if count == 2**bits.bits:
        return everywhere
    bends = torch.logspace(-15, 7, 200_000, base=2, dtype=torch.float64).to(dtype)
    special = torch.tensor([0.0, torch.inf, torch.nan], dtype=dtype)
    return torch.cat([everywhere, bends, -bends, special, -special])


def most_units(activation: str, dtype: torch.dtype) -> int:
    """How many units in the last place an activation may lie from PyTorch's."""
    if dtype == torch.float32 and build_info()["kernels"] == "generic":
        # Without fused multiply-adds e^-x is sometimes one unit further from PyTorch's, and the
        # formula of sigmoid doubles that: 4 in 5.7 million values lie 4 units off, 31 lie 3.
        without = {"sigmoid": 4, "silu": 4, "mish": 5, "logsigmoid": 3}
        if activation in without:
            return without[activation]
    if dtype == torch.float32 and activation in ("softplus", "mish"):
        return 3  # PyTorch's own lie up to 1 and 2 of them from the exact value
    return {torch.float32: 2, torch.float64: 4}.get(dtype, 1)  # 16 bits: float32's, rounded


@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("activation", OF_OUTPUT)  # the others: test_activations.py
@pytest.mark.parametrize("along", ["rows", "units"])
def test_activations_lie_few_units_in_the_last_place_from_pytorchs(along, activation, dtype):
    x = numbers_of_every_exponent(dtype)
    if dtype == torch.bfloat16:
        # The 16-bit matrix units take denormal numbers for zero.
        x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x)
    one = torch.ones(1, 1, dtype=dtype)
    column = along == "rows"
    args = (x[:, None], one) if column else (one, x[None])
    actual = functional.linear_act(*args, None, activation).flatten()
    expected = reference.ACTIVATIONS[activation](x)
    assert torch.equal(actual.isnan(), expected.isnan())
    apart = units_apart(actual, expected).masked_fill(expected.isnan(), 0)
    worst = apart.argmax()
    assert apart[worst] <= most_units(activation, dtype), (
        f"{apart[worst]} units at {x[worst].item()!r}"
    )


# ---- identical bits --------------------------------------------------------------------

MOST_ROWS = 130
# The last three pass the size from which threads share the work, by rows and by columns; rows of
# the last lie so that tiles copy them.
BIT_SIZES = [(1, 1), (5, 3), (64, 64), (257, 70), (300, 65), (600, 200), (1024, 140)]
# Each activation at sizes of one block; at the others one that is taken in registers, one that is
# taken behind the product, and one whose derivative reads its input.
BIT_CASES = [
    (*sizes, activation)
    for sizes in BIT_SIZES
    for activation in (reference.ACTIVATIONS if sizes[0] <= 64 else ("relu", "tanh", "gelu"))
]


@pytest.mark.grid(one_in=2)
@every_dtype
@pytest.mark.parametrize(("in_units", "units", "activation"), BIT_CASES)
def test_a_row_has_the_same_bits_in_every_batch(in_units, units, activation, dtype):
    draw = samples.drawer("batch", dtype)
    x, weight, bias = draw(MOST_ROWS, in_units), draw(in_units, units), draw(units)
    grad = draw(MOST_ROWS, units)

    def forward_and_input_gradient(rows: slice) -> tuple[Tensor, Tensor]:
        batch = x[rows].clone().requires_grad_()
        output = functional.linear_act(batch, weight, bias, activation)
        return output.detach(), torch.autograd.grad(output, batch, grad[rows])[0]

    with num_threads(1):
        alone = [forward_and_input_gradient(slice(i, i + 1)) for i in range(MOST_ROWS)]
    outputs, gradients = (torch.cat(parts) for parts in zip(*alone, strict=True))
    for threads in (1, 2, 4):
        with num_threads(threads):
            for rows in range(1, MOST_ROWS + 1):
                output, gradient = forward_and_input_gradient(slice(rows))
                case = f"{rows} rows, {threads} threads"
                assert same_bits(output, outputs[:rows]), f"forward, {case}"
                assert same_bits(gradient, gradients[:rows]), f"input gradient, {case}"


@pytest.mark.grid
@every_dtype
@any_activation
def test_a_row_has_the_same_bits_whatever_the_layout_and_rank_of_its_batch(activation, dtype):
    draw = samples.drawer("layout bits", dtype)
    x, weight, bias = draw(12, 300), draw(300, 70), draw(70)
    linear_act = functools.partial(functional.linear_act, activation=activation)
    expected = linear_act(x, weight, bias)
    assert same_bits(linear_act(x[3], weight, bias), expected[3])
    assert same_bits(linear_act(x.view(2, 3, 2, 300), weight, bias), expected.view(2, 3, 2, 70))
    for layout in ("transposed", "stepped", "misaligned", "row_slice"):
        for which in range(3):
            args = [x, weight, bias]
            args[which] = samples.LAYOUTS[layout](
                lambda *shape: torch.zeros(shape, dtype=dtype), tuple(args[which].shape)
            ).copy_(args[which])
            assert same_bits(linear_act(*args), expected), (layout, which)


# A processor's conversion to a 16-bit type may flush what another way to write the row keeps.
@every_dtype
@pytest.mark.parametrize("activation", [None, "relu"])
def test_subnormal_and_nan_results_have_the_same_bits_in_every_batch(activation, dtype):
    draw, info = samples.drawer("subnormal", dtype), torch.finfo(dtype)
    scale = info.tiny**0.5
    x, weight = draw(MOST_ROWS, 64) * scale, draw(64, 70) * scale
    bias = draw(70) * info.tiny
    bias[33], bias[69] = torch.nan, torch.full((), -torch.nan, dtype=dtype)
    x[5, 7], x[60, 0] = torch.nan, torch.inf
    one_by_one = torch.cat(
        [functional.linear_act(row, weight, bias, activation) for row in x.split(1)]
    )
    size = one_by_one.abs()
    assert ((size > 0) & (size < info.tiny)).any()
    expected = reference.linear_act(x, weight, bias, activation)
    assert torch.equal(one_by_one.isnan(), expected.isnan())
    for rows in (2, 5, 6, 7, 33, MOST_ROWS):
        output = functional.linear_act(x[:rows], weight, bias, activation)
        assert same_bits(output, one_by_one[:rows]), rows


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_float16_sums_that_round_to_subnormal_numbers_and_then_once_more(activation):
    x = (torch.arange(-500, 500) * 2.0**-24).half()[:, None]
    weight = torch.tensor([[0.7], [0.3]]).half()
    for w in weight:
        check_forward(
            functional.linear_act, Sample("few", (x, w[None], None), {"activation": activation})
        )


# NaNs with signs and bits of their own meet in the sum and at the bias. That both factors of one
# product are NaN is left out: there a row's bits may depend on its batch.
@pytest.mark.grid
@pytest.mark.skipif(
    build_info()["kernels"] not in ("generic", "avx2"), reason="proved on these alone so far"
)
@every_dtype
@any_activation
@pytest.mark.parametrize("transposed", [False, True], ids=["weight", "weight.T"])
@pytest.mark.parametrize(("in_units", "units"), [(5, 3), (64, 64), (300, 65), (1024, 140)])
def test_of_several_nans_the_same_one_is_kept_in_every_batch(
    in_units, units, transposed, activation, dtype
):
    draw = samples.drawer("NaN", dtype)
    x, weight, bias = draw(MOST_ROWS, in_units), draw(in_units, units), draw(units)
    grad = draw(MOST_ROWS, units)
    for t in (x[::3, ::2], bias, grad[1::4]):  # few enough to leave numbers, too
        places = torch.arange(t.numel()).view(t.shape) % 17 == 5
        t[places] = samples.nans_like(t)[places]
    poisoned = weight.clone()
    poisoned[1] = samples.nans_like(poisoned[1])  # no x is NaN there
    if transposed:
        weight, poisoned = (t.t().contiguous().t() for t in (weight, poisoned))

    def results(rows: slice) -> list[Tensor]:
        batch = x[rows].clone().requires_grad_()
        output = functional.linear_act(batch, weight, bias, activation)
        gradient = torch.autograd.grad(output, batch, grad[rows])[0]
        return [output, gradient, functional.linear_act(x[rows], poisoned, bias, activation)]

    with num_threads(1):
        alone = [results(slice(i, i + 1)) for i in range(MOST_ROWS)]
    expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    assert not expected[0].isnan().all()
    for rows in (2, 3, 5, 12, 40, MOST_ROWS):
        for threads in (1, 2):
            with num_threads(threads):
                found = results(slice(rows))
            for what, a, b in zip(("output", "gradient", "poisoned"), found, expected, strict=True):
                assert same_bits(a, b[:rows]), (what, rows, threads)


# One row and a few stream, more do in some dtypes; a sum of 1101 terms is cut once or often, by the
# columns.
@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("rows", [1, 3, 12, 40])
def test_a_column_has_the_same_bits_in_every_weight_and_in_its_transpose(rows, dtype):
    draw = samples.drawer("columns", dtype)
    x, weight, bias = draw(rows, 1101), draw(1101, 2100), draw(2100)
    expected = functional.linear_act(x, weight, bias)
    assert same_bits(functional.linear_act(x, weight.t().contiguous().t(), bias), expected)
    for columns in (slice(70), slice(64, 1031), slice(2099, 2100)):
        some = functional.linear_act(x, weight[:, columns], bias[columns])
        assert same_bits(some, expected[:, columns]), columns


# A weight whose rows or columns lie 16,384 values apart, or a little more, spans more than 16 MiB,
# and is read otherwise; columns only if they do not lie in the same sets of the caches.
@pytest.mark.grid
@every_dtype
@any_activation
@pytest.mark.parametrize("threads", [1, 2])
def test_a_weight_has_the_same_bits_however_far_its_rows_lie_apart(threads, activation, dtype):
    draw = samples.drawer("far", dtype)
    x, weight, bias = draw(MOST_ROWS, 601), draw(601, 1077), draw(1077)
    far = torch.zeros(601, 16_384, dtype=dtype)[:, :1077].copy_(weight)
    far_columns = torch.zeros(1077, 16_400, dtype=dtype)[:, :601].t().copy_(weight)
    with num_threads(threads):
        for rows in (1, 2, 4, 5, 16, 17, 63, 128, 129):
            expected = functional.linear_act(x[:rows], weight, bias, activation)
            for other in (far, far_columns):
                actual = functional.linear_act(x[:rows], other, bias, activation)
                assert same_bits(actual, expected), (rows, other.stride())


@every_dtype
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_a_batch_of_several_tasks(threads, dtype):
    draw = samples.drawer("tasks", dtype)
    x, weight, bias = draw(2500, 300), draw(300, 70), draw(70)
    with num_threads(threads):
        whole = functional.linear_act(x, weight, bias)
        for rows in (slice(1), slice(1000, 1130), slice(1023, 2049), slice(2499, 2500)):
            assert same_bits(functional.linear_act(x[rows], weight, bias), whole[rows]), rows


# On AMX 4096 terms are packed together, and with more of them 8192 rows are multiplied together.
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_a_batch_and_a_sum_of_several_parts(threads):
    draw = samples.drawer("parts", torch.bfloat16)
    x, weight = draw(8300, 4200), draw(4200, 70)
    with num_threads(threads):
        whole = functional.linear_act(x, weight, None, None)
        for rows in (slice(1), slice(300, 700), slice(8190, 8194), slice(8299, 8300)):
            assert same_bits(functional.linear_act(x[rows], weight, None, None), whole[rows]), rows
    some = slice(8100, 8300)
    exact = in_float64(x[some], weight, None)
    tolerance = forward_tolerance(torch.bfloat16, *exact, None)
    assert_within(whole[some], reference.linear_act(*exact, None), tolerance)


@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize(
    "sizes", [(5000, 0, 3), (5000, 3, 0), (5000, 0, 0), (3, 0, 600), (300, 600, 0)]
)
def test_gradients_of_no_units_have_no_values_however_many_rows_there_are(sizes, dtype):
    rows, in_units, units = sizes
    draw = samples.drawer("nothing", dtype)
    x, weight, bias = leaves(draw(rows, in_units), draw(in_units, units), draw(units))
    functional.linear_act(x, weight, bias).sum().backward()
    assert [t.grad.shape for t in (x, weight, bias)] == [t.shape for t in (x, weight, bias)]
    assert not x.grad.any() or units > 0


# Rows of the batch, in_units, units: one sum, 2, 3 and 65 pieces; a large result, whose sums
# are not cut.
@pytest.mark.grid
@every_dtype
@any_activation
@pytest.mark.parametrize(
    "sizes", [(700, 40, 33), (2049, 40, 33), (4500, 65, 17), (140_000, 3, 2), (5000, 300, 270)]
)
def test_weight_and_bias_gradients_have_the_same_bits_for_any_thread_count(
    sizes, activation, dtype
):
    rows, in_units, units = sizes
    draw = samples.drawer("threads", dtype)
    x, grad = draw(rows, in_units), draw(rows, units)
    weight, bias = leaves(draw(in_units, units), draw(units))
    output = functional.linear_act(x, weight, bias, activation)

    def gradients(threads: int) -> tuple[Tensor, ...]:
        with num_threads(threads):
            return torch.autograd.grad(output, (weight, bias), grad, retain_graph=True)

    expected = gradients(1)
    for threads in (2, 4):
        for actual, same in zip(gradients(threads), expected, strict=True):
            assert same_bits(actual, same), f"{threads} threads"


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def forward_and_gradients(sample: Sample) -> list[Tensor | None]:
    args = leaves(*sample.args)
    output = functional.linear_act(*args, **sample.kwargs)
    output.backward(samples.drawer(sample.name, output.dtype)(*output.shape).to(output.device))
    return [output, *(None if t is None else t.grad for t in args)]


@every_dtype
def test_deterministic_mode_changes_no_bit_and_finds_no_unwritten_memory(dtype, request):
    expected = {name: forward_and_gradients(s) for name, s in by_name(dtype).items()}
    request.getfixturevalue("deterministic")
    assert torch.empty(8).isnan().all(), "fresh memory is not filled with NaN"
    for name, sample in by_name(dtype).items():
        for actual, same in zip(forward_and_gradients(sample), expected[name], strict=True):
            assert actual is same or same_bits(actual, same), name


# ---- devices and dtypes without a kernel -----------------------------------------------


@every_sample
def test_meta_tensors_give_the_shapes_strides_and_dtypes_of_the_kernels(name):
    sample = by_name(torch.float32)[name]
    results = []
    for device in ("cpu", "meta"):
        args = leaves(*(None if t is None else t.detach().to(device) for t in sample.args))
        output = functional.linear_act(*args, **sample.kwargs)
        wanted = [t for t in args if t is not None]
        results.append([output, *torch.autograd.grad(output, wanted, torch.ones_like(output))])
    for real, meta in zip(*results, strict=True):
        assert meta.device.type == "meta"
        assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@any_activation
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.complex32,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
    ids=lambda d: str(d)[6:],
)
def test_other_dtypes_end_as_matmul_and_the_activation_do(dtype, with_bias, activation):
    values = torch.arange(-6, 6)
    args = [values.view(3, 4).to(dtype), values.view(4, 3).to(dtype)]
    args.append(values[:3].to(dtype) if with_bias else None)
    actual = outcome(functional.linear_act, *args, activation)
    expected = outcome(reference.linear_act, *args, activation)
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    else:
        assert actual is expected


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", None])
def test_complex_gradients_are_the_references(activation):
    draw = samples.drawer("complex", torch.complex128)
    values = draw(5, 4), draw(4, 3), draw(3)
    args, exact_args = leaves(*values), leaves(*values)
    grad = draw(5, 3)
    functional.linear_act(*args, activation).backward(grad)
    reference.linear_act(*exact_args, activation).backward(grad)
    for argument, exact in zip(args, exact_args, strict=True):
        torch.testing.assert_close(argument.grad, exact.grad, rtol=0, atol=1e-14)
