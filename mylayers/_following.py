"""What lines of a forward come to, for a module as it is: layers one after another.

The lines are followed with the module's own values in the place of names, and a tensor of which
nothing is known. Whatever is read on the way is noted (:class:`Node`, ``globals``): as long as all
of it stays, the lines come to the same layers. What cannot be followed ends the region there.
"""

import ast
import builtins
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

from mylayers import _watched, sequential, stock
from mylayers._extension import _C
from mylayers._source import Source
from mylayers.activations import ACTIVATIONS, LARGEST, LEAST, RANGE, name_of
from mylayers.sequential import FusedSequential, Layer, Unfused
from mylayers.stock import HOOKS, Must, Stock

__all__ = ["Element", "FollowError", "Follower", "Node", "has_of_class"]


class FollowError(Exception):
    """Why lines cannot be followed."""


# ---- values ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flow:
    """The tensor that has gone through so many layers."""

    layers: int


@dataclass(frozen=True)
class _Method:
    """A method of that tensor."""

    of: _Flow
    name: str


@dataclass(frozen=True)
class _Module:
    """A module, by its place among the nodes."""

    node: int


@dataclass(frozen=True)
class _Known:
    """An object of Python's or PyTorch's own, or a constant."""

    value: Any


@dataclass(frozen=True)
class _Items:
    """What a loop goes over."""

    items: tuple[Any, ...]


_Value = _Flow | _Method | _Module | _Known | _Items

_ATOMS = (int, float, str, bool, type(None))
_OBJECTS = (torch, nn, F)
_BUILTINS = (len, range, enumerate, zip, isinstance)
_TYPES = (int, float, str, bool, list, tuple, dict)
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Not: operator.not_,
    ast.USub: operator.neg,
}


def _is_known(value: object, among: Iterable[object]) -> bool:
    return any(value is one for one in among)


# ---- functions ---------------------------------------------------------------------------------

# Names of their arguments behind the tensor, with their defaults.
_Arguments = dict[str, Any]


def _activation(name: str, arguments: _Arguments) -> Layer:
    """Of the function of this name."""
    inplace = arguments.pop("inplace", False)
    if type(inplace) is not bool:
        raise FollowError("its inplace is no bool")
    for kind, known in ACTIVATIONS.items():
        if name not in (kind, known.module.__name__.lower()):
            continue
        setting = arguments.pop(known.setting, known.default)
        allowed = type(setting) in (int, float) and LEAST <= setting <= LARGEST
        if known.setting and not allowed:
            raise FollowError(f"its {known.setting} is no number {RANGE}")
        if arguments.items() <= known.settings.items():
            return Layer(name_of(kind, setting), in_place=inplace)
    raise FollowError(f"{name} with {arguments}")


def _flatten(arguments: _Arguments) -> Layer:
    if not all(map(stock.is_index, arguments.values())):
        raise FollowError("flatten of dimensions that are no ints")
    return Layer(f"flatten({arguments['start_dim']},{arguments['end_dim']})")


def _dropout(arguments: _Arguments) -> Layer:
    p = arguments["p"]
    if arguments["training"] is not False:
        raise FollowError("dropout is random in training")
    if type(p) not in (int, float) or not 0 <= p <= 1:
        raise FollowError("its p is no probability")
    return Layer("")


_PARAMETERS: dict[str, _Arguments] = {
    "relu": {"inplace": False},
    "elu": {"alpha": 1.0, "inplace": False},
    "gelu": {"approximate": "none"},
    "silu": {"inplace": False},
    "leaky_relu": {"negative_slope": 0.01, "inplace": False},
    "selu": {"inplace": False},
    "celu": {"alpha": 1.0, "inplace": False},
    "softplus": {"beta": 1, "threshold": 20},
    "mish": {"inplace": False},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0, "inplace": False},
    "relu6": {"inplace": False},
    "hardswish": {"inplace": False},
    "hardsigmoid": {"inplace": False},
    "flatten": {"start_dim": 0, "end_dim": -1},
    "dropout": {"p": 0.5, "training": True, "inplace": False},
}
# Builtin, and deaf to the keywords that the same function of torch.nn.functional has.
_OWN_PARAMETERS: dict[Any, _Arguments] = {
    torch.relu: {},
    Tensor.relu: {},
    torch.selu: {},
    torch.celu: {"alpha": 1.0},
}
_BY_KEYWORD = (F.gelu,)

_FUNCTIONS: dict[Any, str] = {
    function: name.rpartition(".")[2]
    for owner, name, function in (*_watched.BY_LAYERS, *_watched.BY_FORWARDS)
    if owner in (torch, F, Tensor) and name in (*ACTIVATIONS, "flatten", "dropout")
}


def _layer_of(function: Any, given: list[Any], named: dict[str, Any]) -> Layer:
    """A function's, with these arguments behind the tensor."""
    name = _FUNCTIONS[function]
    defaults = _OWN_PARAMETERS.get(function, _PARAMETERS.get(name, {}))
    if len(given) > (0 if function in _BY_KEYWORD else len(defaults)):
        raise FollowError(f"{name} with arguments of its own")
    placed = dict(zip(defaults, given, strict=False))
    if named.keys() - defaults.keys() or named.keys() & placed.keys():
        raise FollowError(f"{name} with arguments of its own")
    arguments = {**defaults, **placed, **named}
    if name == "flatten":
        return _flatten(arguments)
    return _dropout(arguments) if name == "dropout" else _activation(name, arguments)


# ---- modules -----------------------------------------------------------------------------------


@dataclass
class Node:
    """A module that lines read, and how: ``Node`` in csrc/python/forwards.cpp.

    Attributes:
        owner: the node whose child it is; 0 is the module whose forward it is.
        name: its key there.
        place: the same in their order; -1: any.
        module: the module, as it is now.
        kind: as the extension compares it.
        size: how many children it must have; -1: any number.
        children: attributes that must be children of it.
        attributes: what its ``__dict__`` must hold.
    """

    owner: int
    name: str
    place: int
    module: nn.Module
    kind: stock.Kind
    size: int = -1
    children: dict[str, None] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)

    def for_extension(self) -> tuple[Any, ...]:
        """As ``keep_regions`` takes it."""
        return (
            self.owner,
            self.name,
            self.place,
            self.kind,
            self.size,
            tuple(self.children),
            tuple(self.attributes.items()),
        )


@dataclass(frozen=True)
class Element:
    """One layer of a region.

    Attributes:
        label: how the report calls it.
        layer: what it is to a chain.
        node: its module's place among the nodes; -1: it is a function.
        call: which call of the forward it is part of.
    """

    label: str
    layer: Layer
    node: int
    call: int


# Of which forwards ask the length and items, too, and make others by slices.
_LIST = Stock(
    nn.ModuleList(),
    harmless=stock.HARMLESS
    - {"__len__", "__getitem__", "append", "extend", "__iadd__", "add_module", "register_module"},
)
_LIST_INIT = vars(nn.ModuleList)["__init__"]  # Dynamo replaces nn.Module's
_ITER = nn.Sequential.__iter__
_NETWORKS = (Stock(nn.Sequential()), Stock(FusedSequential()))


def has_of_class(cls: type, name: str) -> bool:
    """Whether a class or a base of it has this name."""
    return any(name in vars(base) for base in cls.__mro__)


def _container(module: nn.Module, known: Stock) -> stock.Kind | None:
    """One that gives its children as its stock class does, and has no hooks; None if it may not."""
    cls = type(module)
    version, difference = stock.judge(cls, known)
    own = dict(module.__dict__)
    if (
        not version
        or difference.name
        or any(type(name) is not str for name in own)
        or known.is_shadowed_by(own)
        or not all(stock.is_empty(own.get(hooks)) for hooks in HOOKS)
        or type(own.get("_modules")) is not dict
    ):
        return None
    entries = stock.entries(own)
    assert entries is not None
    as_modules = ("_modules", Must.BE_MODULES, None)
    return cls, version, tuple(as_modules if e[0] == "_modules" else e for e in entries)


# ---- the lines ---------------------------------------------------------------------------------


class Follower:
    """Follows lines of a module's forward.

    Attributes:
        nodes: the modules that they read; the first is the one whose forward it is.
        globals: what the names are that they look up in the function's globals.
        builtins: and among the builtins.
        input: the name of the tensor that they begin with; "" as long as there is none.
        elements: the layers that it goes through.
        names: what names stand for.
        returned: whether they end in a return of what came of it.
    """

    def __init__(self, module: nn.Module, source: Source, evaluates: bool) -> None:
        cls = type(module)
        self.source = source
        self.evaluates = evaluates
        self.nodes = [Node(0, "", -1, module, (cls, _C.class_version(cls), None))]
        self.globals: dict[str, Any] = {}
        self.builtins: dict[str, Any] = {}
        self.input = ""
        self.elements: list[Element] = []
        self.names: dict[str, _Value] = {source.code.co_varnames[0]: _Module(0)}
        self.returned = False
        self._calls = 0
        self._loops = 0  # around the line
        self._jump: type[ast.stmt] | None = None  # a break or continue that was come to

    # -- statements

    def follow(self, statement: ast.stmt) -> None:
        """Go on with a statement; raises FollowError, and is then of no further use."""
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            self._assign(statement.targets[0], self.value(statement.value))
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            self._assign(statement.target, self.value(statement.value))
        elif isinstance(statement, ast.For) and not statement.orelse:
            self._follow_loop(statement)
        elif isinstance(statement, ast.If):
            self._follow_all(statement.body if self._constant(statement.test) else statement.orelse)
        elif isinstance(statement, ast.Return) and statement.value is not None:
            if self.value(statement.value) != self.flow:
                raise FollowError("it returns something else")
            self.returned = True
        elif isinstance(statement, ast.Break | ast.Continue) and self._loops:
            self._jump = type(statement)
        elif isinstance(statement, ast.Pass) or (
            isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        ):
            return
        else:
            raise FollowError(f"a line of {type(statement).__name__.lower()}")

    def _follow_loop(self, loop: ast.For) -> None:
        self._loops += 1
        for item in self._iterated(self.value(loop.iter)):
            self._assign(loop.target, item)
            self._follow_all(loop.body)
            leaves = self.returned or self._jump is ast.Break
            self._jump = None
            if leaves:
                break
        self._loops -= 1

    def _follow_all(self, lines: list[ast.stmt]) -> None:
        for line in lines:
            if self.returned or self._jump:
                break
            self.follow(line)

    def _assign(self, target: ast.expr, value: _Value) -> None:
        if isinstance(target, ast.Name):
            if target.id == self._self:
                raise FollowError(f"{target.id} is assigned to")
            self.names[target.id] = value
        elif isinstance(target, ast.Tuple) and isinstance(value, _Items):
            if len(target.elts) != len(value.items):
                raise FollowError("so many names for so many values")
            for one, item in zip(target.elts, value.items, strict=True):
                self._assign(one, item)
        else:
            raise FollowError("it assigns to more than a name")

    # -- expressions

    @property
    def flow(self) -> _Flow:
        """What has come of the tensor so far."""
        return _Flow(len(self.elements))

    @property
    def _self(self) -> str:
        return self.source.code.co_varnames[0]

    def value(self, e: ast.expr) -> _Value:
        """What an expression is."""
        if isinstance(e, ast.Constant):
            return self._known(e.value)
        if isinstance(e, ast.Name):
            return self._name(e.id)
        if isinstance(e, ast.Attribute):
            return self._attribute(self.value(e.value), e.attr)
        if isinstance(e, ast.Call):
            return self._call(e)
        if isinstance(e, ast.Subscript):
            return self._item(self.value(e.value), e.slice)
        if isinstance(e, ast.IfExp):
            return self.value(e.body if self._constant(e.test) else e.orelse)
        if isinstance(e, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.BinOp):
            return _Known(self._constant(e))
        raise FollowError(f"an expression of {type(e).__name__.lower()}")

    def _known(self, value: object) -> _Known:
        if type(value) not in _ATOMS:
            raise FollowError(f"a value of {type(value).__name__}")
        return _Known(value)

    def _name(self, name: str) -> _Value:
        if name in self.names:
            return self.names[name]
        code = self.source.code
        if name in code.co_varnames or name in code.co_cellvars:
            if self.input:
                raise FollowError(f"{name} is computed elsewhere")
            self.input = name
            self.names[name] = _Flow(0)
            return self.names[name]
        if name in code.co_freevars:
            raise FollowError(f"{name} is a variable of the function around it")
        known = self.source.function.__globals__
        if name in known:
            value = known[name]
            if not _is_known(value, _OBJECTS) and not _is_function(value):
                raise FollowError(f"{name} is a global variable")
            self.globals[name] = value
        else:
            value = vars(builtins).get(name, builtins)
            if not _is_known(value, (*_BUILTINS, *_TYPES)):
                raise FollowError(f"{name} is called")
            self.builtins[name] = value
        return _Known(value)

    def _attribute(self, of: _Value, name: str) -> _Value:
        if isinstance(of, _Module) and of.node == 0:
            return self._of_self(name)
        if isinstance(of, _Known) and isinstance(of.value, ModuleType):
            found = vars(of.value).get(name)
            if _is_known(found, _OBJECTS) or _is_function(found):
                return _Known(found)
            raise FollowError(f"{of.value.__name__}.{name} has no fused kernel")
        # What a layer computed has no attributes of its own; the input may.
        if isinstance(of, _Flow) and any(e.layer.computes for e in self.elements[: of.layers]):
            return _Method(of, name)
        raise FollowError(f"it reads {name} of something else")

    def _of_self(self, name: str) -> _Value:
        node = self.nodes[0]
        own, label = node.module.__dict__, f"{self._self}.{name}"
        if has_of_class(type(node.module), name):
            raise FollowError(f"{label} is of its class")
        if name in own:
            value = False if self.evaluates and name == "training" else own[name]
            if type(value) not in _ATOMS and not _is_function(value):
                raise FollowError(f"{label} is of {type(value).__name__}")
            node.attributes[name] = value
            return _Known(value)
        found = own["_modules"].get(name)
        if name in own["_parameters"] or name in own["_buffers"] or found is None:
            raise FollowError(f"{label} is no module")
        node.children[name] = None
        return _Module(self._reach(0, name, -1, found))

    def _reach(self, owner: int, name: str, place: int, module: nn.Module) -> int:
        for i, node in enumerate(self.nodes):
            if i and (node.owner, node.name, node.place) == (owner, name, place):
                return i
        # Its class alone, until more is asked for.
        self.nodes.append(Node(owner, name, place, module, (type(module), 0, None)))
        return len(self.nodes) - 1

    # -- calls

    def _call(self, e: ast.Call) -> _Value:
        function = self.value(e.func)
        if any(isinstance(a, ast.Starred) for a in e.args) or any(
            k.arg is None for k in e.keywords
        ):
            raise FollowError("it is called with arguments of any number")
        given = [self.value(a) for a in e.args]
        named = {k.arg or "": self.value(k.value) for k in e.keywords}
        if isinstance(function, _Module):
            if len(given) != 1 or named:
                raise FollowError("a module that is given more than one tensor")
            return self._through_module(function, given[0])
        if isinstance(function, _Method):
            method = vars(Tensor).get(function.name) or getattr(Tensor, function.name, None)
            if not _is_function(method):
                raise FollowError(f"its {function.name} has no fused kernel")
            return self._through_function(method, function.of, given, named)
        if isinstance(function, _Known) and _is_function(function.value):
            if not given:
                raise FollowError("a tensor that is given by its name")
            return self._through_function(function.value, given[0], given[1:], named)
        if isinstance(function, _Known) and not named:
            return self._builtin(function.value, given)
        raise FollowError("it calls something else")

    def _through(self, flow: _Value, label: str, layer: Layer, node: int) -> None:
        if flow != self.flow:
            raise FollowError(f"{label} is not given what came of the layer before it")
        self.elements.append(Element(label, layer, node, self._calls))

    def _through_function(
        self, function: Any, flow: _Value, given: list[_Value], named: dict[str, _Value]
    ) -> _Value:
        if _C.replaced_functions():  # maybe one that this calls
            raise FollowError("a function of PyTorch's was replaced")
        constants = [_constant(v) for v in given]
        layer = _layer_of(function, constants, {k: _constant(v) for k, v in named.items()})
        self._through(flow, _FUNCTIONS[function], layer, -1)
        self._calls += 1
        return self.flow

    def _through_module(self, called: _Module, flow: _Value) -> _Value:
        self._go_through(called.node, flow)
        self._calls += 1
        return self.flow

    def _go_through(self, place: int, flow: _Value) -> None:
        node = self.nodes[place]
        if isinstance(node.module, nn.Sequential):
            for child in self._children(place, _NETWORKS):
                self._go_through(child, flow)
                flow = self.flow
            return
        look = sequential.look_at(node.module, evaluates=self.evaluates)
        layer = sequential.layer_of(node.module, look)
        label = self._label(place)
        if isinstance(layer, Unfused):
            raise FollowError(layer.reason)
        node.kind = sequential.kind_of(node.module, look, layer)
        self._through(flow, label, layer, place)

    def _label(self, place: int) -> str:
        names: list[str] = []
        while place:
            names.insert(0, self.nodes[place].name)
            place = self.nodes[place].owner
        return ".".join(names)

    def _children(self, place: int, known: Iterable[Stock]) -> list[int]:
        """The nodes of all its children, in their order."""
        node = self.nodes[place]
        kinds = [kind for one in known if (kind := _container(node.module, one))]
        if not kinds:
            raise FollowError(f"{type(node.module).__name__} does more than its stock class")
        node.kind = kinds[0]
        return self._listed(place)

    def _listed(self, place: int) -> list[int]:
        modules = self.nodes[place].module._modules
        self.nodes[place].size = len(modules)
        children = []
        for i, (name, child) in enumerate(modules.items()):
            if child is None or type(name) is not str:
                raise FollowError("an entry that is no module")
            children.append(self._reach(place, name, i, child))
        return children

    # -- what Python computes

    def _builtin(self, function: Any, given: list[_Value]) -> _Value:
        if function is len and len(given) == 1 and given[0] != _Module(0):
            return _Known(len(self._iterated(given[0])))
        if function is range and 1 <= len(given) <= 3:
            numbers = [_constant(v) for v in given]
            if all(type(n) is int for n in numbers) and 0 not in numbers[2:]:
                made = range(*numbers)
                if len(made) <= 1024:
                    return _Items(tuple(map(_Known, made)))
        if function is enumerate and len(given) == 1:
            items = self._iterated(given[0])
            return _Items(tuple(_Items((_Known(i), item)) for i, item in enumerate(items)))
        if function is zip and given:
            rows = zip(*map(self._iterated, given), strict=False)
            return _Items(tuple(map(_Items, rows)))
        if function is isinstance and len(given) == 2 and isinstance(given[0], _Known):
            cls = _constant(given[1])
            if _is_known(cls, _TYPES):
                return _Known(isinstance(given[0].value, cls))
        raise FollowError("it calls something else")

    def _iterated(self, value: _Value) -> tuple[Any, ...]:
        if isinstance(value, _Items):
            return value.items
        if isinstance(value, _Module):
            module = self.nodes[value.node].module
            if type(module) is nn.ModuleList and vars(nn.ModuleList)["__init__"] is _LIST_INIT:
                return tuple(map(_Module, self._children(value.node, [_LIST])))
            if value.node == 0 and isinstance(module, nn.Sequential):
                return tuple(map(_Module, self._own_children()))
        raise FollowError("it goes over something else")

    def _own_children(self) -> list[int]:
        """Of a module that is an nn.Sequential and iterates as that does."""
        node = self.nodes[0]
        cls = type(node.module)
        if cls.__iter__ is not _ITER or has_of_class(cls, "_modules"):  # type: ignore[attr-defined]
            raise FollowError(f"{cls.__name__} has a way of its own to go over its children")
        return self._listed(0)

    def _item(self, of: _Value, index: ast.expr) -> _Value:
        if isinstance(of, _Module) and type(self.nodes[of.node].module) is not nn.ModuleList:
            raise FollowError("it takes items of something else")
        items = self._iterated(of)
        if isinstance(index, ast.Slice):
            parts: list[Any] = [
                p and self._constant(p) for p in (index.lower, index.upper, index.step)
            ]
            if any(type(p) not in (int, type(None)) for p in parts) or parts[2] == 0:
                raise FollowError("a slice of something else")
            return _Items(items[slice(*parts)])
        place = self._constant(index)
        if type(place) is not int or not -len(items) <= place < len(items):
            raise FollowError("an item of something else")
        if isinstance(of, _Module):
            name = self.nodes[items[place].node].name
            if name != str(place % len(items)):
                raise FollowError("a list with names of its own")
        return items[place]  # type: ignore[no-any-return]

    def _constant(self, e: ast.expr) -> Any:
        """The value of an expression of constants."""
        if isinstance(e, ast.BoolOp):
            stops_at = isinstance(e.op, ast.Or)
            for one in e.values:
                value = self._constant(one)
                if bool(value) == stops_at:
                    break
            return value
        if isinstance(e, ast.UnaryOp | ast.BinOp):
            function = _OPERATORS.get(type(e.op))
            operands = [e.operand] if isinstance(e, ast.UnaryOp) else [e.left, e.right]
            if function is not None:
                return _computed(function, [self._constant(o) for o in operands])
            raise FollowError(f"it computes by {type(e.op).__name__.lower()}")
        if isinstance(e, ast.Compare):
            if len(e.ops) != 1:
                raise FollowError("a chain of comparisons")
            (test,), (right,) = e.ops, e.comparators
            if isinstance(test, ast.Is | ast.IsNot):
                return self._is(e.left, right) == isinstance(test, ast.Is)
            function = _OPERATORS.get(type(test))
            if function is None:
                raise FollowError(f"it compares by {type(test).__name__.lower()}")
            return _computed(function, [self._constant(e.left), self._constant(right)])
        return _constant(self.value(e))

    def _is(self, left: ast.expr, right: ast.expr) -> bool:
        a, b = self.value(left), self.value(right)
        for one, other in ((a, b), (b, a)):
            if isinstance(other, _Known) and (other.value is None or type(other.value) is bool):
                return isinstance(one, _Known) and one.value is other.value
        raise FollowError("it compares objects")


def _is_function(value: object) -> bool:
    return any(value is known for known in _FUNCTIONS)


def _constant(value: _Value) -> Any:
    if not isinstance(value, _Known):
        raise FollowError("what it does depends on values")
    return value.value


def _computed(function: Callable[..., Any], operands: list[Any]) -> Any:
    if any(type(o) not in _ATOMS for o in operands):
        raise FollowError("it computes with something else")
    try:
        return function(*operands)
    except TypeError as e:
        raise FollowError(str(e)) from None
