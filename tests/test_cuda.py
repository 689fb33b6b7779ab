"""The CUDA kernels, on a GPU: values, bits, graphs, streams, everything that differs from the CPU.

What is the same for every device (shapes, errors, autograd's bookkeeping) is tested on the CPU.
"""

import functools
import gc
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import samples
import torch
from samples import KERNEL_DTYPES, Sample, assert_within, in_float64, moved_sample, same_bits
from test_center import by_name as center_by_name
from test_center import check_gradient as check_center_gradient
from test_center import check_values
from test_linear_act import (
    by_name,
    check_forward,
    check_gradients,
    forward_and_gradients,
    forward_tolerance,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import mylayers
from mylayers import CenteredLayer, MyLinear, functional, reference

MISSING = (
    f"the CUDA kernels were not built: {mylayers.build_info()['cuda_detail']}"
    if mylayers.build_info()["cuda"] is None
    else ""
    if torch.cuda.is_available()
    else "torch finds no GPU"
)
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    # From torch 2.14 on, opcheck looks at gradients of what is no leaf.
    pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf"),
]

ops = torch.ops.mylayers
# All that have kernels, and one that is PyTorch's.
ACTIVATIONS = (*samples.ACTIVATIONS, "sigmoid", "gelu_tanh", "silu")
GIB = 1 << 30

# Thousands of cases take seconds to collect: of what is skipped, one sample.
samples_there = slice(1) if MISSING else slice(None)
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d)[6:])
every_product = pytest.mark.parametrize("name", list(by_name(torch.float32))[samples_there])
every_mean = pytest.mark.parametrize("name", list(center_by_name(torch.float32))[samples_there])
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@functools.cache
def product(dtype: torch.dtype, name: str) -> Sample:
    return moved_sample(by_name(dtype)[name], "cuda")


@functools.cache
def mean(dtype: torch.dtype, name: str) -> Sample:
    return moved_sample(center_by_name(dtype)[name], "cuda")


def drawn(name: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    draw = samples.drawer(name, dtype)
    return [draw(*shape).cuda() for shape in shapes]


@pytest.fixture
def deterministic(monkeypatch) -> Iterator[None]:
    # What cuBLAS itself asks for, where a product goes to PyTorch's operators.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tf32() -> Iterator[Callable[[bool], None]]:
    def allow(value: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = value

    yield allow
    allow(False)


# ---- values ----------------------------------------------------------------------------


@pytest.mark.grid
@every_dtype
@every_product
def test_products_are_the_float64_reference_rounded_once(name, dtype):
    for operator in (functional.linear_act, ops.linear_act):
        check_forward(operator, product(dtype, name))


@pytest.mark.grid
@every_dtype
@every_product
def test_gradients_are_the_float64_references(name, dtype):
    check_gradients(product(dtype, name))


@pytest.mark.grid
@every_dtype
@every_mean
def test_means_and_their_gradients_are_those_of_float64(name, dtype):
    sample = mean(dtype, name)
    (x,) = sample.args
    before = x.clone()
    actual = functional.center(x, **sample.kwargs)
    check_values(actual, x, **sample.kwargs)
    assert actual.stride() == reference.center(x, **sample.kwargs).stride()
    assert torch.equal(x, before)
    check_center_gradient(x, **sample.kwargs)


def test_every_reduction_of_center_over_dims_of_a_tensor_of_four():
    (x,) = drawn("dims", torch.float32, (6, 40, 5, 70))
    for count in range(1, 5):
        for dims in itertools.combinations(range(4), count):
            check_values(functional.center(x, dims), x, dims)
            for order in itertools.permutations(range(4)):
                permuted = x.permute(order)
                check_values(functional.center(permuted, dims), permuted, dims)


# Through cuBLASLt, whole vectors and single values; sizes of 1 and 0 through addmm.
SIZES = [(64, 64, 64), (33, 129, 65), (1, 64, 64), (64, 1, 8), (64, 64, 1), (5, 0, 16), (0, 4, 4)]


@pytest.mark.grid
@every_dtype
@every_activation
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["bare", "bias"])
def test_every_activation_forward_and_backward(with_bias, sizes, activation, dtype):
    rows, in_units, units = sizes
    x, weight, bias = drawn(
        f"act{sizes}{with_bias}", dtype, (rows, in_units), (in_units, units), (units,)
    )
    sample = Sample(
        str(sizes), (x, weight, bias if with_bias else None), {"activation": activation}
    )
    check_forward(functional.linear_act, sample)
    check_gradients(sample)


@every_dtype
def test_a_bias_may_begin_at_any_address(dtype):
    x, weight, memory = drawn("bias", dtype, (100, 64), (64, 72), (80,))
    for offset, activation in itertools.product(range(8), (None, "relu", "tanh")):
        bias = memory[offset : offset + 72]
        sample = Sample(f"offset {offset}", (x, weight, bias), {"activation": activation})
        check_forward(functional.linear_act, sample)


@every_dtype
def test_sums_are_formed_in_float32_where_16_bits_would_stop_at_256_or_2048(dtype):
    rows = 4096
    grad = torch.ones(rows, 64, device="cuda", dtype=dtype)
    x = torch.full((rows, 64), 8.0, device="cuda", dtype=dtype)
    _, dweight, dbias = ops.linear_act_backward(grad, x, None, None, None, (False, True, True))
    assert (dweight == 8 * rows).all()
    assert (dbias == rows).all()


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_products_are_tf32_only_where_pytorch_allows_it(allowed, tf32):
    x, weight, bias = drawn("tf32", torch.float32, (256, 512), (512, 256), (256,))
    exact = in_float64(x, weight, bias)
    # The other setting first: what is remembered for it must not be used.
    tf32(not allowed)
    functional.linear_act(x, weight, bias)
    tf32(allowed)
    y = functional.linear_act(x, weight, bias)
    rounding = 2**-10 if allowed else 0  # of each factor, in TF32
    tolerance = forward_tolerance(torch.float32, *exact, "relu") + rounding * (
        exact[0].abs() @ exact[1].abs()
    )
    assert_within(y, reference.linear_act(*exact), tolerance)


# ---- NaN and infinity ------------------------------------------------------------------


def special(t: Tensor) -> Tensor:
    """With NaN, both infinities and both zeros in its first row, if it is that long."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=t.dtype)
    t = t.clone()
    t[0, : min(5, t.shape[1])] = values[: t.shape[1]].to(t.device)
    return t


@pytest.mark.grid
@every_dtype
@every_activation
@pytest.mark.parametrize("rows", [1, 2, 64, 1000])
@pytest.mark.parametrize("with_bias", [False, True], ids=["bare", "bias"])
def test_nan_and_infinity_come_out_as_pytorchs(with_bias, rows, activation, dtype):
    x, bias = drawn("nan", dtype, (rows, 64), (64,))
    weight = torch.eye(64, device="cuda", dtype=dtype)
    weight[:, 32:] = 0  # whose product with the infinities is NaN
    for place in ("input", "bias") if with_bias else ("input",):
        arguments = [x, weight, bias if with_bias else None]
        if place == "input":
            arguments[0] = special(x)
        else:
            arguments[2] = special(bias[None])[0]
        want = reference.linear_act(*arguments, activation=activation)
        for _ in range(3):  # the first call asks the algorithm, the next ones remember
            y = functional.linear_act(*arguments, activation)
            assert torch.equal(y.isnan(), want.isnan())
            assert torch.equal(y.isinf(), want.isinf())
        assert y.isnan().any()


@pytest.mark.grid
@every_dtype
@every_activation
def test_nan_in_the_output_passes_the_gradient_as_pytorchs(activation, dtype):
    y, grad = drawn("nan grad", dtype, (40, 24), (40, 24))
    y, grad = special(y), special(grad.flip(0)).flip(0)
    eye = torch.eye(24, device="cuda", dtype=dtype)
    mask = (False, False, True)
    got = ops.linear_act_backward(grad, None, eye, y, activation, mask)[2]
    want = ops.linear_act_backward(
        grad.double().cpu(), None, None, y.double().cpu(), activation, mask
    )[2]
    assert torch.equal(got.isnan().cpu(), want.isnan())


@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("shape", [(40,), (3, 5000), (1 << 20,)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_nan_or_infinity_reaches_its_slice_alone(value, shape, dtype):
    (x,) = drawn("center nan", dtype, shape)
    x[..., 7].view(-1)[0] = value
    y = functional.center(x, -1)
    want = reference.center(x, -1)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())


# ---- bits ------------------------------------------------------------------------------


# (lead...) of center around the sizes at which another kernel takes over: a warp, a block, the
# grid's registers, its shared memory, two phases.
def center_edges(dtype: torch.dtype) -> list[int]:
    device = torch.cuda.get_device_properties("cuda")
    lanes = 16 // dtype.itemsize
    registers = 16 * 512 * device.multi_processor_count * lanes
    shared = (device.shared_memory_per_block_optin - 1024) // (512 * 16)
    chip = registers + shared * 512 * device.multi_processor_count * lanes
    edges = [2048 // dtype.itemsize, 65536 // dtype.itemsize, registers, chip]
    return [edge + step for edge in edges for step in (-1, 0, 1, lanes + 1)]


@every_dtype
@pytest.mark.parametrize("offset", [0, 1])
def test_center_where_one_kernel_hands_over_to_the_next(offset, dtype):
    edges = center_edges(dtype)
    (memory,) = drawn("edges", dtype, (max(edges) + offset,))
    for size in edges:
        x = memory[offset : offset + size]
        y = functional.center(x)
        check_values(y, x, None)
        assert same_bits(functional.center(x), y)


@every_dtype
@pytest.mark.usefixtures("deterministic")
def test_a_second_run_in_deterministic_mode_gives_the_same_bits(dtype):
    # Fresh memory is full of NaN now, which shows what was not written.
    assert torch.empty(8, device="cuda").isnan().all()
    for name in by_name(dtype):
        first, second = (forward_and_gradients(product(dtype, name)) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert a is b or same_bits(a, b), name
    for name in center_by_name(dtype):
        (x,), options = mean(dtype, name).args, mean(dtype, name).kwargs
        y = functional.center(x, **options)
        assert same_bits(functional.center(x, **options), y), name
        check_values(y, x, **options)


@every_dtype
@pytest.mark.parametrize("sizes", [(100_000, 64, 64), (4096, 1000, 333)], ids=str)
def test_ten_runs_of_large_sums_give_the_same_bits(sizes, dtype):
    rows, in_units, units = sizes
    x, weight, bias, grad = drawn(
        f"runs{sizes}", dtype, (rows, in_units), (in_units, units), (units,), (rows, units)
    )
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def step() -> list[Tensor]:
        y = functional.linear_act(*leaves)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    first = step()
    for _ in range(9):
        for a, b in zip(step(), first, strict=True):
            assert same_bits(a, b)


# ---- graphs, streams, devices ----------------------------------------------------------


def captured(step: Callable[[], list[Tensor]], warm: bool) -> tuple[torch.cuda.CUDAGraph, list]:
    """The graph of a step, and its outputs, which a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # cuBLAS must have its handle before; the step itself only if it is to be warm.
        torch.mm(torch.ones(4, 4, device="cuda"), torch.ones(4, 4, device="cuda"))
        if warm:
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


@pytest.mark.grid
@every_dtype
@every_activation
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_forward_and_backward_in_a_graph_follow_new_inputs(warm, activation, dtype):
    # Sizes that no other test has: cold, the first call of a problem is under capture.
    units = 40 + 8 * ACTIVATIONS.index(activation) + KERNEL_DTYPES.index(dtype) + 100 * warm
    shapes = (77, 56), (56, units), (units,), (77, units)
    *leaves, grad = drawn("graph", dtype, *shapes)
    leaves = [t.requires_grad_() for t in leaves]

    def step() -> list[Tensor]:
        y = functional.linear_act(*leaves, activation)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    graph, outputs = captured(step, warm)
    for turn in range(2):
        fresh = drawn(f"graph{turn}", dtype, *shapes)
        fresh[0] = special(fresh[0]) if turn else fresh[0]
        with torch.no_grad():
            for target, values in zip((*leaves, grad), fresh, strict=True):
                target.copy_(values)
        graph.replay()
        y = outputs[0].clone()
        exact = in_float64(*fresh[:3])
        want = reference.linear_act(*exact, activation)
        tolerance = forward_tolerance(dtype, *exact, activation)
        assert torch.equal(y.isnan(), want.isnan())
        finite = tolerance.isfinite()
        assert_within(y[finite], want[finite], tolerance[finite])
        if warm:  # the very kernels of an eager call
            for a, b in zip(step(), [t.clone() for t in outputs], strict=True):
                assert torch.equal(a.isnan(), b.isnan())
                assert same_bits(a.nan_to_num(), b.nan_to_num())


@every_dtype
def test_center_in_a_graph_by_every_kernel(dtype):
    for size in (100, 30_000, 1 << 20, center_edges(dtype)[-1]):
        (x,) = drawn("center graph", dtype, (size,))
        graph, (y,) = captured(lambda x=x: [functional.center(x)], warm=False)
        for turn in range(2):
            x.copy_(samples.drawer(f"turn{turn}", dtype)(size))
            graph.replay()
            check_values(y, x, None)


def test_kernels_run_on_the_current_stream():
    x, weight, bias = drawn("stream", torch.float32, (2000, 512), (512, 512), (512,))
    expected = functional.center(functional.linear_act(x, weight, bias))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    fresh = torch.zeros_like(x)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what follows must wait for it, and for the copy
        fresh.copy_(x)
        actual = functional.center(functional.linear_act(fresh, weight, bias))
    side.synchronize()
    assert same_bits(actual, expected)


def test_nothing_waits_for_the_device_once_an_algorithm_is_known():
    x, weight, bias = drawn("sync", torch.bfloat16, (300, 64), (64, 72), (72,))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def step() -> None:
        functional.center(functional.linear_act(*leaves)).backward(torch.ones_like(x[:, :1] + bias))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_threads_may_call_with_different_sizes_at_once():
    # The grid of center takes shared memory by size: more from one thread than from another.
    last = center_edges(torch.float32)[-1]
    inputs = drawn("threads", torch.float32, *((last // n,) for n in range(2, 10)))
    expected = [functional.center(x) for x in inputs]

    def repeated(n: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [functional.center(inputs[n]) for _ in range(20)]
            return all(same_bits(y, expected[n]) for y in results)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(repeated, range(len(inputs))))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@every_dtype
def test_another_device_than_the_current_one(dtype):
    for make, check in ((by_name, check_gradients), (center_by_name, None)):
        for name in list(make(dtype))[:20]:
            sample = moved_sample(make(dtype)[name], "cuda:1")
            if check is None:
                check_center_gradient(*sample.args, **sample.kwargs)
            else:
                check(sample)
    assert torch.cuda.current_device() == 0


def test_arguments_on_two_devices_are_refused():
    x, weight = torch.ones(2, 3, device="cuda"), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="linear_act: weight must be on cuda:0 like input"):
        functional.linear_act(x, weight)


# ---- autograd, tracing, autocast -------------------------------------------------------


def small(make: Callable[..., Iterator[Sample]], requires_grad: bool = True) -> list[Sample]:
    drawn_samples = make(torch.float64, requires_grad=requires_grad, large=False)
    return [moved_sample(sample, "cuda") for sample in drawn_samples]


def call(operator: Callable[..., Tensor], sample: Sample) -> tuple[Callable[..., Tensor], list]:
    """Of the arguments that are tensors, as gradcheck calls it."""
    given = [t for t in sample.args if t is not None]

    def of_tensors(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        return operator(*(None if t is None else next(rest) for t in sample.args), **sample.kwargs)

    return of_tensors, given


def test_gradcheck_and_gradgradcheck():
    for sample in small(samples.linear_act_samples):
        assert gradcheck(*call(functional.linear_act, sample), fast_mode=True), sample
        assert gradgradcheck(*call(functional.linear_act, sample), fast_mode=True), sample
    for sample in small(samples.center_samples):
        assert gradcheck(*call(functional.center, sample), fast_mode=True), sample
        assert gradgradcheck(*call(functional.center, sample), fast_mode=True), sample


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
def test_opcheck(requires_grad):
    for sample in small(samples.linear_act_samples, requires_grad)[::3]:
        opcheck(ops.linear_act, sample.args, sample.kwargs)
    for sample in small(samples.center_samples, requires_grad)[::4]:
        opcheck(ops.center, sample.args, sample.kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_with_gradients_in_the_parameters(dtype):
    layer = MyLinear(64, 48, device="cuda")
    (x,) = drawn("autocast", torch.float32, (100, 64))
    with torch.autocast("cuda", dtype):
        y = layer(x)
        y.sum().backward()  # inside, where PyTorch's own products would be cast
    assert y.dtype == dtype
    assert layer.weight.grad.dtype == torch.float32
    cast = [t.detach().to(dtype) for t in (x, layer.weight, layer.bias)]
    assert same_bits(y.detach(), functional.linear_act(*cast))


def test_the_kernels_run_and_not_the_formula():
    x, weight, bias = drawn("names", torch.bfloat16, (300, 64), (64, 72), (72,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        functional.center(functional.linear_act(x, weight, bias, "tanh"))
        torch.cuda.synchronize()
    names = " ".join(event.key for event in profile.key_averages())
    assert "bias_act_kernel" in names
    assert "slices_kernel" in names


def test_compiled_and_eager_calls_agree():
    net = torch.nn.Sequential(MyLinear(64, 48), CenteredLayer(), MyLinear(48, 8)).cuda()
    (x,) = drawn("compile", torch.float32, (100, 64))
    compiled = torch.compile(net, fullgraph=True)
    y, expected = compiled(x), net(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    got = torch.autograd.grad(y.sum(), list(net.parameters()))
    want = torch.autograd.grad(expected.sum(), list(net.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


@every_dtype
def test_copy_on_write_inputs_are_read_and_not_copied(dtype):
    values = drawn("cow", dtype, (33, 64), (64, 48), (48,))
    lazy = [torch._lazy_clone(t).requires_grad_() for t in values]
    functional.center(functional.linear_act(*lazy)).backward(
        torch._lazy_clone(torch.ones(33, 48, device="cuda", dtype=dtype))
    )
    assert all(torch._C._is_cow_tensor(t) for t in lazy)


def test_complex_values_take_the_formula():
    x, weight, bias = drawn("complex", torch.complex64, (5, 4), (4, 3), (3,))
    with torch.inference_mode():
        y = functional.linear_act(x, weight, bias, None)
        assert torch.equal(y, reference.linear_act(x, weight, bias, None))
        assert torch.equal(functional.center(x, 0), reference.center(x, 0))


# ---- large -----------------------------------------------------------------------------


def needs_memory(gib: int) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of GPU memory; {free / GIB:.0f} are free")


def test_center_of_more_than_two_to_the_31_elements():
    needs_memory(16)
    size = (1 << 31) + 4096 + 3
    x = torch.ones(size, device="cuda", dtype=torch.bfloat16)
    x[-1] = 3
    y = functional.center(x)
    assert y[-1] == 2
    assert not y[:-1].any()
    for shape, dim in (((1 << 30) + 1, 2), 0), (((1 << 30) + 1, 2), 1), ((2, (1 << 30) + 1), 1):
        x = torch.ones(shape, device="cuda", dtype=torch.bfloat16)
        y = functional.center(x, dim)
        assert not y.any(), (shape, dim)


def test_linear_act_of_more_than_two_to_the_31_elements():
    needs_memory(32)
    rows, units = (1 << 26) + 1, 33
    x = torch.ones(rows, 2, device="cuda", dtype=torch.bfloat16)
    x[-1] = 3
    weight = torch.ones(2, units, device="cuda", dtype=torch.bfloat16)
    bias = torch.ones(units, device="cuda", dtype=torch.bfloat16)
    for activation in ("relu", "elu"):
        y = functional.linear_act(x, weight, bias, activation)
        assert (y[:-1] == 3).all()
        assert (y[-1] == 7).all()
    _, _, dbias = ops.linear_act_backward(y, None, None, y, "relu", (False, False, True))
    assert (dbias == torch.tensor(3.0 * (rows - 1) + 7).bfloat16()).all()


# ---- autotuning ------------------------------------------------------------------------


AUTOTUNED = """
import itertools, torch
from mylayers import functional, reference

x, weight, bias = torch.randn(512, 256), torch.eye(256), torch.randn(256)
x[0, 0] = torch.nan
for dtype, activation, with_bias in itertools.product(
    (torch.float32, torch.bfloat16), ("relu", None, "tanh"), (True, False)
):
    arguments = [t.to("cuda", dtype) for t in (x, weight, bias)]
    if not with_bias:
        arguments[2] = None
    for _ in range(2):
        y = functional.linear_act(*arguments, activation)
        expected = reference.linear_act(*arguments, activation)
        torch.testing.assert_close(y, expected, equal_nan=True)
"""


def test_autotuned_products_are_right():
    done = subprocess.run(
        [sys.executable, "-c", AUTOTUNED],
        env={**os.environ, "MYLAYERS_CUDA_AUTOTUNE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
