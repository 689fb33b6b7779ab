"""float32 products under PyTorch's own setting that lets them be multiplied as bfloat16."""

import contextlib
from collections.abc import Iterator

import pytest
import samples
import torch
from samples import assert_within, num_threads, product_tolerance, same_bits
from torch import Tensor

from mylayers import build_info, functional, reference

AMX = build_info()["amx"]
needs_amx = pytest.mark.skipif(not AMX, reason="only AMX multiplies float32 as bfloat16")


WAYS = ("set_float32_matmul_precision", "mkldnn.matmul.fp32_precision")


@contextlib.contextmanager
def allowed(way: str) -> Iterator[None]:
    """bfloat16 for float32, in each of the ways in which users say so."""
    before = torch.get_float32_matmul_precision()
    own = torch.backends.mkldnn.matmul.fp32_precision
    try:
        if way == WAYS[0]:
            torch.set_float32_matmul_precision("medium")
        else:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.mkldnn.matmul.fp32_precision = own


@pytest.fixture(params=WAYS)
def medium(request):
    with allowed(request.param):
        yield


def drawn(rows: int, in_units: int, units: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = samples.drawer("precision", torch.float32)
    return draw(rows, in_units), draw(in_units, units), draw(units)


def rounded(t: Tensor) -> Tensor:
    return t.bfloat16().float()


# Rows of whole and cut tiles, of one pass and several; terms that are no whole tile.
SIZES = [(1, 600, 520), (17, 512, 513), (65, 601, 530), (300, 700, 600), (600, 520, 1100)]


@pytest.mark.grid
@needs_amx
@pytest.mark.usefixtures("medium")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_operands_are_rounded_to_bfloat16_and_summed_in_float32(sizes, transposed):
    x, weight, bias = drawn(*sizes)
    if transposed:
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    actual = functional.linear_act(x, weight, bias, "tanh")
    by_hand = rounded(x), rounded(weight), bias
    assert same_bits(functional.linear_act(*by_hand, "tanh"), actual)
    exact = tuple(t.double() for t in by_hand)
    magnitude = exact[0].abs() @ exact[1].abs() + exact[2].abs()
    without = functional.linear_act(x, weight, bias, None)
    expected = reference.linear_act(*exact, None)
    assert_within(without, expected, product_tolerance(x.dtype, x.shape[1], magnitude, expected))
    assert actual.dtype == torch.float32


@needs_amx
@pytest.mark.usefixtures("medium")
def test_neither_contiguous_rows_nor_columns_are_needed():
    x, weight, bias = drawn(40, 600, 520)
    stepped = torch.zeros(40, 1200)[:, ::2].copy_(x)
    apart = torch.zeros(1200, 1040)[::2, ::2].copy_(weight)
    expected = functional.linear_act(x, weight, bias)
    assert same_bits(functional.linear_act(stepped, apart, bias), expected)


@needs_amx
@pytest.mark.usefixtures("medium")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_every_batch_there_too(threads):
    x, weight, bias = drawn(600, 520, 600)
    whole = functional.linear_act(x, weight, bias)
    with num_threads(threads):
        for rows in (slice(1), slice(7, 20), slice(100, 357), slice(599, 600), slice(None)):
            assert same_bits(functional.linear_act(x[rows], weight, bias), whole[rows]), rows


@needs_amx
@pytest.mark.usefixtures("medium")
def test_gradients_are_those_of_rounded_operands():
    x, weight, bias = (t.requires_grad_() for t in drawn(600, 600, 520))
    grad = samples.drawer("precision-grad", torch.float32)(600, 520)
    dx, dw = torch.autograd.grad(functional.linear_act(x, weight, bias, None), (x, weight), grad)
    g, by_hand = rounded(grad).double(), [rounded(t.detach()).double() for t in (x, weight)]
    for actual, left, right in ((dx, g, by_hand[1].t()), (dw, by_hand[0].t(), g)):
        expected, magnitude = left @ right, left.abs() @ right.abs()
        tolerance = product_tolerance(torch.float32, left.shape[1], magnitude, expected)
        assert_within(actual, expected, tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_small_weights_and_processors_without_amx_know_no_difference(way):
    sizes = [(300, 64, 64), (5, 300, 200), *([] if AMX else SIZES)]
    expected = [functional.linear_act(*drawn(*size)) for size in sizes]
    with allowed(way):
        for size, result in zip(sizes, expected, strict=True):
            assert same_bits(functional.linear_act(*drawn(*size)), result), size


@needs_amx
@pytest.mark.usefixtures("medium")
def test_infinities_and_nans_stay_what_they_are():
    x, weight, bias = drawn(3, 600, 520)
    x[0, 7], x[1, 9] = torch.inf, torch.nan
    result = functional.linear_act(x, weight, bias, None)
    assert result[0].isinf().all()
    assert result[1].isnan().all()
    assert result[2].isfinite().all()
