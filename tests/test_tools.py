"""What looks at a network from outside: counters, profilers, hooks on the graph, wrapped functions."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import mylayers
from mylayers import CenteredLayer, FusedSequential, MyLinear
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
    "leading": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Flatten(0, -2), nn.Linear(4, 5)), (5, 2, 3)),
    "of no dimension": (lambda: nn.Sequential(nn.Flatten(0), MyLinear(1, 5)), ()),
}
CASES = {
    **{(name, shape): (net, shape) for name, net in NETS.items()
       for shape in ((6,), (5, 6), (0, 6), (2, 5, 6), (2, 1, 3, 6))},
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
            counts.append(flops_there_and_back(lambda: call(x), [x] * of_input + wanted))
        assert counts[0] == counts[1]
        assert (counts[0][0] > 0) == all(t.numel() > 0 for t in (x, *parameters))


def test_every_operator_has_a_formula():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mylayers::")}
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
        "import torch, mylayers\nfrom torch.utils import flop_counter",
        "import torch\nfrom torch.utils import flop_counter\nimport mylayers",
        # As notebooks do that reload what has changed.
        "import sys, torch, mylayers\n"
        "from torch.utils import flop_counter\n"
        "for name in [*sys.modules]:\n"
        "    if name.startswith('mylayers') and name != 'mylayers._C': del sys.modules[name]\n"
        "import mylayers",
    ],
    ids=["before the counter", "after the counter", "again"],
)
def test_the_counter_knows_our_operators_whichever_is_imported_first(imports):
    assert python(imports + COUNTED) == f"{2 * 5 * 6 * 4}\n"


def test_the_import_leaves_the_counter_unimported():
    assert python(
        "import sys, mylayers; print('torch.utils.flop_counter' in sys.modules)"
    ) == "False\n"


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
