"""What looks at a network from outside, or takes it elsewhere, works as with stock layers.

Counters, profilers, hooks on the graph, functions that somebody has replaced; TorchScript, FX,
torch.package, cloudpickle, copies.
"""

import copy
import functools
import io
import subprocess
import sys
from types import ModuleType

import cloudpickle
import pytest
import torch
from common import Calls
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)
from torch.overrides import get_overridable_functions
from torch.package import PackageExporter, PackageImporter, PackagingError
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import mylayers
from mylayers import CenteredLayer, FusedSequential, LazyMyLinear, MyLinear, sync
from mylayers.sequential import plan

# ---- operations, as PyTorch's counter has them -------------------------------------------------


def flops(call):
    counter = FlopCounterMode(display=False)
    with counter:
        result = call()
    return counter.get_total_flops(), result


def flops_there_and_back(call, needed):
    """Of the forward and of a backward that gives the gradients of ``needed``."""
    forward, y = flops(call)
    backward, _ = flops(lambda: torch.autograd.grad(y, needed, torch.ones_like(y)))
    return forward, backward


def as_one_operator(net):
    """The network's function, by ``mylayers::sequential``."""
    (chain,) = plan(net)
    return lambda x: torch.ops.mylayers.sequential(x, list(net.parameters()), chain.program)


def with_stock_layers(net):
    """The same network without ours."""
    layers = [
        nn.Sequential(layer.to_linear(), nn.ReLU()) if isinstance(layer, MyLinear) else layer
        for layer in net
    ]
    return nn.Sequential(*layers)


NETS = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 4)),
    "without bias": lambda: nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU()),
    "ours": lambda: nn.Sequential(MyLinear(6, 4)),
    "deep": lambda: nn.Sequential(
        nn.Linear(6, 4), nn.Tanh(), MyLinear(4, 5, bias=False), CenteredLayer(), nn.Linear(5, 3)
    ),
    "center first": lambda: nn.Sequential(CenteredLayer(), nn.Linear(6, 4), nn.Sigmoid()),
    "no units between": lambda: nn.Sequential(nn.Linear(6, 0), nn.ReLU(), nn.Linear(0, 3)),
}
FLATTENING = {
    "first": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), (5, 2, 3)),
    "in between": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)),
        (5, 2, 3),
    ),
    "leading": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Flatten(0, -2), nn.Linear(4, 5)),
        (5, 2, 3),
    ),
    "of no dimension": (lambda: nn.Sequential(nn.Flatten(0), MyLinear(1, 5)), ()),
}
CASES = {
    **{
        (name, shape): (net, shape)
        for name, net in NETS.items()
        for shape in ((6,), (5, 6), (0, 6), (2, 5, 6), (2, 1, 3, 6))
    },
    **{("flatten " + name, shape): (net, shape) for name, (net, shape) in FLATTENING.items()},
}


# Which gradients are asked for: of the input, and of which parameters.
NEEDED = {
    "all": (True, slice(None)),
    "parameters": (False, slice(None)),
    "input": (True, slice(0)),
    "last": (False, slice(-1, None)),
    "first weight": (False, slice(1)),
}


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("how", ["one by one", "fused", "optimized", "operator"])
def test_operations_are_counted_as_of_the_stock_network(case, how):
    made, shape = CASES[case]
    net = made()
    stock = with_stock_layers(net)
    if how == "optimized":
        mylayers.optimize(net)
    fn = {"fused": FusedSequential(*net), "operator": as_one_operator(net)}.get(how, net)
    for of_input, of_parameters in NEEDED.values():
        x, counts = torch.rand(shape, requires_grad=of_input), []
        for call, parameters in ((fn, [*net.parameters()]), (stock, [*stock.parameters()])):
            wanted = parameters[of_parameters]
            for parameter in parameters:
                parameter.requires_grad_(any(parameter is one for one in wanted))
            of = functools.partial(call, x)
            counts.append(flops_there_and_back(of, [x] * of_input + wanted))
        assert counts[0] == counts[1]
        assert (counts[0][0] > 0) == all(t.numel() > 0 for t in (x, *parameters))


def test_every_operator_has_a_formula():
    names = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("mylayers::")
    }
    for name in names:
        assert getattr(torch.ops.mylayers, name) in flop_registry, name


def test_operations_of_a_gradient_that_arrives_in_between():
    """As in a double backward, whose gradients come through what backward has read."""
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh())
    parameters = list(net.parameters())
    (chain,) = plan(net)
    x = torch.rand(5, 6)
    outputs = torch.ops.mylayers.sequential_outputs(x, parameters, chain.program)
    counted, _ = flops(lambda: torch.autograd.grad(outputs[0].sum(), parameters[:2]))
    assert counted == 2 * 5 * 6 * 4


def test_a_step_in_one_call_counts_as_its_three_lines():
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y, loss = torch.rand(5, 6), torch.rand(5, 3), nn.MSELoss()
    stock, _ = flops(lambda: loss(net(x), y).backward())
    ours, _ = flops(lambda: mylayers.forward_backward(FusedSequential(*net), loss, x, y))
    assert ours == stock == 2 * 5 * (6 * 4 + 4 * 3) + 2 * 5 * (6 * 4 + 4 * 3 + 4 * 3)


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COUNTED = """
counter = flop_counter.FlopCounterMode(display=False)
with counter:
    mylayers.functional.linear_act(torch.rand(5, 6), torch.rand(6, 4))
print(counter.get_total_flops())
"""


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param(
            "import torch, mylayers\nfrom torch.utils import flop_counter",
            id="before the counter",
        ),
        pytest.param(
            "import torch\nfrom torch.utils import flop_counter\nimport mylayers",
            id="after the counter",
            marks=pytest.mark.whole,
        ),
        # As notebooks do that reload what has changed.
        pytest.param(
            "import sys, torch, mylayers\n"
            "from torch.utils import flop_counter\n"
            "for name in [*sys.modules]:\n"
            "    if name.startswith('mylayers') and name != 'mylayers._C': del sys.modules[name]\n"
            "import mylayers",
            id="again",
            marks=pytest.mark.whole,
        ),
    ],
)
def test_the_counter_knows_our_operators_whichever_is_imported_first(imports):
    assert python(imports + COUNTED) == f"{2 * 5 * 6 * 4}\n"


# ---- the profiler ------------------------------------------------------------------------------


def test_the_profiler_names_our_operators_and_counts_none_of_their_operations():
    """Its operations are of a list in PyTorch's C++, which only its own operators are on."""
    layer, stock, x = MyLinear(6, 4), nn.Linear(6, 4), torch.rand(5, 6)
    with torch.profiler.profile(with_flops=True, record_shapes=True) as profile:
        layer(x).sum().backward()
        FusedSequential(layer, nn.Linear(4, 3))(x).sum().backward()
        stock(x)
    events = {event.key: event for event in profile.key_averages(group_by_input_shape=True)}
    for name in ("linear_act", "linear_act_backward", "sequential_outputs", "sequential_backward"):
        assert events[f"mylayers::{name}"].flops == 0
    assert events["mylayers::linear_act"].input_shapes[:3] == [[5, 6], [6, 4], [4]]
    assert events["aten::addmm"].flops == 2 * 5 * 6 * 4


# ---- hooks on the graph ------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_hooks_on_a_fused_networks_grad_fn_find_the_gradient_first(layers):
    net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(layers)))
    net = nn.Sequential(*(layer for pair in net for layer in pair))
    x, grad = torch.rand(3, 4, requires_grad=True), torch.rand(3, 4)
    found = []
    for of in (net, FusedSequential(*net)):
        seen = []
        y = of(x)
        y.grad_fn.register_hook(lambda _, grads, seen=seen: seen.append(grads[0]))
        y.grad_fn.register_prehook(lambda grads: (2 * grads[0], *grads[1:]))
        found.append((torch.autograd.grad(y, x, grad)[0], seen[0]))
    for stock, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, stock)
    assert torch.equal(found[1][1], 2 * grad)


# ---- functions that somebody has replaced ------------------------------------------------------

# Each once after a linear layer, and one of each loss.
LAYERS = {
    "Linear": lambda: nn.Linear(4, 4),
    "MyLinear": lambda: MyLinear(4, 4),
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "ELU": nn.ELU,
    "CenteredLayer": CenteredLayer,
    "Flatten": lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3)),
    "Dropout": lambda: nn.Dropout().eval(),
    "Identity": nn.Identity,
}
LOSSES = {
    "MSELoss": (nn.MSELoss(), F.mse_loss),
    "SmoothL1Loss": (nn.SmoothL1Loss(), F.smooth_l1_loss),
    "HuberLoss": (nn.HuberLoss(), F.huber_loss),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), F.cross_entropy),
}
OWNERS = (torch, F, torch.Tensor, mylayers.functional)
NO_OPERATIONS = {"size", "dim", "requires_grad_", "detach"}


def public_functions():
    """All of PyTorch's that its own overrides may take, and ours, as owner and name."""
    known = {**get_overridable_functions(), mylayers.functional: []}
    for owner in OWNERS:
        names = {getattr(f, "__name__", "") for f in known[owner]} - NO_OPERATIONS
        for name in sorted(names | set(getattr(owner, "__all__", ()))):
            function = getattr(owner, name, None)
            if not name.startswith("_") and callable(function) and not isinstance(function, type):
                yield owner, name


def replace(monkeypatch, owner, name, calls):
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append((owner, name))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def called(call):
    """What a call of stock modules looks up."""
    calls = []
    with pytest.MonkeyPatch.context() as all_of_them:
        for owner, name in public_functions():
            replace(all_of_them, owner, name, calls)
        call()
    return sorted(set(calls), key=str)


def calls_of(call, owner, name, monkeypatch):
    calls = []
    with monkeypatch.context() as this_one:
        replace(this_one, owner, name, calls)
        result = call()
    return len(calls), result


def layers_of(name):
    made = LAYERS[name]()
    return [nn.Linear(4, 4), *(made if isinstance(made, nn.Sequential) else [made])]


@pytest.mark.grid
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("planned_before", [True, False])
def test_a_replaced_function_is_called_as_by_stock_layers(name, planned_before, monkeypatch):
    stock = nn.Sequential(*layers_of(name))
    x = torch.rand(3, 2, 4)
    expected = stock(x)
    found = called(lambda: stock(x))
    assert (F, "linear") in found
    ours = {"MyLinear": ["linear_act"], "CenteredLayer": ["center"]}
    assert [f for owner, f in found if owner is mylayers.functional] == ours.get(name, [])
    for owner, function in found:
        for make in (lambda: FusedSequential(*stock), lambda: nn.Sequential(*stock)):
            net = make()
            if planned_before:
                mylayers.optimize(net)
                for _ in range(2):
                    net(x)

            def call(net=net):
                mylayers.optimize(net)
                return net(x)

            wanted, _ = calls_of(lambda: stock(x), owner, function, monkeypatch)
            assert wanted > 0
            number, y = calls_of(call, owner, function, monkeypatch)
            assert number == wanted, function
            torch.testing.assert_close(y, expected)
            with Calls() as seen:  # all in their places again
                call()
            assert [operator for operator, _ in seen.seen] == ["sequential_outputs"]


class Instead(ModuleType):
    """A module in the place of another, which notes what is looked up in it."""

    def __init__(self, original):
        super().__init__(original.__name__)
        self.original, self.seen = original, []

    def __getattr__(self, name):
        self.seen.append(name)
        return getattr(self.original, name)


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_in_the_place_of_one_that_layers_look_up_in_is_asked(name, monkeypatch):
    """``mock.patch("torch.nn.modules.linear.F")`` is another way to replace F.linear."""
    net, x = FusedSequential(*layers_of(name)), torch.rand(3, 2, 4)
    expected = net(x)
    asked = 0
    for owner in {sys.modules[type(layer).__module__] for layer in net}:
        for own in ("F", "torch", "functional"):
            if hasattr(owner, own):
                with monkeypatch.context() as this_one:
                    instead = Instead(getattr(owner, own))
                    this_one.setattr(owner, own, instead)
                    nn.Sequential(*net)(x)
                    wanted, instead.seen = instead.seen, []
                    torch.testing.assert_close(net(x), expected)
                    assert instead.seen == wanted
                    asked += len(wanted)
    assert asked > 0


@pytest.mark.parametrize("loss", ["MSELoss", "SmoothL1Loss", "HuberLoss", "CrossEntropyLoss"])
def test_a_module_in_the_place_of_one_that_losses_look_up_in_is_asked(loss, monkeypatch):
    net, x = FusedSequential(nn.Linear(4, 3)), torch.rand(5, 4)
    y = torch.tensor([0, 1, 2, 1, 0]) if loss == "CrossEntropyLoss" else torch.rand(5, 3)
    step = lambda: mylayers.forward_backward(net, LOSSES[loss][0], x, y)  # noqa: E731
    step()
    instead = Instead(F)
    monkeypatch.setattr(nn.modules.loss, "F", instead)
    step()
    assert instead.seen == [LOSSES[loss][1].__name__]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("as_function", [False, True])
def test_a_replaced_function_of_a_loss_is_called(loss, as_function, monkeypatch):
    criterion = LOSSES[loss][as_function]
    stock = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    net, x = FusedSequential(*stock), torch.rand(5, 4)
    y = torch.tensor([0, 1, 2, 1, 0]) if loss == "CrossEntropyLoss" else torch.rand(5, 3)

    def three_lines():
        value = criterion(stock(x), y)
        value.backward()
        return value.detach()

    found = called(lambda: criterion(stock(x), y))
    assert (torch, "tanh") in found
    for owner, function in (*found, (torch.Tensor, "backward"), (torch.autograd, "backward")):
        wanted, expected = calls_of(three_lines, owner, function, monkeypatch)
        number, value = calls_of(
            lambda: mylayers.forward_backward(net, criterion, x, y), owner, function, monkeypatch
        )
        assert number == wanted, function
        torch.testing.assert_close(value, expected)


# ---- the network taken elsewhere ---------------------------------------------------------------


class Around(nn.Module):
    """A module of somebody's with a network in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1


def optimized(net):
    mylayers.optimize(net)
    return net


NETWORKS = {
    "MyLinear": lambda: MyLinear(4, 3),
    "without bias and activation": lambda: MyLinear(4, 3, bias=False, activation=None),
    "CenteredLayer": CenteredLayer,
    "CenteredLayer(1)": lambda: CenteredLayer(1),
    "CenteredLayer((0, 1))": lambda: CenteredLayer((0, 1)),
    "Sequential of ours": lambda: nn.Sequential(MyLinear(4, 3, activation="elu"), CenteredLayer()),
    "FusedSequential": lambda: FusedSequential(
        nn.Linear(4, 3), nn.Tanh(), CenteredLayer(0), MyLinear(3, 2)
    ),
    "optimized": lambda: optimized(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), MyLinear(3, 2))),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]()


@pytest.fixture(params=["alone", "within", "called before"])
def net(request, network):
    """A network by itself, in another module, and when it has a plan of its last call."""
    if request.param == "called before":
        network(torch.rand(3, 4))
    return Around(network) if request.param == "within" else network


def stored(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


def ours_in(module):
    return [type(layer) for layer in module.modules() if type(layer) in (MyLinear, CenteredLayer)]


def test_a_scripted_network_calls_our_operators_saved_and_loaded(net):
    x = torch.rand(3, 4, requires_grad=True)
    expected = net(x)
    wanted = torch.autograd.grad(expected.sin().sum(), [x, *net.parameters()])
    for scripted in (torch.jit.script(net), stored(torch.jit.script(net))):
        graph = str(scripted.inlined_graph)
        for cls, operator in ((MyLinear, "linear_act"), (CenteredLayer, "center")):
            assert graph.count(f"mylayers::{operator}(") == ours_in(net).count(cls)
        for _ in range(3):  # TorchScript optimises at the second call
            y = scripted(x)
            torch.testing.assert_close(y, expected)
            grads = torch.autograd.grad(y.sin().sum(), [x, *scripted.parameters()])
            torch.testing.assert_close(grads, wanted)


def test_scripting_leaves_the_network_as_it_was(net):
    before = {name: type(module) for name, module in net.named_modules()}
    torch.jit.script(net)
    assert {name: type(module) for name, module in net.named_modules()} == before
    net(torch.rand(3, 4))


def test_the_function_scripts_too():
    @torch.jit.script
    def layer(x, weight):
        return mylayers.functional.linear_act(x, weight, None, "tanh")

    x, weight = torch.rand(3, 4), torch.rand(4, 2)
    assert torch.equal(layer(x, weight), mylayers.functional.linear_act(x, weight, None, "tanh"))
    assert "mylayers::linear_act" in str(layer.inlined_graph)


@pytest.mark.parametrize("dim", [None, 1, [0, -1]], ids=str)
def test_center_scripts_by_itself(dim):
    x = torch.rand(3, 4, 2)
    center = stored(torch.jit.script(mylayers.functional.center))
    assert torch.equal(center(x, dim), mylayers.functional.center(x, dim))
    assert "mylayers::center" in str(center.inlined_graph)


def test_center_scripts_where_it_is_called():
    def layer(x):
        return mylayers.functional.center(x, 1) * mylayers.functional.center(x, [0, -1])

    x = torch.rand(3, 4, 2)
    scripted = torch.jit.script(layer)
    assert torch.equal(scripted(x), layer(x))
    assert "mylayers::center" in str(scripted.inlined_graph)


def test_a_mean_over_processes_says_what_to_use_instead_of_scripting():
    layer = CenteredLayer()
    layer._group = sync.Group("0", (0, 1))
    for of in (layer, Around(layer)):
        with pytest.raises(
            RuntimeError, match=r"CenteredLayer: .* use torch\.export\.export, or set"
        ):
            torch.jit.script(of)


def test_a_lazy_layer_scripts_once_its_sizes_are_known():
    layer, x = LazyMyLinear(3), torch.rand(2, 4)
    with pytest.raises(RuntimeError, match="uninitialized parameters"):
        torch.jit.script(layer)
    expected = layer(x)
    assert torch.equal(torch.jit.script(layer)(x), expected)


def test_fx_records_the_operators_and_stock_layers(net):
    x = torch.rand(3, 4)
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(traced(x), net(x))
    targets = [str(node.target) for node in traced.graph.nodes]
    for cls, operator in ((MyLinear, "linear_act"), (CenteredLayer, "center")):
        assert targets.count(f"mylayers.{operator}") == ours_in(net).count(cls)


def packaged(net, how):
    file = io.BytesIO()
    with PackageExporter(file) as exporter:
        getattr(exporter, how)("mylayers.**")
        exporter.extern("torch.**")
        exporter.save_pickle("net", "net.pkl", net)
    file.seek(0)
    return PackageImporter(file).load_pickle("net", "net.pkl")


# torch.package's own use of the typed storages that PyTorch has left behind.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_package_holds_a_network_and_asks_for_ours_from_outside(network):
    network(torch.rand(3, 4))
    x, loaded = torch.rand(3, 4), packaged(network, "extern")
    assert type(loaded) is type(network)
    assert torch.equal(loaded(x), network(x))
    with pytest.raises(PackagingError, match=r"C extension module.*\n.*mylayers\._C"):
        packaged(network, "intern")


def test_cloudpickle_takes_a_network_also_in_a_class_of_main(network):
    network(torch.rand(3, 4))

    class Own(Around):
        pass

    x = torch.rand(3, 4)
    for net in (network, Own(network)):
        loaded = cloudpickle.loads(cloudpickle.dumps(net))
        assert torch.equal(loaded(x), net(x))
        assert not {p.data_ptr() for p in loaded.parameters()} & {
            p.data_ptr() for p in net.parameters()
        }


def test_a_shallow_copy_shares_what_that_of_a_stock_module_shares(network):
    x = torch.rand(3, 4)
    network(x)
    shallow = copy.copy(network)
    assert type(shallow) is type(network)
    assert torch.equal(shallow(x), network(x))
    for one, other in zip(shallow.parameters(), network.parameters(), strict=True):
        assert one is other
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert torch.equal(shallow(x), network(x))
    if isinstance(network, nn.Sequential):
        assert shallow[0] is network[0]
        stock = nn.Sequential(*network)
        is_shared = copy.copy(stock)._modules is stock._modules
        assert (shallow._modules is network._modules) == is_shared
