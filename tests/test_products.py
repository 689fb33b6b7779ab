"""Products that are PyTorch's, where no machine of a kind was measured; and the switch for ours.

On a machine that was measured the tests of the former run once more in a process of their own, with
the kernels of one that was not.
"""

import os
import subprocess
import sys

import pytest
import samples
import torch
from chains import outputs_one_by_one
from samples import (
    KERNEL_DTYPES,
    LAYOUTS,
    Sample,
    assert_within,
    in_float64,
    num_threads,
    same_bits,
)
from test_linear_act import (
    any_activation,
    check_forward,
    check_gradients,
    every_dtype,
    forward_tolerance,
)
from torch import Tensor, nn

import mylayers
from mylayers import FusedSequential, functional, reference

# PyTorch's own, once a process, on an Arm processor without bfloat16's instructions.
pytestmark = pytest.mark.filterwarnings("ignore:mkldnn_matmul failed")

INFO = mylayers.build_info()
WHOSE = "from mylayers import build_info as b; print(b()['products'], b()['tuned_for'])"
UNMEASURED = {"ATEN_CPU_CAPABILITY": "default", "MYLAYERS_PRODUCTS": ""}

torchs = pytest.mark.skipif(INFO["products"] != "torch", reason="products are ours here")
ours = pytest.mark.skipif(INFO["products"] != "own", reason="products are PyTorch's here")


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


# ---- from where products are ours --------------------------------------------------------------


@ours
@pytest.mark.parametrize("which", ["not whole", pytest.param("whole", marks=pytest.mark.whole)])
def test_all_of_this_holds_where_no_machine_was_measured(which):
    # Not "python -m pytest", which would put the source folder first on the path.
    code = "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main(sys.argv[1:]))"
    options = ("-q", "-n0", "-m", which, "-p", "no:cacheprovider", "-rs", __file__)
    done = run("-c", code, *options, **UNMEASURED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PyTorch's here" in done.stdout, "nothing but these tests was left out"
    assert "ours here" not in done.stdout


@ours
def test_a_value_of_the_switch_that_says_nothing_ends_the_import():
    done = run("-c", "import mylayers", MYLAYERS_PRODUCTS="ours")
    assert done.returncode == 1
    assert 'MYLAYERS_PRODUCTS must be "own" or not be set; got "ours"' in done.stderr


@ours
@pytest.mark.parametrize(
    ("wish", "products", "line"),
    [("", "torch", "PyTorch's, but for small"), ("own", "own", "ours")],
)
def test_build_info_and_the_report_say_whose_products_they_are(wish, products, line):
    environment = {**UNMEASURED, "MYLAYERS_PRODUCTS": wish}
    assert run("-c", WHOSE, **environment).stdout.split() == [products, "None"]
    done = run("-m", "mylayers", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"products     {line}" in done.stdout


@ours
def test_a_machine_that_was_measured_needs_no_switch():
    products, tuned_for = run("-c", WHOSE, MYLAYERS_PRODUCTS="").stdout.strip().split(maxsplit=1)
    assert (products == "torch") == (tuned_for == "None")


# ---- where they are PyTorch's --------------------------------------------------------------------

# Rows, in_units, units: of more than 2^15 multiply-adds; one row, few columns, many rows, and sums
# that our kernels would cut into pieces.
LARGE = [(1, 300, 200), (40, 33, 65), (5000, 17, 3), (200, 256, 64)]
any_size = pytest.mark.parametrize("sizes", LARGE, ids=str)


def drawn(sizes: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = samples.drawer(f"products{sizes}", dtype)
    rows, in_units, units = sizes
    return draw(rows, in_units), draw(in_units, units) / 8, draw(units)


@torchs
@any_size
@every_dtype
def test_bits_are_those_of_pytorchs_own_products(sizes, dtype):
    x, weight, bias = drawn(sizes, dtype)
    assert same_bits(functional.linear_act(x, weight, None, None), x @ weight)
    affine = torch.addmm(bias, x, weight)
    assert same_bits(functional.linear_act(x, weight, bias, None), affine)
    assert same_bits(functional.linear_act(x, weight, bias, "relu"), affine.relu())
    grad = samples.drawer("products-grad", dtype)(*affine.shape)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    functional.linear_act(*leaves, None, None).backward(grad)
    assert same_bits(leaves[0].grad, grad @ weight.t())
    assert same_bits(leaves[1].grad, x.t() @ grad)


@torchs
@any_size
@any_activation
@every_dtype
def test_values_and_gradients_are_the_references(sizes, activation, dtype):
    sample = Sample("products", drawn(sizes, dtype), {"activation": activation})
    if dtype.itemsize > 2 or activation in (None, "relu"):
        check_forward(functional.linear_act, sample)
    else:  # rounded before the activation too, which moves no two values further apart
        exact = in_float64(*sample.args)
        before = forward_tolerance(dtype, *exact, None)
        expected = reference.linear_act(*exact, activation)
        output = functional.linear_act(*sample.args, activation)
        after = torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).tiny
        assert_within(output, expected, before + after)
    if dtype.itemsize > 2 or activation in (None, "relu"):
        check_gradients(sample)


@pytest.mark.grid
@torchs
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_any_layout_is_as_good_as_another(layout, dtype):
    draw = samples.drawer("products-layout", dtype)
    args = (
        LAYOUTS[layout](draw, (50, 40)),
        LAYOUTS[layout](draw, (40, 70)),
        LAYOUTS[layout](draw, (70,)),
    )
    sample = Sample("products-layout", args, {"activation": "relu"})
    check_forward(functional.linear_act, sample)
    check_gradients(sample)


@pytest.mark.grid
@torchs
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 20, 700])
@every_dtype
def test_a_chain_has_the_bits_of_its_layers(rows, dtype, threads):
    # Of many rows all products are PyTorch's, of few the middle one alone.
    program = "linear_t+bias+tanh; linear+bias+relu; linear_t+bias"
    draw = samples.drawer("products-chain", dtype)
    shapes = ((64, 40), (64,), (64, 600), (600,), (2, 600), (2,))
    parameters = [(draw(*shape) / 8).requires_grad_() for shape in shapes]
    x = draw(rows, 40).requires_grad_()
    with num_threads(threads):
        together = torch.ops.mylayers.sequential(x, parameters, program)
        alone = outputs_one_by_one(x, parameters, program)[-1]
        assert same_bits(together, alone)
        grad = draw(rows, 2)
        got, expected = (torch.autograd.grad(y, [x, *parameters], grad) for y in (together, alone))
    # Of PyTorch's layout of a weight the gradient is another product than of ours.
    close = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps * 8
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=close * rows**0.5)


@torchs
@every_dtype
def test_a_training_step_in_one_call_has_the_bits_of_the_three_lines(dtype):
    torch.manual_seed(0)
    net = FusedSequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)
    draw = samples.drawer("products-step", dtype)
    x, target = draw(100, 40), draw(100, 8)
    loss = mylayers.forward_backward(net, nn.MSELoss(), x, target)
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    expected = nn.MSELoss()(net(x), target)
    expected.backward()
    assert same_bits(loss, expected.detach())
    for one, other in zip(gradients, net.parameters(), strict=True):
        assert same_bits(one, other.grad)


@torchs
@pytest.mark.parametrize("activation", [None, "relu", "tanh", "elu"])
@every_dtype
def test_nan_and_infinity_go_where_they_go_in_the_formula(activation, dtype):
    x, weight, bias = drawn((64, 64, 64), dtype)
    x[3, 5], x[7, 0], weight[9, 11] = torch.nan, torch.inf, -torch.inf
    actual = functional.linear_act(x, weight, bias, activation)
    expected = reference.linear_act(*in_float64(x, weight, bias), activation)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


@torchs
@pytest.mark.parametrize("dtype", KERNEL_DTYPES[:2], ids=["float32", "float64"])
def test_small_products_are_ours_and_keep_a_rows_bits_in_every_batch(dtype):
    x, weight, bias = drawn((8, 64, 64), dtype)
    together = functional.linear_act(x, weight, bias)
    for i in range(8):
        assert same_bits(functional.linear_act(x[i : i + 1], weight, bias)[0], together[i])


@torchs
def test_bad_input_is_refused_as_everywhere():
    with pytest.raises(RuntimeError, match=r"linear_act: weight must be .* got weight \[65, 64\]"):
        functional.linear_act(torch.ones(64, 64), torch.ones(65, 64))
