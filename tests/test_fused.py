"""FusedSequential against ``nn.Sequential`` of the very same children: what it fuses, what it is.

The activations of stock layers round elsewhere, so that results are close and not equal.
"""

import contextlib
import copy
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from chains import (
    EDITS,
    MARKS,
    Doubled,
    assert_close,
    assert_like_stock,
    assert_same_bits,
    every_dtype,
    followed_by,
    halved,
    hooked,
    programs,
    pruned,
    replaced,
    results,
    small,
    split_net,
    stock,
)
from common import Calls
from samples import drawer, same_bits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, prune

from mylayers import CenteredLayer, FusedSequential, MyLinear, sequential

pytestmark = MARKS


@pytest.fixture
def x() -> Tensor:
    return drawer("input", torch.float32)(5, 4)


# ---- FusedSequential: what it fuses ----------------------------------------------------


class _Named(nn.Linear):
    """A subclass that computes what nn.Linear does."""


class _Called(nn.Linear):
    def __call__(self, *args: Any) -> Any:
        return 2 * super().__call__(*args)


IN_ORDER = ("relu", "tanh", "sigmoid", "elu", "gelu", "gelu_tanh")


def compiled(layer: nn.Module) -> nn.Module:
    layer.compile(backend="eager")
    return layer


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


# name -> (children, programs of its calls)
FUSED: dict[str, tuple[Callable[[], list[nn.Module]], list[str]]] = {
    "nothing": (list, []),
    "linear": (lambda: [linear()], ["linear_t+bias"]),
    "no bias": (lambda: [nn.Linear(4, 4, bias=False), nn.ReLU()], ["linear_t+relu"]),
    "own": (lambda: [MyLinear(4, 3), MyLinear(3, 4, False)], ["linear+bias+relu; linear+relu"]),
    "own without activation": (
        lambda: [MyLinear(4, 3, activation=None), nn.Sigmoid(), nn.Tanh()],
        ["linear+bias+sigmoid; tanh"],
    ),
    "own with two": (lambda: [MyLinear(4, 3), nn.ELU()], ["linear+bias+relu; elu"]),
    "activations": (
        lambda: [
            linear(),
            nn.ReLU(),
            linear(),
            nn.Tanh(),
            linear(),
            nn.Sigmoid(),
            linear(),
            nn.ELU(),
            linear(),
            nn.GELU(),
            linear(),
            nn.GELU("tanh"),
        ],
        ["; ".join(f"linear_t+bias{followed_by(a)}" for a in IN_ORDER)],
    ),
    "in place": (
        lambda: [linear(), nn.ReLU(inplace=True), linear(), nn.ELU(inplace=True)],
        ["linear_t+bias+relu; linear_t+bias; elu"],
    ),
    "in place first": (lambda: [nn.ReLU(inplace=True), linear()], ["linear_t+bias"]),
    "in place on a view": (
        lambda: [nn.Flatten(), nn.Identity(), nn.ReLU(inplace=True), linear()],
        ["linear_t+bias"],
    ),
    "activation first": (lambda: [nn.Tanh(), linear()], ["tanh; linear_t+bias"]),
    "activations alone": (lambda: [nn.Tanh(), nn.ReLU(), nn.Dropout()], []),
    "centered": (
        lambda: [CenteredLayer(), linear(), CenteredLayer(-1), CenteredLayer((0, 1))],
        ["center; linear_t+bias; center(-1); center(0,1)"],
    ),
    "identity and dropout": (
        lambda: [nn.Identity(), linear(), nn.Dropout(), nn.Identity(), nn.Tanh(), nn.Dropout(0)],
        ["linear_t+bias+tanh"],
    ),
    "flatten": (
        lambda: [nn.Flatten(), linear(), nn.Flatten(0, -1), nn.Tanh()],
        ["flatten(1,-1); linear_t+bias; flatten(0,-1); tanh"],
    ),
    "flatten at the end": (lambda: [linear(), nn.Flatten(0)], ["linear_t+bias"]),
    "flatten alone": (lambda: [nn.Flatten(0)], []),
    "elu of a setting": (
        lambda: [linear(), nn.ELU(2.0), linear(), nn.ELU(0.5)],
        ["linear_t+bias+elu(2.0); linear_t+bias; elu(0.5)"],
    ),
    "elu below zero": (lambda: [linear(), nn.ELU(-2.0), linear()], ["linear_t+bias"] * 2),
    "another type": (
        lambda: [linear(), nn.GroupNorm(1, 4), nn.Tanh(), linear(), nn.Softshrink()],
        ["linear_t+bias", "tanh; linear_t+bias"],
    ),
    "own forward": (
        lambda: [linear(), Doubled(4, 4), nn.Tanh(), linear()],
        ["linear_t+bias", "tanh; linear_t+bias"],
    ),
    "own call": (lambda: [_Called(4, 4), nn.Tanh(), linear()], ["tanh; linear_t+bias"]),
    "subclass": (lambda: [_Named(4, 4), nn.Tanh()], ["linear_t+bias+tanh"]),
    "hooked": (lambda: [linear(), hooked(nn.Tanh()), linear()], ["linear_t+bias"] * 2),
    "forward replaced": (lambda: [replaced(linear()), linear()], ["linear_t+bias"]),
    "weight norm": (
        lambda: [parametrizations.weight_norm(linear()), nn.Tanh(), linear()],
        ["tanh; linear_t+bias"],
    ),
    "spectral norm": (
        lambda: [parametrizations.spectral_norm(linear()), linear()],
        ["linear_t+bias"],
    ),
    "parametrised": (lambda: [halved(MyLinear(4, 4), "weight"), linear()], ["linear_t+bias"]),
    "parametrised bias": (lambda: [halved(linear(), "bias"), linear()], ["linear_t+bias"]),
    "pruned": (lambda: [pruned(linear()), linear()], ["linear_t+bias"]),
    "pruned for good": (lambda: [prune.remove(pruned(linear()), "weight")], ["linear_t+bias"]),
    "compiled": (lambda: [compiled(linear()), linear()], ["linear_t+bias"]),
    "nested": (
        lambda: [linear(), FusedSequential(nn.Tanh(), linear()), nn.Sequential(linear())],
        ["linear_t+bias", "tanh; linear_t+bias"],
    ),
}


@pytest.mark.parametrize(("make", "expected"), FUSED.values(), ids=FUSED)
def test_which_children_one_call_computes_and_their_results(make, expected):
    net, x = FusedSequential(*make()).eval(), torch.randn(5, 4)
    assert programs(net, x) == expected
    assert programs(net, x) == expected  # by the plan that is kept
    assert_like_stock(net, x)


def test_an_in_place_activation_first_changes_its_input_as_ever():
    net, x = FusedSequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), torch.randn(3, 4)
    net(x)
    assert x.min() == 0


def test_bits_of_a_fused_network_are_those_of_its_layers():
    net = FusedSequential(
        MyLinear(30, 40, activation="tanh"),
        CenteredLayer(0),
        MyLinear(40, 50, activation="elu"),
        nn.Dropout(),
        MyLinear(50, 3, bias=False, activation=None),
    ).eval()
    for rows in (1, 7, 300):
        x = torch.randn(rows, 30)
        assert_same_bits(results(net, x), results(stock(net), x), rows)


@every_dtype
def test_a_network_of_stock_layers_has_the_bits_of_ours(dtype):
    net = FusedSequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 9)).to(dtype)
    ours = nn.Sequential(MyLinear.from_linear(net[0], "tanh"), MyLinear.from_linear(net[2], None))
    x = torch.randn(33, 30, dtype=dtype)
    actual, expected = results(net, x), results(ours, x)
    assert_same_bits(actual, [e.T if i in (2, 4) else e for i, e in enumerate(expected)])


@pytest.mark.grid
@every_dtype
@pytest.mark.parametrize("rows", [1, 4, 33])
def test_a_stock_weight_that_lies_in_out_in_memory_changes_no_bit(rows, dtype):
    net = FusedSequential(nn.Linear(70, 130), nn.Tanh(), nn.Linear(130, 9)).to(dtype)
    x = torch.randn(rows, 70, dtype=dtype)
    expected, parameters = results(net, x), list(net.parameters())
    for layer in (net[0], net[2]):
        layer.weight.data = layer.weight.data.T.contiguous().T
        assert layer.weight.T.is_contiguous()
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert_same_bits(results(net, x), expected)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 4), (2, 0, 4)], ids=str)
def test_any_rank_of_a_networks_input(shape):
    assert_like_stock(
        FusedSequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(shape)
    )


# ---- FusedSequential: one of nn.Sequential's kind --------------------------------------


def test_constructor_forms_names_and_repr():
    layers = [nn.Linear(4, 3), nn.Tanh()]
    named = FusedSequential(OrderedDict(first=layers[0], then=layers[1]))
    assert [name for name, _ in named.named_children()] == ["first", "then"]
    assert named.first is layers[0]
    assert [n for n, _ in FusedSequential(*layers).named_parameters()] == ["0.weight", "0.bias"]
    assert repr(FusedSequential(*layers)) == "Fused" + repr(nn.Sequential(*layers))
    assert isinstance(named, nn.Sequential)
    with pytest.raises(TypeError, match="is not a Module subclass"):
        FusedSequential(3)


def test_indexing_slicing_iteration_and_arithmetic(x):
    net = small()
    children = list(net.children())
    assert len(net) == 8
    assert list(net) == children
    assert net[0] is children[0]
    assert net[-1] is children[-1]
    with pytest.raises(IndexError):
        net[8]
    part = net[5:]
    assert type(part) is FusedSequential
    assert list(part) == children[5:]
    hidden = net[:5](x)
    assert_close(part(hidden), net(x))
    assert list(net + nn.Sequential(nn.Tanh()))[:8] == children
    assert list(net * 2) == children * 2
    seen = []
    assert net.apply(seen.append) is net
    assert seen == [*children, net]


def test_state_dict_goes_both_ways(x):
    net, other = small(), stock(copy.deepcopy(small()))
    state = net.state_dict()
    assert list(state) == list(other.state_dict())
    other.load_state_dict({k: v + 1 for k, v in state.items()})
    net(x)
    net.load_state_dict(other.state_dict())
    assert_close(net(x), other(x))


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_after_a_call_takes_effect_at_once(edit, x):
    net = small()
    net[7].bias = None
    before = [net(x), net(x)][-1]
    edit(net)
    after = results(net, x)
    assert after[0].shape != before.shape or not torch.equal(after[0], before)
    assert_close(after, results(stock(net), x))
    assert_close(results(net, x), after)


@pytest.mark.parametrize(
    ("kind", "change"), [("forward", lambda y: y + 1), ("pre", lambda y: y * 2)]
)
def test_a_hook_of_its_own_changes_what_passes(kind, change, x):
    net = small()
    plain = net(x)
    if kind == "forward":
        handle = net.register_forward_hook(lambda m, a, y: change(y))  # noqa: ARG005
        expected = change(plain)
    else:
        handle = net.register_forward_pre_hook(lambda m, a: (change(a[0]),))  # noqa: ARG005
        expected = net[:](change(x))
    assert_close(net(x), expected)
    handle.remove()
    assert same_bits(net(x), plain)


def test_edits_to_one_part_of_several_take_effect(x):
    for edit in (
        lambda n: setattr(n[0], "bias", None),
        lambda n: n[3].train(),
        lambda n: n.__setitem__(1, nn.Sigmoid()),
        lambda n: n.__setitem__(2, nn.Tanh()),
        lambda n: setattr(n[4], "weight", nn.Parameter(n[4].weight.detach() * 2)),
        lambda n: n[5].register_forward_hook(lambda m, a, y: y + 1),  # noqa: ARG005
        lambda n: n.train(),
        lambda n: n.append(nn.Tanh()),
        lambda n: n.__delitem__(0) or n.insert(0, nn.Linear(4, 6)),
    ):
        net = split_net()
        before = [net(x), net(x)][-1]
        edit(net)
        assert_like_stock(net, x)
        assert not torch.equal(results(net, x)[0], before)


@pytest.mark.parametrize("cls", [nn.Linear, MyLinear, nn.Tanh, nn.ELU, CenteredLayer])
def test_a_class_whose_forward_is_replaced_is_called_by_it(cls, monkeypatch, x):
    layers = [nn.Linear(4, 4), nn.Tanh(), MyLinear(4, 4), nn.ELU(), CenteredLayer()]
    net = FusedSequential(*layers)
    before = [net(x), net(x)][-1]
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, v: 2 * own(self, v))
    for called in (net, FusedSequential(*layers)):
        assert not torch.equal(called(x), before)
        assert_like_stock(called, x)
    monkeypatch.undo()
    assert same_bits(net(x), before)


def test_nn_modules_own_call_may_be_replaced(monkeypatch, x):
    net = small()
    net(x)
    seen, own = [], nn.Module.__call__

    def spy(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(self).__name__)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", spy)
    fused = net(x)
    assert seen == ["FusedSequential", *(type(m).__name__ for m in net)]
    assert_close(fused, stock(net)(x))


def test_a_subclass_with_its_own_forward_is_called_by_it(x):
    class Doubled(FusedSequential):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    net = Doubled(*small())
    expected = 2 * stock(net)(x)
    for _ in range(3):
        assert_close(net(x), expected)


def test_a_replaced_forward_of_its_own_is_called(monkeypatch, x):
    net = small()
    y = net(x)
    own = net.forward
    net.forward = lambda v: 2 * own(v)
    assert_close(net(x), 2 * y)
    assert_close(net(x), 2 * y)
    del net.forward
    assert same_bits(net(x), y)
    class_own = FusedSequential.forward
    monkeypatch.setattr(FusedSequential, "forward", lambda self, v: 3 * class_own(self, v))
    assert_close(net(x), 3 * y)


def test_a_subclass_that_iterates_otherwise_computes_in_that_order(x):
    class Reversed(FusedSequential):
        def __iter__(self) -> Iterator[nn.Module]:
            return reversed(list(self._modules.values()))

    net = Reversed(nn.Linear(4, 4), nn.Linear(4, 4))
    for _ in range(3):
        assert_close(net(x), net[0](net[1](x)))


def test_a_subclass_that_looks_at_each_result_before_it_gives_the_next_child(x):
    class Exit(FusedSequential):
        def __iter__(self) -> Iterator[nn.Module]:
            for child in self._modules.values():
                if self.done:
                    return
                yield child

    net = Exit(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4))
    net.done = False
    net[1].register_forward_hook(lambda *_: setattr(net, "done", True))
    for _ in range(3):
        net.done = False
        assert_close(net(x), net[0](x))


@pytest.mark.parametrize("way", ["__iter__", "_modules"])
def test_what_gives_its_children_in_a_way_of_its_own_is_not_planned_at_each_call(
    way, x, monkeypatch
):
    class Own(FusedSequential):
        if way == "__iter__":

            def __iter__(self) -> Iterator[nn.Module]:
                return iter(self._modules.values())

    net = Own(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    if way == "_modules":
        net._modules = OrderedDict(net._modules)
    expected = nn.Sequential.forward(net, x)
    for function in ("plan", "parts_of"):
        monkeypatch.setattr(sequential, function, lambda *_: pytest.fail("planned"))
    for _ in range(3):
        assert same_bits(net(x), expected)


def _iterating(net: FusedSequential) -> None:
    class Own(FusedSequential):
        def __iter__(self) -> Iterator[nn.Module]:
            return iter(self._modules.values())

    net.__class__ = Own


def _forwarding(net: FusedSequential) -> None:
    class Own(FusedSequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    net.__class__ = Own


def _getting(net: FusedSequential) -> None:
    class Own(FusedSequential):
        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name)

    net.__class__ = Own


# Of these nothing but forward is the network's own.
OWN_FORWARDS: dict[str, Callable[[FusedSequential], Any]] = {
    "iter of its class": _iterating,
    "forward of its class": _forwarding,
    "getattr of its class": _getting,
    "forward": lambda n: setattr(n, "forward", functools.partial(FusedSequential.forward, n)),
    "ordered children": lambda n: setattr(n, "_modules", OrderedDict(n._modules)),
}


def calls_through_nn_module(net: FusedSequential, x: Tensor) -> int:
    """How often a call of the network goes through ``nn.Module``'s own."""
    count = 0

    def seen(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        own = frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is net
        count += own and event == "call"

    sys.setprofile(seen)
    try:
        net(x)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("change", OWN_FORWARDS.values(), ids=OWN_FORWARDS)
def test_a_call_goes_straight_to_a_forward_of_its_own(change, x):
    net = small()
    change(net)
    expected = nn.Sequential.forward(net, x)
    for _ in range(2):
        assert_close(net(x), expected)
    assert calls_through_nn_module(net, x) == 0
    for register in (nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook):
        seen: list[Any] = []
        handle = register(net, lambda *given, seen=seen: seen.append(given))
        assert_close(net(x), expected)
        assert len(seen) == 1
        assert calls_through_nn_module(net, x) == 1
        handle.remove()
    with net_hooks() as events:
        assert_close(net(x), expected)
    assert events[-1] is net
    assert calls_through_nn_module(net, x) == 0
    net._call_impl = lambda v: 2 * nn.Module._call_impl(net, v)
    assert_close(net(x), 2 * expected)
    del net._call_impl
    net.forward = lambda v: 3 * nn.Sequential.forward(net, v)
    assert_close(net(x), 3 * expected)


@contextlib.contextmanager
def net_hooks() -> Iterator[list[nn.Module]]:
    """The modules that are called meanwhile, as a hook on all modules sees them."""
    events: list[nn.Module] = []
    handle = global_hooks.register_module_forward_hook(lambda m, *_: events.append(m))
    try:
        yield events
    finally:
        handle.remove()


@pytest.mark.parametrize("change", OWN_FORWARDS.values(), ids=OWN_FORWARDS)
def test_a_network_that_is_as_ever_again_is_fused_again(change, x):
    net = small()
    children = net._modules
    change(net)
    net(x)
    net.__class__, net._modules = FusedSequential, children
    vars(net).pop("forward", None)
    net(x)
    assert calls_through_nn_module(net, x) == 0
    with Calls() as calls:
        net(x)
    assert [name for name, _ in calls.seen if name.startswith("sequential")] != []


@pytest.mark.parametrize("place", [None, 0, 1], ids=["network", "linear", "activation"])
@pytest.mark.parametrize("calls", [0, 2])
def test_a_module_that_was_compiled_taken_back_and_compiled_again(place, calls, x):
    net = FusedSequential(nn.Linear(4, 4), nn.Tanh())
    module = net if place is None else net[place]
    module._compiled_call_impl = None
    for _ in range(calls):
        net(x)
    expected = net(x)
    own = type(module).forward
    module._compiled_call_impl = lambda v: 2 * own(module, v)
    for _ in range(2):
        assert_close(net(x), stock(net)(x) * (2 if place is None else 1))
    assert not torch.equal(net(x), expected)
    module._compiled_call_impl = None
    assert same_bits(net(x), expected)


def test_children_in_an_ordered_dictionary_that_was_reordered(x):
    net = FusedSequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net(x)
    net._modules = OrderedDict(net._modules)
    net._modules.move_to_end("0")
    assert_like_stock(net, x)


@pytest.mark.parametrize("dims", [[0], (0,), torch.tensor(0).numpy()[()]], ids=str)
def test_a_centered_layer_may_hold_any_dim_that_center_takes(dims, x):
    net = FusedSequential(nn.Linear(4, 4), CenteredLayer(1))
    net(x)
    net[1].dim = dims
    assert_like_stock(net, x)
    if isinstance(dims, list):
        dims[0] = 1
        assert_like_stock(net, x)


def test_flatten_may_change_its_dimensions():
    net, x = FusedSequential(nn.Flatten(), CenteredLayer(-1)), torch.randn(2, 3, 4, 5)
    assert_like_stock(net, x)
    net[0].start_dim = 2
    assert_like_stock(net, x)
    net[0].end_dim = 2
    assert_like_stock(net, x)


def test_moving_to_another_dtype(x):
    net = small()
    expected = net(x)
    assert copy.deepcopy(net).to("meta")(x.to("meta")).shape == expected.shape
    assert net.to(torch.float64)(x.double()).dtype == torch.float64
    assert_like_stock(net, x.double())
    with pytest.raises(RuntimeError, match="weight must have the dtype of input"):
        net(x)


def test_tied_weights_within_and_across_networks(x):
    net, other = (
        FusedSequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
        FusedSequential(nn.Linear(4, 4)),
    )
    net[2].weight = net[0].weight
    other[0].weight = net[0].weight
    assert len(list(net.parameters())) == 3
    for n in (net, other):
        assert_like_stock(n, x)
        before = n(x)
        net[0].weight.data.mul_(2)
        assert not torch.equal(n(x), before)
        assert_like_stock(n, x)


def test_one_child_in_several_places(x):
    layer = nn.Linear(4, 4)
    net = FusedSequential(layer, nn.Tanh(), layer, nn.Tanh(), layer)
    assert programs(net, x) == ["linear_t+bias+tanh; linear_t+bias+tanh; linear_t+bias"]
    assert_like_stock(net, x)


@pytest.mark.parametrize("make", [small, split_net])
def test_functional_call_and_transforms(make, x):
    net = make()
    net(x)
    given = {name: p.detach() * 0.5 + 0.1 for name, p in net.named_parameters()}
    plain = stock(net)

    def loss(module: nn.Module) -> Callable[..., Tensor]:
        return lambda p, v: functional_call(module, p, (v,)).pow(3).sum()

    assert_close(functional_call(net, given, (x,)), functional_call(plain, given, (x,)))
    assert_close(grad(loss(net))(given, x), grad(loss(plain))(given, x))
    stacked = {name: torch.stack([p, p * 2]) for name, p in given.items()}
    assert_close(
        vmap(lambda p: functional_call(net, p, (x,)))(stacked),
        vmap(lambda p: functional_call(plain, p, (x,)))(stacked),
    )
    assert_like_stock(net, x)  # its own parameters again


@pytest.mark.parametrize("make", [small, split_net])
def test_frozen_layers_and_modes(make, x):
    net = make()
    net(x)
    for frozen in (("0.",), ("0.bias",), ("4.", "5."), ("",)):
        for name, p in net.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        assert_like_stock(net, x)
    y = net(x)
    assert not y.requires_grad
    net.requires_grad_(True)
    assert net(x).requires_grad
    with torch.no_grad():
        assert not net(x).requires_grad
    with torch.inference_mode():
        assert net(x).is_inference()
    assert same_bits(net(x), y)


@pytest.mark.parametrize("make", [small, split_net])
def test_dropout_in_training_is_stocks(make, x):
    net = make()
    for training in (False, True, False, True):
        net.train(training)
        torch.manual_seed(3)
        actual = net(x)
        torch.manual_seed(3)
        assert_close(actual, stock(net)(x))
    net.eval()
    net[3].train()
    assert not torch.equal(net(x), net(x))
    net[3].eval()
    assert torch.equal(net(x), net(x))
    net.train()
    net[3].eval()
    assert torch.equal(net(x), net(x))
