"""Programs whose steps name their inputs: residual sums, values that several steps read, heads."""

import pytest
import torch
from samples import KERNEL_DTYPES, num_threads, same_bits
from torch import Tensor

from mylayers import _programs

ops = torch.ops.mylayers
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)

RESIDUAL = "linear_t+bias+relu; linear_t+bias; add@0,2; tanh"


def residual(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    hidden = torch.nn.functional.linear(x, w, b).relu()
    return torch.tanh(x + torch.nn.functional.linear(hidden, v, c))


def parameters(
    dtype: torch.dtype = torch.float64, inner: int = 31, units: int = 20
) -> list[Tensor]:
    shapes = ((inner, units), (inner,), (units, inner), (units,))
    return [torch.randn(*shape, dtype=torch.float64).mul(0.3).to(dtype) for shape in shapes]


def computed(x: Tensor, *given: Tensor) -> Tensor:
    return ops.sequential(x, given, RESIDUAL)


@every_dtype
def test_a_residual_sum_and_its_gradients(dtype):
    # Of the largest value: some roundings of the dtype one after another.
    tolerance = 12 * torch.finfo(dtype).eps
    args = [torch.randn(70, 20, dtype=torch.float64).to(dtype), *parameters(dtype)]
    results = []
    for wide, f in (
        (torch.float64, residual),
        (dtype, lambda x, *p: ops.sequential(x, p, RESIDUAL)),
    ):
        leaves = [t.to(wide, copy=True).requires_grad_() for t in args]
        output = f(*leaves)
        output.backward(torch.ones(70, 20, dtype=wide))
        results.append([output.double(), *(t.grad.double() for t in leaves)])
    for exact, found in zip(*results, strict=True):
        assert (found - exact).abs().max() <= tolerance * exact.abs().max()


@every_dtype
def test_a_rows_bits_depend_on_no_other_row(dtype):
    given = parameters(dtype)
    x = torch.randn(300, 20).to(dtype)
    whole = ops.sequential(x, given, RESIDUAL)
    for first, end in ((0, 1), (7, 300), (123, 160)):
        assert same_bits(ops.sequential(x[first:end], given, RESIDUAL), whole[first:end])
    with num_threads(1):
        assert same_bits(ops.sequential(x, given, RESIDUAL), whole)
    recorded = ops.sequential(x, [p.clone().requires_grad_() for p in given], RESIDUAL)
    assert same_bits(recorded.detach(), whole)


def test_gradients_of_gradients_and_transforms():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    given = [p.requires_grad_() for p in parameters(inner=5, units=4)]
    f = computed
    assert torch.autograd.gradcheck(f, (x, *given), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, *given))
    batch = torch.randn(6, 3, 4, dtype=torch.float64)
    each = torch.stack([f(rows, *given) for rows in batch])
    mapped = torch.vmap(f, (0, *[None] * 4))(batch, *given)
    torch.testing.assert_close(mapped, each)
    jacobians = torch.func.jacrev(f)(x, *given), torch.func.jacfwd(f)(x, *given)
    torch.testing.assert_close(*jacobians)


def test_two_heads_share_a_trunk():
    program = "linear+relu; linear; linear@1"
    x = torch.randn(9, 4, dtype=torch.float64)
    given = [torch.randn(*shape, dtype=torch.float64) for shape in ((4, 6), (6, 2), (6, 3))]
    leaves = [t.clone().requires_grad_() for t in (x, *given)]
    trunk, first, second = ops.sequential_outputs(leaves[0], leaves[1:], program)
    (first.sum() + second.square().sum()).backward()
    plain = [t.clone().requires_grad_() for t in (x, *given)]
    hidden = (plain[0] @ plain[1]).relu()
    ((hidden @ plain[2]).sum() + (hidden @ plain[3]).square().sum()).backward()
    torch.testing.assert_close(trunk, hidden)
    for leaf, other in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)
    # What a gradient does not reach gets none, not zeros.
    leaves = [t.clone().requires_grad_() for t in (x, *given)]
    _, _, second = ops.sequential_outputs(leaves[0], leaves[1:], program)
    second.sum().backward()
    assert leaves[2].grad is None
    assert all(leaves[i].grad is not None for i in (0, 1, 3))


def test_a_value_that_a_view_and_a_sum_read():
    program = "flatten(1,2); linear+tanh; add@1,2; center(1)@1; add@3,4"
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: ops.sequential(x, [w], program), (x, weight))
    flat = x.flatten(1, 2)
    expected = flat + torch.tanh(flat @ weight) + flat - flat.mean(1, keepdim=True)
    torch.testing.assert_close(ops.sequential(x, [weight], program), expected)


@pytest.mark.parametrize(
    "program",
    [
        "add",
        "linear; add@0",
        "linear; add@0,2",
        "linear; add@0,1,1",
        "linear@1",
        "relu@0,0",
        "relu@-1",
        "relu@",
        "add(1)@0,0",
        "add+bias@0,0",
        "relu@0@0",
        "relu @0",
        "layer_norm",
        "layer_norm(2)",
        "layer_norm(1e-05)",
        "layer_norm(2.5,1e-05)",
        "layer_norm(-2,1e-05)",
        "layer_norm(2,nan)",
        "layer_norm(2,inf)",
        "layer_norm(2,1e-05)+bias",
        "layer_norm(2,1e-05)+bias+weight",
        "layer_norm(2,1e-05)+weight+bias+relu",
        "layer_norm(2,1e-05",
    ],
)
def test_programs_that_name_no_earlier_values_are_refused(program):
    with pytest.raises(ValueError, match=r"sequential: program must name steps .* got "):
        ops.sequential(torch.ones(2, 2), [torch.ones(2, 2)], program)


def test_sums_of_other_sizes_are_refused():
    x, weight = torch.ones(3, 4), torch.ones(4, 1)
    with pytest.raises(RuntimeError, match=r"sequential: add must have inputs of the same sizes"):
        ops.sequential(x, [weight], "linear; add@0,1")


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="no compiler")
def test_a_residual_sum_under_compilers():
    x, given = torch.randn(6, 20), [p.float().requires_grad_() for p in parameters()]

    def f(x: Tensor, given: list[Tensor]) -> Tensor:
        return ops.sequential(x, given, RESIDUAL).square().sum()

    eager = torch.autograd.grad(f(x, given), given)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, given), given), eager)
    torch.library.opcheck(ops.sequential.default, (x, given, RESIDUAL))


def test_under_autocast_the_sum_is_taken_as_pytorch_takes_it():
    x, given = torch.randn(6, 20), [p.float() for p in parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.sequential(x, given, RESIDUAL)
        expected = residual(x, *given)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


def test_products_are_counted_once_each():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(7, 20, requires_grad=True)
    given = [p.float().requires_grad_() for p in parameters()]
    with FlopCounterMode(display=False) as forward:
        output = ops.sequential(x, given, RESIDUAL)
    assert forward.get_total_flops() == 2 * 7 * 20 * 31 * 2
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_the_programs_parts():
    first, second, third = _programs.parse("linear_t+bias+relu; center(0,-1)@0; add@1,2")
    assert first == ("linear_t", (), 0.0, True, True, "relu", (0,))
    assert (first.is_linear, first.units_dim, first.parameters) == (True, 0, 2)
    assert second == ("center", (0, -1), 0.0, False, False, None, (0,))
    assert third == ("add", (), 0.0, False, False, None, (1, 2))
    (norm,) = _programs.parse("layer_norm(2,3,1e-05)+weight")
    assert norm == ("layer_norm", (2, 3), 1e-5, True, False, None, (0,))
    assert (norm.is_linear, norm.parameters) == (False, 1)
