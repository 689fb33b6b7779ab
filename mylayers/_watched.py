"""The functions that layers look up by name whenever they are called, and whether one was replaced.

Counters, profilers and tracers put a function of their own in the place of PyTorch's
(``torch.nn.functional.relu = counted``), and mean the layers to call it; a chain computes for its
layers only as long as all of theirs are in their places. csrc/watched_functions.h asks at every
call.
"""

import itertools
from types import BuiltinFunctionType, MethodDescriptorType, ModuleType

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

from mylayers import functional
from mylayers._extension import _C
from mylayers.layers import CenteredLayer, MyLinear

__all__ = ["replaced"]

# Where it is looked up, its name, and what is there as long as nobody has replaced it.
_Function = tuple[ModuleType | type, str, object]

_DEFINING = tuple(map(vars, (F, torch.functional, torch.autograd, torch._tensor, functional)))


def _is_own(function: object) -> bool:
    """Whether it is PyTorch's or ours, not what somebody put in its place before this import."""
    if isinstance(function, BuiltinFunctionType | MethodDescriptorType):
        return True
    return any(getattr(function, "__globals__", None) is names for names in _DEFINING)


def _functions(*places: tuple[ModuleType | type, str]) -> tuple[_Function, ...]:
    found = []
    for owner, name in places:
        function = getattr(owner, name)
        # An object that is nowhere, so that this one stays replaced.
        found.append((owner, name, function if _is_own(function) else object()))
    return tuple(found)


_CALLED: dict[type[nn.Module], tuple[_Function, ...]] = {
    nn.Linear: _functions((F, "linear")),
    MyLinear: _functions((functional, "linear_act")),
    nn.ReLU: _functions((F, "relu"), (torch, "relu"), (torch, "relu_")),
    nn.Tanh: _functions((torch, "tanh")),
    nn.Sigmoid: _functions((torch, "sigmoid")),
    nn.ELU: _functions((F, "elu")),
    CenteredLayer: _functions((functional, "center")),
    nn.Flatten: _functions((torch.Tensor, "flatten")),
    nn.Dropout: _functions((F, "dropout")),
}
# Of any of the losses that mylayers.forward_backward knows, and of its loss.backward().
_IN_TRAINING = _functions(
    (F, "mse_loss"),
    (F, "smooth_l1_loss"),
    (F, "huber_loss"),
    (F, "cross_entropy"),
    (torch, "broadcast_tensors"),
    (torch.Tensor, "backward"),
    (torch.autograd, "backward"),
)

_C.watch_functions(tuple(itertools.chain(*_CALLED.values())), _IN_TRAINING)


def replaced(cls: type[nn.Module]) -> str:
    """The full name of one that layers of a stock class call, not in its place; "" if all are."""
    for owner, name, function in _CALLED.get(cls, ()):
        if getattr(owner, name, None) is not function:
            parent = f"{owner.__module__}." if isinstance(owner, type) else ""
            return f"{parent}{owner.__name__}.{name}"
    return ""
