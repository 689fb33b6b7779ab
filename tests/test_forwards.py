"""Forwards that users wrote: what is fused in them, and that nothing else changes.

Each case is a module whose forward has the lines that the table of docs/what-a-forward-may-say.md
shows; ``python tests/test_forwards.py`` writes that page. Stock and optimized must compute the same
before and after whatever Python may change between two calls.
"""

import copy
import functools
import gc
import inspect
import io
import linecache
import pickle
import random
import textwrap
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional
from common import COPIES, Calls
from samples import same_bits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (as forwards have it)
from torch.nn import functional as other_functional
from torch.nn.functional import relu as named_relu
from torch.nn.utils import parametrize, prune

import mylayers
from mylayers import CenteredLayer, FusedSequential, MyLinear
from mylayers._extension import _C

pytestmark = pytest.mark.usefixtures("float64")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "what-a-forward-may-say.md"
BEGIN, END = "<!-- table: python tests/test_forwards.py -->", "<!-- end of table -->"


# ---- forwards ----------------------------------------------------------------------------------


class Base(nn.Module):
    """Three layers of one size, so that they can be called in any order."""

    flag_of_class = True

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.groups = nn.LayerNorm(4), nn.GroupNorm(1, 4)
        self.drop = nn.Dropout(0.5)
        self.act = nn.Tanh()
        self.mine = MyLinear(4, 4, activation="tanh")
        self.center = CenteredLayer(1)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
        self.flag, self.nothing, self.function, self.p = True, None, torch.tanh, 0.3


class Notebook(Base):
    def forward(self, X):  # noqa: N803
        return self.b(F.relu(self.a(X)))


class Lines(Base):
    def forward(self, x):
        x = F.relu(self.a(x))
        x = torch.tanh(self.b(x))
        return self.c(x)


class OtherNames(Base):
    def forward(self, x):
        h = self.a(x)
        h2 = torch.sigmoid(h)
        y: Tensor = self.b(h2)
        return y


class Docstring(Base):
    def forward(self, x: Tensor) -> Tensor:
        """Has
        a docstring, less indented."""
        # and a comment
        return self.b(self.act(self.a(x)))


class Methods(Base):
    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).sigmoid())


class MethodOfInput(Base):
    def forward(self, x):
        return self.b(x.relu())


class Functions(Base):
    def forward(self, x):
        x = named_relu(self.a(x))
        x = F.elu(self.b(x), 1.0)
        x = torch.nn.functional.gelu(self.c(x), approximate="tanh")
        return other_functional.tanh(self.a(x))


class Settings(Base):
    def forward(self, x):
        x = F.leaky_relu(self.a(x), 0.2)
        x = F.elu(self.b(x), alpha=0.5)
        x = F.celu(self.c(x), 2.0, inplace=True)
        return torch.celu(self.a(x), 0.5)


class OtherActivations(Base):
    def forward(self, x):
        x = F.softplus(self.b(F.silu(self.a(x))), beta=1)
        x = F.mish(self.a(F.logsigmoid(self.c(x))))
        x = F.relu6(self.c(F.hardtanh(self.b(x), -1, 1)))
        x = F.softsign(self.b(F.hardswish(self.a(x))))
        return torch.selu(self.c(x))


class SettingBelowZero(Base):
    def forward(self, x):
        return self.b(F.elu(self.a(x), -1.0))


class OtherCorners(Base):
    def forward(self, x):
        return self.b(F.hardtanh(self.a(x), -2.0, 2.0))


class InPlace(Base):
    def forward(self, x):
        return self.b(F.relu(self.a(x), inplace=True))


class InPlaceOnInput(Base):
    def forward(self, x):
        x = x + 0
        return self.b(self.a(F.relu(x, inplace=True)))


class ChangedAfterwards(Base):
    def forward(self, x):
        x = F.relu(F.elu(self.a(torch.tanh(x))), inplace=True)
        return F.relu(self.c(F.elu(self.b(x))), inplace=True)


class OursInIt(Base):
    def forward(self, x):
        return self.b(self.center(self.mine(x)))


class DropoutModule(Base):
    def forward(self, x):
        x = self.drop(F.relu(self.a(x)))
        x = self.drop(F.relu(self.b(x)))
        return self.c(x)


class DropoutFunction(Base):
    def forward(self, x):
        x = F.dropout(F.relu(self.a(x)), self.p, training=self.training)
        return self.b(x)


class Flattened(Base):
    def forward(self, x):
        return self.b(torch.relu(self.a(torch.flatten(x, 1))))


class Container(Base):
    def forward(self, x):
        return self.a(self.act(self.net(x)))


class ContainerAlone(Base):
    def forward(self, x):
        return self.net(x)


class Loop(Base):
    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.a(x)


class LoopOfAllButOne(Base):
    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Enumerated(Base):
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.layers) - 1:
                x = F.relu(x)
        return x


class Indexed(Base):
    def forward(self, x):
        for i in range(len(self.layers)):
            x = self.act(self.layers[i](x))
        return x


class Zipped(Base):
    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms):  # noqa: B905
            x = F.relu(norm(layer(x)))
        return self.b(F.relu(self.a(x)))


class LoopWithBreak(Base):
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            if i == 2:
                break
            x = F.relu(layer(x))
        return x


class LoopWithReturn(Base):
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            if i == 1:
                return x
        return x


class LoopOfUse(Base):
    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return x, layer.weight.sum()


class Flags(Base):
    def forward(self, x):
        x = F.relu(self.a(x)) if self.flag else self.a(x)
        if self.nothing is not None:
            x = self.nothing(x)
        if not self.flag or self.nothing:
            return x
        return self.b(x)


class FlagOfTraining(Base):
    def forward(self, x):
        x = F.relu(self.a(x))
        if self.training:
            x = self.b(x)
        return self.c(x)


class FunctionAsAttribute(Base):
    def forward(self, x):
        for j, linear in enumerate(self.layers[:-1]):
            x = (
                self.function[j](linear(x))
                if isinstance(self.function, list)
                else self.function(linear(x))
            )
        return self.layers[-1](x)


class OptionalArgument(Base):
    def forward(self, x, mask=None, scale: float = 1.0):
        x = self.b(F.relu(self.a(x)))
        if mask is not None:
            x = x * mask
        return x * scale


class AnyArguments(Base):
    def forward(self, *args, **kwargs):
        (x,) = args
        return self.b(F.relu(self.a(x)), **kwargs)


class NamedArguments(Base):
    def forward(self, x, *, scale=1.0):
        return self.b(F.relu(self.a(x))) * scale


class Residual(Base):
    def forward(self, x):
        return x + self.b(F.relu(self.a(x)))


class ResidualByName(Base):
    def forward(self, x):
        y = F.relu(self.a(x))
        y = self.b(y)
        return x + y


class TwoHeads(Base):
    def forward(self, x):
        h = F.relu(self.a(x))
        h = torch.tanh(self.b(h))
        return self.c(h), self.net(h)


class ReturnsItsMiddle(Base):
    def forward(self, x):
        h = F.relu(self.a(x))
        y = self.c(torch.tanh(self.b(h)))
        return y, h


class InTheMiddle(Base):
    def forward(self, x):
        if x.dim() != 2:
            raise ValueError(x.shape)
        x = x * 2
        x = self.b(F.relu(self.a(x)))
        x = self.groups(x)
        x = self.c(x)
        return torch.tanh(x)


class NormBetween(Base):
    def forward(self, x):
        return self.b(F.relu(self.norm(self.a(F.relu(self.c(x))))))


class GroupsBetween(Base):
    def forward(self, x):
        return self.b(F.relu(self.groups(self.a(F.relu(self.c(x))))))


class OnValues(Base):
    def forward(self, x):
        if x.sum() > 0:
            return self.b(F.relu(self.a(x)))
        while x.abs().sum() > 100:
            x = self.c(torch.tanh(self.b(x)))
        return x


class Computed(Base):
    def forward(self, x):
        return self.b(F.relu(self.a(x * 2)))


class GivenByName(Base):
    def forward(self, x):
        return self.b(F.relu(self.a(input=x)))


class WithBlocks(Base):
    def forward(self, x):
        with torch.no_grad():
            y = F.relu(self.a(x))
            y = self.b(y)
        try:
            x = F.relu(self.a(x))
            x = self.b(x)
        finally:
            y = y + x
        return y


class LambdaInIt(Base):
    def forward(self, x):
        y = self.b(F.relu(self.a(x)))
        return (lambda: y + x)()


class Comprehension(Base):
    def forward(self, x):
        x = self.b(F.relu(self.a(x)))
        return torch.stack([F.relu(layer(x)) for layer in self.layers]).sum(0)


class OfClass(Base):
    def forward(self, x):
        return self.b(F.relu(self.a(x))) if self.flag_of_class else x


class Property(Base):
    @property
    def prop(self):
        return self.a

    def forward(self, x):
        return self.b(F.relu(self.prop(x)))


class Locals(Base):
    def forward(self, x):
        x = self.b(F.relu(self.a(x)))
        return x * len(locals())


class Deleted(Base):
    def forward(self, x):
        h = F.relu(self.a(x))
        y = self.b(h)
        del h
        return y


def doubled(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return 2 * function(self, x)

    return wrapper


def untouched(function):
    return function


class Decorated(Base):
    @doubled
    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class DecoratedNoGrad(Base):
    @torch.no_grad()
    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class DecoratedByNothing(Base):
    @untouched
    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Lambda(Base):
    forward = lambda self, x: self.b(F.relu(self.a(x)))  # noqa: E731


class Private(Base):
    def __init__(self):
        super().__init__()
        self.__a = nn.Linear(4, 4)

    def forward(self, x):
        return self.b(F.relu(self.__a(x)))


class Inherited(Lines):
    pass


class Super(Lines):
    def forward(self, x):
        return 2 * super().forward(x)


class Generator(Base):
    def forward(self, x):
        yield self.b(F.relu(self.a(x)))


class GetAttr(Base):
    def __getattr__(self, name):
        found = super().__getattr__(name)
        return found if name != "a" else (lambda x: 2 * found(x))

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class OwnCall(Base):
    def __call__(self, *args):
        return 2 * super().__call__(*args)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class ChainOfLoops(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.ELU(), nn.Linear(5, 4), nn.Tanh())

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class ChainOfSuper(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.ELU(), nn.Linear(5, 4), nn.Tanh())

    def forward(self, *inputs):
        if len(inputs) > 1:
            inputs = (torch.cat([*inputs], -1),)
        return super().forward(*inputs)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = Notebook(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.extractor, self.value_net = Notebook(), nn.Linear(4, 1)

    def forward(self, x):
        return self.predict(self.extractor(x))

    def predict(self, features):
        return self.value_net(features)


def without_source() -> nn.Module:
    names: dict[str, Any] = {"Base": Base, "F": F}
    text = """
    class Sourceless(Base):
        def forward(self, x):
            return self.b(F.relu(self.a(x)))
    """
    exec(textwrap.dedent(text), names)
    return names["Sourceless"]()


def with_another_source() -> nn.Module:
    """Its file says something else by now."""
    made = without_source()
    wrong = "def forward(self, x):\n    return self.a(F.relu(self.b(x)))\n"
    name = "<another source>"
    code = type(made).forward.__code__.replace(co_filename=name, co_firstlineno=1)
    type(made).forward.__code__ = code
    linecache.cache[name] = (len(wrong), None, wrong.splitlines(True), name)
    return made


class Case(NamedTuple):
    """A forward.

    Attributes:
        make: makes a module with it.
        fused: what of it is fused, in training and in evaluation, each separated by commas.
        why: a part of the reason of what is not, where none is.
    """

    make: Callable[[], nn.Module]
    training: str
    evaluation: str | None = None
    why: str = ""

    @property
    def name(self) -> str:
        return self.make.__name__

    def made(self, training: bool = True) -> nn.Module:
        torch.manual_seed(0)
        return self.make().train(training)


CASES = [
    Case(Notebook, "a + relu + b"),
    Case(Lines, "a + relu + b + tanh + c"),
    Case(OtherNames, "a + sigmoid + b"),
    Case(Docstring, "a + act + b"),
    Case(Methods, "a + relu + b + sigmoid + c"),
    Case(MethodOfInput, ""),
    Case(Functions, "a + relu + b + elu + c + gelu + a + tanh"),
    Case(Settings, "a + leaky_relu + b + elu + c + celu + a + celu"),
    Case(
        OtherActivations,
        "a + silu + b + softplus + c + logsigmoid + a + mish + b + hardtanh + c + relu6 + a "
        "+ hardswish + b + softsign + c + selu",
    ),
    Case(SettingBelowZero, "", why="its alpha is no number from 0.0001 to 100"),
    Case(OtherCorners, "", why="hardtanh with"),
    Case(InPlace, "a + relu + b"),
    Case(InPlaceOnInput, ""),
    Case(ChangedAfterwards, "tanh + a + elu, b + elu + c + relu"),
    Case(OursInIt, "mine + center + b"),
    Case(DropoutModule, "a + relu, b + relu", "a + relu + drop + b + relu + drop + c"),
    Case(DropoutFunction, "a + relu", "a + relu + dropout + b"),
    Case(Flattened, "flatten + a + relu + b"),
    Case(Container, "net.0 + net.1 + net.2 + act + a"),
    Case(ContainerAlone, ""),
    Case(Loop, "layers.0 + tanh + layers.1 + tanh + layers.2 + tanh + a"),
    Case(LoopOfAllButOne, "layers.0 + relu + layers.1 + relu + layers.2"),
    Case(Enumerated, "layers.0 + relu + layers.1 + relu + layers.2"),
    Case(Indexed, "layers.0 + act + layers.1 + act + layers.2 + act"),
    Case(
        Zipped,
        "layers.0 + norms.0 + relu + layers.1 + norms.1 + relu + layers.2 + norms.2 + relu + "
        "a + relu + b",
    ),
    Case(LoopWithBreak, "layers.0 + relu + layers.1 + relu"),
    Case(LoopWithReturn, "layers.0 + relu + layers.1 + relu"),
    Case(LoopOfUse, ""),
    Case(Flags, "a + relu + b"),
    Case(FlagOfTraining, "a + relu + b + c", "a + relu + c"),
    Case(FunctionAsAttribute, "layers.0 + tanh + layers.1 + tanh + layers.2"),
    Case(OptionalArgument, "a + relu + b"),
    Case(AnyArguments, "", why="any number of arguments"),
    Case(NamedArguments, "", why="or named ones"),
    Case(Residual, "a + relu + b"),
    Case(ResidualByName, "a + relu + b"),
    Case(TwoHeads, "a + relu + b + tanh"),
    Case(ReturnsItsMiddle, "a + relu, b + tanh + c"),
    Case(InTheMiddle, "a + relu + b, c + tanh"),
    Case(NormBetween, "c + relu + a + norm + relu + b"),
    Case(GroupsBetween, "c + relu + a"),
    Case(OnValues, "a + relu + b, b + tanh + c"),
    Case(Computed, "", why="it computes by mult"),
    Case(GivenByName, "", why="more than one tensor"),
    Case(WithBlocks, "a + relu + b, a + relu + b"),
    Case(LambdaInIt, "a + relu + b"),
    Case(Comprehension, "a + relu + b"),
    Case(OfClass, "a + relu + b"),
    Case(Property, ""),
    Case(Locals, "", why="it calls locals"),
    Case(Deleted, "a + relu"),
    Case(Decorated, ""),
    Case(DecoratedNoGrad, "", why="decorated"),
    Case(DecoratedByNothing, "a + relu + b"),
    Case(Lambda, "", why="not written as a function"),
    Case(Private, "", why="its source is not what runs"),
    Case(Inherited, "a + relu + b + tanh + c"),
    Case(Generator, "", why="generator"),
    Case(GetAttr, "", why="GetAttr overrides Module.__getattr__"),
    Case(OwnCall, "", why="OwnCall overrides Module.__call__"),
    Case(ChainOfLoops, "0 + 1 + 2 + 3"),
    Case(ChainOfSuper, "Linear + ELU + Linear + Tanh"),
    Case(without_source, "", why="its source is not there"),
    Case(with_another_source, "", why="its source is not what runs"),
    Case(Super, ""),
    Case(Outer, "a + relu + b"),
    Case(Policy, "a + relu + b"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
fused_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.training], ids=[c.name for c in CASES if c.training]
)
either_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


# ---- yardsticks --------------------------------------------------------------------------------


def x() -> Tensor:
    return torch.linspace(-1, 1, 20).view(5, 4).sin()


def results(net: nn.Module, given: Tensor | None = None) -> list[Any]:
    v = (x() if given is None else given).requires_grad_()
    torch.manual_seed(1)
    found = net(v)
    if isinstance(found, types.GeneratorType):
        found = tuple(found)
    outputs = list(found) if isinstance(found, tuple) else [found]
    loss = sum(y.pow(2).sum() for y in outputs)
    if not loss.requires_grad:
        return outputs
    parameters = [p for _, p in sorted(net.named_parameters()) if p.requires_grad]
    grads = torch.autograd.grad(loss, [v, *parameters], allow_unused=True)
    return [y.detach() for y in outputs] + list(grads)


def assert_close(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for ours, stocks in zip(found, expected, strict=True):
        assert (ours is None) == (stocks is None)
        if ours is not None:
            torch.testing.assert_close(ours, stocks, rtol=1e-9, atol=1e-9, check_stride=False)


def operators(net: nn.Module) -> int:
    with torch.no_grad(), Calls() as calls:
        net(x())
    return sum(name == "sequential" for name, _ in calls.seen)


def fused(report: mylayers.Report) -> str:
    """What was fused, but for the nn.Sequential in every case."""
    return ", ".join(f.layers for f in report.fused if not f.path.endswith("net"))


def reasons(report: mylayers.Report) -> str:
    return "; ".join(finding.reason for finding in report.unfused)


def pair(case: Case, training: bool = True) -> tuple[nn.Module, nn.Module]:
    stock = case.made(training)
    ours = copy.deepcopy(stock) if case.name.startswith("with") else case.made(training)
    mylayers.optimize(ours)
    return stock, ours


# ---- values and reports ------------------------------------------------------------------------


@every_case
@either_mode
def test_values_and_gradients_are_stocks(case, training):
    stock, ours = pair(case, training)
    for mode in (training, not training, training):
        stock.train(mode), ours.train(mode)
        for _ in range(3):
            assert_close(results(ours), results(stock))
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    assert list(state) == list(stock.state_dict())
    mylayers.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    assert_close(results(ours), results(stock))


@every_case
@either_mode
def test_the_report_says_what_is_fused_and_why_the_rest_is_not(case, training):
    report = mylayers.optimize(case.made(training))
    expected = case.training if training or case.evaluation is None else case.evaluation
    assert fused(report) == expected
    assert case.why in reasons(report)


@fused_case
@either_mode
def test_what_is_fused_is_computed_by_that_many_operators(case, training):
    net = case.made(training)
    regions = fused(mylayers.optimize(net)).split(", ")
    containers = case.name == "TwoHeads"  # whose second head is one
    if case.name != "OnValues":
        assert operators(net) == len(regions) + containers


@fused_case
def test_a_region_has_the_bits_of_a_fused_sequential(case):
    if case.name not in ("Notebook", "Lines", "Loop", "Container", "OursInIt"):
        return
    net = case.made()
    layers: dict[str, list[nn.Module]] = {
        "Notebook": [net.a, nn.ReLU(), net.b],
        "Lines": [net.a, nn.ReLU(), net.b, nn.Tanh(), net.c],
        "Loop": [*(m for layer in net.layers for m in (layer, nn.Tanh())), net.a],
        "Container": [*net.net, net.act, net.a],
        "OursInIt": [net.mine, net.center, net.b],
    }
    expected = results(FusedSequential(*layers[case.name]))
    mylayers.optimize(net)
    found = results(net)
    assert same_bits(found[0], expected[0])
    assert same_bits(found[1], expected[1])


# ---- between two calls -------------------------------------------------------------------------


def add(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output + 1


def of_its_own(net: Any) -> None:
    own = net.forward
    net.forward = lambda *args: own(*args) * 3


def ramp(layer: Any) -> Any:
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p).cos())
    return layer


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Halved(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2


class OtherF:
    relu = staticmethod(torch.sigmoid)


def other_forward(self, x):
    return self.a(x) * 5


def thrice(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs) * 3


Patch = pytest.MonkeyPatch
# Of each module by itself.
EDITS: dict[str, tuple[type[nn.Module], Callable[[Any], Any]]] = {
    "a layer replaced": (Lines, lambda net: setattr(net, "b", ramp(nn.Linear(4, 4)))),
    "a layer replaced by another kind": (Lines, lambda net: setattr(net, "b", nn.Softmax(-1))),
    "an activation replaced": (Docstring, lambda net: setattr(net, "act", nn.ReLU())),
    "a layer of another class": (Lines, lambda net: setattr(net.b, "__class__", Scaled)),
    "a hook on a layer": (Lines, lambda net: net.b.register_forward_hook(add)),
    "a hook before a layer": (
        Lines,
        lambda net: net.c.register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
    ),
    "a hook on an activation": (Docstring, lambda net: net.act.register_forward_hook(add)),
    "a backward hook on a layer": (
        Lines,
        lambda net: net.b.register_full_backward_hook(lambda _, g, o: (g[0] * 2,)),  # noqa: ARG005
    ),
    "a hook on the module": (Lines, lambda net: net.register_forward_hook(add)),
    "a hook with arguments by name": (
        Lines,
        lambda net: net.register_forward_hook(lambda m, a, k, y: y * 2, with_kwargs=True),  # noqa: ARG005
    ),
    "an attribute in __dict__": (Lines, lambda net: net.__dict__.update(b=torch.tanh)),
    "a parameter of that name": (
        Lines,
        lambda net: net._parameters.update(b=nn.Parameter(torch.ones(1))),
    ),
    "a buffer of that name": (Lines, lambda net: net._buffers.update(b=torch.ones(1))),
    "a layer removed": (Lines, lambda net: delattr(net, "b")),
    "a layer set to None": (Lines, lambda net: setattr(net, "b", None)),
    "modules in a dictionary of another class": (
        Lines,
        lambda net: net.__dict__.update(_modules=OtherDictionary(net._modules)),
    ),
    "its forward replaced": (Lines, of_its_own),
    "a layer's forward replaced": (Lines, lambda net: of_its_own(net.b)),
    "a layer's weight frozen": (Lines, lambda net: net.b.weight.requires_grad_(False)),
    "a layer's weight replaced": (
        Lines,
        lambda net: setattr(net.b, "weight", nn.Parameter(torch.eye(4))),
    ),
    "a layer's bias removed": (Lines, lambda net: setattr(net.b, "bias", None)),
    "a layer in another dtype": (Lines, lambda net: net.b.float()),
    "a layer of another size": (Lines, lambda net: setattr(net, "b", ramp(nn.Linear(5, 5)))),
    "sizes changed that fit": (
        Lines,
        lambda net: (
            setattr(net, "a", ramp(nn.Linear(4, 7))),
            setattr(net, "b", ramp(nn.Linear(7, 4))),
        ),
    ),
    "a parametrized weight": (
        Lines,
        lambda net: parametrize.register_parametrization(net.b, "weight", Halved()),
    ),
    "a pruned weight": (Lines, lambda net: prune.l1_unstructured(net.b, "weight", 0.5)),
    "evaluation": (DropoutModule, lambda net: net.eval()),
    "one dropout in evaluation": (DropoutModule, lambda net: net.drop.eval()),
    "another probability": (DropoutFunction, lambda net: setattr(net, "p", 0.9)),
    "evaluation, read by the forward": (FlagOfTraining, lambda net: net.eval()),
    "a flag": (Flags, lambda net: setattr(net, "flag", False)),
    "a flag of another type": (Flags, lambda net: setattr(net, "flag", [])),
    "None becomes a layer": (Flags, lambda net: setattr(net, "nothing", nn.Tanh())),
    "another function": (FunctionAsAttribute, lambda net: setattr(net, "function", torch.sigmoid)),
    "a list of functions": (
        FunctionAsAttribute,
        lambda net: setattr(net, "function", [torch.relu, torch.tanh]),
    ),
    "a layer appended": (Loop, lambda net: net.layers.append(ramp(nn.Linear(4, 4)))),
    "a layer inserted": (Enumerated, lambda net: net.layers.insert(1, ramp(nn.Linear(4, 4)))),
    "a layer deleted": (Enumerated, lambda net: net.layers.__delitem__(1)),
    "a layer of a list replaced": (
        LoopOfAllButOne,
        lambda net: net.layers.__setitem__(1, nn.Softmax(-1)),
    ),
    "another list": (
        Indexed,
        lambda net: setattr(net, "layers", nn.ModuleList([ramp(nn.Linear(4, 4))])),
    ),
    "a list in another order": (
        Loop,
        lambda net: net.layers.__dict__.update(
            _modules=dict(reversed(list(net.layers._modules.items())))
        ),
    ),
    "a list of another class": (Loop, lambda net: setattr(net.layers, "__class__", Backwards)),
    "a layer of a container replaced": (Container, lambda net: net.net.__setitem__(1, nn.Tanh())),
    "a layer appended to a container": (Container, lambda net: net.net.append(nn.Softmax(-1))),
    "a hook on a container": (Container, lambda net: net.net.register_forward_hook(add)),
    "a container's forward replaced": (Container, lambda net: of_its_own(net.net)),
    "a layer of itself replaced": (ChainOfLoops, lambda net: net.__setitem__(1, nn.ReLU())),
    "a layer appended to itself": (ChainOfSuper, lambda net: net.append(nn.Softmax(-1))),
    "in half precision": (Lines, lambda net: net.half()),
    "an attribute that nobody reads": (Lines, lambda net: setattr(net, "note", [net])),
}


class OtherDictionary(dict[str, Any]):
    def __getitem__(self, name: str) -> Any:
        return super().__getitem__("a" if name == "b" else name)


class Backwards(nn.ModuleList):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(super().__iter__()))


# Of everything.
HERE = globals()
PATCHES: dict[str, tuple[type[nn.Module], Callable[[Patch], Any]]] = {
    "an attribute of the class": (
        Lines,
        lambda patch: patch.setattr(Lines, "b", torch.tanh, raising=False),
    ),
    "an attribute of its base": (
        Lines,
        lambda patch: patch.setattr(Base, "b", torch.tanh, raising=False),
    ),
    "another attribute of the class": (
        Lines,
        lambda patch: patch.setattr(Lines, "other", 1, raising=False),
    ),
    "F bound to something else": (Notebook, lambda patch: patch.setitem(HERE, "F", OtherF)),
    "F deleted": (Notebook, lambda patch: patch.delitem(HERE, "F")),
    "F.relu replaced": (Notebook, lambda patch: patch.setattr(F, "relu", thrice(F.relu))),
    "F.linear replaced": (Notebook, lambda patch: patch.setattr(F, "linear", thrice(F.linear))),
    "torch.tanh replaced": (Loop, lambda patch: patch.setattr(torch, "tanh", thrice(torch.tanh))),
    "torch.relu replaced, which F.relu calls": (
        Notebook,
        lambda patch: patch.setattr(torch, "relu", thrice(torch.relu)),
    ),
    "torch.flatten replaced": (
        Flattened,
        lambda patch: patch.setattr(torch, "flatten", thrice(torch.flatten)),
    ),
    "Tensor.relu replaced": (
        Methods,
        lambda patch: patch.setattr(Tensor, "relu", thrice(Tensor.relu)),
    ),
    "a function's name bound to another": (
        Functions,
        lambda patch: patch.setitem(HERE, "named_relu", torch.sigmoid),
    ),
    "len shadowed": (Enumerated, lambda patch: patch.setitem(HERE, "len", lambda _: 2)),
    "forward of the class replaced": (
        Lines,
        lambda patch: patch.setattr(Lines, "forward", other_forward),
    ),
    "forward of the base replaced": (
        Inherited,
        lambda patch: patch.setattr(Lines, "forward", other_forward),
    ),
    "forward's code replaced": (
        Lines,
        lambda patch: patch.setattr(Lines.forward, "__code__", other_forward.__code__),
    ),
    "forward's defaults replaced": (
        OptionalArgument,
        lambda patch: patch.setattr(OptionalArgument.forward, "__defaults__", (torch.ones(4) * 3,)),
    ),
    "forward's defaults by name given": (
        OptionalArgument,
        lambda patch: patch.setattr(OptionalArgument.forward, "__kwdefaults__", {"scale": 3.0}),
    ),
    "__call__ of the class": (
        Lines,
        lambda patch: patch.setattr(Lines, "__call__", thrice(nn.Module.__call__)),
    ),
    "_call_impl of the class": (
        Lines,
        lambda patch: patch.setattr(Lines, "_call_impl", thrice(nn.Module._call_impl)),
    ),
    "__getattr__ of the class": (
        Lines,
        lambda patch: patch.setattr(
            Lines,
            "__getattr__",
            lambda net, name: nn.Module.__getattr__(net, "a" if name == "b" else name),
            raising=False,
        ),
    ),
    "__getattribute__ of the class": (
        Lines,
        lambda patch: patch.setattr(
            Lines,
            "__getattribute__",
            lambda net, name: object.__getattribute__(net, "act" if name == "b" else name),
        ),
    ),
    "nn.Linear.forward replaced": (
        Lines,
        lambda patch: patch.setattr(nn.Linear, "forward", thrice(nn.Linear.forward)),
    ),
    "nn.ModuleList.__iter__ replaced": (
        Loop,
        lambda patch: patch.setattr(
            nn.ModuleList, "__iter__", lambda m: reversed(m._modules.values())
        ),
    ),
    "nn.ModuleList.__len__ replaced": (
        Enumerated,
        lambda patch: patch.setattr(nn.ModuleList, "__len__", lambda _: 2),
    ),
    "nn.ModuleList.__getitem__ replaced": (
        LoopOfAllButOne,
        lambda patch: patch.setattr(
            nn.ModuleList, "__getitem__", lambda m, _: m._modules["0"]
        ),
    ),
    "a hook on all modules": (
        Lines,
        lambda patch: patch.setitem(
            nn.modules.module._global_forward_hooks, 0, lambda m, a, y: y + 1  # noqa: ARG005
        ),
    ),
    "an attribute of the class, read": (
        OfClass,
        lambda patch: patch.setattr(OfClass, "flag_of_class", False),
    ),
}  # fmt: skip


def outcome(net: nn.Module, given: Tensor | None = None) -> Any:
    """What a call comes to, or what kind of exception it ends in, and with which words."""
    try:
        return results(net, given)
    except Exception as e:
        return type(e), str(e).replace("'Fused", "'")  # the class of ours says its name


def assert_alike(ours: nn.Module, stock: nn.Module) -> None:
    found, expected = outcome(ours), outcome(stock)
    if isinstance(expected, tuple):
        assert isinstance(found, tuple), f"no {expected}"
        assert found[0] is expected[0], f"{found} for {expected}"
        # An operator of ours has words of its own, and another name in autograd's.
        assert found[1] == expected[1] or expected[0] is RuntimeError
    else:
        assert not isinstance(found, tuple), found
        assert_close(found, expected)


def both(cls: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    stock, ours = pair(Case(cls, ""))
    assert isinstance(ours, cls)
    assert type(ours) is not cls
    for _ in range(3):
        assert_close(results(ours), results(stock))
    return stock, ours


# What torch.float16 rounds to differs by design.
_LOOSELY = ("in half precision",)


@pytest.mark.parametrize("when", ["before the first call", "later"])
@pytest.mark.parametrize("name", EDITS)
def test_a_module_may_change_between_two_calls(name, when):
    cls, edit = EDITS[name]
    if when == "later":
        stock, ours = both(cls)
    else:
        stock, ours = pair(Case(cls, ""))
    for net in (stock, ours):
        edit(net)
    if name in _LOOSELY:
        given = x().half()
        for _ in range(3):
            a, e = results(ours, given.clone()), results(stock, given.clone())
            torch.testing.assert_close(a[0], e[0], rtol=1e-2, atol=1e-2)
        return
    for _ in range(5):
        assert_alike(ours, stock)
    mylayers.optimize(ours)
    for _ in range(3):
        assert_alike(ours, stock)
    mylayers.restore(ours)
    assert_alike(ours, stock)


@pytest.mark.parametrize("name", PATCHES)
def test_what_a_forward_calls_may_change_between_two_calls(name, monkeypatch):
    cls, patch = PATCHES[name]
    stock, ours = both(cls)
    before = operators(ours)
    assert before >= 1
    with monkeypatch.context() as patches:
        patch(patches)
        for _ in range(5):
            assert_alike(ours, stock)
        twin = pair(Case(cls, ""))[1]
        for _ in range(2):
            assert_alike(twin, stock)
    for _ in range(40):
        assert_alike(ours, stock)
        assert_alike(twin, stock)
    assert operators(ours) == before  # and it is fused again


def test_another_module_is_read_anew_where_the_class_is_patched_while_it_is_optimized(monkeypatch):
    """The forward that optimize read is not the one of another time."""
    stock, ours = both(Lines)
    monkeypatch.setattr(Lines, "forward", InTheMiddle.forward)
    report = mylayers.optimize(ours)
    assert fused(report) == "a + relu + b, c + tanh"
    for _ in range(3):
        assert_alike(ours, stock)
    assert operators(ours) == 2


# ---- what else may call it ---------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Lines, Loop, Flags, Residual, OptionalArgument, ChainOfSuper])
def test_other_roads_see_the_users_own_forward(cls):
    stock, ours = pair(Case(cls, ""))
    expected = stock(x())
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert_close([compiled(x())], [expected])
    program = torch.export.export(ours, (x(),))
    assert "mylayers." not in str(program.graph) or cls is ChainOfSuper
    assert_close([program.module()(x())], [expected])
    traced = torch.jit.trace(ours, x())
    assert_close([traced(x())], [expected])
    assert "mylayers::" not in str(traced.inlined_graph) or cls is ChainOfSuper
    if cls not in (ChainOfSuper, OptionalArgument):  # which ask what their inputs are
        followed = torch.fx.symbolic_trace(ours)
        assert_close([followed(x())], [expected])
    for _ in range(20):
        assert_close([ours(x())], [expected])
    assert operators(ours) >= 1


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


def test_it_is_scripted_as_its_author_wrote_it():
    net = Scripted()
    expected = torch.jit.script(net).code
    mylayers.optimize(net)
    scripted = torch.jit.script(net)
    assert scripted.code == expected
    assert_close([scripted(x())], [net(x())])


@pytest.mark.parametrize("cls", [Lines, OptionalArgument, Docstring])
def test_its_forward_looks_as_it_did(cls):
    stock, ours = both(cls)
    assert type(ours).forward is not cls.forward
    assert inspect.signature(ours.forward) == inspect.signature(stock.forward)
    assert inspect.getsource(type(ours).forward) == inspect.getsource(cls.forward)
    assert ours.forward.__doc__ == stock.forward.__doc__
    assert ours.forward.__qualname__ == stock.forward.__qualname__


def test_an_exception_comes_from_the_users_own_line():
    stock, ours = both(Lines)
    lines = []
    for net in (stock, ours):
        with pytest.raises(RuntimeError, match="cannot be multiplied") as raised:
            net(torch.ones(2, 3))
        entries = [e for e in raised.traceback if e.name == "forward" and e.path == Path(__file__)]
        lines.append((entries[0].lineno, str(raised.value)))
    assert lines[0] == lines[1]


@pytest.mark.parametrize("given", [None, 1, [1.0], "text"])
def test_what_is_no_tensor_ends_as_in_stocks(given):
    stock, ours = both(Lines)
    for net in (stock, ours):
        with pytest.raises(TypeError, match="linear"):
            net(given)


class Counted(Tensor):
    """Sees each function that it is given to."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


seen: list[Any] = []


def test_a_subclass_of_tensor_sees_each_function():
    stock, ours = both(Lines)
    runs = []
    for net in (stock, ours):
        seen.clear()
        net(x().as_subclass(Counted))
        runs.append(list(seen))
    assert runs[0] == runs[1]
    assert F.linear in runs[0]


def test_a_mode_for_functions_sees_each_function():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    stock, ours = both(Lines)
    runs = []
    for net in (stock, ours):
        seen.clear()
        given = x()
        with Mode():
            net(given)
        runs.append(list(seen))
    assert runs[0] == runs[1]


def test_autocast_and_transforms_compute_what_stocks_do():
    stock, ours = both(Lines)
    with torch.autocast("cpu", torch.bfloat16):
        a, e = (net.float()(x().float()) for net in (ours, stock))
    assert a.dtype == e.dtype == torch.bfloat16
    torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2)
    stock.double(), ours.double()
    rows = x()
    assert_close([torch.vmap(ours)(rows)], [torch.vmap(stock)(rows)])
    assert_close([torch.func.jacrev(ours)(rows[0])], [torch.func.jacrev(stock)(rows[0])])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rows, torch.ones_like(rows))
        tangents = [
            torch.autograd.forward_ad.unpack_dual(net(dual)).tangent for net in (ours, stock)
        ]
    assert_close(tangents[:1], tangents[1:])
    parameters = {name: p * 2 for name, p in stock.named_parameters()}
    assert_close(*([torch.func.functional_call(net, parameters, (rows,))] for net in (ours, stock)))
    with torch.inference_mode():
        assert_close([ours(rows)], [stock(rows)])


# ---- copies and the class ----------------------------------------------------------------------


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("cls", [Lines, Residual, ChainOfLoops, ChainOfSuper])
def test_copies_are_optimized_and_restored_alike(cls, called, make_copy):
    stock, ours = pair(Case(cls, ""))
    if called:
        ours(x())
    before = {name: dict(vars(m)) for name, m in ours.named_modules()}
    twin = make_copy(ours)
    assert type(twin) is type(ours)
    assert_close(results(twin), results(stock))
    assert operators(twin) == operators(ours) >= 1
    assert mylayers.restore(twin)
    assert type(twin) is cls
    assert_close(results(ours), results(stock))
    assert {name: dict(vars(m)) for name, m in ours.named_modules()} == before


def test_a_whole_model_is_loaded_with_an_allow_list():
    ours = both(Scripted)[1]
    file = io.BytesIO()
    torch.save(ours, file)
    allowed = {type(m) for m in ours.modules()} | {set}
    with pytest.raises(pickle.UnpicklingError, match="was not an allowed global"):
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    with torch.serialization.safe_globals(list(allowed)):
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert type(loaded) is type(ours)
    assert_close(results(loaded), results(ours))
    assert operators(loaded) == 1


def test_its_class_has_one_name_by_which_pickle_finds_it():
    ours = both(Notebook)[1]
    cls = type(ours)
    assert cls.__qualname__ == f"Fused[{__name__.replace('.', '/')}:Notebook]"
    assert getattr(mylayers.optimization, cls.__qualname__) is cls
    assert isinstance(ours, Notebook)


def test_a_class_derived_from_that_of_an_optimized_module_runs_as_it_is():
    stock, ours = both(Lines)

    class Derived(type(ours)):
        pass

    class Deriving(type(ours)):
        def forward(self, x):
            return 2 * super().forward(x)

    for cls, factor in ((Derived, 1), (Deriving, 2)):
        torch.manual_seed(0)
        net = cls()
        assert_close([net(x())], [factor * stock(x())])
        assert mylayers.restore(net) == ("net",) * 0
    assert_close(results(ours), results(stock))


@pytest.mark.parametrize("cls", [Lines, ChainOfLoops])
def test_optimizing_twice_is_optimizing_once(cls):
    stock, ours = both(cls)
    first, kind = mylayers.optimize(ours), type(ours)
    second = mylayers.optimize(ours)
    assert type(ours) is kind
    assert [str(f) for f in first.findings] == [str(f) for f in second.findings]
    assert_close(results(ours), results(stock))
    assert operators(ours) == 1


def test_modules_of_one_class_may_differ():
    """Their regions stand in one forward."""
    made = {"plain": Lines(), "without": Lines(), "other": Lines(), "both": Lines()}
    made["without"].b = nn.Softmax(-1)
    made["other"].a = nn.Identity()
    made["both"].b, made["both"].c = nn.Softmax(-1), nn.Tanh()
    stocks = {name: copy.deepcopy(net) for name, net in made.items()}
    for net in made.values():
        mylayers.optimize(net)
    for _ in range(3):
        for name, net in made.items():
            assert_close(results(net), results(stocks[name]))


class Failing(Notebook):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise KeyboardInterrupt
        super().__setattr__(name, value)


def test_an_exception_halfway_leaves_nothing_changed():
    net = nn.Sequential(Lines(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), Failing())
    before = [(type(module), vars(module).copy()) for module in net.modules()]
    with pytest.raises(KeyboardInterrupt):
        mylayers.optimize(net)
    assert [(type(module), vars(module).copy()) for module in net.modules()] == before


class Final(Notebook):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("Final is final")


class Meta(type):
    pass


class WithMetaclass(Notebook, metaclass=Meta):
    pass


class Fixed(Notebook):
    def __init__(self):
        super().__init__()
        self.__dict__["fixed"] = True

    def __setattr__(self, name, value):
        if self.__dict__.get("fixed"):
            raise AttributeError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Final, "decides on its subclasses in __init_subclass__"),
        (WithMetaclass, "has the metaclass Meta"),
        (Fixed, "its class cannot be changed"),
    ],
)
def test_a_class_that_will_not_have_it_is_left(cls, why):
    net, other = cls(), Notebook()
    report = mylayers.optimize(nn.ModuleList([net, other]))
    assert type(net) is cls
    assert type(other) is not Notebook
    assert why in reasons(report)


# ---- nothing is kept alive ---------------------------------------------------------------------


def test_a_module_in_a_cycle_with_its_class_is_collected():
    def make() -> list[Any]:
        class Local(Lines):
            def forward(self, x):
                return self.b(F.relu(self.a(x)))

        Local.net = net = Local()
        net.itself = [net]
        mylayers.optimize(net)
        results(net)
        assert operators(net) == 1
        return [net, Local, type(net), net.a.weight, net.a]

    gc.collect()
    before = _C.known_objects(), _C.known_forwards()
    references = [weakref.ref(thing) for thing in make()]
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    assert (_C.known_objects(), _C.known_forwards()) == before


def test_a_region_keeps_no_tensor_longer_than_its_line():
    class Local(Base):
        def forward(self, x):
            x = self.b(F.relu(self.a(x)))
            kept = weakref.ref(x)
            x = x.sum()
            y = self.c(F.relu(self.a(torch.ones(4)))).sum()
            return kept(), y

    net = Local()
    mylayers.optimize(net)
    with torch.no_grad():
        for _ in range(3):
            assert net(x())[0] is None


# ---- threads -----------------------------------------------------------------------------------


def test_several_threads_call_change_and_optimize_it():
    net, stock = DropoutModule().eval(), None
    stock = copy.deepcopy(net)
    expected = stock(x()).detach()
    failures: list[Any] = []
    done = threading.Event()

    def call() -> None:
        try:
            while not done.is_set():
                with torch.no_grad():
                    assert_close([net(x())], [expected])
        except BaseException as e:
            failures.append(e)

    def change(round_: int) -> None:
        if round_ % 3 == 0:
            mylayers.optimize(net)
        elif round_ % 3 == 1:
            net.a.register_forward_hook(lambda m, a, y: y).remove()  # noqa: ARG005
            net.b = copy.deepcopy(net.b)
        else:
            mylayers.restore(net)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for round_ in range(150):
        change(round_)
    done.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


# ---- policies ----------------------------------------------------------------------------------


def test_training_goes_on_as_it_would_have():
    runs = []
    for optimized in (True, False):
        torch.manual_seed(0)
        net = Enumerated()
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        if optimized:
            mylayers.optimize(net, optimizer)
        for _ in range(8):
            optimizer.zero_grad()
            net(x()).pow(2).mean().backward()
            optimizer.step()
        runs.append([p.detach() for p in net.parameters()])
    assert_close(*runs)


# ---- drawn forwards ----------------------------------------------------------------------------


class Draw:
    """A forward, and what happens to its module between calls, from a seed."""

    LAYERS = ("a", "b", "c", "d", "act", "drop", "norm", "mine", "net")
    FUNCTIONS = (
        "F.relu({})",
        "torch.tanh({})",
        "torch.relu({})",
        "F.relu({}, inplace=True)",
        "torch.sigmoid({})",
        "F.gelu({})",
        "F.elu({}, alpha=1.0)",
        "F.dropout({}, 0.5, self.training)",
        "{}.tanh()",
        "function({})",
        "self.function({})",
        "F.softmax({}, -1)",
    )

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.name = f"<drawn forward {seed}>"
        body = "\n".join(self.lines(2, 8, loops=0))
        extra = self.random.choice(["", "", ", scale=1", ", *rest", ", **named"])
        self.text = f"class Drawn(Base):\n    def forward(self, x{extra}):\n        h = x\n{body}\n"
        self.text += (
            f"        return {self.random.choice(['x', 'x', 'x + h', '(x, h)', self.deep()])}\n"
        )
        self.names: dict[str, Any] = {
            "F": F,
            "torch": torch,
            "Base": DrawnBase,
            "function": torch.tanh,
        }
        linecache.cache[self.name] = (len(self.text), None, self.text.splitlines(True), self.name)
        exec(compile(self.text, self.name, "exec"), self.names)

    def forget(self) -> None:
        del linecache.cache[self.name]

    def call(self, inner: str) -> str:
        draw = self.random.random()
        if draw < 0.6:
            return f"self.{self.random.choice(self.LAYERS)}({inner})"
        if draw < 0.95:
            return self.random.choice(self.FUNCTIONS).format(inner)
        return f"({inner} * 0.5)"

    def deep(self, name: str = "x") -> str:
        inner = name
        for _ in range(self.random.choice([1, 1, 2, 2, 3, 4])):
            inner = self.call(inner)
        return inner

    def test(self) -> str:
        return self.random.choice(
            [
                "self.flag", "not self.flag", "self.training", "self.nothing is not None",
                "x.sum() > 0", "len(self.layers) > 2", "self.number == 1",
                "self.flag and self.number",
            ]
        )  # fmt: skip

    def lines(self, depth: int, most: int, loops: int) -> list[str]:
        pad = "    " * (4 - depth)
        made: list[str] = []
        for _ in range(self.random.randint(1, most)):
            draw = self.random.random()
            source, target = self.random.choices(["x", "h"], [4, 1], k=2)
            if draw < 0.62 or depth == 0:
                made.append(f"{pad}{target} = {self.deep(source)}")
            elif draw < 0.68:
                made.append(
                    f"{pad}x = {self.random.choice(['x + h', 'h', 'h - x', 'x + ' + self.deep()])}"
                )
            elif draw < 0.78:
                made += [f"{pad}if {self.test()}:", *self.lines(depth - 1, 3, loops)]
                if self.random.random() < 0.4:
                    made += [f"{pad}else:", *self.lines(depth - 1, 3, loops)]
            elif draw < 0.92:
                loop = self.random.choice(
                    [
                        "for layer in self.layers:", "for layer in self.layers[:-1]:",
                        "for i, layer in enumerate(self.layers):",
                        "for i in range(len(self.layers)):", "for layer in self.layers[1:]:",
                    ]
                )  # fmt: skip
                layer = "self.layers[i]" if "range" in loop else "layer"
                inner = f"{layer}(x)"
                if self.random.random() < 0.7:
                    inner = self.call(inner)
                made += [f"{pad}{loop}", f"{pad}    x = {inner}"]
                if loop.split()[1] in ("i", "i,") and self.random.random() < 0.6:
                    test = self.random.choice(["<", "==", ">"])
                    line = self.random.choice(
                        ["x = torch.tanh(x)", "break", "continue", "return x"]
                    )
                    made += [f"{pad}    if i {test} len(self.layers) - 2:", f"{pad}        {line}"]
                    made.append(f"{pad}    x = {self.deep()}")
            elif draw < 0.95 and depth < 2:
                made.append(f"{pad}return {self.deep()}")
            else:
                made += [f"{pad}try:", *self.lines(depth - 1, 2, loops),
                         f"{pad}finally:", f"{pad}    h = h * 0.9"]  # fmt: skip
        return made

    def layer(self) -> Callable[[], nn.Module]:
        return self.random.choice(
            [
                lambda: nn.Linear(4, 4), lambda: nn.Linear(4, 4, bias=False), nn.Tanh, nn.Identity,
                nn.ReLU, lambda: nn.LayerNorm(4), lambda: nn.Softmax(-1), lambda: MyLinear(4, 4),
                lambda: nn.Dropout(0.5), nn.GELU, lambda: nn.ELU(2.0),
                lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
                lambda: nn.ReLU(inplace=True),
            ]
        )  # fmt: skip

    def edit(self) -> Callable[[Any, bool], Any]:
        """Of a module, and whether it is the optimized one; each does the same to both."""
        r = self.random
        name, made, seed = r.choice(self.LAYERS), self.layer(), r.random()

        def new() -> nn.Module:
            torch.manual_seed(int(seed * 1e6))
            return made()

        def shadow(net: Any, _: bool) -> None:
            if name in net.__dict__:
                del net.__dict__[name]
            else:
                net.__dict__[name] = torch.tanh

        def hook(net: Any, _: bool) -> None:
            layer = net._modules[name]
            if layer._forward_hooks:
                layer._forward_hooks.clear()
            else:
                layer.register_forward_hook(add)

        def of_class(_net: Any, ours: bool) -> None:
            if ours:  # once
                cls = self.names["Drawn"]
                if name in vars(cls):
                    delattr(cls, name)
                else:
                    setattr(cls, name, torch.sigmoid)

        def of_globals(_net: Any, ours: bool) -> None:
            if ours:
                key = r.choice(["F", "function"])
                others = {"F": (F, DrawnF), "function": (torch.tanh, torch.relu)}[key]
                self.names[key] = others[self.names[key] is others[0]]

        def again(net: Any, ours: bool) -> None:
            if ours:
                (mylayers.optimize if r.random() < 0.7 else mylayers.restore)(net)

        item = r.randrange(2)
        mode, flag, number = r.random() < 0.5, r.random() < 0.5, r.randrange(3)
        return r.choice(
            [
                lambda net, _: net.train(mode),
                lambda net, _: net._modules["drop"].train(mode),
                lambda net, _: setattr(net, "flag", flag),
                lambda net, _: setattr(net, "number", number),
                lambda net, _: setattr(net, "nothing", None if flag else new()),
                lambda net, _: setattr(net, "function", torch.relu if flag else torch.sigmoid),
                lambda net, _: setattr(net, name, new()),
                lambda net, _: setattr(net, name, new()),
                lambda net, _: net.layers.append(new()),
                lambda net, _: net.layers.__setitem__(item, new()),
                lambda net, _: net.layers.__delitem__(item) if len(net.layers) > 2 else None,
                lambda net, _: (
                    net.net.__setitem__(item, new()) if isinstance(net.net, nn.Sequential) else None
                ),
                lambda net, _: setattr(net, f"note{number}", 1),
                shadow,
                hook,
                of_class,
                of_globals,
                again,
            ]
        )

    def run(self) -> int:
        """Calls both modules amid changes; how many operators there were."""
        torch.manual_seed(0)
        stock = self.names["Drawn"]()
        ours = copy.deepcopy(stock)
        mylayers.optimize(ours)
        count = 0
        for _ in range(self.random.randint(3, 7)):
            for _ in range(self.random.choice([1, 1, 2])):
                assert_alike(ours, stock)
            with torch.no_grad(), Calls() as calls:
                outcome(ours)
            count += len(calls.seen)
            for _ in range(self.random.choice([1, 1, 2])):
                edit = self.edit()
                for net in (stock, ours):
                    edit(net, net is ours)
        assert_alike(ours, stock)
        return count


class DrawnF:
    """In the place of torch.nn.functional."""

    relu = staticmethod(lambda x, inplace=False: F.relu(x) * 2)  # noqa: ARG005
    gelu = staticmethod(torch.tanh)
    elu = staticmethod(F.elu)
    dropout = staticmethod(F.dropout)
    softmax = staticmethod(F.softmax)


class DrawnBase(Base):
    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Linear(4, 4, bias=False)
        self.number = 1


def draw(seeds: range) -> int:
    """Runs drawn forwards; how many operators there were."""
    count = 0
    for seed in seeds:
        drawn = Draw(seed)
        try:
            count += drawn.run()
        except BaseException:
            print(f"seed {seed}:\n{drawn.text}")
            raise
        finally:
            drawn.forget()
    return count


@pytest.mark.grid(one_in=3)
@pytest.mark.parametrize("first", range(0, 150, 15))
def test_drawn_forwards_compute_what_stocks_do(first):
    assert draw(range(first, first + 15)) > 15


# ---- the page ----------------------------------------------------------------------------------

# What other tests show: a line of the table, and the test.
OTHERS = {
    "`torch.compile`, `torch.export`, `torch.jit.trace`, `torch.fx.symbolic_trace`": (
        "follow the user's own forward",
        test_other_roads_see_the_users_own_forward,
    ),
    "`torch.jit.script`": (
        "compiles the user's source",
        test_it_is_scripted_as_its_author_wrote_it,
    ),
    "a shape that does not fit, no tensor": (
        "the user's own line raises",
        test_an_exception_comes_from_the_users_own_line,
    ),
    "a subclass of Tensor, a `TorchFunctionMode`": (
        "sees every function",
        test_a_subclass_of_tensor_sees_each_function,
    ),
    "autocast, `torch.func`, forward-mode gradients": (
        "fused, with stock's results",
        test_autocast_and_transforms_compute_what_stocks_do,
    ),
    "it is copied, pickled": (
        "an optimized copy is optimized",
        test_copies_are_optimized_and_restored_alike,
    ),
    "a class derived from an optimized module's": (
        "runs the user's own forward",
        test_a_class_derived_from_that_of_an_optimized_module_runs_as_it_is,
    ),
    "`__init_subclass__`, a metaclass, a `__setattr__` that refuses": (
        "runs as it is, with the reason",
        test_a_class_that_will_not_have_it_is_left,
    ),
    "an exception while `optimize` works": (
        "nothing is changed",
        test_an_exception_halfway_leaves_nothing_changed,
    ),
    "several threads": ("each call is right", test_several_threads_call_change_and_optimize_it),
}


def lines_of(case: Case) -> str:
    """A forward as a line of the table."""
    net = case.made()
    forward = type(net).forward
    if case.name.startswith("with"):
        return {"without_source": "source that is not there, as of `exec`"}.get(
            case.name, "a source file that was changed meanwhile"
        )
    if isinstance(net, Inherited):
        return "a forward that is inherited"
    text = textwrap.dedent(inspect.getsource(vars(type(net)).get("forward", forward)))
    bare = (line.partition("  #")[0] for line in text.splitlines())
    lines = [line for line in bare if line.strip() and not line.strip().startswith("#")]
    return (
        "<br>".join(f"`{' ' * (len(line) - len(line.lstrip()))}{line.strip()}`" for line in lines)
        .replace("|", "\\|")
        .replace("](", "] (")
    )  # which would be a link


def table() -> str:
    rows = ["| a forward | what is fused |", "|---|---|"]
    for case in CASES:
        report = mylayers.optimize(case.made())
        found = fused(report)
        evaluation = fused(mylayers.optimize(case.made(False)))
        what = f"`{found}`" if found else f"nothing: {why(report)}"
        if evaluation != found:
            what += f"; in evaluation `{evaluation}`"
        rows.append(f"| {lines_of(case)} | {what} |")
    rows += ["", "| between two calls | what comes of it |", "|---|---|"]
    rows += [f"| {name} | the next call is right |" for name in (*EDITS, *PATCHES)]
    rows += [f"| {what} | {result} |" for what, (result, _) in OTHERS.items()]
    return "\n".join(rows)


def why(report: mylayers.Report) -> str:
    found = [f.reason for f in report.unfused if f.path in ("a", "b", "body.a", "0", "layers.0")]
    return found[0] if found else "there is no layer to fuse it with"


def test_the_page_has_this_table():
    _, _, rest = PAGE.read_text().partition(BEGIN)
    now = table()
    assert rest.partition(END)[0].strip() == now, f"run python {Path(__file__).name}"


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", type=int, help="so many forwards, in the place of the page")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    asked = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    if asked.draw is not None:
        count = draw(range(asked.seed, asked.seed + asked.draw))
        print(f"{asked.draw} forwards from seed {asked.seed}: alike, {count} operators")
        return
    text = PAGE.read_text()
    PAGE.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n{table()}\n{END}{text.split(END)[1]}")


if __name__ == "__main__":
    main()
