"""The activations: the one list of Python's half; csrc/activation.h has the kernels'.

Imports nothing compiled: the formulas are the oracle of the tests (:mod:`mylayers.reference`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

__all__ = ["ACTIVATIONS", "NAMES", "Activation"]


@dataclass(frozen=True)
class Activation:
    """What Python knows of an activation.

    Attributes:
        formula: the activation, in PyTorch.
        module: PyTorch's module of it.
        settings: the attributes that a module of that class must have to be this activation.
        calls: functions that the module looks up, each with where it does.
        onnx: the activation of ``x`` by the operators of an opset.
        onnx_float64: the same, where runtimes lack that operator for float64.
        reads_input: whether its derivative is a function of its input, not of its output.
    """

    formula: Callable[[Tensor], Tensor]
    module: type[nn.Module]
    onnx: Callable[[Any, Any], Any]
    onnx_float64: Callable[[Any, Any], Any] | None = None
    settings: Mapping[str, int | float | str] = field(default_factory=dict)
    calls: tuple[tuple[Any, str], ...] = ()
    reads_input: bool = False


def _elu_float64(op: Any, x: Any) -> Any:
    # ONNX Runtime has no Elu of float64 on CPUs.
    zero, one = op.CastLike(0.0, x), op.CastLike(1.0, x)
    return op.Add(op.Relu(x), op.Sub(op.Exp(op.Min(x, zero)), one))


def _half_of_product(op: Any, x: Any, y: Any) -> Any:
    return op.Mul(op.Mul(x, op.CastLike(0.5, x)), op.Add(y, op.CastLike(1.0, x)))


def _gelu_onnx(op: Any, x: Any) -> Any:
    return _half_of_product(op, x, op.Erf(op.Mul(x, op.CastLike(0.5**0.5, x))))


def _gelu_tanh_onnx(op: Any, x: Any) -> Any:
    cubic = op.Mul(op.Mul(op.Mul(x, x), x), op.CastLike(0.044715, x))
    inner = op.Mul(op.Add(x, cubic), op.CastLike((2 / pi) ** 0.5, x))
    return _half_of_product(op, x, op.Tanh(inner))


ACTIVATIONS = {
    "relu": Activation(
        torch.relu,
        nn.ReLU,
        lambda op, x: op.Relu(x),
        calls=((F, "relu"), (torch, "relu"), (torch, "relu_")),
    ),
    "tanh": Activation(torch.tanh, nn.Tanh, lambda op, x: op.Tanh(x), calls=((torch, "tanh"),)),
    "sigmoid": Activation(
        torch.sigmoid, nn.Sigmoid, lambda op, x: op.Sigmoid(x), calls=((torch, "sigmoid"),)
    ),
    "elu": Activation(
        F.elu,
        nn.ELU,
        lambda op, x: op.Elu(x),
        onnx_float64=_elu_float64,
        settings={"alpha": 1},
        calls=((F, "elu"),),
    ),
    "gelu": Activation(
        F.gelu,
        nn.GELU,
        _gelu_onnx,
        settings={"approximate": "none"},
        calls=((F, "gelu"),),
        reads_input=True,
    ),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"),
        nn.GELU,
        _gelu_tanh_onnx,
        settings={"approximate": "tanh"},
        calls=((F, "gelu"),),
        reads_input=True,
    ),
}

# As messages list them.
NAMES = ", ".join(ACTIVATIONS)
