"""What a reader of the notebook does with a layer, row by row, with the layers of mylayers."""

import copy
import itertools
import math
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the notebook's name)

from mylayers import CenteredLayer, LazyMyLinear, MyLinear, reference


class NotebookMyLinear(nn.Module):
    """The notebook's layer, ``.data`` included: no gradient reaches its parameters."""

    def __init__(self, in_units, units):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_units, units))
        self.bias = nn.Parameter(torch.randn(units))

    def forward(self, x):
        return F.relu(torch.matmul(x, self.weight.data) + self.bias.data)


class MLP(nn.Module):
    """The notebook's block; relu is part of its hidden layer."""

    def __init__(self):
        super().__init__()
        self.hidden = MyLinear(20, 256)
        self.out = MyLinear(256, 10, activation=None)

    def forward(self, x):
        return self.out(self.hidden(x))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_product(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None):
    """``actual`` is ``act(x @ weight + bias)``, but for the rounding of a sum of K products."""
    exact = [None if t is None else t.detach().double() for t in (x, weight, bias)]
    sizes = reference.linear_act(*(None if t is None else t.abs() for t in exact), None)
    terms = x.shape[-1] + (bias is not None)
    tolerance = torch.finfo(actual.dtype).eps * math.sqrt(terms) * sizes.max().item()
    expected = reference.linear_act(*exact, act)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=0, atol=tolerance)


def assert_layer(layer: MyLinear, x: Tensor):
    """``layer(x)`` is the formula of the parameters that the layer holds now."""
    assert_product(layer(x), x, layer.weight, layer.bias, layer.activation)


def our_net() -> nn.Sequential:
    """The notebook's first net; its relu is part of the first layer."""
    return nn.Sequential(MyLinear(4, 8), nn.Identity(), MyLinear(8, 1, activation=None))


both_layers = pytest.mark.parametrize(
    "make", [lambda: MyLinear(4, 4), CenteredLayer], ids=["MyLinear", "CenteredLayer"]
)


# ---- N1 to N9: parameters, layers and blocks ---------------------------------------------


def test_n01_converted_linear_on_a_ramp_is_relu_of_the_stock_values():
    linear = nn.Linear(2, 1)
    x = torch.arange(12, dtype=torch.float32).reshape(6, 2)
    y = MyLinear.from_linear(linear)(x)
    assert y.shape == (6, 1)
    assert y.grad_fn is not None
    assert_product(y, x, linear.weight.T, linear.bias, "relu")


@pytest.mark.parametrize("ours", [(), (0,), (2,), (0, 2)], ids=str)
def test_n02_stock_and_our_layers_mix_in_a_sequential(ours):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    exact = copy.deepcopy(net).double()
    for i in ours:
        net[i] = MyLinear.from_linear(net[i], activation=None)
        assert type(net[i]) is MyLinear
    x = torch.rand(size=(2, 4))
    y = net(x)
    assert y.shape == (2, 1)
    # One rounding per layer; what the first leaves, the second's weights pass on.
    eps = torch.finfo(torch.float32).eps
    hidden = x.double() @ exact[0].weight.T.abs() + exact[0].bias.abs()
    size = hidden @ exact[2].weight.T.abs() + exact[2].bias.abs()
    tolerance = eps * (math.sqrt(4 + 1) + math.sqrt(8 + 1)) * size.max().item()
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=0, atol=tolerance)


def test_n03_state_dict_has_exactly_weight_and_bias():
    net = our_net()
    state = net[2].state_dict()
    assert isinstance(state, OrderedDict)
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], net[2].weight)
    assert torch.equal(state["bias"], net[2].bias)
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(MyLinear(4, 8, bias=False).state_dict()) == ["weight"]
    assert list(CenteredLayer().state_dict()) == []


def test_n04_parameters_data_and_gradients_before_and_after_backward():
    net = our_net()
    x = torch.rand(size=(2, 4))
    assert type(net[2].bias) is nn.Parameter
    assert net[2].bias.requires_grad
    assert type(net[2].bias.data) is Tensor
    assert not net[2].bias.data.requires_grad
    assert net[2].weight.grad is None
    hidden = net[0](x).detach()
    net(x).sum().backward()
    assert_product(net[2].weight.grad, hidden.T, torch.ones(2, 1), None, None)
    assert net[2].bias.grad.tolist() == [2.0]
    net[2].bias.data = torch.tensor([10.0])
    net[2].weight.data[:] = 0
    assert net(x).tolist() == [[10.0], [10.0]]


def test_n05_apply_init_normal_takes_effect_in_the_next_forward():
    def init_normal(m):
        if isinstance(m, MyLinear):
            nn.init.normal_(m.weight, mean=0, std=0.01)
            nn.init.zeros_(m.bias)

    net = our_net()
    x = torch.rand(size=(2, 4))
    before = net(x)
    net.apply(init_normal)
    for layer in (net[0], net[2]):
        assert 0 < layer.weight.abs().max() < 0.01 * 6  # six standard deviations
        assert not layer.bias.any()
    assert not torch.equal(net(x), before)
    assert_layer(net[0], x)
    assert_layer(net[2], net[0](x))


def test_n06_xavier_on_one_block_and_42_on_another():
    def init_xavier(m):
        if type(m) is MyLinear:
            nn.init.xavier_uniform_(m.weight)

    def init_42(m):
        if type(m) is MyLinear:
            nn.init.constant_(m.weight, 42)

    net = our_net()
    net[0].apply(init_xavier)
    net[2].apply(init_42)
    bound = math.sqrt(6 / (4 + 8))
    # 32 uniform draws all stay below 2/3 of the bound once in 400,000 seeds.
    assert bound * 2 / 3 < net[0].weight.abs().max() <= bound
    assert net.state_dict()["2.weight"].tolist() == [[42.0]] * 8
    x = torch.rand(size=(2, 4))
    assert_layer(net[0], x)
    assert_layer(net[2], net[0](x))


def test_n06_kaiming_reads_the_fan_in_from_the_transposed_weight():
    layer = MyLinear(600, 6)
    nn.init.kaiming_uniform_(layer.weight.T, nonlinearity="relu")
    bound = math.sqrt(2) * math.sqrt(3 / 600)
    # Of 3600 uniform draws the largest is within 1 % of the bound.
    assert 0.99 * bound < layer.weight.abs().max() <= bound


def test_n07_one_layer_used_twice_stays_tied():
    shared = MyLinear(8, 8)
    net = nn.Sequential(
        MyLinear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 1)
    )
    x = torch.rand(size=(2, 4))
    net(x)
    assert (net[2].weight.data == net[4].weight.data).all()
    net[2].weight.data[0, 0] = 100
    assert net[4].weight.data[0, 0] == 100
    names = [f"{i}.{name}" for i in (0, 2, 4, 6) for name in ("weight", "bias")]
    assert list(net.state_dict()) == names
    assert len(list(net.parameters())) == 6

    untied = copy.deepcopy(net)
    untied[4] = copy.deepcopy(untied[2])
    y = net(x)
    assert torch.equal(y, untied(x))
    for each in (net, untied):
        each(x).sum().backward()
    for name in ("weight", "bias"):
        gradients = [getattr(untied[i], name).grad for i in (2, 4)]
        assert all(g.any() for g in gradients)
        # Two terms, summed once: one rounding at most.
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(
            getattr(shared, name).grad, gradients[0] + gradients[1], rtol=eps, atol=0
        )


@both_layers
def test_n08_nested_blocks_work_and_calling_is_dunder_call_with_hooks(make):
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(make(), nn.Sequential(nn.Linear(4, 2))))
    x = torch.rand(2, 4)
    fired = []
    layer = net[1][0]
    with (
        layer.register_forward_pre_hook(lambda *_: fired.append("before")),
        layer.register_forward_hook(lambda *_: fired.append("after")),
        layer.register_full_backward_hook(lambda *_: fired.append("backward")),
    ):
        y = net(x)
        assert torch.equal(y, net.__call__(x))
        y.sum().backward()
        assert fired == ["before", "after", "before", "after", "backward"]
        layer.forward(net[0](x))
    assert fired == ["before", "after", "before", "after", "backward"]
    assert torch.equal(y, net[1][1](layer(net[0](x))))


def test_n08_forward_and_parameters_are_all_a_block_needs():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([MyLinear(4, 4), MyLinear(4, 4)])
            self.center = CenteredLayer()

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return self.center(x)

    net = nn.Sequential(Block(), Block())
    net(torch.rand(64, 4)).square().sum().backward()
    parameters = dict(net.named_parameters())
    assert len(parameters) == 8
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())


def test_n09_mlp_class_with_our_layer_inside():
    net = MLP()
    x = torch.rand(2, 20)
    y = net(x)
    assert y.shape == (2, 10)
    assert_layer(net.hidden, x)
    assert_layer(net.out, net.hidden(x))
    assert torch.equal(y, net.out(net.hidden(x)))


# ---- N10 to N14: layers of our own -------------------------------------------------------


def test_n10_centered_layer_on_one_to_five():
    layer = CenteredLayer()
    y = layer(torch.FloatTensor([1, 2, 3, 4, 5]))
    assert y.dtype == torch.float32
    assert y.tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("shape", "scale", "offset"),
    [((4, 8), 1, 0), ((4, 8), 1e4, 1e5), ((1, 8), 1, 0), ((3, 5, 8), 1e-30, 0)],
)
def test_n11_output_of_a_centered_net_has_mean_zero(shape, scale, offset):
    net = nn.Sequential(nn.Linear(8, 128), CenteredLayer())
    x = scale * torch.rand(shape) + offset
    y = net(x)
    assert y.shape == (*shape[:-1], 128)
    # The mean is rounded once and so is every difference: half an eps of each.
    mean = net[0](x).double().mean().abs()
    tolerance = torch.finfo(y.dtype).eps / 2 * (mean + y.double().abs().max())
    assert y.double().mean().abs() <= tolerance


def test_n12_for_one_seed_the_notebooks_values():
    torch.manual_seed(7)
    linear = MyLinear(5, 3)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    notebook = NotebookMyLinear(5, 3)
    assert linear.weight.shape == (5, 3)
    assert linear.bias.shape == (3,)
    assert torch.equal(linear.weight, notebook.weight)
    assert torch.equal(linear.bias, notebook.bias)
    assert torch.equal(state, torch.get_rng_state())


def test_n12_output_is_relu_of_the_affine_map():
    linear = MyLinear(5, 3)
    x = torch.rand(2, 5)
    y = linear(x)
    assert y.shape == (2, 3)
    assert (y >= 0).all()
    assert (y > 0).any()
    assert_product(y, x, linear.weight, linear.bias, "relu")


def test_n13_two_layers_in_a_sequential():
    net = nn.Sequential(MyLinear(64, 8), MyLinear(8, 1))
    x = torch.rand(2, 64)
    assert net(x).shape == (2, 1)
    assert_layer(net[0], x)
    assert_layer(net[1], net[0](x))


def test_n14_gradients_reach_input_weight_and_bias():
    x = torch.rand(2, 5, requires_grad=True)
    assert not NotebookMyLinear(5, 3)(x.detach()).requires_grad  # the notebook's slip

    linear = MyLinear(5, 3)
    linear(x).sum().backward()
    ours = (x, linear.weight, linear.bias)
    exact = [t.detach().double().requires_grad_() for t in ours]
    reference.linear_act(*exact).sum().backward()
    # dx sums over 3 units, the others over 2 rows; each sum is at most that of the factors.
    terms = (3, 2, 2)
    sizes = (exact[1].abs().sum(1), exact[0].abs().sum(0), torch.tensor(2.0))
    for tensor, twin, k, size in zip(ours, exact, terms, sizes, strict=True):
        assert tensor.grad.any()
        tolerance = torch.finfo(torch.float32).eps * math.sqrt(k) * size.max().item()
        torch.testing.assert_close(tensor.grad.double(), twin.grad, rtol=0, atol=tolerance)


def test_n14_training_lowers_the_loss_at_every_step_and_moves_every_parameter():
    linear, target = MyLinear(5, 3), MyLinear(5, 3)
    start = copy.deepcopy(linear)
    x = torch.randn(64, 5)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(linear(x), target(x).detach())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert (linear.weight != start.weight).all()
    assert (linear.bias != start.bias).all()


# ---- N15 to N18: files and modes ---------------------------------------------------------


@both_layers
def test_n15_outputs_are_saved_and_loaded(make, tmp_path):
    x = make()(torch.rand(2, 4))
    torch.save(x, tmp_path / "x-file")
    x2 = torch.load(tmp_path / "x-file")
    assert type(x2) is Tensor
    assert torch.equal(x2, x)


def test_n16_state_dict_goes_through_a_file_into_a_second_network(tmp_path):
    net, clone = MLP(), MLP()
    torch.save(net.state_dict(), tmp_path / "mlp.params")
    keys = clone.load_state_dict(torch.load(tmp_path / "mlp.params"), strict=True)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    for name, value in net.state_dict().items():
        assert torch.equal(clone.state_dict()[name], value)
    assert not clone.eval().hidden.training
    assert repr(clone) == (
        "MLP(\n"
        "  (hidden): MyLinear(in_units=20, units=256, bias=True, activation='relu')\n"
        "  (out): MyLinear(in_units=256, units=10, bias=True, activation=None)\n"
        ")"
    )


def test_n17_the_clone_computes_the_same_bits(tmp_path):
    net, clone = MLP(), MLP()
    x = torch.rand(size=(4, 20))
    y = net(x)
    torch.save(net.state_dict(), tmp_path / "mlp.params")
    clone.load_state_dict(torch.load(tmp_path / "mlp.params"))
    clone.eval()
    y_clone = clone(x)
    assert (y_clone == y).all()
    assert torch.equal(y_clone, y)


OTHER_PROCESS = """
import torch
from torch import nn
from mylayers import CenteredLayer, MyLinear

torch.set_num_threads(1)
net = nn.Sequential(MyLinear(20, 256), CenteredLayer(), MyLinear(256, 10, activation=None))
net.load_state_dict(torch.load("mlp.params"))
torch.save(net.eval()(torch.load("x-file")), "y-file")
"""


def test_n17_another_process_computes_the_same_bits(tmp_path):
    net = nn.Sequential(MyLinear(20, 256), CenteredLayer(), MyLinear(256, 10, activation=None))
    x = torch.rand(size=(300, 20))
    torch.save(net.state_dict(), tmp_path / "mlp.params")
    torch.save(x, tmp_path / "x-file")
    subprocess.run(
        [sys.executable, "-W", "error", "-c", OTHER_PROCESS], cwd=tmp_path, check=True, timeout=60
    )
    assert torch.equal(torch.load(tmp_path / "y-file"), net(x))


def test_n18_train_and_eval_change_dropout_and_nothing_else():
    net = nn.Sequential(MyLinear(4, 64), CenteredLayer(), nn.Dropout(0.5))
    x = torch.rand(8, 4)
    inner = net[:2]
    assert all(m.training for m in net.modules())
    trained = inner(x)
    torch.manual_seed(3)
    dropped = net(x)
    torch.manual_seed(3)
    assert torch.equal(dropped, F.dropout(trained, 0.5))
    assert not torch.equal(dropped, trained)
    net.eval()
    assert not any(m.training for m in net.modules())
    assert torch.equal(inner(x), trained)
    assert torch.equal(net(x), trained)
    net.train()
    assert all(m.training for m in net.modules())


# ---- the chapters that the notebook follows ----------------------------------------------


def nested_net() -> nn.Sequential:
    def block():
        return nn.Sequential(MyLinear(4, 8), CenteredLayer(), MyLinear(8, 4))

    chain = nn.Sequential()
    for i in range(3):
        chain.add_module(f"block {i}", block())
    return nn.Sequential(chain, nn.Linear(4, 1))


def test_chapters_parameters_are_reached_by_name_through_nested_blocks():
    net = nested_net()
    names = [
        f"0.block {i}.{j}.{name}" for i in range(3) for j in (0, 2) for name in ("weight", "bias")
    ]
    assert [name for name, _ in net.named_parameters()] == [*names, "1.weight", "1.bias"]
    inner = net.get_parameter("0.block 1.2.bias")
    assert inner is net[0][1][2].bias
    assert net.get_submodule("0.block 1.1") is net[0][1][1]
    assert torch.equal(net.state_dict()["0.block 1.2.bias"], inner)
    assert net(torch.rand(2, 4)).shape == (2, 1)


def test_chapters_a_custom_initialiser_sees_every_layer_by_name():
    seen = []

    def my_init(m):
        if type(m) is MyLinear:
            seen.append([(name, tuple(p.shape)) for name, p in m.named_parameters()])
            nn.init.uniform_(m.weight, -10, 10)
            m.weight.data *= m.weight.data.abs() >= 5

    net = nested_net()
    net.apply(my_init)
    first = [("weight", (4, 8)), ("bias", (8,))]
    second = [("weight", (8, 4)), ("bias", (4,))]
    assert seen == [first, second] * 3
    layer = net[0][0][0]
    assert ((layer.weight == 0) | (layer.weight.abs() >= 5)).all()
    assert_layer(layer, torch.rand(2, 4))


def test_chapters_direct_edits_of_data_change_the_next_output():
    net = our_net()
    x = torch.rand(size=(2, 4))
    net(x)
    net[0].weight.data[:] += 1
    net[0].weight.data[0, 0] = 42
    assert net[0].weight[0, 0] == 42
    assert_layer(net[0], x)
    net[0].bias.data = net[0].bias.data - 100
    assert not net[0](x).any()


def test_chapters_lists_and_dicts_of_tensors_are_saved_and_loaded(tmp_path):
    layer = MyLinear(4, 3)
    x = torch.rand(2, 4)
    y, z = layer(x), CenteredLayer()(x)
    torch.save([x, y], tmp_path / "x-files")
    x2, y2 = torch.load(tmp_path / "x-files")
    assert torch.equal(x2, x)
    assert torch.equal(y2, y)
    torch.save({"y": y, "z": z, "weight": layer.weight}, tmp_path / "mydict")
    loaded = torch.load(tmp_path / "mydict")
    assert list(loaded) == ["y", "z", "weight"]
    assert torch.equal(loaded["y"], y)
    assert torch.equal(loaded["z"], z)
    assert type(loaded["weight"]) is nn.Parameter
    assert torch.equal(loaded["weight"], layer.weight)


def test_chapters_deferred_initialisation_waits_for_the_first_input():
    net = nn.Sequential(LazyMyLinear(256), LazyMyLinear(10, activation=None))
    assert "LazyMyLinear(in_units=0, units=256" in repr(net)
    x = torch.rand(2, 20)
    assert net(x).shape == (2, 10)
    assert [type(m) for m in net] == [MyLinear, MyLinear]
    assert [tuple(m.weight.shape) for m in net] == [(20, 256), (256, 10)]
    assert_layer(net[0], x)
    assert_layer(net[1], net[0](x))


def test_chapters_a_network_moves_to_a_device():
    net = nn.Sequential(MyLinear(4, 8, device="cpu"), CenteredLayer(), MyLinear(8, 1))
    x = torch.rand(2, 4)
    y = net(x)
    assert torch.equal(net.to(device=torch.device("cpu"))(x), y)
    away = copy.deepcopy(net).to(device="meta")
    assert {p.device.type for p in away.parameters()} == {"meta"}
    z = away(x.to("meta"))
    assert z.device.type == "meta"
    assert z.shape == (2, 1)
    with pytest.raises(RuntimeError, match="weight must be on cpu like input; got meta"):
        away(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_chapters_a_network_moves_to_a_dtype(dtype):
    layer = MyLinear(4, 8).to(dtype)
    x = torch.rand(2, 4, dtype=dtype)
    assert layer(x).dtype == dtype
    assert_layer(layer, x)
    assert CenteredLayer().to(dtype)(x).dtype == dtype
