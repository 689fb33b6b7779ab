"""From and to stock modules. The parameters are copied, the weight transposed."""

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import skip_init

if TYPE_CHECKING:
    from mylayers.layers import MyLinear

__all__ = ["linear_from", "linear_to"]

Layer = TypeVar("Layer", bound="MyLinear")
Module = TypeVar("Module", bound=nn.Module)
Source = TypeVar("Source", "MyLinear", nn.Linear)


def linear_from(cls: type[Layer], linear: nn.Linear, activation: str | None) -> Layer:
    """See :meth:`mylayers.MyLinear.from_linear`."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(
            f"MyLinear.from_linear: linear must be an nn.Linear; got {type(linear).__name__}"
        )
    weight = _made(linear).weight
    cls = getattr(cls, "cls_to_become", None) or cls  # a lazy layer's sizes are known here
    # skip_init draws no random numbers: the caller's generator stays where it was.
    layer: Layer = skip_init(  # type: ignore[no-untyped-call]
        cls,
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        activation,
        device=weight.device,
        dtype=weight.dtype,
    )
    return _copied(layer, linear)


def linear_to(layer: "MyLinear") -> nn.Linear:
    """See :meth:`mylayers.MyLinear.to_linear`."""
    weight = _made(layer).weight
    linear: nn.Linear = skip_init(  # type: ignore[no-untyped-call]
        nn.Linear,
        layer.in_units,
        layer.units,
        layer.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    return _copied(linear, layer)


def _made(source: Source) -> Source:
    if is_lazy(source.weight):
        raise ValueError(
            f"{type(source).__name__} is uninitialized: its sizes are not known before the first "
            "input, so it cannot be converted yet"
        )
    return source


def _copied(target: Module, source: "MyLinear | nn.Linear") -> Module:
    with torch.no_grad():
        for name, parameter in source.named_parameters(recurse=False):
            copy = target.get_parameter(name)
            copy.copy_(parameter.T if parameter.dim() == 2 else parameter)
            copy.requires_grad_(parameter.requires_grad)
    return target.train(source.training)
