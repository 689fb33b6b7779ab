"""linear_act: values and gradients against float64, and the promise of identical bits."""

import functools
import itertools

import hypothesis
import pytest
import samples
import torch
from hypothesis import strategies as st
from samples import (
    KERNEL_DTYPES,
    Sample,
    assert_within,
    in_float64,
    num_threads,
    outcome,
    product_tolerance,
    same_bits,
)
from torch import Tensor

from mylayers import functional, reference


@functools.cache
def by_name(dtype: torch.dtype) -> dict[str, Sample]:
    return {s.name: s for s in samples.linear_act_samples(dtype)}


every_sample = pytest.mark.parametrize("name", list(by_name(torch.float32)))
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d)[6:])


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def rows_of(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def forward_tolerance(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """For the pre-activation; relu moves no two values further apart."""
    exact = reference.linear_act(x, weight, bias, activation=None)
    magnitude = torch.matmul(x.abs(), weight.abs()) + (0 if bias is None else bias.abs())
    return product_tolerance(dtype, x.shape[-1], magnitude, exact)


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
        forward_tolerance(dtype, *exact_args),
    )
    for argument, copy in zip(sample.args, before, strict=True):
        assert argument is copy or torch.equal(argument, copy)


def check_gradients(sample: Sample) -> None:
    args, exact_args = leaves(*sample.args), leaves(*in_float64(*sample.args))
    dtype = args[0].dtype
    output = functional.linear_act(*args, **sample.kwargs)
    exact_output = reference.linear_act(*exact_args, **sample.kwargs)

    # Where rounding may put the pre-activation on either side of the kink, neither gradient
    # is wrong: nothing flows there.
    x, weight, bias = in_float64(*sample.args)
    z = reference.linear_act(x, weight, bias, activation=None)
    clear = z.abs() > forward_tolerance(dtype, x, weight, bias)
    grad = samples.drawer(f"{sample.name}-grad", dtype)(*output.shape) * clear
    output.backward(grad)
    exact_output.backward(grad.double())

    dz = grad.double().abs()
    if sample.kwargs["activation"] == "relu":
        dz = dz * (z > 0)
    sizes = {"input": weight.shape[1], "weight": rows_of(x).shape[0], "bias": rows_of(x).shape[0]}
    magnitudes = {
        "input": torch.matmul(dz, weight.abs().T),
        "weight": rows_of(x.abs()).T @ rows_of(dz),
        "bias": rows_of(dz).sum(0),
    }
    for name, argument, exact in zip(sizes, args, exact_args, strict=True):
        if argument is not None:
            assert argument.grad.dtype == dtype, name
            tolerance = product_tolerance(dtype, sizes[name], magnitudes[name], exact.grad)
            assert_within(argument.grad, exact.grad, tolerance)


@every_dtype
@every_sample
@pytest.mark.parametrize(
    "operator", [functional.linear_act, torch.ops.mylayers.linear_act], ids=["functional", "ops"]
)
def test_forward_is_the_float64_reference_rounded_once(operator, name, dtype):
    check_forward(operator, by_name(dtype)[name])


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
    return Sample("drawn", args, {"activation": draw(st.sampled_from(["relu", None]))})


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(drawn_samples())
def test_any_shape_and_strides_forward_and_gradients(sample):
    check_forward(functional.linear_act, sample)
    check_gradients(sample)


@pytest.mark.parametrize(
    "wanted", list(itertools.product([False, True], repeat=3)), ids=lambda w: str(w).strip("()")
)
@pytest.mark.parametrize("activation", ["relu", None])
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

    dz = grad * (output.detach() > 0) if activation else grad
    expected = (dz @ values[1].T, values[0].T @ dz, dz.sum(0))
    for argument, want, exact in zip(args, wanted, expected, strict=True):
        if want:
            torch.testing.assert_close(argument.grad, exact, rtol=0, atol=1e-15 * rows)
        else:
            assert argument.grad is None


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)), ids=str)
def test_the_backward_operator_leaves_out_what_its_mask_leaves_out(mask):
    draw = samples.drawer("mask", torch.float64)
    grad, x, weight, y = draw(5, 3), draw(5, 7), draw(7, 3), draw(5, 3)
    gradients = torch.ops.mylayers.linear_act_backward(
        grad, x if mask[1] else None, weight if mask[0] else None, y, "relu", mask
    )
    dz = grad * (y > 0)
    for gradient, want, exact in zip(
        gradients, mask, (dz @ weight.T, x.T @ dz, dz.sum(0)), strict=True
    ):
        if want:
            torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-14)
        else:
            assert gradient is None


# ---- identical bits --------------------------------------------------------------------

MOST_ROWS = 130
# The last two pass the size from which threads share the work, by rows and by columns.
BIT_SIZES = [(1, 1), (5, 3), (64, 64), (257, 70), (300, 65), (600, 200)]


@every_dtype
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(("in_units", "units"), BIT_SIZES)
def test_a_row_has_the_same_bits_in_every_batch(in_units, units, threads, dtype):
    draw = samples.drawer("batch", dtype)
    x, weight, bias = draw(MOST_ROWS, in_units), draw(in_units, units), draw(units)
    grad = draw(MOST_ROWS, units)

    def forward_and_input_gradient(rows: slice) -> tuple[Tensor, Tensor]:
        batch = x[rows].clone().requires_grad_()
        output = functional.linear_act(batch, weight, bias)
        return output.detach(), torch.autograd.grad(output, batch, grad[rows])[0]

    with num_threads(1):
        alone = [forward_and_input_gradient(slice(i, i + 1)) for i in range(MOST_ROWS)]
    outputs, gradients = (torch.cat(parts) for parts in zip(*alone, strict=True))
    with num_threads(threads):
        for rows in range(1, MOST_ROWS + 1):
            output, gradient = forward_and_input_gradient(slice(rows))
            assert same_bits(output, outputs[:rows]), f"forward, {rows} rows"
            assert same_bits(gradient, gradients[:rows]), f"input gradient, {rows} rows"


@every_dtype
def test_a_row_has_the_same_bits_whatever_the_layout_and_rank_of_its_batch(dtype):
    draw = samples.drawer("layout bits", dtype)
    x, weight, bias = draw(12, 300), draw(300, 70), draw(70)
    expected = functional.linear_act(x, weight, bias)
    assert same_bits(functional.linear_act(x[3], weight, bias), expected[3])
    assert same_bits(
        functional.linear_act(x.view(2, 3, 2, 300), weight, bias), expected.view(2, 3, 2, 70)
    )
    for layout in ("transposed", "stepped", "misaligned", "row_slice"):
        for which in range(3):
            args = [x, weight, bias]
            args[which] = samples.LAYOUTS[layout](
                lambda *shape: torch.zeros(shape, dtype=dtype), tuple(args[which].shape)
            ).copy_(args[which])
            assert same_bits(functional.linear_act(*args), expected), (layout, which)


# Rows of the batch, in_units, units: one sum, 2, 3 and 65 pieces; a large result, whose sums
# are not cut.
@every_dtype
@pytest.mark.parametrize(
    "sizes", [(700, 40, 33), (2049, 40, 33), (4500, 65, 17), (140_000, 3, 2), (5000, 300, 270)]
)
def test_weight_and_bias_gradients_have_the_same_bits_for_any_thread_count(sizes, dtype):
    rows, in_units, units = sizes
    draw = samples.drawer("threads", dtype)
    x, grad = draw(rows, in_units), draw(rows, units)
    weight, bias = leaves(draw(in_units, units), draw(units))
    output = functional.linear_act(x, weight, bias)

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
    output.backward(samples.drawer(sample.name, output.dtype)(*output.shape))
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


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("activation", ["relu", None])
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
def test_other_dtypes_end_as_matmul_and_relu_do(dtype, with_bias, activation):
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


def test_complex_gradients_are_the_references():
    draw = samples.drawer("complex", torch.complex128)
    values = draw(5, 4), draw(4, 3), draw(3)
    args, exact_args = leaves(*values), leaves(*values)
    grad = draw(5, 3)
    functional.linear_act(*args, None).backward(grad)
    reference.linear_act(*exact_args, None).backward(grad)
    for argument, exact in zip(args, exact_args, strict=True):
        torch.testing.assert_close(argument.grad, exact.grad, rtol=0, atol=1e-14)
