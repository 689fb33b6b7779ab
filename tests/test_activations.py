"""Each activation, behind a product and alone: values, gradients, and bits that stay the same."""

import pytest
import torch
from samples import KERNEL_DTYPES, num_threads, same_bits
from torch import nn

import mylayers
from mylayers import functional, reference
from mylayers.activations import ACTIVATIONS

sequential = torch.ops.mylayers.sequential
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
of_input = pytest.mark.parametrize(
    "activation", [name for name, one in ACTIVATIONS.items() if one.reads_input]
)

# From where the float32 result is the smallest normal number, and that of PyTorch 0, to far above.
NUMBERS = torch.cat([torch.linspace(-12.5, 14, 4001, dtype=torch.float64), torch.zeros(1)])


def exact(activation: str, x: torch.Tensor) -> torch.Tensor:
    """The activation in float64, without the cancellation of 1 + erf and 1 + tanh."""
    if activation == "gelu":
        return x * torch.special.erfc(-x * 0.5**0.5) / 2
    if activation == "gelu_tanh":
        return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    return reference.ACTIVATIONS[activation](x)


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
@of_input
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
@of_input
def test_gradients_are_right_however_small(activation, dtype):
    x = NUMBERS.to(dtype)
    wide = x.to(torch.float64, copy=True).requires_grad_()
    exact(activation, wide).sum().backward()
    alone = x.clone().requires_grad_()
    sequential(alone, [], activation).sum().backward()
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    # The two terms of the derivative cancel where it is 0.
    torch.testing.assert_close(alone.grad.double(), wide.grad, rtol=tolerance, atol=tolerance / 10)


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


@of_input
def test_gradients_of_gradients(activation):
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


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("trains", [False, True])
def test_stock_gelu_is_fused(approximate, trains):
    torch.manual_seed(3)
    stock = nn.Sequential(nn.Linear(9, 70), nn.GELU(approximate), nn.Linear(70, 4)).double()
    fused = mylayers.FusedSequential(*stock)
    x = torch.randn(50, 9, dtype=torch.float64)
    results = []
    for network in (stock, fused):
        network.zero_grad()
        with torch.set_grad_enabled(trains):
            output = network(x)
        if trains:
            output.square().sum().backward()
        results.append([output, *(p.grad for p in network.parameters() if trains)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert not mylayers.optimize(stock).unfused


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
