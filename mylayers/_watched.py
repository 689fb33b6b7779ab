"""What layers look up by name whenever they are called, and whether something was replaced.

Counters, profilers and tracers put a function of their own in the place of PyTorch's
(``torch.nn.functional.relu = counted``), and mean the layers to call it; a chain computes for its
layers only as long as all of theirs are in their places. csrc/python/watched_functions.h asks at
every call.
"""

import itertools
from types import (
    BuiltinFunctionType,
    GetSetDescriptorType,
    MethodDescriptorType,
    ModuleType,
)

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)
from torch.nn.modules import activation, dropout, linear, loss, normalization
from torch.optim import adagrad, adam, optimizer, rmsprop, sgd

from mylayers import functional, layers
from mylayers._extension import _C
from mylayers.activations import ACTIVATIONS
from mylayers.layers import CenteredLayer, MyLinear

__all__ = ["replaced"]

# Where it is looked up, its name, and what is there as long as nobody has replaced it.
_Function = tuple[ModuleType | type, str, object]

_MODULES = (torch, nn, F, functional)
_OPTIMIZERS = (sgd, adam, rmsprop, adagrad)
_DEFINING = tuple(
    map(
        vars,
        (
            F,
            torch.functional,
            torch.autograd,
            torch._tensor,
            torch.utils._foreach_utils,
            functional,
            optimizer,
            *_OPTIMIZERS,
        ),
    )
)


def _is_own(function: object) -> bool:
    """Whether it is PyTorch's or ours, not what somebody put in its place before this import."""
    if isinstance(function, BuiltinFunctionType | MethodDescriptorType | GetSetDescriptorType):
        return True
    if isinstance(function, ModuleType):
        return function in _MODULES
    return any(getattr(function, "__globals__", None) is names for names in _DEFINING)


def _functions(*places: tuple[ModuleType | type, str]) -> tuple[_Function, ...]:
    found = []
    for owner, name in places:
        function = getattr(owner, name)
        # An object that is nowhere, so that this one stays replaced.
        found.append((owner, name, function if _is_own(function) else object()))
    return tuple(found)


_CALLED: dict[type[nn.Module], tuple[_Function, ...]] = {
    nn.Linear: _functions((F, "linear"), (linear, "F")),
    MyLinear: _functions((functional, "linear_act"), (layers, "functional")),
    **{
        known.module: _functions(*known.calls, (activation, "F"), (activation, "torch"))
        for known in ACTIVATIONS.values()
    },
    CenteredLayer: _functions((functional, "center"), (layers, "functional")),
    nn.LayerNorm: _functions((F, "layer_norm"), (torch, "layer_norm"), (normalization, "F")),
    nn.Flatten: _functions((torch.Tensor, "flatten")),
    nn.Dropout: _functions((F, "dropout"), (dropout, "F")),
}
# Of any of the losses that mylayers.forward_backward knows, and of its loss.backward().
IN_TRAINING = _functions(
    (loss, "F"),
    (F, "mse_loss"),
    (F, "smooth_l1_loss"),
    (F, "huber_loss"),
    (F, "cross_entropy"),
    (F, "l1_loss"),
    (F, "binary_cross_entropy"),
    (F, "binary_cross_entropy_with_logits"),
    (F, "nll_loss"),
    (F, "kl_div"),
    (torch, "broadcast_tensors"),
    (torch.Tensor, "backward"),
    (torch.autograd, "backward"),
)

# Of any step of an optimiser, and of zero_grad.
IN_STEPS = _functions(
    *((module, module.__name__.rpartition(".")[2]) for module in _OPTIMIZERS),
    *((module, "_single_tensor_" + module.__name__.rpartition(".")[2]) for module in _OPTIMIZERS),
    *((module, "_default_to_fused_or_foreach") for module in _OPTIMIZERS),
    *((module, "_get_value") for module in (adam, adagrad)),
    *((module, "_to_scalar") for module in _OPTIMIZERS),
    (torch, "maximum"),
    *(
        (torch.Tensor, name)
        for name in (
            "add",
            "add_",
            "mul_",
            "addcmul",
            "addcmul_",
            "addcdiv_",
            "lerp_",
            "sqrt",
            "sqrt_",
            "zero_",
            "requires_grad_",
            "item",
            "grad",
            "is_sparse",
            "__neg__",
            "__iadd__",
            "__truediv__",
            "__hash__",
        )
    ),
)
HOOKS_ON_STEPS = tuple(
    (optimizer, name, getattr(optimizer, name))
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
)

BY_LAYERS = tuple(itertools.chain(*_CALLED.values()))

# What forwards call that users wrote (mylayers/_following.py), beside these.
BY_FORWARDS = _functions(
    (torch, "nn"),
    (nn, "functional"),
    (F, "tanh"),
    (F, "sigmoid"),
    (torch, "flatten"),
    *((torch.Tensor, name) for name in ("relu", "tanh", "sigmoid")),
)

_C.watch_optimizers(IN_STEPS, HOOKS_ON_STEPS)
_C.watch_functions(BY_LAYERS + BY_FORWARDS, IN_TRAINING)


def replaced(cls: type[nn.Module]) -> str:
    """The full name of one that layers of a stock class call, not in its place; "" if all are."""
    for owner, name, function in _CALLED.get(cls, ()):
        if getattr(owner, name, None) is not function:
            parent = f"{owner.__module__}." if isinstance(owner, type) else ""
            return f"{parent}{owner.__name__}.{name}"
    return ""
