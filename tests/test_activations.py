"""Each activation, behind a product and alone: values, gradients, and bits that stay the same."""

import pytest
import torch
from samples import (
    KERNEL_DTYPES,
    WITH_SETTINGS,
    Sample,
    linear_act_samples,
    num_threads,
    same_bits,
    units_apart,
)
from test_linear_act import check_forward, check_gradients, most_units
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

import mylayers
from mylayers import functional, reference
from mylayers.activations import ACTIVATIONS, find

sequential = torch.ops.mylayers.sequential
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
every_activation = pytest.mark.parametrize("activation", [*ACTIVATIONS, *WITH_SETTINGS])
of_normal = pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])

# From where the float32 result is the smallest normal number, and that of PyTorch 0, to far above.
NUMBERS = torch.cat([torch.linspace(-12.5, 14, 4001, dtype=torch.float64), torch.zeros(1)])


def exact(activation: str, x: torch.Tensor) -> torch.Tensor:
    """The activation in float64, without the cancellation of 1 + erf and 1 + tanh."""
    if activation == "gelu":
        return x * torch.special.erfc(-x * 0.5**0.5) / 2
    if activation == "gelu_tanh":
        return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    raise KeyError(activation)


# Units in the last place. An exponential multiplies the rounding of its argument, up to 89; in
# float64 that is the formula's own, which is no more exact than ours.
LIMITS = {
    ("gelu", torch.float32): 10,
    ("gelu_tanh", torch.float32): 200,
    ("gelu", torch.float64): 250,
    ("gelu_tanh", torch.float64): 1000,
}


def assert_within_units(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Within so many units in the last place, of the smallest normal number at least."""
    info = torch.finfo(actual.dtype)
    smallest = expected.abs().clamp(min=info.smallest_normal)
    unit = smallest.log2().floor().exp2() * info.eps
    assert ((actual.double() - expected) / unit).abs().max() <= limit


@every_dtype
@of_normal
def test_values_are_right_to_the_last_places_however_small(activation, dtype):
    x = NUMBERS.to(dtype)
    found = functional.linear_act(x[:, None], torch.eye(1, dtype=dtype), None, activation)[:, 0]
    expected = exact(activation, x.double())
    normal = expected.abs() >= 4 * torch.finfo(torch.float32).smallest_normal
    normal |= dtype == torch.float64
    limit = LIMITS.get((activation, dtype), 1)
    assert_within_units(found[normal], expected[normal], limit)
    assert ((found[~normal].double() - expected[~normal]).abs() <= 1e-36).all()


@every_dtype
@of_normal
def test_gradients_are_right_however_small(activation, dtype):
    x = NUMBERS.to(dtype)
    wide = x.to(torch.float64, copy=True).requires_grad_()
    exact(activation, wide).sum().backward()
    alone = x.clone().requires_grad_()
    sequential(alone, [], activation).sum().backward()
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    # The two terms of the derivative cancel where it is 0.
    torch.testing.assert_close(alone.grad.double(), wide.grad, rtol=tolerance, atol=tolerance / 10)


def test_gradients_that_are_more_exact_than_pytorchs():
    x = torch.linspace(-4, 4, 801, dtype=torch.float64, requires_grad=True)
    for activation, expected in (
        ("hardsigmoid", torch.where(x.detach().abs() < 3, 1 / 6, torch.zeros_like(x))),
        ("celu(0.3)", (x.detach().clamp(max=0) / 0.3).exp()),
    ):
        (grad,) = torch.autograd.grad(sequential(x, [], activation).sum(), x)
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)


@every_dtype
@every_activation
def test_values_and_gradients_behind_a_product(activation, dtype):
    kinds = {s.name: s for s in linear_act_samples(dtype) if s.kwargs["activation"] == "tanh"}
    for lead in ("(2,3,4)->5", "(3,31)->129", "(300,17)->15"):
        of = next(sample for name, sample in kinds.items() if name.startswith(lead))
        sample = Sample(of.name, of.args, {"activation": activation})
        check_forward(functional.linear_act, sample)
        check_gradients(sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_activation
def test_of_however_large_numbers(activation, dtype):
    exponents = torch.linspace(2, 37 if dtype == torch.float32 else 307, 4000).double()
    x = torch.cat([10**exponents, torch.linspace(99, 1300, 4000).double()]).to(dtype)
    x = torch.cat([x, -x]).requires_grad_()
    if activation.startswith(("gelu", "hardswish")):
        x = x.detach()[x.abs() < 1e12].requires_grad_()  # a cube, a product with 6
    found, expected = sequential(x, [], activation), find(activation).formula(x)
    # What PyTorch's exponentials, and not ours, have left of their smallest numbers.
    limits = {"rtol": 1e-6, "atol": 1e-36}
    torch.testing.assert_close(found, expected, **limits)
    (grad,), (due,) = (torch.autograd.grad(y.sum(), x) for y in (found, expected))
    torch.testing.assert_close(grad, due, rtol=1e-6, atol=2 * torch.finfo(dtype).eps)


def test_a_slope_that_changes_between_compiled_calls():
    # In float64: a slope of 1000 leaves large values, whose sums may be small.
    network = mylayers.FusedSequential(nn.Linear(5, 7), nn.LeakyReLU(0.2), nn.Linear(7, 3)).double()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    x = torch.randn(4, 5, dtype=torch.float64)
    for slope in (0.2, 0.3, -1.0, 0.0, 0.5, 1000.0):
        network[1].negative_slope = slope
        torch.testing.assert_close(compiled(x), nn.Sequential(*network)(x))


# From where float32's exponentials are no normal numbers, to beyond the largest.
ANY = torch.cat(
    [torch.linspace(-104, 90, 100_003), torch.tensor([-3.0, 0.0, -0.0, 3.0, 6.0, 20.0])]
)


@every_activation
def test_float32_values_are_within_few_units_of_pytorchs(activation):
    if activation.startswith("gelu"):
        pytest.skip("more exact than PyTorch's, see above")
    found = sequential(ANY, [], activation)
    expected = find(activation).formula(ANY)
    # A product with an exponential that is no normal number has as few digits as that.
    normal = expected.abs() >= 100 * torch.finfo(torch.float32).smallest_normal
    apart = units_apart(found, expected).where(normal, 0)
    assert ((found - expected)[~normal].abs() <= 1e-42).all()
    worst = apart.argmax()
    limit = most_units(activation, torch.float32)
    assert apart[worst] <= limit, f"{apart[worst]} units at {ANY[worst].item()!r}"


@pytest.mark.grid
@every_dtype
@every_activation
def test_bits_depend_on_no_place_in_memory(activation, dtype):
    x = torch.randn(3, 1031, dtype=torch.float64).mul(3).to(dtype)
    grad = torch.randn(3, 1031).to(dtype)

    def computed(x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaf = x.detach().clone().requires_grad_()
        output = sequential(leaf, [], activation)
        return output.detach(), *torch.autograd.grad(output, leaf, grad)

    whole = computed(x, grad)
    for first in (1, 5, 1030):
        part = computed(x[:, first:], grad[:, first:])
        for all_of_it, some in zip(whole, part, strict=True):
            assert same_bits(all_of_it[:, first:].contiguous(), some)
    large = torch.randn(300, 1031).to(dtype)
    with num_threads(2):
        shared = sequential(large, [], activation)
    with num_threads(1):
        assert same_bits(shared, sequential(large, [], activation))
    assert same_bits(sequential(large.t(), [], activation), shared.t())


@pytest.mark.grid
@every_dtype
@every_activation
def test_a_layer_that_trains_computes_what_one_that_does_not_computes(activation, dtype):
    layer = mylayers.MyLinear(20, 33, activation=activation).to(dtype)
    network = mylayers.FusedSequential(layer, mylayers.MyLinear(33, 5, activation=activation))
    network = network.to(dtype)
    x = torch.randn(70, 20).to(dtype)
    for module in (layer, network):
        with torch.no_grad():
            expected = module(x)
        output = module(x)
        assert output.requires_grad
        assert same_bits(output.detach(), expected)
        with torch.no_grad():
            assert same_bits(module(x[7:8]), expected[7:8])


@every_activation
def test_gradients_of_gradients(activation):
    torch.manual_seed(1)
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((4, 5), (5, 3), (3,))
    )

    def layer(x, weight, bias):
        return functional.linear_act(x, weight, bias, activation)

    assert torch.autograd.gradcheck(layer, (x, weight, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, (x, weight, bias))
    assert torch.autograd.gradcheck(
        lambda *args: sequential(args[0], args[1:], f"{activation}; linear+bias; {activation}"),
        (x, weight, bias),
    )


# ---- PyTorch's modules -----------------------------------------------------------------

MODULES = {
    "GELU": nn.GELU,
    "GELU(tanh)": lambda: nn.GELU("tanh"),
    "ELU": nn.ELU,
    "ELU(0.5)": lambda: nn.ELU(0.5),
    "SiLU": nn.SiLU,
    "LeakyReLU": nn.LeakyReLU,
    "LeakyReLU(0.2, inplace)": lambda: nn.LeakyReLU(0.2, inplace=True),
    "LeakyReLU(1)": lambda: nn.LeakyReLU(1),
    "LeakyReLU(0.0001)": lambda: nn.LeakyReLU(0.0001),
    "SELU": nn.SELU,
    "CELU(2)": lambda: nn.CELU(2),
    "Softplus": nn.Softplus,
    "LogSigmoid": nn.LogSigmoid,
    "Mish": nn.Mish,
    "Hardtanh": nn.Hardtanh,
    "ReLU6": nn.ReLU6,
    "Hardswish(inplace)": lambda: nn.Hardswish(inplace=True),
    "Hardsigmoid": nn.Hardsigmoid,
    "Softsign": nn.Softsign,
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def trained(network: nn.Module, x: torch.Tensor, edit: bool) -> list[torch.Tensor]:
    """An output, changed in place before the backward if it is so asked, and the gradients."""
    network.zero_grad()
    output = network(x)
    if edit:
        output += 1
    output.square().sum().backward()
    return [output, *(p.grad for p in network.parameters())]


@every_module
@pytest.mark.parametrize("ends", [False, True], ids=["between layers", "at the end"])
def test_stock_activations_are_fused(make, ends):
    torch.manual_seed(3)
    last = make() if ends else nn.Linear(70, 4)
    stock = nn.Sequential(nn.Linear(9, 70), make(), nn.Linear(70, 70), last).double()
    fused = mylayers.FusedSequential(*stock)
    x = torch.randn(50, 9, dtype=torch.float64)
    # PyTorch's own Hardsigmoid has a factor of float32 in its gradient.
    limits = (
        {"rtol": 1e-7, "atol": 1e-7} if make is nn.Hardsigmoid else {"rtol": 1e-9, "atol": 1e-9}
    )
    # What comes out may be changed before the backward, where PyTorch's own may.
    edit = ends and not getattr(last, "inplace", False)
    expected = trained(stock, x, edit)
    torch.testing.assert_close(trained(fused, x, edit), expected, **limits)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), stock(x), **limits)
    assert not mylayers.optimize(stock).unfused
    torch.testing.assert_close(trained(stock, x, edit), expected, **limits)


@every_module
def test_a_compiled_network_is_fused(make):
    network = nn.Sequential(nn.Linear(3, 4), make(), nn.Linear(4, 2))
    fused, x = mylayers.FusedSequential(*network), torch.randn(5, 3)
    made = torch.export.export(fused, (x,)).graph_module.graph
    assert [node.target for node in made.nodes if node.op == "call_function"] == [
        torch.ops.mylayers.sequential.default
    ]


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(F.hardsigmoid(self.a(x)))


def test_the_function_of_an_inexact_gradient_is_followed():  # the others: test_forwards.py
    module, x = Written(), torch.randn(5, 3)
    expected = module(x)
    assert not mylayers.optimize(module).unfused
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (nn.LeakyReLU(0), "negative_slope is 0, no number from 0.0001 to 100"),
        (nn.LeakyReLU(-0.1), "negative_slope is -0.1, no number from"),
        (nn.ELU(float("nan")), "alpha is nan, no number from"),
        (nn.CELU(101), "alpha is 101, no number from"),
        (nn.ELU(1e-5), "alpha is 1e-05, no number from"),
        (nn.Softplus(2), "beta is 2, not 1"),
        (nn.Softplus(threshold=3), "threshold is 3, not 20"),
        (nn.Hardtanh(-2, 2), "max_val is 2, not 1, min_val is -2, not -1"),
    ],
)
def test_a_setting_without_a_kernel_stays_by_itself(activation, reason):
    network = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2))
    x = torch.randn(5, 3)
    expected = network(x)
    report = mylayers.optimize(network)
    assert reason in str(report)
    torch.testing.assert_close(network(x), expected, equal_nan=True)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "elu()",
            "elu(0)",
            "elu(-1)",
            "elu(inf)",
            "elu(nan)",
            "elu(1e400)",
            "elu(101)",
            "elu(0.00009)",
        ),
        *("elu(1", "elu(1))", "elu(1_0)", "elu( 1)", "elu(0x1)", "leaky_relu(0.1,0.2)"),
        *("relu(1)", "(1)"),
    ],
)
def test_a_name_that_is_none_is_refused(name):
    one = torch.ones(1, 1)
    for call in (
        lambda: functional.linear_act(one, one, None, name),
        lambda: reference.linear_act(one, one, None, name),
        lambda: mylayers.MyLinear(1, 1, activation=name),
    ):
        with pytest.raises(
            ValueError, match=r"activation must be one of relu, tanh, .*elu\[\(x\)\]"
        ):
            call()
    with pytest.raises(ValueError, match="sequential: program must name steps"):
        sequential(one, [], name)


@pytest.mark.parametrize("setting", ["0.5", "1e-04", "1e2", ".25", "3", "12.345678912345679"])
def test_a_setting_is_a_number_in_any_notation(setting):
    x = torch.randn(7, 5, dtype=torch.float64)
    found = functional.linear_act(x, torch.eye(5).double(), None, f"leaky_relu({setting})")
    assert torch.equal(found, F.leaky_relu(x, float(setting)))


def test_an_approximation_that_is_unknown_stays_by_itself():
    gelu = nn.GELU()
    gelu.approximate = "sigmoid"
    network = mylayers.FusedSequential(nn.Linear(3, 4), gelu)
    with pytest.raises(RuntimeError, match="approximate"):
        network(torch.ones(2, 3))


def test_backward_from_the_output_refuses_what_needs_the_input():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="one whose derivative is a function of its output"):
        torch.ops.mylayers.linear_act_backward(one, one, one, one, "gelu", [True, True, True])
    with pytest.raises(ValueError, match="sequential: program must name steps"):
        sequential(one, [one], "linear+gelu")
