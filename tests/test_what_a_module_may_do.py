"""What a module may have or do, and still be computed as its author wrote it.

Each case is one network that stock PyTorch runs, three times: as it is, with its children in a
``FusedSequential`` (or its class derived from that), and optimized. All must compute the same, at
the first call and at later ones, and leave the same behind. What came of each is a line of
docs/what-a-module-may-do.md; ``python tests/test_what_a_module_may_do.py`` writes that page.
"""

import abc
import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune

import mylayers
from mylayers import FusedSequential, MyLinear, forward_backward
from mylayers._extension import _C

pytestmark = pytest.mark.usefixtures("float64")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "what-a-module-may-do.md"
BEGIN, END = "<!-- table: python tests/test_what_a_module_may_do.py -->", "<!-- end of table -->"


# ---- classes of children -----------------------------------------------------------------------


class WeightProperty(nn.Linear):
    @property
    def weight(self) -> Tensor:
        return super().__getattr__("weight") * 0.5


class BiasProperty(nn.Linear):
    @property
    def bias(self) -> Tensor:
        return super().__getattr__("bias") * 0.5


class DictProperty(nn.Linear):
    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        own = super().__dict__
        if "_parameters" not in own:
            return own
        halves = {name: value * 0.5 for name, value in own["_parameters"].items()}
        return {**own, "_parameters": halves}


class Versioned(nn.Linear):
    _version = 2
    call_super_init = True


class MyWeightProperty(MyLinear):
    @property
    def weight(self) -> Tensor:
        return super().__getattr__("weight") * 0.5


class GetAttr(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found * 0.5 if name == "weight" else found


class GetAttribute(nn.Linear):
    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return found + 1 if name == "bias" else found


class MyGetAttribute(MyLinear):
    def __getattribute__(self, name: str) -> Any:
        return "tanh" if name == "activation" else super().__getattribute__(name)


class Slots(nn.Linear):
    __slots__ = ("note", "other")


class WeightSlot(nn.Linear):
    __slots__ = ("weight",)


class OwnCallImpl(nn.Linear):
    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super()._call_impl(*args, **kwargs)


class OwnCall(nn.Linear):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class MyOwnForward(MyLinear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Mixin:
    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super()._call_impl(*args, **kwargs)  # type: ignore[misc]


class Mixed(Mixin, nn.Linear):
    pass


class Meta(type):
    pass


class WithMetaclass(nn.Linear, metaclass=Meta):
    pass


class Abstract(nn.Linear, abc.ABC):
    pass


class Named(nn.Linear):
    """Names of its own, and of nn.Linear's what a call does not ask."""

    scale = 3

    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("Named is final")

    def helper(self) -> int:
        return self.scale

    def extra_repr(self) -> str:
        return "named"

    def train(self, mode: bool = True) -> Any:
        return super().train(mode)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "note":
            raise AttributeError("no notes")
        super().__setattr__(name, value)


class Alpha(nn.ELU):
    @property
    def alpha(self) -> float:
        return 2.0

    @alpha.setter
    def alpha(self, value: float) -> None:
        pass


class Tagged(nn.Parameter):
    """A parameter that decides itself what linear is."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found * 2 if func is nn.functional.linear else found


class Halved(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2


# ---- classes of containers ---------------------------------------------------------------------
#
# Each is made of nn.Sequential and of FusedSequential.


def family(base: type[nn.Sequential]) -> dict[str, type[nn.Sequential]]:
    class CallImpl(base):  # type: ignore[misc, valid-type]
        def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super()._call_impl(*args, **kwargs)

    class Call(base):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().__call__(*args, **kwargs)

    class Forward(base):  # type: ignore[misc, valid-type]
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Iter(base):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[nn.Module]:
            return (m for name, m in self._modules.items() if name != "1")

    class GetAttribute(base):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            if name == "_modules" and len(found) == 3:
                return {k: v for k, v in found.items() if k != "1"}
            return found

    class GetState(base):  # type: ignore[misc, valid-type]
        def __getstate__(self) -> dict[str, Any]:
            return self.__dict__.copy()

    class DeepCopy(base):  # type: ignore[misc, valid-type]
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            twin = type(self).__new__(type(self))
            memo[id(self)] = twin
            for name, value in self.__dict__.items():
                twin.__dict__[name] = copy.deepcopy(value, memo)
            return twin

    class Reduce(base):  # type: ignore[misc, valid-type]
        def __reduce__(self) -> Any:
            return _made_of, (type(self), dict(self.__dict__))

    class OddState(base):  # type: ignore[misc, valid-type]
        def __getstate__(self) -> Any:
            return list(self.__dict__.items())

        def __setstate__(self, state: Any) -> None:
            self.__dict__.update(state)

    class Closed(base):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: Any) -> None:
            if "_modules" in self.__dict__ and not hasattr(self, name):
                raise AttributeError(f"no {name}")
            super().__setattr__(name, value)

    class Frozen(base):  # type: ignore[misc, valid-type]
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(*layers)
            self.__dict__["frozen"] = True

        def __setattr__(self, name: str, value: Any) -> None:
            if self.__dict__.get("frozen"):
                raise AttributeError(f"cannot assign to field {name!r}")
            super().__setattr__(name, value)

        def __delattr__(self, name: str) -> None:
            raise AttributeError(f"cannot delete field {name!r}")

        def __eq__(self, other: object) -> bool:
            return type(self) is type(other)

        __hash__ = None  # type: ignore[assignment]
        named_modules = _named_modules
        train = _train

    class Keyword(base):  # type: ignore[misc, valid-type]
        def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            cls.key = key

    class Final(base):  # type: ignore[misc, valid-type]
        def __init_subclass__(cls, **kwargs: Any) -> None:
            raise TypeError("Final is final")

    class Registering(base):  # type: ignore[misc, valid-type]
        registry: list[type] = []  # noqa: RUF012

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            Registering.registry.append(cls)

    class Slotted(base):  # type: ignore[misc, valid-type]
        __slots__ = ("note",)

    class Typed(base, metaclass=Meta):  # type: ignore[misc, valid-type]
        pass

    class Abstracted(base, abc.ABC):  # type: ignore[misc, valid-type]
        pass

    made = {
        name: cls for name, cls in locals().items() if isinstance(cls, type) and cls is not base
    }
    for name, cls in made.items():  # pickle finds them by their names
        cls.__qualname__ = cls.__name__ = f"{base.__name__}{name}"
        globals()[cls.__name__] = cls
    return made


def _named_modules(
    self: nn.Module, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
) -> Any:
    """Without sets of modules, as those of this class have no hash."""
    del memo, remove_duplicate
    yield prefix, self
    for name, child in self._modules.items():
        assert child is not None
        yield f"{prefix}.{name}" if prefix else name, child


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    self.__dict__["training"] = mode
    for child in self._modules.values():
        assert child is not None
        child.train(mode)
    return self


def _made_of(cls: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    made = cls.__new__(cls)
    made.__dict__.update(state)
    return made


PLAIN, FUSED = family(nn.Sequential), family(FusedSequential)


# ---- cases -------------------------------------------------------------------------------------


def children(first: nn.Module | None = None) -> list[nn.Module]:
    return [first or nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)]


class Case(NamedTuple):
    """One network.

    Attributes:
        what: what it has or does.
        first: its first child, by nn.Linear if none.
        container: the name of its class in :func:`family`.
        edit: done to the network, before its first call or after.
    """

    what: str
    first: Callable[[], nn.Module] | None = None
    container: str = ""
    edit: Callable[[Any], Any] | None = None

    def made(self, kind: str) -> nn.Module:
        torch.manual_seed(0)
        layers = children(self.first and self.first())
        for layer in layers:  # a property may keep nn.Linear from drawing them
            for parameter in layer.parameters():
                size = parameter.numel()
                with torch.no_grad():
                    parameter.copy_(torch.linspace(-0.6, 0.9, size).cos().view(parameter.shape))
        if self.container:
            return (FUSED if kind == "fused" else PLAIN)[self.container](*layers)
        return (FusedSequential if kind == "fused" else nn.Sequential)(*layers)


def add(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output + 1


def add_with_kwargs(_module: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
    return output + 1


def doubled(_module: nn.Module, grads: Any, _grad_outputs: Any) -> Any:
    return tuple(None if grad is None else grad * 2 for grad in grads)


def parametrized(net: Any) -> None:
    parametrize.register_parametrization(net[0], "weight", Halved())


def shadowed(net: Any) -> None:
    net[0].__dict__["weight"] = net[0]._parameters["weight"].detach() * 0.5


def own_call_impl(module: Any) -> None:
    own = module._call_impl
    module._call_impl = lambda *args, **kwargs: 2 * own(*args, **kwargs)


def own_forward(module: Any) -> None:
    own = module.forward
    module.forward = lambda *args, **kwargs: 2 * own(*args, **kwargs)


def tagged(net: Any) -> None:
    net[0].weight = Tagged(net[0].weight.detach())


def broadcast(net: Any) -> None:
    net[0].bias = nn.Parameter(torch.full((1,), 0.3))


def noted(net: Any) -> None:
    net.note = net[0].note = "text"


def renewed(net: Any) -> None:
    noted(net)
    del net.note, net[0].note
    noted(net)


class Counted(OrderedDict[str, Any]):
    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name) * 0.5


def other_dictionary(net: Any) -> None:
    net[0]._parameters = Counted(net[0]._parameters)


CASES = [
    Case("nothing of its own"),
    # children
    Case("a layer's class with names of its own, `__init__`, `extra_repr`, `train`, `__setattr__`, "
         "`__init_subclass__`", lambda: Named(4, 4)),
    Case("a layer's class with `__slots__`", lambda: Slots(4, 4)),
    Case("a slot named `weight`", lambda: WeightSlot(4, 4)),
    Case("`weight` is a property", lambda: WeightProperty(4, 4)),
    Case("`bias` is a property", lambda: BiasProperty(4, 4)),
    Case("`weight` of a `MyLinear` is a property", lambda: MyWeightProperty(4, 4)),
    Case("an attribute such as `alpha` is a property",
         lambda: nn.Sequential(nn.Linear(4, 4), Alpha())),
    Case("`__dict__` is a property", lambda: DictProperty(4, 4)),
    Case("a layer's class has a `_version` of its state, `call_super_init`",
         lambda: Versioned(4, 4)),
    Case("a layer's class has `__getattr__`", lambda: GetAttr(4, 4)),
    Case("a layer's class has `__getattribute__`", lambda: GetAttribute(4, 4)),
    Case("a `MyLinear`'s class has `__getattribute__`", lambda: MyGetAttribute(4, 4)),
    Case("a layer's class has `forward`", lambda: OwnForward(4, 4)),
    Case("a `MyLinear`'s class has `forward`", lambda: MyOwnForward(4, 4)),
    Case("a layer's class has `__call__`", lambda: OwnCall(4, 4)),
    Case("a layer's class has `_call_impl`", lambda: OwnCallImpl(4, 4)),
    Case("a layer's class inherits `_call_impl` from a mixin", lambda: Mixed(4, 4)),
    Case("a layer's class has a metaclass", lambda: WithMetaclass(4, 4)),
    Case("a layer's class has the metaclass `abc.ABCMeta`", lambda: Abstract(4, 4)),
    # instances
    Case("attributes of a layer and the network", edit=noted),
    Case("attributes that come, go and come", edit=renewed),
    Case('`layer.__dict__["weight"] = tensor`', edit=shadowed),
    Case('`MyLinear(...).__dict__["weight"] = tensor`', lambda: MyLinear(4, 4), edit=shadowed),
    Case("a layer has a `forward` of its own", edit=lambda net: own_forward(net[0])),
    Case("a layer has a `_call_impl` of its own", edit=lambda net: own_call_impl(net[0])),
    Case("the network has a `forward` of its own", edit=own_forward),
    Case("the network has a `_call_impl` of its own", edit=own_call_impl),
    Case("`_parameters` of a layer is a dictionary of another class", edit=other_dictionary),
    Case("a parameter's class has `__torch_function__`", edit=tagged),
    Case("a bias that is broadcast", edit=broadcast),
    Case("a parametrized weight", edit=parametrized),
    Case("`weight_norm`", edit=lambda net: parametrizations.weight_norm(net[0])),
    Case("`spectral_norm`", lambda: parametrizations.spectral_norm(nn.Linear(4, 4)).eval()),
    Case("a pruned weight", edit=lambda net: prune.l1_unstructured(net[0], "weight", 0.5)),
    # hooks
    Case("`register_forward_hook` on a layer", edit=lambda net: net[0].register_forward_hook(add)),
    Case("the same with `always_call`",
         edit=lambda net: net[0].register_forward_hook(add, always_call=True)),
    Case("the same with `with_kwargs`",
         edit=lambda net: net[0].register_forward_hook(add_with_kwargs, with_kwargs=True)),
    Case("`register_forward_pre_hook` on a layer",
         edit=lambda net: net[1].register_forward_pre_hook(lambda _, args: (args[0] + 1,))),
    Case("the same with `with_kwargs`",
         edit=lambda net: net[1].register_forward_pre_hook(
             lambda _, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)),
    Case("`register_full_backward_hook` on a layer",
         edit=lambda net: net[0].register_full_backward_hook(doubled)),
    Case("`register_full_backward_pre_hook` on a layer",
         edit=lambda net: net[0].register_full_backward_pre_hook(lambda _, o: (o[0] * 2,))),
    Case("`register_forward_hook` on the network", edit=lambda net: net.register_forward_hook(add)),
    Case("`register_full_backward_hook` on the network",
         edit=lambda net: net.register_full_backward_hook(doubled)),
    Case("`register_state_dict_pre_hook`, `register_state_dict_post_hook`, load hooks",
         edit=lambda net: (
             net[0].register_state_dict_pre_hook(lambda *_: None),
             net[0].register_state_dict_post_hook(lambda *_: None),
             net[0].register_load_state_dict_pre_hook(lambda *_: None),
             net[0].register_load_state_dict_post_hook(lambda *_: None))),
    Case("`register_module_forward_hook`, of all modules",
         edit=lambda _: global_hooks.register_module_forward_hook(add)),
    # containers
    *(
        Case(what, container=container)
        for what, container in (
            ("the container's class has `forward`", "Forward"),
            ("the container's class has `__call__`", "Call"),
            ("the container's class has `_call_impl`", "CallImpl"),
            ("the container's class has `__iter__`", "Iter"),
            ("the container's class has `__getattribute__`", "GetAttribute"),
            ("its `__getstate__` is `self.__dict__.copy()`", "GetState"),
            ("its `__deepcopy__` goes over `__dict__`", "DeepCopy"),
            ("its `__reduce__` goes over `__dict__`", "Reduce"),
            ("its state is no dictionary", "OddState"),
            ("its `__setattr__` refuses new attributes", "Closed"),
            ("its `__setattr__` refuses all, as a frozen dataclass's; no `__hash__`", "Frozen"),
            ("its `__init_subclass__` takes a keyword", "Keyword"),
            ("its `__init_subclass__` says that it is final", "Final"),
            ("its `__init_subclass__` registers a family", "Registering"),
            ("its class has `__slots__`", "Slotted"),
            ("its class has a metaclass", "Typed"),
            ("its class has the metaclass `abc.ABCMeta`", "Abstracted"),
        )
    ),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])


# ---- yardsticks --------------------------------------------------------------------------------


def x() -> Tensor:
    return torch.linspace(-1, 1, 20).view(5, 4)


def results(net: nn.Module) -> list[Any]:
    v = x().requires_grad_()
    y = net(v)
    parameters = [p for _, p in sorted(net.named_parameters())]
    return [y.detach(), *torch.autograd.grad(y.pow(2).sum(), [v, *parameters], allow_unused=True)]


def assert_close(found: list[Any], expected: list[Any]) -> None:
    for ours, stocks in zip(found, expected, strict=True):
        assert (ours is None) == (stocks is None)
        if ours is not None:
            torch.testing.assert_close(ours, stocks, rtol=1e-5, atol=1e-5, check_stride=False)


@pytest.fixture(autouse=True)
def _no_global_hooks() -> Iterator[None]:
    yield
    global_hooks._global_forward_hooks.clear()


def observed(case: Case, kind: str) -> str:
    """Checks a case, and says what came of it where it was optimized."""
    rows: tuple[Any, ...] = ()
    for when in ("before", "after"):
        global_hooks._global_forward_hooks.clear()
        nets = case.made("stock"), case.made(kind)
        if kind == "optimized" and when == "after":
            report = mylayers.optimize(nets[1])
        for net in nets:
            if when == "after":
                assert_close(results(net), results(net))
                assert_close(results(net), results(net))
        for net in nets[: 1 if case.what.endswith("of all modules") else 2]:
            if case.edit is not None:
                case.edit(net)
        if kind == "optimized" and when == "before":
            report = mylayers.optimize(nets[1])
        expected = results(nets[0])
        for _ in range(3):
            assert_close(results(nets[1]), expected)
        with torch.no_grad():
            assert_close([nets[1](x())], expected[:1])
        losses = []
        for net in nets:
            net.zero_grad()
            losses.append(forward_backward(net, nn.MSELoss(), x(), torch.zeros(5, 3)))
        assert_close(losses[1:], losses[:1])
        assert_close(*([p.grad for _, p in sorted(net.named_parameters())] for net in nets[::-1]))
        if when == "before" and kind == "optimized":
            rows = report.findings
        if kind == "optimized":
            mylayers.restore(nets[1])
            assert type(nets[1]) is type(nets[0])
            assert vars(nets[1]).keys() == vars(nets[0]).keys()
            assert_close(results(nets[1]), expected)
    global_hooks._global_forward_hooks.clear()
    fused = [row for row in rows if row.fused]
    if len(rows) == 1 and fused:
        return "fused, whole"
    reasons = "; ".join(f"{row.layers}: {row.reason}" for row in rows if not row.fused)
    return f"fused around {reasons}" if fused else f"runs as it is: {reasons}"


@pytest.mark.grid
@every_case
@pytest.mark.parametrize("kind", ["fused", "optimized"])
@pytest.mark.filterwarnings("ignore:.*hook.*")
def test_it_is_computed_as_its_author_wrote_it(kind, case):
    observed(case, kind)


class MyGetAttr(MyLinear):
    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found * 0.5 if name == "bias" else found


class MyNamed(MyLinear):
    note = 1


def shadowed_alone(layer: Any) -> None:
    layer.__dict__["weight"] = layer._parameters["weight"].detach() * 0.5


ALONE: dict[str, tuple[type[MyLinear], Callable[[Any], Any]]] = {
    "nothing": (MyLinear, lambda _: None),
    "a class of its own": (MyNamed, lambda _: None),
    "a property": (MyWeightProperty, lambda _: None),
    "__getattr__": (MyGetAttr, lambda _: None),
    "__getattribute__": (MyGetAttribute, lambda _: None),
    "__dict__": (MyLinear, shadowed_alone),
    "another weight": (MyLinear, lambda m: setattr(m, "weight", nn.Parameter(torch.ones(4, 3)))),
    "no bias": (MyLinear, lambda m: setattr(m, "bias", None)),
    "another activation": (MyLinear, lambda m: setattr(m, "activation", "tanh")),
    "parametrized": (
        MyLinear,
        lambda m: parametrize.register_parametrization(m, "weight", Halved()),
    ),
    "pruned": (MyLinear, lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "another dictionary": (
        MyLinear,
        lambda m: setattr(m, "_parameters", Counted(m._parameters)),
    ),
    "a class of parameters": (MyLinear, lambda m: setattr(m, "weight", Tagged(m.weight.detach()))),
}


@pytest.mark.grid
@pytest.mark.parametrize(("cls", "change"), ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("calls", [0, 2])
def test_a_layer_alone_takes_what_its_attributes_are(calls, cls, change):
    layer = cls(4, 3)
    for _ in range(calls):
        layer(x())
    change(layer)
    for _ in range(3):
        y = layer(x())
        reference = mylayers.functional.linear_act(x(), layer.weight, layer.bias, layer.activation)
        torch.testing.assert_close(y, reference, rtol=0, atol=0)


def test_a_layer_alone_calls_what_replaces_the_function(monkeypatch):
    layer, seen, own = MyLinear(4, 3), [], mylayers.functional.linear_act
    layer(x())
    monkeypatch.setattr(
        mylayers.functional, "linear_act", lambda *args: (seen.append(args), own(*args))[1]
    )
    layer(x())
    assert len(seen) == 1


# ---- what is known of a module lies outside of it ----------------------------------------------

STATES = ["GetState", "DeepCopy", "Reduce", "OddState", "Closed"]
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle protocol {protocol}": lambda net, protocol=protocol: pickle.loads(
            pickle.dumps(net, protocol)
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


def called(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for _ in range(2):
            net(x())
    return net


@pytest.mark.grid
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", ["fused", "optimized"])
@pytest.mark.parametrize("container", ["", *STATES])
def test_a_network_that_was_called_is_copied(container, kind, make_copy):
    net = Case("", container=container).made(kind)
    if kind == "optimized":
        assert mylayers.optimize(net).fused
    called(net)
    twin = make_copy(net)
    assert type(twin) is type(net)
    assert_close(results(twin), results(net))
    if kind == "optimized":
        assert mylayers.restore(twin) == ("",)
        assert type(twin) is type(Case("", container=container).made("stock"))


@pytest.mark.parametrize("kind", ["fused", "optimized"])
def test_a_call_leaves_nothing_in_a_module(kind):
    net = Case("").made(kind)
    if kind == "optimized":
        mylayers.optimize(net)
    layer, loss = MyLinear(4, 3), nn.MSELoss()
    before = [dict(vars(module)) for module in (net, *net, layer, loss)]
    called(net)
    layer(x())
    forward_backward(net, loss, x(), torch.zeros(5, 3))
    assert [dict(vars(module)) for module in (net, *net, layer, loss)] == before
    copy.deepcopy(vars(net))


def test_a_pickle_of_a_local_class_ends_as_stocks_does():
    class Local(nn.Sequential):
        pass

    net = Local(*children())
    mylayers.optimize(net)
    with pytest.raises((pickle.PicklingError, AttributeError), match="Local"):
        pickle.dumps(net)


@pytest.mark.parametrize("container", ["", "GetState", "Closed"])
def test_a_whole_optimized_model_is_loaded_with_an_allow_list(container):
    net = Case("", container=container).made("optimized")
    mylayers.optimize(net)
    file = io.BytesIO()
    torch.save(called(net), file)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(file.getvalue()))
    allowed = [type(module) for module in net.modules()]
    for name in names:
        module, _, attribute = name.rpartition(".")
        allowed.append(getattr(sys.modules.get(module) or __import__(module), attribute))
    with pytest.raises(pickle.UnpicklingError, match="was not an allowed global"):
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    with torch.serialization.safe_globals(allowed):
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert type(loaded) is type(net)
    assert_close(results(loaded), results(net))


# ---- nothing is kept alive ---------------------------------------------------------------------


def collected(make: Callable[[], list[Any]]) -> None:
    gc.collect()
    before = _C.known_objects()
    references = [weakref.ref(thing) for thing in make()]
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    assert _C.known_objects() == before


def test_a_network_in_a_cycle_is_collected():
    def make() -> list[Any]:
        net = FusedSequential(*children())
        loss, layer = nn.MSELoss(), MyLinear(4, 4)
        net.itself, loss.network, layer.itself = [net, loss, layer], net, [layer]
        called(net)
        forward_backward(net, loss, x(), torch.zeros(5, 3))
        layer(x())
        return [net, *net, net[0].weight, loss, layer]

    collected(make)


def test_a_class_in_a_cycle_with_its_network_is_collected():
    def make() -> list[Any]:
        class Probe(nn.Linear):
            pass

        class Net(FusedSequential):
            pass

        Probe.net = net = Net(Probe(4, 4), nn.Tanh(), Probe(4, 3))
        called(net)
        return [net, Probe, Net, net[0].weight]

    collected(make)


def test_a_class_that_was_optimized_is_collected():
    def make() -> list[Any]:
        class Net(nn.Sequential):
            pass

        Net.net = net = Net(*children())
        mylayers.optimize(net)
        called(net)
        return [net, Net, type(net)]

    collected(make)


def test_one_class_is_made_of_another_while_it_lives():
    nets = [PLAIN["GetState"](*children()) for _ in range(2)]
    for net in nets:
        mylayers.optimize(net)
    assert type(nets[0]) is type(nets[1])
    assert [c for c in PLAIN["GetState"].__subclasses__() if c is type(nets[0])] == [type(nets[0])]


# ---- optimize: all or nothing ------------------------------------------------------------------


class Failing(nn.Sequential):
    """Raises what is no Exception when its class is changed."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise KeyboardInterrupt
        super().__setattr__(name, value)


def test_an_exception_halfway_leaves_nothing_changed():
    net = nn.Sequential(nn.Sequential(*children()), Failing(nn.Linear(3, 3), nn.Tanh()))
    before = [(type(module), vars(module).copy()) for module in net.modules()]
    with pytest.raises(KeyboardInterrupt):
        mylayers.optimize(net)
    assert [(type(module), vars(module).copy()) for module in net.modules()] == before


@pytest.mark.parametrize("container", ["Keyword", "Final", "Registering", "Frozen", "Typed"])
def test_a_module_that_will_not_have_it_is_a_row_and_all_others_are_fused(container):
    registry = list(PLAIN["Registering"].registry)
    refusing = PLAIN[container](*children())
    net = nn.Sequential(nn.Sequential(*children()), nn.Sequential(nn.Linear(3, 4)), refusing)
    report = mylayers.optimize(net)
    assert [(row.path, row.fused) for row in report.findings] == [
        ("0", True), ("1", True), ("2", False)]  # fmt: skip
    assert type(refusing) is PLAIN[container]
    assert PLAIN["Registering"].registry == registry
    assert mylayers.restore(net) == ("0", "1")


class OnTop(nn.Sequential):
    """What FSDP's fully_shard does to a class."""


def test_restore_leaves_a_class_that_was_put_on_top():
    net = nn.Sequential(*children())
    mylayers.optimize(net)
    expected = results(net)
    on_top = type("OnTop", (OnTop, type(net)), {})
    net.__class__ = on_top
    assert mylayers.restore(net) == ()
    assert type(net) is on_top
    assert_close(results(net), expected)


# ---- one interpreter ---------------------------------------------------------------------------


def test_another_interpreter_of_the_process_is_refused():
    code = (
        "import torch\n"
        "try:\n"
        "    import _interpreters as interpreters\n"
        "    made = interpreters.create('legacy')\n"
        "    said = interpreters.exec(made, 'import mylayers')\n"
        "    print(said)\n"
        "except ModuleNotFoundError:\n"
        "    import _xxsubinterpreters as interpreters\n"
        "    made = interpreters.create()\n"
        "    try:\n"
        "        interpreters.run_string(made, 'import mylayers')\n"
        "    except interpreters.RunFailedError as e:\n"
        "        print(e)\n"
        "assert interpreters.get_main() == interpreters.get_current()\n"
        "interpreters.destroy(made)\n"
        "import mylayers\n"
        "print(mylayers.MyLinear(2, 3)(torch.ones(1, 2)).shape)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "mylayers: must be imported by the main interpreter" in ended.stdout
    assert ended.stdout.endswith("torch.Size([1, 3])\n")


# ---- the page ----------------------------------------------------------------------------------

# What other tests show: a line of the table, and the test.
OTHERS = {
    "it is copied, pickled by any protocol, `copy.deepcopy(vars(net))`": (
        "a call leaves nothing in a module; an optimized copy is optimized",
        test_a_network_that_was_called_is_copied,
    ),
    "`torch.load(..., weights_only=True)` of a whole optimized model": (
        "with its classes allowed",
        test_a_whole_optimized_model_is_loaded_with_an_allow_list,
    ),
    "a network, a layer, a loss in a cycle": ("collected", test_a_network_in_a_cycle_is_collected),
    "a class in a cycle with its network": (
        "collected",
        test_a_class_in_a_cycle_with_its_network_is_collected,
    ),
    "a class of which modules were optimized": (
        "collected",
        test_a_class_that_was_optimized_is_collected,
    ),
    "an exception while `optimize` works": (
        "nothing is changed",
        test_an_exception_halfway_leaves_nothing_changed,
    ),
    "a class put on an optimized one, as by `fully_shard`": (
        "`restore` leaves it",
        test_restore_leaves_a_class_that_was_put_on_top,
    ),
    "another interpreter of the process": (
        "refused",
        test_another_interpreter_of_the_process_is_refused,
    ),
    "several threads call, train, copy, edit, hook, optimize and restore it": (
        "each call owns what it computes with",
        "test_threads.py",
    ),
}


def table() -> str:
    lines = ["| what a module has or does | what comes of it |", "|---|---|"]
    lines += [f"| {case.what} | {observed(case, 'optimized')} |" for case in CASES]
    lines += [f"| {what} | {result} |" for what, (result, _) in OTHERS.items()]
    return "\n".join(lines)


@pytest.mark.filterwarnings("ignore:.*hook.*")
def test_the_page_has_this_table():
    _, _, rest = PAGE.read_text().partition(BEGIN)
    now = table()
    assert rest.partition(END)[0].strip() == now, f"run python {Path(__file__).name}"


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    text = PAGE.read_text()
    PAGE.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n{table()}\n{END}{text.split(END)[1]}")
