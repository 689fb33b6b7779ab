"""center: values and gradients against float64, accuracy of long sums, identical bits."""

import functools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import samples
import torch
from hypothesis import strategies as st
from samples import (
    KERNEL_DTYPES,
    Sample,
    assert_within,
    num_threads,
    outcome,
    same_bits,
)
from torch import Tensor

from mylayers import functional, reference
from mylayers._extension import _C


@functools.cache
def by_name(dtype: torch.dtype) -> dict[str, Sample]:
    return {s.name: s for s in samples.center_samples(dtype)}


every_sample = pytest.mark.parametrize("name", list(by_name(torch.float32)))
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d)[6:])


def mean_of(x: Tensor, dim: int | Sequence[int] | None) -> Tensor:
    """In float64, every averaged dimension kept with size one.

    That of float64 values is of their exact sum: PyTorch's own sum adds a value that repeats over
    and over, and all its roundings go the same way.
    """
    dims = tuple(range(x.dim())) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    mean = x.detach().double().mean(dims, keepdim=True)
    if x.dtype != torch.float64 or not x.numel() or not dims:
        return mean
    count = x.numel() // mean.numel()
    averaged = x.detach().movedim(dims, tuple(range(-len(dims), 0))).reshape(-1, count)
    sums = [math.fsum(values) for values in averaged.tolist()]
    return (mean.new_tensor(sums) / count).view(mean.shape)


def check_values(actual: Tensor, x: Tensor, dim: int | Sequence[int] | None) -> None:
    assert actual.dtype == x.dtype
    mean = mean_of(x, dim)
    if x.dtype.itemsize == 2:
        # The sum is so good that the rounded mean, and all that follows, is exact. But eight values
        # meet in float32 (three roundings): beside a tie the mean may round to either side.
        off = 1.5 * torch.finfo(torch.float32).eps * mean_of(x.abs(), dim)
        most, least = (x - (mean + sign * off).to(x.dtype) for sign in (-1, 1))
        beside = (least < most) & (least <= actual) & (actual <= most)
        assert same_bits(actual, torch.where(beside, actual, x - mean.to(x.dtype)))
        return
    # Eight values meet in their own type (three roundings); a sum of float64 stays there.
    count = x.numel() / max(mean.numel(), 1)
    roundings = 3 if x.dtype == torch.float32 else count**0.5 + 3
    magnitude = roundings * mean_of(x.abs(), dim) + mean.abs() + (x - mean).abs()
    eps = torch.finfo(x.dtype).eps
    assert_within(actual, x - mean, eps / 2 * (1 + 4 * eps) * magnitude)


def check_gradient(x: Tensor, dim: int | Sequence[int] | None) -> None:
    leaf = x.detach().requires_grad_()
    output = functional.center(leaf, dim)
    grad = samples.drawer("center-grad", x.dtype)(*x.shape).to(x.device)
    check_values(torch.autograd.grad(output, leaf, grad)[0], grad, dim)


@pytest.mark.grid
@every_dtype
@every_sample
def test_values_are_those_of_the_float64_mean(name, dtype):
    sample = by_name(dtype)[name]
    (x,) = sample.args
    before = x.clone()
    y = functional.center(x, **sample.kwargs)
    check_values(y, x, **sample.kwargs)
    assert same_bits(torch.ops.mylayers.center(x, **sample.kwargs), y)
    assert torch.equal(x, before)


@pytest.mark.grid
@every_dtype
@every_sample
def test_gradient_is_the_centered_gradient(name, dtype):
    sample = by_name(dtype)[name]
    check_gradient(*sample.args, **sample.kwargs)


@every_sample
def test_strides_are_those_of_the_formula(name):
    sample = by_name(torch.float32)[name]
    actual = functional.center(*sample.args, **sample.kwargs)
    assert actual.stride() == reference.center(*sample.args, **sample.kwargs).stride()


@every_sample
def test_meta_tensors_give_the_shapes_strides_and_dtypes_of_the_kernels(name):
    sample = by_name(torch.float32)[name]
    (x,) = sample.args
    real = functional.center(x, **sample.kwargs)
    shadow = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    meta = functional.center(shadow, **sample.kwargs)
    assert meta.device.type == "meta"
    assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


@st.composite
def drawn_samples(draw: st.DrawFn) -> Sample:
    dtype = draw(st.sampled_from(KERNEL_DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=2)))
    shape = tuple(draw(st.permutations([*shape, draw(st.sampled_from([1, 5, 64, 258, 4099]))])))
    layout = draw(st.sampled_from(list(samples.LAYOUTS)))
    rank = len(shape)
    dims = st.lists(
        st.integers(-rank, rank - 1), max_size=rank, unique_by=lambda d: d % rank
    ).flatmap(lambda d: st.sampled_from([d, tuple(d)]))
    values = samples.drawer(f"{dtype}{shape}{layout}", dtype)
    dim = draw(st.none() | st.integers(-rank, rank - 1) | dims)
    return Sample("drawn", (samples.LAYOUTS[layout](values, shape),), {"dim": dim})


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(drawn_samples())
def test_any_shape_strides_and_dims_forward_and_gradient(sample):
    (x,) = sample.args
    check_values(functional.center(x, **sample.kwargs), x, **sample.kwargs)
    check_gradient(x, **sample.kwargs)


# ---- accuracy --------------------------------------------------------------------------


def test_values_that_repeat_are_measured_against_their_exact_mean():
    x = samples.drawer("repeated", torch.float64)(2, 1, 1, 2).expand(2, 512, 16, 2)
    check_values(functional.center(x), x, None)
    check_gradient(x, (0, 1, 2))


@pytest.mark.parametrize("count", [10**7, pytest.param(10**8, marks=pytest.mark.whole)])
def test_mean_of_many_float32_values_is_right_to_one_unit_in_the_last_place(count):
    x = torch.rand(count, generator=torch.Generator().manual_seed(1)).add_(1000)
    exact = torch.sum(x, dtype=torch.float64).item() / count
    # Values this close to their mean lose nothing when it is subtracted: the difference
    # gives the mean back.
    y = functional.center(x)
    mean = np.float32(x[0].item() - y[0].item())
    assert abs(float(mean) - exact) <= np.spacing(np.float32(exact))
    assert torch.equal(y, x - float(mean))


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_float16_values_whose_sum_overflows_float16_have_the_right_mean(dim):
    x = torch.full((300, 400), 1000.0, dtype=torch.float16)
    x[::2, ::2] += 4
    # Means of 1001; of 1002 and 1000 by turns along either dimension.
    mean = {None: 1001.0, 0: 1002.0, 1: 1002.0}[dim]
    assert x.double().sum(0).min() > torch.finfo(torch.float16).max
    assert functional.center(x, dim)[0, 0].item() == 1004 - mean
    check_values(functional.center(x, dim), x, dim)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES[1:], ids=lambda d: str(d)[6:])
def test_large_values_of_both_signs_cancel(dtype):
    large = 2.0**15
    x = torch.tensor([large, 3.0, -large, 1.0], dtype=dtype).repeat(3000)
    assert torch.equal(functional.center(x), x - 1)


# ---- identical bits --------------------------------------------------------------------


@every_dtype
def test_thread_count_changes_no_bit(dtype):
    for name, sample in by_name(dtype).items():
        with num_threads(1):
            expected = functional.center(*sample.args, **sample.kwargs)
        for threads in (2, 4):
            with num_threads(threads):
                actual = functional.center(*sample.args, **sample.kwargs)
            assert same_bits(actual, expected), f"{name}, {threads} threads"


@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("length", [1, 7, 300, 4097])
def test_a_row_has_the_same_bits_in_every_batch(length, dtype):
    x = samples.drawer("rows", dtype)(130, length)
    alone = torch.cat([functional.center(row, -1) for row in x.split(1)])
    for rows in range(1, 131):
        assert same_bits(functional.center(x[:rows], -1), alone[:rows]), f"{rows} rows"


# Which of two NaNs an addition passes on is the compiler's choice in each copy of a loop, so that
# of a mean it is torch.nan. A value that is NaN itself keeps its bits.
@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("along", [-1, 0])
@pytest.mark.parametrize("length", [3, 7, 300, 4097, 70_000])
def test_nan_has_the_same_bits_in_every_batch(length, along, dtype):
    others = 130 if length < 4097 else 9
    x = samples.drawer("NaN", dtype)(others, length)
    for row in (0, 1, 5, others - 1):
        x[row, row % 3 :: length // 3] = samples.nans_like(x[row, row % 3 :: length // 3])
    had_nan = x.isnan()

    def centered(rows: Tensor) -> Tensor:
        if along == 0:
            return functional.center(rows.t().contiguous(), 0).t()
        return functional.center(rows, -1)

    alone = torch.cat([centered(row.repeat(2, 1))[:1] for row in x.split(1)])
    assert torch.equal(alone.isnan(), had_nan.any(1, keepdim=True).expand_as(alone))
    of_mean = alone[alone.isnan() & ~had_nan]
    assert same_bits(of_mean, torch.full_like(of_mean, torch.nan))
    for rows in (2, 3, 8, others):
        for threads in (1, 2, 4):
            with num_threads(threads):
                assert same_bits(centered(x[:rows]), alone[:rows]), (rows, threads)


# Results of 24 MiB, which a processor may be told to write past its caches where rows are whole
# cache lines.
@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("length", [8195, 8224])
def test_rows_of_a_result_larger_than_a_cache_have_the_bits_of_each_alone(length, dtype):
    x = samples.drawer("large", dtype)(24 * 2**20 // dtype.itemsize // length, length)
    alone = torch.cat([functional.center(row, -1) for row in x.split(1)])
    whole = functional.center(x)
    check_values(whole, x, None)
    for threads in (1, 2):
        with num_threads(threads):
            assert same_bits(functional.center(x, -1), alone), f"{threads} threads"
            assert same_bits(functional.center(x), whole), f"{threads} threads"


@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("columns", [64, 1056, 1057, 8224])
@pytest.mark.parametrize("slices", [1, 50])
def test_columns_of_a_result_larger_than_a_cache_have_the_bits_of_some_alone(
    slices, columns, dtype
):
    rows = 24 * 2**20 // dtype.itemsize // columns // slices
    x = samples.drawer("large", dtype)(slices, rows, columns)
    quarters = (part.contiguous() for part in x.chunk(4, dim=2))
    alone = torch.cat([functional.center(part, 1) for part in quarters], 2)
    for threads in (1, 2):
        with num_threads(threads):
            assert same_bits(functional.center(x, 1), alone), f"{threads} threads"


@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("rows", [1, 7, 8, 300])
def test_a_column_has_the_same_bits_beside_any_others(rows, dtype):
    x = samples.drawer("columns", dtype)(rows, 1100)
    expected = functional.center(x, 0)
    for columns in (2, 3, 15, 16, 17, 64, 65, 1023, 1024, 1025):
        some = x[:, :columns].contiguous()
        assert same_bits(functional.center(some, 0), expected[:, :columns]), f"{columns} columns"
        slices = functional.center(torch.stack([some + 1, some, some]), 1)
        assert same_bits(slices[1], expected[:, :columns]), f"{columns} columns, three slices"


def test_few_long_rows_are_centered_along_their_columns():
    x = samples.drawer("three rows", torch.float32)(3, 1_000_000)
    check_values(functional.center(x, 0), x, 0)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@every_dtype
def test_deterministic_mode_changes_no_bit_and_finds_no_unwritten_memory(dtype, request):
    def all_results() -> dict[str, Tensor]:
        return {n: functional.center(*s.args, **s.kwargs) for n, s in by_name(dtype).items()}

    expected = all_results()
    request.getfixturevalue("deterministic")
    assert torch.empty(8).isnan().all(), "fresh memory is not filled with NaN"
    for name, actual in all_results().items():
        assert same_bits(actual, expected[name]), name


# ---- huge pages ------------------------------------------------------------------------

# Prints which huge pages were asked for: in the flags of the memory of a result, and its bits.
LARGE_RESULT = """
import hashlib, torch
from mylayers import build_info, functional
x = torch.randn(3, 2**20, generator=torch.Generator().manual_seed(0))
y = functional.center(x)
middle, inside = y.data_ptr() + y.nbytes // 2, False
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        inside = begin <= middle < end
    elif inside and line.startswith("VmFlags:"):
        print(build_info()["huge_pages"], "hg" in line.split())
print(hashlib.sha256(y.numpy()).hexdigest())
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux's huge pages"
)
def test_huge_pages_are_asked_for_unless_switched_off_and_change_no_bit():
    def run(setting: str) -> list[str]:
        return subprocess.run(
            [sys.executable, "-c", LARGE_RESULT],
            env={**os.environ, "MYLAYERS_HUGE_PAGES": setting},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()

    on, off = run("1"), run("0")
    assert (on[0], off[0]) == ("True True", "False False")
    assert on[1] == off[1]


# ---- what the formula decides ----------------------------------------------------------


def assert_ends_as_the_formula(x: Tensor, dim: object) -> None:
    actual, expected = outcome(functional.center, x, dim), outcome(reference.center, x, dim)
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)
    else:
        assert actual is expected


@pytest.mark.grid
@pytest.mark.parametrize(
    "shape", [(), (3,), (0,), (2, 3), (2, 0), (2, 3, 4)], ids=lambda s: f"{len(s)}-D{s}"
)
@pytest.mark.parametrize(
    "dim",
    [-4, -3, -2, -1, 0, 1, 2, 3, (), (0,), (0, 0), (0, -2), (1, -1), (0, 5), (-5, 0), (2, 0)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=lambda d: str(d)[6:])
def test_repeated_and_out_of_range_dims_end_as_the_formula(shape, dim, dtype):
    assert_ends_as_the_formula(samples.drawer("dims", dtype)(*shape), dim)


@pytest.mark.parametrize(
    "dim",
    ["0", 1.0, (0, 1.0), True, (0, True), ..., {0}, {0: 1}, torch.tensor(1.5)],
    ids=str,
)
def test_a_dim_that_is_no_integer_is_a_type_error(dim):
    with pytest.raises(TypeError, match=r"center: dim must be None, an int or a sequence of ints"):
        functional.center(torch.ones(2, 3), dim)


@pytest.mark.parametrize("dim", [np.int64(1), (np.int32(0), 1), [0, 1]], ids=repr)
def test_numpy_integers_and_lists_are_dims(dim):
    x = samples.drawer("numpy dims", torch.float32)(2, 3)
    check_values(functional.center(x, dim), x, tuple(np.atleast_1d(dim).tolist()))


def test_a_dim_beyond_64_bits_is_refused_as_mean_refuses_it():
    assert_ends_as_the_formula(torch.ones(2, 3), 2**70)


@pytest.mark.grid
@pytest.mark.parametrize("dim", [None, 1, (0, 2)])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int64,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
    ],
    ids=lambda d: str(d)[6:],
)
def test_other_dtypes_end_as_the_formula(dtype, dim):
    assert_ends_as_the_formula(torch.arange(24).view(2, 3, 4).to(dtype), dim)


@pytest.mark.parametrize("dim", [None, 0, (0, 1)])
def test_complex_values_and_gradient_are_the_references(dim):
    draw = samples.drawer("complex", torch.complex128)
    x, grad = draw(5, 4).requires_grad_(), draw(5, 4)
    for view in (x, x.conj(), x.mT):
        actual, expected = functional.center(view, dim), reference.center(view, dim)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)
        gradients = (torch.autograd.grad(y, x, grad.reshape(y.shape)) for y in (actual, expected))
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-15)


class _Index:
    """An index that says when it was used after its end."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __del__(self) -> None:
        ended.append(self)
        self.value = 100

    def __index__(self) -> int:
        return self.value


ended: list[_Index] = []


class _Dims(Sequence[_Index]):
    """Makes its items as they are asked for, as an array of NumPy's does."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, place: int) -> _Index:  # type: ignore[override]
        if place >= 2:
            raise IndexError
        return _Index(place)


def test_the_items_of_dim_live_while_they_are_read():
    x = torch.rand(3, 4, 5)
    expected = functional.center(x, (0, 1))
    assert torch.equal(_C.center(x, _Dims()), expected)
    assert torch.equal(_C.center(x, torch.arange(2).numpy()), expected)
