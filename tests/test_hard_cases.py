"""Inputs and situations that must end well: a right result or the right exception, no more."""

import contextlib
import functools
import gc
import itertools
import mmap
import os
import re
import signal
import statistics
import subprocess
import sys
import textwrap
import time
import warnings
from typing import Any

import numpy as np
import pytest
import samples
import torch
from samples import ACTIVATIONS, KERNEL_DTYPES, OF_INPUT, num_threads, outcome, same_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import mylayers
from mylayers import functional, reference

every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d)[6:])
any_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_operator = pytest.mark.parametrize("operator", ["linear_act", "center"])


def arguments(operator: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Of one valid call, of more than one tile and vector."""
    draw = samples.drawer(operator, dtype)
    if operator == "center":
        return (draw(13, 33),)
    return draw(13, 33), draw(33, 21), draw(21)


def assert_same_outcome(operator: str, *args: object, **kwargs: object) -> None:
    """The compiled function ends as the formula: in its result, or its kind of exception.

    Of a kind that is at most less special: where ATen has a NotImplementedError, the checks on
    dtypes, which come first, may have its base class, RuntimeError.
    """
    actual = outcome(getattr(functional, operator), *args, **kwargs)
    expected = outcome(getattr(reference, operator), *args, **kwargs)
    if not isinstance(expected, Tensor):
        assert not isinstance(actual, Tensor)
        assert actual is expected or (actual is RuntimeError and issubclass(expected, actual))
        return
    assert isinstance(actual, Tensor), actual
    assert type(actual) is type(expected)
    assert (actual.layout, actual.dtype) == (expected.layout, expected.dtype)
    if expected.is_nested:
        parts = zip(actual.unbind(), expected.unbind(), strict=True)
    elif expected.is_quantized:
        parts = [(actual.dequantize(), expected.dequantize())]
    elif expected.layout != torch.strided:
        parts = [(actual.to_dense(), expected.to_dense())]
    else:
        parts = [(actual, expected)]
    for part, exact in parts:
        torch.testing.assert_close(part, exact, equal_nan=True)


# ---- shapes and layouts ----------------------------------------------------------------

ones = torch.ones
MISFITS = [
    (
        "in_units",
        (ones(2, 5), ones(4, 3), None),
        r"linear_act: weight must be \(in_units, units\) with in_units = 5 to match input "
        r"\[2, 5\]; got weight \[4, 3\]",
    ),
    (
        "1-D weight",
        (ones(2, 5), ones(5), None),
        r"linear_act: weight must be 2-D, \(in_units, units\); got 1-D, \[5\]",
    ),
    (
        "3-D weight",
        (ones(2, 5), ones(1, 5, 3), None),
        r"linear_act: weight must be 2-D, \(in_units, units\); got 3-D, \[1, 5, 3\]",
    ),
    (
        "0-D input",
        (ones(()), ones(5, 3), None),
        r"linear_act: input must have at least one dimension, .*in_units.*; got a 0-D tensor",
    ),
    (
        "bias length",
        (ones(2, 5), ones(5, 3), ones(4)),
        r"linear_act: bias must be \(units\) with units = 3 to match weight \[5, 3\]; "
        r"got bias \[4\]",
    ),
    (
        "bias of length one",
        (ones(2, 5), ones(5, 3), ones(1)),
        r"linear_act: bias must be \(units\) with units = 3 to match weight \[5, 3\]; "
        r"got bias \[1\]",
    ),
    (
        "2-D bias",
        (ones(2, 5), ones(5, 3), ones(2, 3)),
        r"linear_act: bias must be 1-D, \(units\); got 2-D, \[2, 3\]",
    ),
    (
        "weight dtype",
        (ones(2, 5), ones(5, 3).double(), None),
        r"linear_act: weight must have the dtype of input, [Ff]loat.*; got [Dd]ouble",
    ),
    (
        "bias dtype",
        (ones(2, 5), ones(5, 3), ones(3).bfloat16()),
        r"linear_act: bias must have the dtype of input, [Ff]loat.*; got BFloat16",
    ),
    (
        "weight device",
        (ones(2, 5), ones(5, 3, device="meta"), None),
        r"linear_act: weight must be on cpu like input; got meta",
    ),
    (
        "input device",
        (ones(2, 5, device="meta"), ones(5, 3), None),
        r"linear_act: weight must be on meta like input; got cpu",
    ),
    (
        "bias device",
        (ones(2, 5), ones(5, 3), ones(3, device="meta")),
        r"linear_act: bias must be on cpu like input; got meta",
    ),
]


@pytest.mark.grid
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "operator", [functional.linear_act, torch.ops.mylayers.linear_act], ids=["functional", "ops"]
)
@pytest.mark.parametrize(("args", "message"), [m[1:] for m in MISFITS], ids=[m[0] for m in MISFITS])
def test_misfits_are_refused_naming_operator_argument_expected_and_got(
    args, message, operator, requires_grad
):
    args = [t if t is None else t.clone().requires_grad_(requires_grad) for t in args]
    with pytest.raises(RuntimeError, match=message):
        operator(*args)


G, X, W, Y = ones(2, 3), ones(2, 5), ones(5, 3), ones(2, 3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((ones(()), X, W, Y), RuntimeError, "grad_output must have at least one dim.*got a 0-D"),
        ((G, X, ones(5, 4), Y), RuntimeError, r"weight must be .* units = 3 .*got weight \[5, 4\]"),
        ((G, X, ones(5), Y), RuntimeError, r"weight must be 2-D.*got 1-D, \[5\]"),
        ((G, ones(4, 5), W, Y), RuntimeError, r"input must have the sizes of .*\[2, 3\].*\[4, 5\]"),
        ((G, X, W, ones(2, 4)), RuntimeError, r"output must have the sizes of .*got \[2, 4\]"),
        ((G, X.double(), W, Y), RuntimeError, "input must have the dtype of grad_output.*Double"),
        ((G, X, W.to("meta"), Y), RuntimeError, "weight must be on cpu like grad_output; got meta"),
        ((G, X, None, Y), ValueError, "weight must be a tensor .*; got None"),
        ((G, None, W, Y), ValueError, "input must be a tensor .*; got None"),
        ((G, X, W, None), ValueError, "output must be a tensor .*; got None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_misfits_of_the_backward_operator_are_refused(args, error, message):
    with pytest.raises(error, match=f"linear_act_backward: {message}"):
        torch.ops.mylayers.linear_act_backward(*args, "relu", [True] * 3)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("dim", "error", "message"),
    [
        (2, IndexError, r"center: dim must be in \[-2, 1\] for a 2-D input; got 2"),
        (-3, IndexError, r"center: dim must be in \[-2, 1\] for a 2-D input; got -3"),
        ((0, -2), RuntimeError, r"center: dim must name each dimension once; got dimension 0 "),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "operator", [functional.center, torch.ops.mylayers.center], ids=["functional", "ops"]
)
def test_wrong_dims_are_refused_naming_operator_expected_and_got(
    dim, error, message, device, operator
):
    with pytest.raises(error, match=message):
        operator(ones(2, 3, device=device), dim)


@pytest.mark.grid
@every_dtype
@any_activation
def test_without_input_units_every_row_is_the_activated_bias(activation, dtype):
    def run(lib, wide):
        x, weight, bias = ones(3, 0), ones(0, 2), torch.tensor([-1.0, 2.0])
        leaves = [t.to(wide).requires_grad_() for t in (x, weight, bias)]
        output = lib.linear_act(*leaves, activation)
        output.sum().backward()
        assert [t.grad.shape for t in leaves] == [(3, 0), (0, 2), (2,)]
        return output, leaves[2].grad

    # An output up to 1 is off by 4 units in the last place at most, which are twice eps; its
    # derivative, up to twice as steep and with roundings of its own, by 6 eps; 3 rows.
    atol = 0 if activation in (None, "relu") else 3 * 6 * torch.finfo(dtype).eps
    for actual, expected in zip(run(functional, dtype), run(reference, torch.float64), strict=True):
        torch.testing.assert_close(actual, expected.to(dtype), rtol=0, atol=atol)


@pytest.mark.grid
@every_dtype
@any_activation
@pytest.mark.parametrize("sizes", [(0, 3, 2), (4, 3, 0), (0, 0, 0)], ids=str)
def test_gradients_to_which_nothing_contributes_are_zero(sizes, activation, dtype):
    rows, in_units, units = sizes
    args = [
        ones(shape, dtype=dtype, requires_grad=True)
        for shape in ((rows, in_units), (in_units, units), (units,))
    ]
    functional.linear_act(*args, activation).sum().backward()
    for argument in args:
        assert torch.equal(argument.grad, torch.zeros_like(argument))


def packed(values: Tensor, offset: int) -> Tensor:
    """The same values at ``offset`` bytes into a buffer that starts on a page."""
    size = values.numel() * values.itemsize
    memory = mmap.mmap(-1, offset + size)
    memory[offset:] = values.contiguous().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(memory, dtype=values.dtype, offset=offset).view(values.shape)


@pytest.mark.grid
@every_dtype
@every_operator
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8, 16, 32, 63])
def test_a_buffer_at_any_byte_gives_the_same_bits(operator, offset, dtype):
    function = getattr(functional, operator)
    args = arguments(operator, dtype)
    shifted = [packed(t, offset) for t in args]
    assert all(t.data_ptr() % 64 == offset for t in shifted)
    assert same_bits(function(*shifted), function(*args))


@every_dtype
@every_operator
def test_a_read_only_memory_map_is_only_read(operator, dtype, tmp_path):
    function = getattr(functional, operator)
    args = arguments(operator, dtype)
    mapped = []
    for i, values in enumerate(args):
        path = tmp_path / str(i)
        path.write_bytes(values.view(torch.uint8).numpy().tobytes())
        memory = np.memmap(path, mode="r")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensor = torch.from_numpy(memory).view(dtype).view(values.shape)
        mapped.append(tensor.requires_grad_())
    output = function(*mapped)
    assert same_bits(output, function(*args))
    output.sum().backward()


@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(
    ("operator", "options"),
    [("linear_act", [a]) for a in ACTIVATIONS] + [("center", [d]) for d in (None, 0, 1)],
    ids=str,
)
def test_copy_on_write_tensors_are_not_materialised(operator, options, layout, dtype):
    args = [
        samples.LAYOUTS[layout](samples.drawer("cow", dtype), tuple(t.shape))
        for t in arguments(operator)
    ]
    lazy = [torch._lazy_clone(t).requires_grad_() for t in args]
    output = getattr(functional, operator)(*lazy, *options)
    grad = torch._lazy_clone(samples.drawer("cow grad", dtype)(*output.shape))
    output.backward(grad)
    for tensor in (*args, *lazy, grad):
        assert torch._C._is_cow_tensor(tensor)


def available_gib() -> float:
    with open("/proc/meminfo") as lines:
        found = re.search(r"MemAvailable:\s+(\d+) kB", lines.read())
    return int(found[1]) / 2**20


@pytest.mark.whole  # half a minute, and gigabytes
def test_more_than_2_to_the_31_elements():
    if available_gib() < 16:
        pytest.skip(f"needs 16 GiB of free memory; there are {available_gib():.1f}")
    rows, units = 2**25 + 1, 64
    column = torch.ones(rows, 1, dtype=torch.bfloat16)
    column[[0, -1]] = torch.tensor([[2.0], [-3.0]], dtype=torch.bfloat16)
    weight = torch.arange(1.0, units + 1, dtype=torch.bfloat16).view(1, units)

    many = functional.linear_act(column, weight, None, None)
    assert many.numel() > 2**31
    for row, factor in ((0, 2), (1, 1), (2**24, 1), (rows - 2, 1), (rows - 1, -3)):
        assert torch.equal(many[row], weight[0] * factor)

    narrow = functional.linear_act(many, weight.T, None, None)
    row_sum = torch.tensor(float((weight.double() ** 2).sum())).to(torch.bfloat16)
    assert bool((narrow[1:-1] == row_sum).all())
    assert narrow[0].item() == (2 * row_sum).item()
    assert narrow[-1].item() == (-3 * row_sum).item()

    # 1 in row 0, -4 in the last, 0 between: what the gradients below have to find.
    many.zero_()
    many[0], many[-1] = 1, -4
    _, weight_grad, bias_grad = torch.ops.mylayers.linear_act_backward(
        many, column, None, None, None, [False, True, True]
    )
    assert torch.equal(weight_grad, torch.full((1, units), 14.0, dtype=torch.bfloat16))
    assert torch.equal(bias_grad, torch.full((units,), -3.0, dtype=torch.bfloat16))

    centered = functional.center(many.fill_(3).view(-1))
    assert not centered.any()


def test_the_same_tensor_as_input_and_weight():
    x = samples.drawer("same", torch.float64)(17, 17).requires_grad_()
    same = x.detach().clone().requires_grad_()
    actual, expected = functional.linear_act(x, x), reference.linear_act(same, same)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    actual.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, same.grad, rtol=0, atol=1e-13)


@every_operator
def test_output_fed_back_as_input(operator):
    x, *rest = arguments(operator, torch.float64)
    if rest:
        rest = [samples.drawer("square", torch.float64)(33, 33), None]
    actual = expected = x
    for _ in range(3):
        actual = getattr(functional, operator)(actual, *rest)
        expected = getattr(reference, operator)(expected, *rest)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_conjugate_views_of_complex_numbers():
    x, weight, bias = arguments("linear_act", torch.complex128)
    for args in ((x.conj(), weight, bias), (x, weight.conj(), bias), (x, weight, bias.conj())):
        assert_same_outcome("linear_act", *args, None)
    assert_same_outcome("center", x.conj())


# ---- values ----------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.grid
@every_dtype
@any_activation
@pytest.mark.parametrize(
    "special", [[NAN], [INF], [-INF], [INF, -INF], [INF, NAN]], ids=lambda v: str(v)
)
def test_nan_and_infinity_spread_as_in_the_formula_and_stay_in_their_row(
    special, activation, dtype
):
    x, weight, bias = arguments("linear_act", dtype)
    weight[:, 4] = 0  # 0 x inf
    clean = functional.linear_act(x, weight, bias, activation)
    row = 7
    hurt = x.clone()
    hurt[row, 3 : 3 + len(special)] = torch.tensor(special, dtype=dtype)
    actual = functional.linear_act(hurt, weight, bias, activation)
    expected = reference.linear_act(*samples.in_float64(hurt, weight, bias), activation=activation)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual[row]), kind(expected[row]))
    others = [i for i in range(len(x)) if i != row]
    assert same_bits(actual[others], clean[others])


@pytest.mark.grid
@every_dtype
@any_activation
@pytest.mark.parametrize("special", [NAN, INF, -INF], ids=str)
def test_nan_and_infinity_in_weight_and_bias_stay_in_their_column(special, activation, dtype):
    x, weight, bias = arguments("linear_act", dtype)
    clean = functional.linear_act(x, weight, bias, activation)
    weight[5, 2] = special
    bias[9] = special
    actual = functional.linear_act(x, weight, bias, activation)
    expected = reference.linear_act(*samples.in_float64(x, weight, bias), activation)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    others = [j for j in range(weight.shape[1]) if j not in (2, 9)]
    assert same_bits(actual[:, others], clean[:, others])


@pytest.mark.grid
@every_dtype
@any_activation
def test_gradients_where_the_output_is_nan_or_infinite_are_the_formulas(activation, dtype):
    x, weight, bias = arguments("linear_act", dtype)
    x[2, 0], x[3, 0] = INF, -INF
    if activation != "elu":
        # At NaN, PyTorch's gradient of elu is NaN where it computes with vectors, and the
        # output's gradient in the few elements that remain.
        x[1, 0] = NAN
    gradients = []
    for module, wide in ((functional, dtype), (reference, torch.float64)):
        args = [t.to(wide, copy=True).requires_grad_() for t in (x, weight, bias)]
        module.linear_act(*args, activation).backward(ones(13, 21, dtype=wide))
        gradients.append([t.grad for t in args])
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())


BACKWARD_FORMULAS = {
    "relu": lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
    "tanh": torch.ops.aten.tanh_backward,
    "sigmoid": torch.ops.aten.sigmoid_backward,
    "elu": lambda grad, y: torch.ops.aten.elu_backward(grad, 1, 1, 1, True, y),
}


@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("activation", BACKWARD_FORMULAS)
def test_gradients_of_special_outputs_are_pytorchs(activation, dtype):
    outputs = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 0.5, -0.5], dtype=dtype)
    if activation == "elu":
        outputs = outputs[1:]  # at NaN, PyTorch has two gradients; see above
    grads = torch.tensor([1.0, -3.0, 0.0, INF, -INF, NAN], dtype=dtype)
    y, grad = outputs.repeat(len(grads)), grads.repeat_interleave(len(outputs))
    one = ones(1, 1, dtype=dtype)
    (dx, _, _) = torch.ops.mylayers.linear_act_backward(
        grad[:, None], None, one, y[:, None], activation, [True, False, False]
    )
    (_, dw, db) = torch.ops.mylayers.linear_act_backward(
        grad[None], one, None, y[None], activation, [False, True, True]
    )
    expected = BACKWARD_FORMULAS[activation](grad, y)  # exact: all are small binary fractions
    for actual in (dx[:, 0], dw[0], db):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_special_inputs_have_the_value_and_gradient_of_the_formula(activation, dtype):
    info = torch.finfo(dtype)
    numbers = [0, info.smallest_normal, info.eps, 0.5, 1, 9, 17, 40, 88, 89, 104, 709, 746]
    x = torch.tensor([*numbers, info.max, INF], dtype=dtype)
    x = torch.cat([x, -x])
    if activation in OF_INPUT:
        x = x[x.abs() < info.max]  # where PyTorch's formula is 0 times infinity, and so is ours
    results = []
    for lib, wide in ((functional, dtype), (reference, torch.float64)):
        leaf = x.to(wide, copy=True).requires_grad_()
        y = lib.linear_act(leaf[:, None], ones(1, 1, dtype=wide), None, activation)[:, 0]
        y.sum().backward()
        results.append((y.detach().to(torch.float64), leaf.grad.to(torch.float64)))
    (y, grad), (exact_y, exact_grad) = results
    assert not y.isnan().any()
    # sigmoid is 0 where e^-x overflows; a subnormal result has fewer digits.
    # PyTorch's gelu is 0 from -8.4 on, in float64, too.
    smallest = 1e-15 if activation in OF_INPUT else info.tiny
    exact_y = exact_y.to(dtype).double()  # selu of the largest number is infinite
    torch.testing.assert_close(y, exact_y, rtol=4 * info.eps, atol=smallest)
    # Twice as steep as the output, and with roundings of its own. In PyTorch's hardsigmoid is a
    # factor of float32.
    atol = 1e-8 if (activation, dtype) == ("hardsigmoid", torch.float64) else 6 * info.eps
    torch.testing.assert_close(grad, exact_grad, rtol=0, atol=atol)


@every_dtype
@pytest.mark.parametrize("special", [NAN, INF], ids=str)
def test_nan_and_infinity_in_center_stay_in_their_slice(special, dtype):
    (x,) = arguments("center", dtype)
    for dim in (0, 1):
        clean = functional.center(x, dim)
        hurt = x.clone()
        hurt[7, 20] = special
        actual, expected = functional.center(hurt, dim), reference.center(hurt, dim)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())
        assert same_bits(
            actual[~expected.isnan() & ~expected.isinf()],
            clean[~expected.isnan() & ~expected.isinf()],
        )


@every_dtype
def test_relu_at_zero_and_minus_zero_has_value_and_gradient_zero(dtype):
    x = torch.tensor([[0.0], [-0.0], [1.0], [-1.0]], dtype=dtype, requires_grad=True)
    weight = ones(1, 20, dtype=dtype)
    output = functional.linear_act(x, weight, torch.full((20,), -0.0, dtype=dtype))
    assert torch.equal(output, torch.relu(x.detach()).expand(4, 20))
    output.sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0], [0.0], [20.0], [0.0]], dtype=dtype))
    minus_zero = torch.full((4, 20), -0.0, dtype=dtype)
    (gradient, _, _) = torch.ops.mylayers.linear_act_backward(
        torch.ones_like(minus_zero), None, weight, minus_zero, "relu", [True, False, False]
    )
    assert torch.equal(gradient, torch.zeros(4, 1, dtype=dtype))


@any_activation
def test_float16_products_beyond_its_range_act_as_infinite(activation):
    x = torch.full((3, 20), 300.0, dtype=torch.float16)
    weight = torch.full((20, 5), 300.0, dtype=torch.float16)
    for sign in (1, -1):
        infinite = torch.full((3, 5), sign * INF, dtype=torch.float16)
        expected = reference.ACTIVATIONS[activation](infinite) if activation else infinite
        actual = functional.linear_act(x, sign * weight, None, activation)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_activations_keep_denormal_numbers(sign, activation, dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bias = torch.full((70,), sign * 4 * smallest, dtype=dtype)
    output = functional.linear_act(
        ones(7, 0, dtype=dtype), ones(0, 70, dtype=dtype), bias, activation
    )
    assert torch.equal(output, reference.ACTIVATIONS[activation](bias).expand(7, 70))


@every_dtype
def test_denormal_numbers_are_kept(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.full((7, 1), 3 * smallest, dtype=dtype)
    weight = ones(1, 20, dtype=dtype)
    if dtype == torch.bfloat16 and mylayers.build_info()["bfloat16_units"]:
        # The 16-bit matrix units take them for zero, as they do in PyTorch's own product as
        # soon as it is large enough to run there.
        padded = torch.nn.functional.pad(x, (0, 63, 0, 57))
        expected = (padded @ ones(64, 64, dtype=dtype))[:7, :20]
    else:
        expected = x.expand(7, 20)
    assert torch.equal(functional.linear_act(x, weight), expected)
    y = torch.tensor([1.0, 2.0, 6.0], dtype=dtype).repeat(20) * smallest
    assert torch.equal(
        functional.center(y), torch.tensor([-2.0, -1.0, 3.0], dtype=dtype).repeat(20) * smallest
    )


def flushes_denormals() -> bool:
    return (torch.full((1,), 1e-39) * 1.0).item() == 0


@pytest.mark.parametrize("mode", [False, True])
def test_the_threads_denormal_mode_is_left_as_found(mode):
    if not torch.set_flush_denormal(mode):
        pytest.skip("this processor cannot flush denormals")
    try:
        for operator in ("linear_act", "center"):
            args = [t.requires_grad_() for t in arguments(operator)]
            getattr(functional, operator)(*args).sum().backward()
            assert flushes_denormals() == mode
    finally:
        torch.set_flush_denormal(False)


# ---- types and devices -----------------------------------------------------------------


@pytest.mark.road("autocast")
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_autocast_computes_in_its_dtype_with_gradients_in_the_parameters(low):
    x, weight, bias = (t.requires_grad_() for t in arguments("linear_act"))
    with torch.autocast("cpu", low):
        output = functional.linear_act(x, weight, bias)
        mixed = functional.linear_act(x.to(low), weight, bias)
        with torch.autocast("cpu", enabled=False):
            full = functional.linear_act(x, weight, bias)
    narrow = [t.detach().to(low).requires_grad_() for t in (x, weight, bias)]
    expected = functional.linear_act(*narrow)
    assert output.dtype == low
    assert same_bits(output, expected)
    assert same_bits(mixed, expected)
    assert full.dtype == torch.float32
    output.sum().backward()
    expected.sum().backward()
    for argument, same in zip((x, weight, bias), narrow, strict=True):
        assert argument.grad.dtype == torch.float32
        assert torch.equal(argument.grad, same.grad.float())


@pytest.mark.road("autocast")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_center_has_the_formulas_dtype_under_autocast(dtype):
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_outcome("center", *arguments("center", dtype))


def quantized(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*quantized tensor creation functions")
        return torch.quantize_per_tensor(t, 0.1, 10, torch.quint8)


def nested(t: Tensor, layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype")
        return torch.nested.nested_tensor([t[:4], t[4:]], layout=layout)


def csr(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return t.to_sparse_csr()


CONVERSIONS = {
    "quantised": quantized,
    "sparse": Tensor.to_sparse,
    "csr": csr,
    "nested": functools.partial(nested, layout=torch.strided),
    "jagged": functools.partial(nested, layout=torch.jagged),
    "mkldnn": Tensor.to_mkldnn,
    "float8": lambda t: t.to(torch.float8_e4m3fn),
}


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@any_activation
@pytest.mark.parametrize("converted", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", CONVERSIONS)
def test_linear_act_of_other_layouts_ends_as_the_formula(kind, converted, activation):
    args = list(arguments("linear_act"))
    args[0] = args[0].relu()  # some zeros, for the sparse layouts
    for i in converted:
        if i < 2 or kind not in ("csr", "nested", "jagged"):  # these are at least 2-D
            args[i] = CONVERSIONS[kind](args[i])
    assert_same_outcome("linear_act", *args, activation)
    assert_same_outcome("linear_act", *args[:2], None, activation)


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("dim", [None, 0, -1])
@pytest.mark.parametrize("kind", CONVERSIONS)
def test_center_of_other_layouts_ends_as_the_formula(kind, dim):
    assert_same_outcome("center", CONVERSIONS[kind](arguments("center")[0]), dim)


@every_operator
def test_fake_tensors_have_the_results_shape_and_dtype(operator):
    args = arguments(operator, torch.bfloat16)
    real = getattr(functional, operator)(*args)
    with FakeTensorMode() as mode:
        fake = getattr(functional, operator)(*(mode.from_tensor(t) for t in args))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert fake.device.type == "cpu"


class Kept(torch.Tensor):
    """A subclass that overrides nothing: PyTorch's functions keep its class."""


class Watching(torch.Tensor):
    """Records which functions it passes through."""

    seen: list[object]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Wrapping(torch.Tensor):
    """Holds a tensor, computes on it below autograd, and wraps the results."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(value):
            return value.inner if isinstance(value, cls) else value

        def wrap(value):
            return cls(value) if isinstance(value, Tensor) else value

        tree_map = torch.utils._pytree.tree_map
        results = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(wrap, results)


@every_operator
def test_a_plain_subclass_is_kept_where_the_formula_keeps_it(operator):
    args = arguments(operator)
    for i in range(len(args)):
        mixed = [t.as_subclass(Kept) if i == j else t for j, t in enumerate(args)]
        assert type(getattr(functional, operator)(*mixed)) is Kept
        assert_same_outcome(operator, *mixed)
        with torch._C.DisableTorchFunctionSubclass():
            assert_same_outcome(operator, *mixed)


@every_operator
def test_torch_function_sees_the_operator_whichever_argument_overrides_it(operator):
    args = arguments(operator)
    expected = getattr(functional, operator)(*args)
    for i in range(len(args)):
        Watching.seen = []
        mixed = [t.as_subclass(Watching) if i == j else t for j, t in enumerate(args)]
        output = getattr(functional, operator)(*mixed)
        seen = [str(function) for function in Watching.seen]
        assert any(f"mylayers.{operator}" in name for name in seen), seen
        assert type(output) is Tensor
        assert same_bits(output, expected)


@every_operator
def test_torch_function_mode_sees_the_operator(operator):
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        getattr(functional, operator)(*arguments(operator))
    assert any(f"mylayers.{operator}" in name for name in seen), seen


@every_operator
def test_a_torch_dispatch_subclass_reaches_the_kernel_forward_and_backward(operator):
    args = arguments(operator)
    function = getattr(functional, operator)
    plain = [t.clone().requires_grad_() for t in args]
    wrapped = [Wrapping(t).requires_grad_() for t in args]
    expected, actual = function(*plain), function(*wrapped)
    assert type(actual) is Wrapping
    assert same_bits(actual.inner, expected)
    expected.sum().backward()
    actual.sum().backward()
    for tensor, same in zip(wrapped, plain, strict=True):
        assert same_bits(tensor.grad.inner, same.grad)


@every_operator
def test_the_result_of_parameters_is_a_plain_tensor(operator):
    args = [torch.nn.Parameter(t) for t in arguments(operator)]
    output = getattr(functional, operator)(*args)
    assert type(output) is Tensor
    assert output.requires_grad


NO_TENSORS = [None, 1.5, [1.0, 2.0], (ones(2),), np.ones((2, 2)), "text", object()]


@pytest.mark.grid
@pytest.mark.parametrize("value", NO_TENSORS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_linear_act_of_no_tensor_is_a_type_error_naming_the_argument(position, value):
    args = [ones(2, 2), ones(2, 2), ones(2)]
    args[position] = value
    if position == 2 and value is None:
        assert functional.linear_act(*args).shape == (2, 2)
        return
    name = ("input", "weight", "bias")[position]
    with pytest.raises(TypeError, match=f"linear_act: {name} must be a torch.Tensor; got "):
        functional.linear_act(*args)


@pytest.mark.parametrize("value", NO_TENSORS, ids=lambda v: type(v).__name__)
def test_center_of_no_tensor_is_a_type_error_naming_the_argument(value):
    with pytest.raises(TypeError, match=r"center: input must be a torch.Tensor; got "):
        functional.center(value)


@pytest.mark.parametrize(
    ("activation", "error", "message"),
    [
        ("swish", ValueError, 'activation must be one of .* or None; got "?.?swish'),
        ("", ValueError, 'activation must be one of .* or None; got ""'),
        ("RELU", ValueError, 'activation must be one of .* or None; got "RELU"'),
        (1, TypeError, "activation must be a str or None; got int"),
        pytest.param(
            torch.relu, TypeError, "activation must be a str or None; got builtin", id="torch.relu"
        ),
    ],
    ids=str,
)
def test_an_unknown_activation_is_refused(activation, error, message):
    for dtype in (torch.float32, torch.int64):
        with pytest.raises(error, match=f"linear_act: {message}"):
            functional.linear_act(
                ones(2, 2, dtype=dtype), ones(2, 2, dtype=dtype), None, activation
            )


# ---- processes, files, resources -------------------------------------------------------


@every_operator
def test_an_allocation_that_cannot_succeed_is_pytorchs_error_and_the_next_call_works(operator):
    huge = {
        "linear_act": (ones(1, 1).expand(2**40, 1), ones(1, 1).expand(1, 2**10)),
        "center": (ones(1).expand(2**50),),
    }[operator]
    message = "DefaultCPUAllocator: (can't allocate memory|not enough memory)"
    with pytest.raises(RuntimeError, match=message):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match=message):
        getattr(functional, operator)(*huge)
    args = arguments(operator)
    torch.testing.assert_close(
        getattr(functional, operator)(*args), getattr(reference, operator)(*args)
    )


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm") as line:
        return int(line.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


x23, w34 = ones(2, 3), ones(3, 4)
LOOPS = {
    "that succeed": [
        lambda: functional.linear_act(x23, w34),
        lambda: torch.ops.mylayers.linear_act(x23, w34),
        lambda: functional.center(x23, (0, 1)),
        lambda: torch.ops.mylayers.center(x23),
    ],
    "that raise": [
        lambda: functional.linear_act(w34, x23),
        lambda: functional.linear_act(x23, [1.0]),
        lambda: functional.linear_act(x23, w34, None, "swish"),
        lambda: functional.center(x23, 7),
        lambda: functional.center(x23, "dim"),
    ],
}


@pytest.mark.parametrize("kind", LOOPS)
def test_a_hundred_thousand_calls_leave_no_memory_behind(kind):
    def repeat(times: int) -> None:
        for call in LOOPS[kind] * (times // len(LOOPS[kind])):
            try:
                call()
            except (RuntimeError, TypeError, ValueError, IndexError):
                assert kind == "that raise"
            else:
                assert kind == "that succeed"

    repeat(10_000)
    before = resident_bytes()
    repeat(100_000)
    # One of five calls that leaks a single small object, of 80 bytes with its allocator's
    # header, would show.
    assert resident_bytes() - before < 16 * 100_000


def test_ten_thousand_training_steps_leave_no_memory_behind():
    args = [t.requires_grad_() for t in arguments("linear_act")]

    def repeat(times: int) -> None:
        for _ in range(times):
            functional.center(functional.linear_act(*args)).sum().backward()

    repeat(1000)
    before = resident_bytes()
    repeat(10_000)
    assert resident_bytes() - before < 64 * 10_000


def test_keyboard_interrupt_is_raised_after_the_call_and_the_next_call_works():
    script = textwrap.dedent(
        """
        import signal
        import torch
        from mylayers import functional
        # A shell's background jobs, and what they start, ignore the signal.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        x, weight = torch.ones(2000, 1000), torch.ones(1000, 1000)
        functional.linear_act(x[:10], weight)
        try:
            print("started", flush=True)
            for _ in range(1000):
                functional.linear_act(x, weight)
        except KeyboardInterrupt:
            again = functional.linear_act(x[:300], weight)
            assert torch.equal(again, torch.full((300, 1000), 1000.0))
            print("interrupted", flush=True)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "started\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (rest, process.returncode) == ("interrupted\n", 0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@every_operator
def test_data_loader_workers_compute_after_the_parent_has_used_its_threads(operator, method):
    draw = samples.drawer("loader", torch.float32)
    batches = [draw(400, 300) for _ in range(3)]
    call = functional.center
    if operator == "linear_act":
        call = functools.partial(functional.linear_act, weight=draw(300, 70), bias=draw(70))
    with num_threads(2):
        expected = [call(x) for x in batches]
        loader = torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            num_workers=1,
            collate_fn=call,
            multiprocessing_context=method,
            timeout=60,
        )
        for actual, same in zip(loader, expected, strict=True):
            assert same_bits(actual, same)


def results_of_training(operator: str) -> list[Tensor]:
    """Of sizes at which threads share the work."""
    draw = samples.drawer("threads", torch.float32)
    args = [draw(3000, 130)] if operator == "center" else [draw(3000, 130), draw(130, 70), draw(70)]
    leaves = [t.requires_grad_() for t in args]
    output = getattr(functional, operator)(*leaves)
    output.backward(draw(*output.shape))
    return [output, *(t.grad for t in leaves)]


@every_operator
def test_thread_counts_that_change_between_calls_and_exceed_the_cores_change_no_bit(operator):
    with num_threads(1):
        expected = results_of_training(operator)
    for threads in (2, 1, 3, 4 * (os.cpu_count() or 1) + 1, 2):
        with num_threads(threads):
            for actual, same in zip(results_of_training(operator), expected, strict=True):
                assert same_bits(actual, same), f"{threads} threads"


def test_with_every_core_busy_bits_are_the_same_and_small_calls_do_not_stall():
    expected = [results_of_training(operator) for operator in ("linear_act", "center")]
    x, weight, bias = arguments("linear_act")
    with contextlib.ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: 0"]))
            stack.callback(busy.kill)
        time.sleep(0.2)
        actual = [results_of_training(operator) for operator in ("linear_act", "center")]
        seconds = []
        for _ in range(500):
            start = time.perf_counter()
            functional.center(functional.linear_act(x, weight, bias))
            seconds.append(time.perf_counter() - start)
    for one, same in zip(actual, expected, strict=True):
        assert all(map(same_bits, one, same))
    # Of microseconds each; the median leaves out those that the busy processes preempt.
    assert statistics.median(seconds) < 1e-3


@every_operator
def test_the_profiler_shows_the_operators_by_name_with_their_shapes(operator):
    args = [t.requires_grad_() for t in arguments(operator)]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        getattr(functional, operator)(*args).sum().backward()
    shapes = {event.name: event.input_shapes for event in profile.events()}
    expected = [list(t.shape) for t in args]
    assert shapes[f"mylayers::{operator}"][: len(args)] == expected
    if operator == "linear_act":
        assert shapes["mylayers::linear_act_backward"][0] == [13, 21]


@every_operator
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_result_is_marked_as_the_formulas(operator, mode):
    args = [t.requires_grad_() for t in arguments(operator)]
    recorded = getattr(functional, operator)(*args)
    with mode():
        actual, expected = (getattr(m, operator)(*args) for m in (functional, reference))
    assert not actual.requires_grad
    assert actual.grad_fn is None
    assert actual.is_inference() == expected.is_inference() == (mode is torch.inference_mode)
    assert same_bits(actual, recorded)


# ---- memory that was taken away ----------------------------------------------------------------

# Who shards a model empties the storage of parameters that are not in use. Each gives a call and
# the tensor that it reads.
FREED: dict[str, Any] = {
    "linear_act, input": (lambda t: functional.linear_act(t, torch.rand(64, 8)), (2, 64)),
    "linear_act, weight": (lambda t: functional.linear_act(torch.rand(2, 64), t), (64, 8)),
    "linear_act, bias": (
        lambda t: functional.linear_act(torch.rand(2, 64), torch.rand(64, 8), t),
        (8,),
    ),
    "center": (functional.center, (4, 8)),
    "sequential, weight": (
        lambda t: torch.ops.mylayers.sequential(torch.rand(2, 64), [t], "linear"),
        (64, 8),
    ),
    "sequential, bias": (
        lambda t: torch.ops.mylayers.sequential(
            torch.rand(2, 64), [torch.rand(64, 8), t], "linear+bias"
        ),
        (8,),
    ),
    "sequential, input": (
        lambda t: torch.ops.mylayers.sequential(t, [torch.rand(64, 8)], "linear+relu"),
        (2, 64),
    ),
    **{
        f"sequential, input of {step}": (
            lambda t, step=step: torch.ops.mylayers.sequential(t, [], step),
            (2, 64),
        )
        for step in ("tanh", "gelu", "center", "layer_norm(64,1e-05)", "flatten(0,1); tanh")
    },
    "sequential, weight of a norm": (
        lambda t: torch.ops.mylayers.sequential(
            torch.rand(2, 64), [t], "layer_norm(64,1e-05)+weight"
        ),
        (64,),
    ),
    "linear_act_backward, grad_output": (
        lambda t: torch.ops.mylayers.linear_act_backward(
            t, torch.rand(2, 64), torch.rand(64, 8), None, None, [True, True, True]
        ),
        (2, 8),
    ),
    "linear_act_backward, weight": (
        lambda t: torch.ops.mylayers.linear_act_backward(
            torch.rand(2, 8), None, t, None, None, [True, False, False]
        ),
        (64, 8),
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize(("call", "shape"), FREED.values(), ids=FREED)
@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_tensor_without_its_memory_is_refused(call, shape, left, mode):
    tensor = torch.rand(shape)
    tensor.untyped_storage().resize_(left)
    with mode(), pytest.raises(RuntimeError, match=f"memory of its elements.*got a .*{left} bytes"):
        call(tensor)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("cls", [nn.Linear, mylayers.MyLinear])
def test_a_network_whose_parameters_were_freed_is_refused_and_comes_back(cls, place):
    net, x = mylayers.FusedSequential(cls(4, 6), nn.Tanh(), cls(6, 3)), torch.rand(5, 4)
    expected = net(x)
    parameter = list(net.parameters())[place]
    kept = parameter.detach().clone()
    parameter.untyped_storage().resize_(0)
    for call in (
        lambda: net(x),
        lambda: mylayers.forward_backward(net, nn.MSELoss(), x, torch.zeros(5, 3)),
        torch.no_grad()(lambda: net(x)),
        torch.inference_mode()(lambda: net(x)),
    ):
        with pytest.raises(RuntimeError, match="memory of its elements"):
            call()
    parameter.untyped_storage().resize_(kept.nbytes)
    parameter.data.copy_(kept)
    assert torch.equal(net(x), expected)


def test_a_gradient_from_memory_that_was_freed_since_is_refused():
    net, x = mylayers.FusedSequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.rand(5, 4)
    loss = net(x).sum()
    net[2].weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="out of bounds for storage of size 0"):  # PyTorch's own
        loss.backward()


class RunsAtEachOperator(TorchDispatchMode):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.f()
        return function(*args, **(kwargs or {}))


HOOKS = "hooks on what is saved"
PYTHON_WITHIN_A_CALL = {
    "a mode": RunsAtEachOperator,
    HOOKS: lambda f: saved_tensors_hooks(lambda t: f() or t, lambda t: t),
}
USES = {
    "linear_act": lambda layer, x: functional.linear_act(x, layer.weight, layer.bias, "tanh"),
    "center": lambda layer, _: functional.center(layer.weight),
    "MyLinear": lambda layer, x: layer(x),
    "FusedSequential": lambda layer, x: mylayers.FusedSequential(layer, nn.Tanh(), layer)(x),
}


@pytest.mark.parametrize(
    ("use", "code"),
    # center saves nothing.
    [pair for pair in itertools.product(USES, PYTHON_WITHIN_A_CALL) if pair != ("center", HOOKS)],
)
def test_no_code_that_runs_within_a_call_can_take_its_tensors_away(use, code):
    use, python = USES[use], PYTHON_WITHIN_A_CALL[code]
    layer, x = mylayers.MyLinear(8, 8), torch.rand(2, 8)
    expected, refusals = use(layer, x), []
    gradients = python is not RunsAtEachOperator

    def exchange() -> None:
        for parameter in (layer.weight, layer.bias):
            with contextlib.suppress(RuntimeError):
                torch.utils.swap_tensors(parameter, nn.Parameter(torch.full_like(parameter, 7.0)))
                continue
            refusals.append(parameter)
        gc.collect()

    with torch.set_grad_enabled(gradients), python(exchange):
        found = use(layer, x)
    assert refusals, "nothing ran within the call"
    assert same_bits(found, expected)
