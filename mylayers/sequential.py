"""``FusedSequential``: an ``nn.Sequential`` that computes runs of its children in one operator.

What can be fused, and how, stands here alone (``_RULES``, ``plan``). An eager call compares the
children with the pattern of the last plan in C++ (csrc/bindings.cpp), which reads the parameters
anew on every call; anything that has changed leads to a new plan.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mylayers import _watched
from mylayers._extension import _C
from mylayers.layers import CenteredLayer, MyLinear

__all__ = ["FusedSequential"]

_is_compiling = torch.compiler.is_compiling
_is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class _Layer:
    """What a child is to a chain.

    Attributes:
        step: the operator's name for it, without bias and later activation; "" for none.
        attributes: those of the child that this holds for, with their values.
    """

    step: str
    attributes: tuple[tuple[str, Any], ...] = ()

    @property
    def is_linear(self) -> bool:
        return self.step.startswith("linear")

    @property
    def computes(self) -> bool:
        return bool(self.step) and not self.step.startswith("flatten")


@dataclass(frozen=True)
class Unfused:
    """A child that runs by itself.

    Attributes:
        reason: why, for the report of :func:`mylayers.optimize`.
        lasting: whether it holds as long as the children's types and the training mode do.
    """

    reason: str
    lasting: bool = False


_ALONE = Unfused("there is no layer to fuse it with", lasting=True)


def _my_linear(layer: MyLinear) -> _Layer:
    activation = layer.activation
    step = "linear" if activation is None else f"linear+{activation}"
    return _Layer(step, (("activation", activation),))


def _always(step: str) -> Callable[[nn.Module], _Layer]:
    return lambda _: _Layer(step)


def _relu(layer: nn.ReLU) -> _Layer:
    return _Layer("relu", (("inplace", layer.inplace),))


def _elu(layer: nn.ELU) -> _Layer | Unfused:
    if layer.alpha != 1:
        return Unfused(f"alpha is {layer.alpha}, not 1")
    return _Layer("elu", (("alpha", layer.alpha), ("inplace", layer.inplace)))


def _centered(layer: CenteredLayer) -> _Layer | Unfused:
    if layer._group is not None:
        return Unfused("its mean is over several processes")
    dims = (layer.dim,) if isinstance(layer.dim, int) else layer.dim
    if dims is not None and not (type(dims) is tuple and all(type(d) is int for d in dims)):
        return Unfused("its dim is neither None nor an int nor a tuple of them")
    step = f"center({','.join(map(str, dims))})" if dims else "center"
    return _Layer(step, (("dim", layer.dim), ("_group", None)))


def _flatten(layer: nn.Flatten) -> _Layer:
    first, last = layer.start_dim, layer.end_dim
    return _Layer(f"flatten({first},{last})", (("start_dim", first), ("end_dim", last)))


def _dropout(layer: nn.Dropout) -> _Layer | Unfused:
    if layer.training:
        return Unfused("dropout is random in training", lasting=True)
    return _Layer("", (("training", False),))


_RULES: dict[type[nn.Module], Callable[[Any], _Layer | Unfused]] = {
    nn.Linear: _always("linear_t"),
    MyLinear: _my_linear,
    nn.ReLU: _relu,
    nn.Tanh: _always("tanh"),
    nn.Sigmoid: _always("sigmoid"),
    nn.ELU: _elu,
    CenteredLayer: _centered,
    nn.Identity: _always(""),
    nn.Flatten: _flatten,
    nn.Dropout: _dropout,
}


# As they were when this was imported: whoever replaces one, in a class or in PyTorch's own, means
# it to be called.
_FORWARDS = {cls: cls.forward for cls in _RULES}
_CALL = nn.Module.__call__


def _layer(child: nn.Module) -> _Layer | Unfused:
    cls = type(child)
    base = next((base for base in cls.__mro__ if base in _RULES), None)
    if base is None:
        return Unfused(f"{cls.__name__} has no fused kernel", lasting=True)
    # torch.export replaces nn.Module.__call__ itself, to follow calls.
    call = nn.Module.__call__ if _is_compiling() else _CALL
    if cls.forward is not _FORWARDS[base] or cls.__call__ is not call:
        return Unfused(f"{cls.__name__} overrides {base.__name__}.forward")
    if function := _watched.replaced(base):
        return Unfused(f"{function} was replaced")
    own = child.__dict__
    if isinstance(child._parameters.get("weight"), UninitializedParameter):
        return Unfused("its sizes are not known yet")
    if "forward" in own or own.get("_compiled_call_impl") is not None:
        return Unfused("its forward was replaced")
    if any(own[hooks] for hooks in _HOOKS):
        return Unfused("it has hooks")
    layer = _RULES[base](child)
    if isinstance(layer, _Layer) and layer.is_linear:
        weight = child._parameters.get("weight")
        if weight is None or "bias" not in child._parameters:
            return Unfused("its weight or bias is computed, not a parameter")
    return layer


@dataclass(frozen=True)
class Chain:
    """Consecutive children that one call of the operator computes.

    Attributes:
        children: the range of their places.
        layers: what each of them is.
        program: the operator's, see csrc/sequential.h.
    """

    children: range
    layers: tuple[_Layer, ...]
    program: str

    @property
    def saves_calls(self) -> bool:
        """Whether it does in one call what its children do in several, or ours does faster."""
        return any(layer.is_linear for layer in self.layers) or "; " in self.program


_ACTIVATION_STEPS = ("relu", "tanh", "sigmoid", "elu")


def _program(children: list[nn.Module], layers: list[_Layer]) -> str:
    steps: list[str] = []
    takes_activation = False
    for child, layer in zip(children, layers, strict=True):
        if layer.is_linear:
            name, _, activation = layer.step.partition("+")
            bias = "" if child._parameters["bias"] is None else "+bias"
            steps.append(name + bias + ("+" + activation if activation else ""))
            takes_activation = not activation
        elif layer.step in _ACTIVATION_STEPS and takes_activation:
            steps[-1] += "+" + layer.step
            takes_activation = False
        elif layer.step:
            steps.append(layer.step)
            takes_activation = False
    return "; ".join(steps)


def plan(children: Iterable[nn.Module]) -> list[Chain | Unfused]:
    """The children in order: chains, and one entry for each child that runs by itself."""
    parts: list[Chain | Unfused] = []
    modules: list[nn.Module] = []
    layers: list[_Layer] = []

    def end_chain(stop: int) -> None:
        # An activation alone is PyTorch's own; a flatten at the end has no result for the operator.
        computing = [i for i, layer in enumerate(layers) if layer.computes]
        first, end = stop - len(layers), computing[-1] + 1 if computing else 0
        while end < len(layers) and not layers[end].step:
            end += 1
        if any(layers[i].is_linear or layers[i].step.startswith("center") for i in computing):
            program = _program(modules[:end], layers[:end])
            parts.append(Chain(range(first, first + end), tuple(layers[:end]), program))
        else:
            end = 0
        parts.extend([_ALONE] * (len(layers) - end))
        layers.clear()
        modules.clear()

    place = -1
    for place, child in enumerate(children):
        layer = _layer(child)
        in_place = isinstance(layer, _Layer) and ("inplace", True) in layer.attributes
        if in_place and not any(earlier.computes for earlier in layers):
            layer = Unfused("it works in place on what it is given")
        if isinstance(layer, Unfused):
            end_chain(place)
            parts.append(layer)
        else:
            modules.append(child)
            layers.append(layer)
    end_chain(place + 1)
    return parts


def _made(parent: nn.Module, chain: Chain, children: list[nn.Module]) -> object:
    """The chain as the extension compares it with the children."""
    patterns = []
    for place, layer in zip(chain.children, chain.layers, strict=True):
        child = children[place]
        has_bias = layer.is_linear and child._parameters["bias"] is not None
        patterns.append((type(child), layer.attributes, layer.is_linear, has_bias))
    return _C.make_chain(
        chain.program, type(parent), chain.children.start, len(children), tuple(patterns)
    )


def _is_foreign(value: object) -> bool:
    """Whether it is of a class that decides itself what operators do, and knows PyTorch's own."""
    cls = type(value)
    if cls in (Tensor, nn.Parameter):
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
    parameters: list[Tensor] = []
    for child in children:
        if isinstance(child, nn.Linear | MyLinear):
            weight, bias = child._parameters["weight"], child._parameters["bias"]
            parameters += [p for p in (weight, bias) if p is not None]
    for tensor in (x, *parameters):
        if _is_foreign(tensor):
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
    ``state_dict``. Runs of :class:`mylayers.MyLinear`, ``nn.Linear``, ``nn.ReLU``, ``nn.Tanh``,
    ``nn.Sigmoid``, ``nn.ELU`` (alpha 1), :class:`mylayers.CenteredLayer`, ``nn.Identity``,
    ``nn.Flatten`` and, in eval mode, ``nn.Dropout`` are fused, forward and backward, without
    copying or keeping anything of them: parameters are read on every call. A child of another
    type, with hooks, with a parametrised weight, or of a subclass with its own ``forward`` runs
    by itself.

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

    # The last plan, which is no part of the state: what it was made for and its parts (a chain, or
    # None for a child that runs by itself, and the place after it); and the chain that is all.
    _prepared: tuple[tuple[object, ...], tuple[tuple[object, int], ...]] | None
    _whole: object
    __jit_ignored_attributes__ = ["_prepared", "_whole"]  # noqa: RUF012  (torch.nn's protocol)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's; the extension goes straight to the chain where that comes to the same.

        The way of ``nn.Module`` to ``forward`` is a quarter of the time of a small network.
        """
        if len(args) == 1 and not kwargs and not _is_compiling():
            output = _C.call_fused(self, args[0])
            if output is not NotImplemented:
                return output
        return super().__call__(*args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        """The children's result, one after another."""
        if _is_scripting():
            x = input
            for child in self:
                x = child(x)
            return x
        children = list(self)
        if _is_compiling():
            return _run(children, input)
        if type(self).__iter__ is not nn.Sequential.__iter__ or type(self._modules) is not dict:
            return _run(children, input)  # in an order of its own
        key = (self.training, *map(type, children))
        prepared = self.__dict__.get("_prepared")  # one object, as other threads may plan anew
        if prepared is None or prepared[0] != key or "_whole" in self.__dict__:
            prepared = self._prepare(children, key)
        if prepared is None:
            return _run(children, input)
        x, place = input, 0
        for chain, stop in prepared[1]:
            if chain is None:
                x = children[place](x)
            else:
                output = _C.run_chain(chain, self._modules, x)
                x = _run(children[place:stop], x) if output is NotImplemented else output
            place = stop
        return x

    def _prepare(self, children: list[nn.Module], key: tuple[object, ...]) -> Any:
        self.forget_plan()
        parts = plan(children)
        if not all(isinstance(part, Chain) or part.lasting for part in parts):
            return None
        chains = [
            _made(self, part, children) if isinstance(part, Chain) else None for part in parts
        ]
        sizes = (len(part.children) if isinstance(part, Chain) else 1 for part in parts)
        prepared = key, tuple(zip(chains, itertools.accumulate(sizes), strict=True))
        self._prepared = prepared
        cls = type(self)
        by_default = cls.forward is FusedSequential.forward and nn.Module.__call__ is _CALL
        if (
            len(chains) == 1
            and chains[0]
            and by_default
            and cls.__call__ is FusedSequential.__call__
        ):
            self._whole = chains[0]
        return prepared

    def forget_plan(self) -> None:
        """Drop what the last call has left; the next one plans anew."""
        for name in _PLAN:
            self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the last plan."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name not in _PLAN}


_PLAN = ("_prepared", "_whole")
