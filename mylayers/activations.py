"""The activations: the one list of Python's half; csrc/activation.h has the kernels'.

Imports nothing compiled: the formulas are the oracle of the tests (:mod:`mylayers.reference`).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

__all__ = [
    "ACTIVATIONS",
    "LARGEST",
    "LEAST",
    "NAMES",
    "RANGE",
    "Activation",
    "find",
    "name_of",
    "row_of",
]


@dataclass(frozen=True)
class Activation:
    """What Python knows of an activation.

    Attributes:
        formula: the activation, in PyTorch.
        module: PyTorch's module of it.
        onnx: the activation of ``x`` by the operators of an opset.
        onnx_float64: the same, where runtimes lack that operator for float64.
        settings: the attributes that a module of that class must have to be this activation.
        setting: the attribute that may be any number from LEAST to LARGEST; an argument of the
            formulas.
        default: what it is where a name says nothing of it.
        calls: functions that the module looks up, each with where it does.
        reads_input: whether its derivative is a function of its input alone.
        saves_output: whether PyTorch's own backward reads its output, which may then not be
            changed.
    """

    formula: Callable[..., Tensor]
    module: type[nn.Module]
    onnx: Callable[..., Any]
    onnx_float64: Callable[..., Any] | None = None
    settings: Mapping[str, int | float | str] = field(default_factory=dict)
    setting: str = ""
    default: float = 0.0
    calls: tuple[tuple[Any, str], ...] = ()
    reads_input: bool = False
    saves_output: bool = False


# Of nn.SELU.
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


# ---- ONNX ---------------------------------------------------------------------------------------


def _constant(op: Any, value: float, x: Any) -> Any:
    if torch.tensor(value, dtype=torch.float32).item() == value:
        return op.CastLike(value, x)
    from onnxscript import ir  # which keeps a float in float32

    return op.CastLike(op.Constant(value=ir.tensor(value, dtype=ir.DataType.DOUBLE)), x)


def _expm1_below_0(op: Any, x: Any) -> Any:
    return op.Sub(op.Exp(op.Min(x, _constant(op, 0.0, x))), _constant(op, 1.0, x))


def _elu_float64(op: Any, x: Any, alpha: float = 1.0) -> Any:
    # ONNX Runtime has no Elu of float64 on CPUs.
    return op.Add(op.Relu(x), op.Mul(_constant(op, alpha, x), _expm1_below_0(op, x)))


def _leaky_relu_float64(op: Any, x: Any, negative_slope: float = 0.01) -> Any:
    below = op.Min(x, _constant(op, 0.0, x))
    return op.Add(op.Relu(x), op.Mul(_constant(op, negative_slope, x), below))


def _celu_onnx(op: Any, x: Any, alpha: float = 1.0) -> Any:
    below = _expm1_below_0(op, op.Div(x, _constant(op, alpha, x)))
    return op.Add(op.Relu(x), op.Mul(_constant(op, alpha, x), below))


def _selu_float64(op: Any, x: Any) -> Any:
    return op.Mul(_constant(op, _SELU_SCALE, x), _elu_float64(op, x, _SELU_ALPHA))


def _half_of_product(op: Any, x: Any, y: Any) -> Any:
    return op.Mul(op.Mul(x, _constant(op, 0.5, x)), op.Add(y, _constant(op, 1.0, x)))


def _gelu_onnx(op: Any, x: Any) -> Any:
    return _half_of_product(op, x, op.Erf(op.Mul(x, _constant(op, 0.5**0.5, x))))


def _gelu_tanh_onnx(op: Any, x: Any) -> Any:
    cubic = op.Mul(op.Mul(op.Mul(x, x), x), _constant(op, 0.044715, x))
    inner = op.Mul(op.Add(x, cubic), _constant(op, (2 / math.pi) ** 0.5, x))
    return _half_of_product(op, x, op.Tanh(inner))


def _softplus_onnx(op: Any, x: Any) -> Any:
    rest = op.Log(op.Add(op.Exp(op.Neg(op.Abs(x))), _constant(op, 1.0, x)))
    return op.Add(op.Relu(x), rest)


def _clipped(op: Any, x: Any, low: float, high: float) -> Any:
    return op.Clip(x, _constant(op, low, x), _constant(op, high, x))


def _hardsigmoid_onnx(op: Any, x: Any) -> Any:
    clipped = _clipped(op, op.Add(x, _constant(op, 3.0, x)), 0.0, 6.0)
    return op.Div(clipped, _constant(op, 6.0, x))


# ---- the table ----------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": Activation(
        torch.relu,
        nn.ReLU,
        lambda op, x: op.Relu(x),
        calls=((F, "relu"), (torch, "relu"), (torch, "relu_")),
        saves_output=True,
    ),
    "tanh": Activation(
        torch.tanh,
        nn.Tanh,
        lambda op, x: op.Tanh(x),
        calls=((torch, "tanh"),),
        saves_output=True,
    ),
    "sigmoid": Activation(
        torch.sigmoid,
        nn.Sigmoid,
        lambda op, x: op.Sigmoid(x),
        calls=((torch, "sigmoid"),),
        saves_output=True,
    ),
    "elu": Activation(
        F.elu,
        nn.ELU,
        lambda op, x, alpha=1.0: op.Elu(x, alpha=alpha),
        onnx_float64=_elu_float64,
        setting="alpha",
        default=1.0,
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
    "silu": Activation(
        F.silu,
        nn.SiLU,
        lambda op, x: op.Mul(x, op.Sigmoid(x)),
        calls=((F, "silu"),),
        reads_input=True,
    ),
    "leaky_relu": Activation(
        F.leaky_relu,
        nn.LeakyReLU,
        lambda op, x, negative_slope=0.01: op.LeakyRelu(x, alpha=negative_slope),
        onnx_float64=_leaky_relu_float64,
        setting="negative_slope",
        default=0.01,
        calls=((F, "leaky_relu"),),
    ),
    "selu": Activation(
        F.selu,
        nn.SELU,
        lambda op, x: op.Selu(x),
        onnx_float64=_selu_float64,
        calls=((F, "selu"), (torch, "selu"), (torch, "selu_")),
    ),
    "celu": Activation(
        F.celu,
        nn.CELU,
        _celu_onnx,
        setting="alpha",
        default=1.0,
        calls=((F, "celu"), (torch, "celu"), (torch, "celu_")),
    ),
    "softplus": Activation(
        F.softplus,
        nn.Softplus,
        _softplus_onnx,
        settings={"beta": 1, "threshold": 20},
        calls=((F, "softplus"),),
    ),
    "logsigmoid": Activation(
        F.logsigmoid,
        nn.LogSigmoid,
        lambda op, x: op.Neg(_softplus_onnx(op, op.Neg(x))),
        calls=((F, "logsigmoid"),),
    ),
    "mish": Activation(
        F.mish,
        nn.Mish,
        lambda op, x: op.Mul(x, op.Tanh(_softplus_onnx(op, x))),
        calls=((F, "mish"),),
        reads_input=True,
    ),
    "hardtanh": Activation(
        F.hardtanh,
        nn.Hardtanh,
        lambda op, x: _clipped(op, x, -1.0, 1.0),
        settings={"min_val": -1, "max_val": 1},
        calls=((F, "hardtanh"),),
    ),
    "relu6": Activation(
        F.relu6,
        nn.ReLU6,
        lambda op, x: _clipped(op, x, 0.0, 6.0),
        settings={"min_val": 0, "max_val": 6},
        calls=((F, "relu6"), (F, "hardtanh")),
    ),
    "hardswish": Activation(
        F.hardswish,
        nn.Hardswish,
        lambda op, x: op.Mul(x, _hardsigmoid_onnx(op, x)),
        calls=((F, "hardswish"),),
        reads_input=True,
    ),
    "hardsigmoid": Activation(
        F.hardsigmoid,
        nn.Hardsigmoid,
        _hardsigmoid_onnx,
        calls=((F, "hardsigmoid"),),
        reads_input=True,
    ),
    "softsign": Activation(
        F.softsign,
        nn.Softsign,
        lambda op, x: op.Div(x, op.Add(op.Abs(x), _constant(op, 1.0, x))),
        calls=((F, "softsign"),),
        reads_input=True,
    ),
}

# As csrc/activation.h has them.
LEAST, LARGEST = 1e-4, 100.0
RANGE = f"from {LEAST:g} to {LARGEST:g}"

# As messages list them.
NAMES = ", ".join(name + ("[(x)]" if one.setting else "") for name, one in ACTIVATIONS.items())
NAMES += f" with x {RANGE}"


# ---- names --------------------------------------------------------------------------------------


def name_of(kind: str, setting: float) -> str:
    """The name of an activation with this setting, a number from LEAST to LARGEST."""
    if setting == ACTIVATIONS[kind].default:
        return kind
    return f"{kind}({float(setting)!r})"


_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _setting_of(name: str) -> float:
    """The number in parentheses behind a name; 0 if there is none, or it may not be one."""
    text = name.partition("(")[2]
    if not text.endswith(")") or not _NUMBER.fullmatch(text[:-1]):
        return 0.0
    setting = float(text[:-1])
    return setting if LEAST <= setting <= LARGEST else 0.0


# A constant to Dynamo, which follows no regular expression.
# (torch.compiler.assume_constant_result does this, and imports Dynamo for it.)
_setting_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def row_of(name: str) -> Activation | None:
    """The row of the activation that is called so, "elu" or "elu(0.5)"; None for none."""
    kind, bracket, _ = name.partition("(")
    row = ACTIVATIONS.get(kind)
    if row is None or not bracket:
        return row
    return row if row.setting and _setting_of(name) else None


def find(name: str) -> Activation | None:
    """The same, with the setting of the name, if it has one, in its formulas."""
    row = row_of(name)
    if row is None or "(" not in name:
        return row
    bound = {row.setting: _setting_of(name)}
    float64 = row.onnx_float64
    return replace(
        row,
        formula=partial(row.formula, **bound),
        onnx=partial(row.onnx, **bound),
        onnx_float64=float64 and partial(float64, **bound),
    )
