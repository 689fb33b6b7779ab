"""``FusedSequential``: an ``nn.Sequential`` that computes runs of its children in one operator.

What can be fused, and how, stands here alone (``_RULES``, ``plan``). An eager call compares the
children with the last plans in C++ (csrc/python/plans.h), which reads the parameters anew on every
call; where none fits any more, a new one is made.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mylayers import _watched, stock
from mylayers._extension import _C
from mylayers.activations import ACTIVATIONS, LARGEST, LEAST, RANGE, name_of, row_of
from mylayers.layers import STOCK_MY_LINEAR, CenteredLayer, MyLinear
from mylayers.stock import DICTIONARIES, HOOKS, TENSORS, Difference, Must, Stock

__all__ = ["FusedSequential"]

_is_compiling = torch.compiler.is_compiling
# Asks less and takes half as long, which a small call notices; export has a mode of its own.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]
_REFUSED = _C.REFUSED

# A module's __dict__, or what it was.
_State = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """What a child is to a chain.

    Attributes:
        step: the operator's name for it, without later activation; "" for none.
        attributes: those of the child that this holds for.
    """

    step: str
    attributes: tuple[str, ...] = ()
    in_place: bool = False

    @property
    def is_linear(self) -> bool:
        return self.step.startswith("linear")

    @property
    def is_affine(self) -> bool:
        """Whether it is linear, without an activation."""
        return self.step in _AFFINE_STEPS

    @property
    def has_parameters(self) -> bool:
        return self.is_linear or "+weight" in self.step

    @property
    def computes(self) -> bool:
        return bool(self.step) and not self.step.startswith("flatten")


@dataclass(frozen=True)
class Unfused:
    """A child that runs by itself.

    Attributes:
        reason: why, for the report of :func:`mylayers.optimize`.
        attributes: those of the child that this holds for.
        lasting: whether it holds for all of the child's class.
    """

    reason: str
    attributes: tuple[str, ...] = ()
    lasting: bool = False


ALONE = Unfused("there is no layer to fuse it with", lasting=True)
_COMPUTED = "its weight or bias is computed, not a parameter"


# ---- what can be fused -------------------------------------------------------------------------
#
# Each rule is given the state of a module that is one of its class's, and nothing else of it.


# A module's weight and bias, as they are named here.
_WITH_PARAMETERS = (nn.Linear, MyLinear, nn.LayerNorm)


def _parameters_objection(parameters: object) -> str:
    if type(parameters) is not dict:
        return f"its parameters are in a {type(parameters).__name__}"
    if "weight" not in parameters or "bias" not in parameters:
        return _COMPUTED
    for name in ("weight", "bias"):
        value = parameters[name]
        if value is None:
            continue
        if not isinstance(value, Tensor) or is_foreign(value):
            return f"its {name} is of {type(value).__name__}, which computes itself"
    return ""


def _linear(own: _State, step: str, *attributes: str) -> Layer | Unfused:
    parameters = own["_parameters"]
    if objection := _parameters_objection(parameters):
        return Unfused(objection)
    if parameters["weight"] is None:
        return Unfused(_COMPUTED)
    name, *activation = step.split("+")
    if not _takes(parameters["weight"], parameters["bias"], 0 if name == "linear_t" else 1):
        return Unfused("its weight is no matrix, or its bias is broadcast")
    bias = [] if parameters["bias"] is None else ["bias"]
    return Layer("+".join([name, *bias, *activation]), attributes)


def _takes(weight: Tensor, bias: Tensor | None, of_units: int) -> bool:
    """Whether they are a matrix and, if there is one, a vector of its size in this dimension."""
    if not _is_compiling():
        return _C.takes_parameters(weight, bias, of_units)  # where a tracer would record the sizes
    if weight.dim() != 2 or bias is None:
        return weight.dim() == 2
    return bias.dim() == 1 and bias.shape[0] == weight.shape[of_units]


def _my_linear(own: _State) -> Layer | Unfused:
    activation = own.get("activation")
    if activation is None:
        return _linear(own, "linear", "activation")
    row = row_of(activation) if type(activation) is str else None
    if row is None:
        return Unfused("its activation is none of ours", ("activation",))
    if not row.reads_input:
        return _linear(own, f"linear+{activation}", "activation")
    layer = _linear(own, "linear", "activation")
    if isinstance(layer, Unfused):
        return layer
    return replace(layer, step=f"{layer.step}; {activation}")


def _activation(module: type[nn.Module]) -> Callable[[_State], Layer | Unfused]:
    known = {name: one for name, one in ACTIVATIONS.items() if one.module is module}
    settings = sorted({setting for one in known.values() for setting in one.settings})
    free = next(iter(known.values())).setting
    works_in_place = "inplace" in vars(module())
    attributes = (*settings, *filter(None, [free]), *["inplace"] * works_in_place)

    def rule(own: _State) -> Layer | Unfused:
        inplace = own.get("inplace") if works_in_place else False
        given = {setting: own.get(setting) for setting in settings}
        if free:
            value: Any = own.get(free)
            if type(value) not in (int, float) or not LEAST <= value <= LARGEST:
                # Dynamo cannot write a number that it traces.
                got = "" if _is_compiling() else f"{value!r}, "
                return Unfused(f"its {free} is {got}no number {RANGE}", attributes)
        if type(inplace) is not bool:
            return Unfused("its inplace is no bool", attributes)
        for setting, value in given.items():
            if type(value) not in (int, float, str):
                return Unfused(f"its {setting} is of {type(value).__name__}", attributes)
        for name, one in known.items():
            if given == one.settings:
                step = name_of(name, value) if free else name
                return Layer(step, attributes, inplace)
        reasons = []
        for setting, value in given.items():
            fused = " or ".join(repr(one.settings[setting]) for one in known.values())
            reasons.append(f"{setting} is {value!r}, not {fused}")
        return Unfused(", ".join(reasons), attributes)

    return rule


def _centered(own: _State) -> Layer | Unfused:
    if own.get("_group") is not None:
        return Unfused("its mean is over several processes", ("_group",))
    dim = own.get("dim")
    dims = (dim,) if type(dim) is int else dim
    if dims is not None and not (type(dims) is tuple and all(map(stock.is_index, dims))):
        return Unfused("its dim is neither None nor an int nor a tuple of them", ("dim",))
    step = f"center({','.join(map(str, dims))})" if dims else "center"
    return Layer(step, ("dim", "_group"))


def _is_size(value: object) -> bool:
    return stock.is_index(value) and value >= 0


def _layer_norm(own: _State) -> Layer | Unfused:
    sizes = own.get("normalized_shape")
    epsilon: Any = own.get("eps")
    attributes = ("normalized_shape", "eps")
    if type(sizes) is not tuple or not sizes or not all(map(_is_size, sizes)):
        return Unfused("its normalized_shape is no tuple of sizes", attributes)
    if type(epsilon) not in (int, float) or not math.isfinite(epsilon):
        return Unfused("its eps is no finite number", attributes)
    parameters = own["_parameters"]
    if objection := _parameters_objection(parameters):
        return Unfused(objection)
    step = f"layer_norm({','.join(map(str, sizes))},{float(epsilon)!r})"
    if parameters["weight"] is None:
        none = parameters["bias"] is None
        return Layer(step, attributes) if none else Unfused("it has a bias and no weight")
    bias = "" if parameters["bias"] is None else "+bias"
    return Layer(f"{step}+weight{bias}", attributes)


def _flatten(own: _State) -> Layer | Unfused:
    first, last = own.get("start_dim"), own.get("end_dim")
    if not stock.is_index(first) or not stock.is_index(last):
        return Unfused("its start_dim or end_dim is no int", ("start_dim", "end_dim"))
    return Layer(f"flatten({first},{last})", ("start_dim", "end_dim"))


def _dropout(own: _State) -> Layer | Unfused:
    if own.get("training") is not False:
        return Unfused("dropout is random in training", ("training",))
    p: Any = own.get("p")
    if type(p) not in (int, float) or not 0 <= p <= 1:
        return Unfused("its p is no probability", ("p",))
    return Layer("", ("training", "p"))


_RULES: dict[type[nn.Module], Callable[[_State], Layer | Unfused]] = {
    nn.Linear: lambda own: _linear(own, "linear_t"),
    MyLinear: _my_linear,
    **{one.module: _activation(one.module) for one in ACTIVATIONS.values()},
    CenteredLayer: _centered,
    nn.LayerNorm: _layer_norm,
    nn.Identity: lambda _: Layer(""),
    nn.Flatten: _flatten,
    nn.Dropout: _dropout,
}
_STOCKS = {
    **{cls: Stock(cls()) for cls in _RULES if cls not in _WITH_PARAMETERS},
    nn.LayerNorm: Stock(nn.LayerNorm(1, device="cpu")),
    nn.Linear: stock.stock_linear(nn.Linear),
    MyLinear: STOCK_MY_LINEAR,
}


# ---- a child ------------------------------------------------------------------------------------


def _base(cls: type) -> type[nn.Module] | None:
    return next((base for base in cls.__mro__ if base in _RULES), None)


def _objection(cls: type, difference: Difference) -> str:
    name = difference.name
    if not name:
        return ""
    if name in ("weight", "bias"):
        return _COMPUTED
    if difference.is_stocks:
        return f"{difference.cls}.{name} was replaced"
    return f"{cls.__name__} overrides {base.__name__}.{name}" if (base := _base(cls)) else ""


class _Look(NamedTuple):
    """What planning saw of a child.

    Attributes:
        version: of its class; 0 if that has none.
        objection: why its class is not fused.
        own: its state.
    """

    version: int
    objection: Unfused | None
    own: _State


def _class_objection(cls: type) -> str:
    base = _base(cls)
    if base is None or type(cls) not in stock.METACLASSES:
        return _no_kernel(cls)
    return _objection(cls, _STOCKS[base].difference(cls))


# What follows from a class's state is a constant to Dynamo, which guards the class alone.
# (torch.compiler.assume_constant_result does this, and imports Dynamo for it.)
_class_objection._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _no_kernel(cls: type) -> str:
    if type(cls) not in stock.METACLASSES:
        return f"{cls.__name__} has the metaclass {type(cls).__name__}"
    return f"{cls.__name__} has no fused kernel"


def look_at(child: nn.Module, *, evaluates: bool = False) -> _Look:
    """What planning sees of a child; as if it were in evaluation mode, if it is so asked."""
    look = _look_as_it_is(child)
    return look._replace(own={**look.own, "training": False}) if evaluates else look


def _look_as_it_is(child: nn.Module) -> _Look:
    cls = type(child)
    if _is_compiling():
        reason = _class_objection(cls)
        own = {**child.__dict__, "_parameters": child._parameters}
        return _Look(1, Unfused(reason) if reason else None, own)
    base = _base(cls) if type(cls) in stock.METACLASSES else None
    if base is None:
        return _Look(0, Unfused(_no_kernel(cls), lasting=True), {})
    version, difference = stock.judge(cls, _STOCKS[base])
    reason = _objection(cls, difference)
    if reason:
        return _Look(version, Unfused(reason, lasting=not difference.is_stocks), {})
    if not version:
        return _Look(0, Unfused(f"CPython counts no changes of {cls.__name__}", lasting=True), {})
    return _Look(version, None, stock.own_state(child))


def _is_made(own: _State) -> bool:
    """Whether a module's state has what nn.Module.__init__ gives it."""
    parameters = own.get("_parameters")
    is_mapping = type(parameters) in DICTIONARIES or isinstance(parameters, Mapping)
    return is_mapping and all(hooks in own for hooks in HOOKS)


def layer_of(child: nn.Module, look: _Look) -> Layer | Unfused:
    """What it is to a chain."""
    if look.objection is not None:
        return look.objection
    own, base = look.own, _base(type(child))
    assert base is not None
    if not _is_made(own):
        return Unfused("it was not initialised")
    if function := _watched.replaced(base):
        return Unfused(f"{function} was replaced")
    if isinstance(own["_parameters"].get("weight"), UninitializedParameter):
        return Unfused("its sizes are not known yet")
    shadow = _STOCKS[base].is_shadowed_by(own)
    if shadow in ("weight", "bias") and not any(own[hooks] for hooks in HOOKS):
        return Unfused(_COMPUTED)
    if any(not stock.is_empty(own.get(hooks)) for hooks in HOOKS):
        return Unfused("it has hooks")
    if shadow:
        name = "forward" if shadow == "_compiled_call_impl" else shadow
        return Unfused(f"its {name} was replaced")
    return _RULES[base](own)


def kind_of(child: nn.Module, look: _Look, layer: Layer | Unfused) -> stock.Kind:
    """The child as the extension compares it."""
    cls = type(child)
    if isinstance(layer, Unfused) and layer.lasting:
        return cls, 0, None
    if look.objection is not None:
        return cls, look.version, None
    tensors = "_parameters" if issubclass(cls, _WITH_PARAMETERS) else ""
    return cls, look.version, stock.entries(look.own, layer.attributes, tensors)


@dataclass(frozen=True)
class Chain:
    """Consecutive children that one call of the operator computes.

    Attributes:
        children: the range of their places.
        layers: what each of them is.
        program: the operator's, see csrc/sequential.h.
    """

    children: range
    layers: tuple[Layer, ...]
    program: str

    @property
    def has_linear(self) -> bool:
        return any(layer.is_linear for layer in self.layers)

    @property
    def saves_calls(self) -> bool:
        """Whether it does in one call what its children do in several, or ours does faster."""
        return self.has_linear or "; " in self.program


_AFFINE_STEPS = ("linear", "linear+bias", "linear_t", "linear_t+bias")


def _belongs_to_linear_step(step: str, is_last: bool) -> bool:
    """Whether it is an activation whose backward reads its output, which the next layer keeps.

    After the last layer callers may change the output, unless PyTorch's backward reads it, too.
    """
    row = row_of(step)
    return row is not None and not row.reads_input and (row.saves_output or not is_last)


def _program(layers: Iterable[Layer]) -> str:
    computing = [layer.step for layer in layers if layer.step]
    steps: list[str] = []
    takes_activation = False
    for place, step in enumerate(computing, 1):
        if takes_activation and _belongs_to_linear_step(step, place == len(computing)):
            steps[-1] += "+" + step
            takes_activation = False
        else:
            steps.append(step)
            takes_activation = step in _AFFINE_STEPS
    return "; ".join(steps)


def parts_of(layers: list[Layer | Unfused]) -> list[Chain | Unfused]:
    """Layers in order: chains, and one entry for each that runs by itself."""
    parts: list[Chain | Unfused] = []
    run: list[Layer] = []

    def end_chain(stop: int) -> None:
        # An activation alone is PyTorch's own; a flatten at the end has no result for the operator.
        computing = [i for i, layer in enumerate(run) if layer.computes]
        first, end = stop - len(run), computing[-1] + 1 if computing else 0
        while end < len(run) and not run[end].step:
            end += 1
        if any(run[i].is_linear or run[i].step.startswith("center") for i in computing):
            fused = tuple(run[:end])
            parts.append(Chain(range(first, first + end), fused, _program(fused)))
        else:
            end = 0
        parts.extend([ALONE] * (len(run) - end))
        run.clear()

    place = -1
    for place, layer in enumerate(layers):
        in_place = isinstance(layer, Layer) and layer.in_place
        if in_place and not any(earlier.computes for earlier in run):
            layer = Unfused("it works in place on what it is given", ("inplace",))
        if isinstance(layer, Unfused):
            end_chain(place)
            parts.append(layer)
        else:
            run.append(layer)
    end_chain(place + 1)
    return parts


def plan(children: Iterable[nn.Module], *, evaluates: bool = False) -> list[Chain | Unfused]:
    """The children in order: chains, and one entry for each child that runs by itself.

    Args:
        children: as they stand in a network.
        evaluates: whether it is asked as if all were in evaluation mode.
    """
    return parts_of([layer_of(child, look_at(child, evaluates=evaluates)) for child in children])


def parameters_of(children: Iterable[nn.Module]) -> list[Tensor]:
    """What a program reads, of the children that it is for."""
    have = (child for child in children if isinstance(child, _WITH_PARAMETERS))
    both = ((child._parameters["weight"], child._parameters["bias"]) for child in have)
    return [p for parameters in both for p in parameters if p is not None]


class _Call(IntEnum):
    """What a call of a network comes to; ``Plan::Call`` in csrc/python/plans.h."""

    OTHERWISE = 0
    FORWARD = 1
    CHILDREN = 2


def _keep_plan(network: "FusedSequential") -> bool:
    """Let the extension know how to run the network as it is; whether there is a way."""
    iterates = _C.iterates(network)
    kind, _ = as_it_is(network, _STOCK_NETWORK, iterates)
    called, is_stocks = as_it_is(network, _STOCK_NETWORK if iterates else _STOCK_BUT_ITER, iterates)
    call = _Call.CHILDREN
    if not is_stocks:
        called, is_stocks = as_it_is(network, _STOCK_UP_TO_FORWARD, iterates)
        call = _Call.FORWARD if is_stocks else _Call.OTHERWISE
    replaced = _C.replaced_functions()
    if not iterates:
        _C.keep_plan(network, kind, called, call, replaced, None)
        return True
    children = list(network.__dict__["_modules"].values())
    looks = list(map(look_at, children))
    layers = list(map(layer_of, children, looks))
    parts: list[tuple[str | None, tuple[stock.Kind, ...]]] = []
    place = 0
    for part in parts_of(layers):
        if isinstance(part, Chain):
            kinds = [kind_of(children[i], looks[i], layers[i]) for i in part.children]
            parts.append((part.program, tuple(kinds)))
            place = part.children.stop
        else:
            parts.append((None, (kind_of(children[place], looks[place], part),)))
            place += 1
    if _C.replaced_functions() != replaced:  # by another thread, in between
        return False
    _C.keep_plan(network, kind, called, call, replaced, tuple(parts))
    return True


def as_it_is(network: nn.Module, known: Stock, iterates: bool) -> tuple[stock.Kind, bool]:
    """The network as the extension compares it; whether a call of it is one of the stock class."""
    cls = type(network)
    version, difference = stock.judge(cls, known)
    own = dict(network.__dict__) if version and not difference.name else {}
    if not own or any(type(name) is not str for name in own):
        return (cls, 0, None), False
    is_stocks = not known.is_shadowed_by(own) and all(name in own for name in HOOKS)
    entries = tuple(_entry_of_network(*item, iterates) for item in own.items())
    return (cls, version, entries), is_stocks


def _entry_of_network(name: str, value: object, iterates: bool) -> tuple[str, int, Any]:
    if name in HOOKS:
        return name, Must.BE_HOOKS, None
    if name == "_modules" and iterates:
        return name, Must.BE_MODULES, None
    return stock.entry_of_another(name, value)


def is_foreign(value: object) -> bool:
    """Whether it is of a class that decides itself what operators do, and knows PyTorch's own."""
    cls = type(value)
    if cls in TENSORS:
        return False
    override = getattr(cls, "__torch_function__", None)
    if override is None:
        return False
    inherited = getattr(override, "__func__", override) in _DEFAULT_OVERRIDES
    return not inherited or is_traceable_wrapper_subclass(value)


_DEFAULT_OVERRIDES = (
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    torch._C._disabled_torch_function_impl,
)


def _one_by_one(children: Iterable[nn.Module], x: Tensor) -> Tensor:
    for child in children:
        x = child(x)
    return x


def _run_chain(children: list[nn.Module], program: str, x: Tensor) -> Tensor:
    if is_foreign(x):
        return _one_by_one(children, x)
    parameters = parameters_of(children)
    if any(map(is_foreign, parameters)):
        return _one_by_one(children, x)
    if not isinstance(x, Tensor):
        raise TypeError(f"FusedSequential: input must be a torch.Tensor; got {type(x).__name__}")
    return torch.ops.mylayers.sequential(x, parameters, program)  # type: ignore[no-any-return]


def _run(children: list[nn.Module], x: Tensor) -> Tensor:
    """As planned here and now, through ``torch.ops``, for all that watches these."""
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return _one_by_one(children, x)
    place = 0
    for part in plan(children):
        if isinstance(part, Chain):
            stop = part.children.stop
            x = _run_chain(children[place:stop], part.program, x)
            place = stop
        else:
            x = children[place](x)
            place += 1
    return x


class FusedSequential(nn.Sequential):
    r"""An ``nn.Sequential`` that computes runs of its children in one call of one operator.

    It takes what ``nn.Sequential`` takes and is one in all but speed: children, names, indices,
    ``state_dict``. Runs of :class:`mylayers.MyLinear`, ``nn.Linear``, PyTorch's modules of the
    activations that :func:`mylayers.functional.linear_act` takes,
    :class:`mylayers.CenteredLayer`, ``nn.LayerNorm``, ``nn.Identity``, ``nn.Flatten`` and, in eval
    mode, ``nn.Dropout`` are fused, forward and backward, without copying or keeping anything of
    them: parameters are read on every call. A child of another type, with hooks, with a
    parametrised weight, or of a subclass with its own ``forward`` runs by itself.

    Args:
        *args: the children, or one ordered dictionary of them.

    Shape:
        as the children's; a chain that begins with a linear layer takes ``(..., in_units)``.

    Raises:
        TypeError: a chain is given what is not a tensor.
        RuntimeError: shapes, dtypes or devices do not fit together.

    Source:
        csrc/cpu/sequential.cpp; the gradient in csrc/autograd/sequential.cpp. Results and
        gradients have the bits that :class:`mylayers.MyLinear` and
        :class:`mylayers.CenteredLayer` would give one by one.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mylayers import FusedSequential
        >>> stock = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> fused, x = FusedSequential(*stock), torch.rand(3, 4)
        >>> torch.allclose(fused(x), stock(x), atol=1e-6)
        True
    """

    def __call__(self, input: Any = _REFUSED, /, *args: Any, **kwargs: Any) -> Any:
        """As any module's; the extension goes straight to the chains where that comes to the same.

        The way of ``nn.Module`` to ``forward`` is a quarter of the time of a small network.
        """
        if input is _REFUSED or args or kwargs or _is_dynamo_compiling():
            given = args if input is _REFUSED else (input, *args)
            return super().__call__(*given, **kwargs)
        output = _C.call_network(self, input)
        if output is not _REFUSED:
            return output
        # Another thread's restore may have taken the class away since this began.
        cls = type(self)
        if not issubclass(cls, FusedSequential):
            return cls.__call__(self, input)
        return super(FusedSequential, cls).__call__(self, input)

    def forward(self, input: Tensor) -> Tensor:
        """The children's result, one after another."""
        if _is_scripting():
            x = input
            for child in self:
                x = child(x)
            return x
        if _is_compiling():
            return _run(list(self), input)
        output = _C.run_network(self, input)
        if output is _REFUSED and _keep_plan(self):
            output = _C.run_network(self, input)
        return _one_by_one(self, input) if output is _REFUSED else output


_STOCK_NETWORK = Stock(FusedSequential())
# What reads nothing of these: forward, where the network gives its children in a way of its own; a
# call without hooks, before it calls forward.
_STOCK_BUT_ITER = Stock(FusedSequential(), {"__iter__", "__getattr__"})
_STOCK_UP_TO_FORWARD = Stock(FusedSequential(), {"forward", "__iter__", "__getattr__"})
