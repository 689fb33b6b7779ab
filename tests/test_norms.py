"""Layer normalisation, a step of programs and ``nn.LayerNorm`` in networks."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from chains import MARKS, assert_close, programs, results, stock
from samples import KERNEL_DTYPES, num_threads, same_bits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

import mylayers
from mylayers import FusedSequential

ops = torch.ops.mylayers
pytestmark = MARKS
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)

AFFINE = {"weight and bias": 2, "weight": 1, "neither": 0}
every_affine = pytest.mark.parametrize("parameters", AFFINE.values(), ids=AFFINE)


def program(sizes: tuple[int, ...], parameters: int, epsilon: float = 1e-5) -> str:
    suffixes = ("", "+weight", "+weight+bias")
    return f"layer_norm({','.join(map(str, sizes))},{epsilon!r}){suffixes[parameters]}"


def drawn(dtype: torch.dtype, *shape: int, mean: float = 0.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) + mean).to(dtype)


def check_values(y: Tensor, x: Tensor, sizes: Sequence[int], given: Sequence[Tensor]) -> None:
    """That it lies within units of exact values, wherever the mean of x is."""
    if not y.numel():
        return
    wide = [t.detach().double().resolve_neg().numpy().astype(np.longdouble) for t in (x, *given)]
    dims = tuple(range(-len(sizes), 0))
    c = wide[0] - wide[0].mean(dims, keepdims=True)
    expected = c / np.sqrt(np.square(c).mean(dims, keepdims=True) + np.longdouble(1e-5))
    largest = np.abs(expected).max()
    for parameter, combine in zip(wide[1:], (np.multiply, np.add), strict=False):
        expected = combine(expected, parameter)
        largest = max(largest, np.abs(parameter).max(), np.abs(expected).max())
    off = np.abs(y.detach().double().numpy().astype(np.longdouble) - expected).max()
    # Of float64 the sums themselves are rounded, too.
    assert off <= (8 if y.dtype is torch.float64 else 2) * torch.finfo(y.dtype).eps * largest


def in_single_operations(x: Tensor, *given: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    y = c * (c.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    y = y * given[0] if given else y
    return y + given[1] if len(given) == 2 else y


# ---- values --------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("mean", [0.0, 30.0, 3e4])
@pytest.mark.parametrize("units", [1, 2, 5, 16, 64, 257])
def test_values_are_exact_to_units_of_the_dtype_wherever_the_mean_is(dtype, mean, units):
    x, given = drawn(dtype, 50, units, mean=mean), [drawn(dtype, units) for _ in range(2)]
    text = program((units,), 2)
    check_values(ops.sequential(x, given, text), x, (units,), given)
    mapped = torch.vmap(lambda row: ops.sequential(row, given, text))(x)  # by the formula
    check_values(mapped, x, (units,), given)


@every_dtype
@every_affine
@pytest.mark.parametrize("sizes", [(7,), (3, 5), (64,)], ids=str)
def test_gradients_are_those_of_the_formula_in_float64(dtype, parameters, sizes):
    args = [drawn(dtype, 9, 2, *sizes, mean=3), *(drawn(dtype, *sizes) for _ in range(parameters))]
    grad = drawn(dtype, 9, 2, *sizes)
    found = []
    for wide in (torch.float64, dtype):
        leaves = [t.to(wide, copy=True).requires_grad_() for t in args]
        if wide is dtype:
            y = ops.sequential(leaves[0], leaves[1:], program(sizes, parameters))
        else:
            y = F.layer_norm(leaves[0], sizes, *leaves[1:])
        found.append(torch.autograd.grad(y, leaves, grad.to(wide)))
        assert all(g.dtype == wide for g in found[-1])
    for expected, got in zip(*found, strict=True):
        off = (got.double() - expected).abs().max()
        assert off <= 12 * torch.finfo(dtype).eps * expected.abs().max()


@every_dtype
def test_neither_other_rows_nor_threads_change_a_bit(dtype):
    units = 96
    x, given = drawn(dtype, 3000, units), [drawn(dtype, units) for _ in range(2)]
    grad = drawn(dtype, 3000, units)

    def whole(x: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, *given)]
        y = ops.sequential(leaves[0], leaves[1:], program((units,), 2))
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    all_rows = whole(x, grad)
    for threads in (1, 2, 5):
        with num_threads(threads):
            for a, b in zip(whole(x, grad), all_rows, strict=True):
                assert same_bits(a, b)
    for first, end in ((0, 1), (5, 130), (2999, 3000)):
        for a, b in zip(whole(x[first:end], grad[first:end])[:2], all_rows, strict=False):
            assert same_bits(a, b[first:end])
    strided = x.t().contiguous().t()
    assert same_bits(ops.sequential(strided, given, program((units,), 2)), all_rows[0])


def test_values_that_are_not_finite_stay_in_their_row():
    x = torch.randn(4, 6)
    x[1, 2], x[2, 3] = float("inf"), float("nan")
    y = ops.sequential(x, [], program((6,), 0))
    assert y[1:3].isnan().all()
    assert same_bits(y[[0, 3]], ops.sequential(x[[0, 3]], [], program((6,), 0)))
    huge = torch.full((1, 6), 1e30)
    huge[0, 0] = -1e30  # their squares are beyond float32
    assert ops.sequential(huge, [], program((6,), 0)).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4), (4,)], ids=str)
def test_inputs_without_rows_without_values_and_of_one_dimension(shape):
    leaves = [torch.randn(*shape), *(torch.randn(shape[-1]) for _ in range(2))]
    found = []
    for f in (
        lambda x, *given: ops.sequential(x, given, program(shape[-1:], 2)),
        lambda x, *given: F.layer_norm(x, shape[-1:], *given),
    ):
        made = [t.clone().requires_grad_() for t in leaves]
        y = f(*made)
        y.sum().backward()
        found.append([y.detach(), *(t.grad for t in made)])
    torch.testing.assert_close(*found)


# ---- derivatives ---------------------------------------------------------------------------------


@every_affine
def test_gradients_of_every_order_and_every_transform(parameters):
    text = program((5,), parameters)
    args = [t.requires_grad_() for t in (drawn(torch.float64, 3, 5), *(
        drawn(torch.float64, 5) for _ in range(parameters)))]  # fmt: skip

    def f(x: Tensor, *given: Tensor) -> Tensor:
        return ops.sequential(x, given, text)

    assert torch.autograd.gradcheck(f, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, args)
    assert torch.autograd.gradgradcheck(lambda *a: _gradient(f, a), args)
    each = torch.stack([f(row, *args[1:]) for row in args[0]])
    mapped = torch.vmap(f, (0, *[None] * parameters))(*args)
    torch.testing.assert_close(mapped, each)
    torch.testing.assert_close(torch.func.jacrev(f)(*args), torch.func.jacfwd(f)(*args))


def _gradient(f: Callable[..., Tensor], args: Any) -> Tensor:
    (grad,) = torch.autograd.grad(f(*args).pow(3).sum(), args[0], create_graph=True)
    return grad


@pytest.mark.parametrize("by", ["autograd", "jvp", "grad"])
def test_third_derivatives_are_right_where_pytorchs_own_are_not(by):
    x, v = drawn(torch.float64, 4, 5), drawn(torch.float64, 4, 5)
    given = [drawn(torch.float64, 5) for _ in range(2)]

    def third(norm: Callable[..., Tensor]) -> Tensor:
        if by == "jvp":

            def once(x: Tensor) -> Tensor:
                return torch.func.jvp(lambda x: norm(x, *given), (x,), (v,))[1]

            def twice(x: Tensor) -> Tensor:
                return torch.func.jvp(once, (x,), (v,))[1]

            return torch.func.jvp(twice, (x,), (v,))[1]
        if by == "grad":

            def scalar(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
                return lambda x: (f(x) * v).sum()

            f: Callable[[Tensor], Tensor] = lambda x: norm(x, *given)  # noqa: E731
            for _ in range(3):
                f = torch.func.grad(scalar(f))
            return f(x)
        leaf = x.clone().requires_grad_()
        y = norm(leaf, *given)
        for _ in range(3):
            (y,) = torch.autograd.grad((y * v).sum(), leaf, create_graph=True)
        return y.detach()

    ours = third(lambda x, *given: ops.sequential(x, given, program((5,), 2)))
    torch.testing.assert_close(ours, third(in_single_operations))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("follows", [False, True], ids=["kernel", "formula"])
@pytest.mark.parametrize(
    ("shape", "own", "message"),
    [
        ((2, 4), (5,), r"(input (with|whose)|expected input).*\[.*5\].*got.*\[2, 4\]"),
        ((4,), (2, 4), r"(input (with|whose)|expected input).*\[.*2, 4\].*got.*\[4\]"),
    ],
    ids=str,
)
def test_inputs_of_other_sizes_are_refused(shape, own, message, follows):
    def call(x: Tensor) -> Tensor:
        return ops.sequential(x, [], program(own, 0))

    x = torch.ones(shape)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(call, *[(x,)] * 2) if follows else call(x)


@pytest.mark.parametrize("follows", [False, True], ids=["kernel", "formula"])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ((torch.ones(3), torch.ones(4)), r"weight.* \[3\]|weight.*got \[3\]"),
        ((torch.ones(4), torch.ones(1)), r"bias.* \[1\]|bias.*got \[1\]"),
        ((torch.ones(1, 4), torch.ones(4)), r"weight.* \[1, 4\]|weight.*got \[1, 4\]"),
    ],
    ids=["weight", "bias", "dimensions"],
)
def test_parameters_of_other_sizes_are_refused(parameters, message, follows):
    x = torch.ones(2, 4)

    def call(x: Tensor) -> Tensor:
        return ops.sequential(x, parameters, program((4,), 2))

    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(call, *[(x,)] * 2) if follows else call(x)


def test_parameters_of_a_wider_dtype_are_taken_as_pytorch_takes_them():
    x, given = drawn(torch.bfloat16, 6, 8), [drawn(torch.float32, 8) for _ in range(2)]
    y = ops.sequential(x, given, program((8,), 2))
    assert same_bits(y, F.layer_norm(x, (8,), *given))
    leaves = [t.clone().requires_grad_() for t in (x, *given)]
    ops.sequential(leaves[0], leaves[1:], program((8,), 2)).sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.bfloat16, torch.float32, torch.float32]
    with pytest.raises(RuntimeError, match=r"expect parameter to have scalar type of Float"):
        ops.sequential(torch.ones(2, 8), [torch.ones(8).double()] * 2, program((8,), 2))


# ---- networks ------------------------------------------------------------------------------------

NORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plain": (lambda: nn.LayerNorm(6), "layer_norm(6,1e-05)+weight+bias"),
    "of a list": (lambda: nn.LayerNorm([6], eps=0.5), "layer_norm(6,0.5)+weight+bias"),
    "of an eps that is an int": (lambda: nn.LayerNorm(6, eps=1), "layer_norm(6,1.0)+weight+bias"),
    "without bias": (lambda: nn.LayerNorm(6, bias=False), "layer_norm(6,1e-05)+weight"),
    "not affine": (lambda: nn.LayerNorm(6, elementwise_affine=False), "layer_norm(6,1e-05)"),
}


def network(norm: Callable[[], nn.Module] = NORMS["plain"][0]) -> FusedSequential:
    net = FusedSequential(nn.Linear(4, 6), norm(), nn.Tanh(), nn.Linear(6, 3))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


@pytest.mark.parametrize("norm", NORMS)
def test_one_program_has_it(norm):
    make, step = NORMS[norm]
    net, x = network(make), torch.randn(5, 4)
    assert programs(net, x) == [f"linear_t+bias; {step}; tanh; linear_t+bias"]
    for _ in range(2):
        assert_close(results(net, x), results(stock(net), x))


class Doubled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


EDITS: dict[str, Callable[[FusedSequential], Any]] = {
    "eps": lambda n: setattr(n[1], "eps", 0.3),
    "weight": lambda n: n[1].weight.data.mul_(2),
    "another weight": lambda n: setattr(n[1], "weight", nn.Parameter(torch.ones(6))),
    "no bias": lambda n: setattr(n[1], "bias", None),
    "neither": lambda n: (setattr(n[1], "bias", None), setattr(n[1], "weight", None)),
    "a bias alone": lambda n: setattr(n[1], "weight", None),
    "another norm": lambda n: n.__setitem__(1, nn.LayerNorm(6, eps=0.1)),
    "a subclass": lambda n: n.__setitem__(1, Doubled(6)),
    "a hook": lambda n: n[1].register_forward_hook(lambda m, a, y: y + 1),  # noqa: ARG005
    "a forward": lambda n: setattr(n[1], "forward", lambda x: x * 2),
    "a shadowed weight": lambda n: n[1].__dict__.__setitem__("weight", torch.zeros(6)),
    "a computed weight": lambda n: nn.utils.parametrizations.weight_norm(n[1], dim=None),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_norm_is_computed_as_it_is(edit):
    net, x = network(), torch.randn(5, 4)
    net(x)
    before = net(x).detach()
    EDITS[edit](net)
    if edit != "a computed weight":
        assert not torch.equal(stock(net)(x), before)
    for _ in range(2):
        assert_close(results(net, x), results(stock(net), x))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            lambda n: setattr(n, "normalized_shape", [6]),
            "its normalized_shape is no tuple of sizes",
        ),
        (lambda n: setattr(n, "normalized_shape", ()), "its normalized_shape is no tuple of sizes"),
        (
            lambda n: setattr(n, "normalized_shape", (-6,)),
            "its normalized_shape is no tuple of sizes",
        ),
        (lambda n: setattr(n, "eps", "1e-05"), "its eps is no finite number"),
        (lambda n: setattr(n, "eps", float("nan")), "its eps is no finite number"),
        (lambda n: setattr(n, "weight", None), "it has a bias and no weight"),
    ],
)
def test_the_report_says_why_a_norm_is_left_alone(edit, reason):
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    edit(model[1])
    assert f"no: {reason}" in str(mylayers.optimize(model))


def test_a_norm_of_other_sizes_is_refused_in_pytorchs_words():
    net = FusedSequential(nn.Linear(4, 6), nn.LayerNorm(5), nn.Linear(5, 3))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"normalized_shape=\[5\], expected input"):
            net(torch.randn(2, 4))


def test_who_replaces_the_function_is_called(monkeypatch):
    net, x = network(), torch.randn(5, 4)
    net(x)
    calls, layer_norm = [], F.layer_norm

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return layer_norm(*args, **kwargs)

    monkeypatch.setattr(F, "layer_norm", counted)
    net(x)
    assert len(calls) == 1


def test_training_with_a_fused_step_ends_where_stock_does():
    ours = network()
    theirs = nn.Sequential(*copy.deepcopy(ours))
    x, target = torch.randn(20, 4), torch.randn(20, 3)
    for net in (ours, theirs):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(30):
            mylayers.training_step(net, nn.MSELoss(), optimizer, x, target)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_frozen_with_a_norm():
    net, x = network(), torch.randn(5, 4)
    frozen = mylayers.freeze(net)
    assert_close(frozen(x), net(x).detach())
    before = frozen(x)
    with torch.no_grad():
        net[1].weight.mul_(2)
    assert torch.equal(frozen(x), before)
    frozen.refresh()
    assert_close(frozen(x), net(x).detach())
    net[1].bfloat16()
    with pytest.raises(RuntimeError, match=r"freeze: a parameter must be float32.* like all"):
        mylayers.freeze(net)


def test_in_compiled_networks():
    net, x = network(), torch.randn(5, 4)
    expected = results(net, x)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_close(results(compiled, x, net), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_as_the_layers_one_by_one(dtype):
    net, x = network(), torch.randn(5, 4)
    with torch.autocast("cpu", dtype):
        y, expected = net(x), stock(net)(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
