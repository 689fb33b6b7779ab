"""The operators in ONNX, for ``torch.onnx.export``; needs onnxscript (``mylayers[onnx]``)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mylayers import _programs
from mylayers.activations import NAMES, find

__all__ = ["translation_table"]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    r"""What ``torch.onnx.export`` needs to know of the operators of mylayers.

    The 16-bit dtypes are computed in float32 and rounded once, as the kernels do; a runtime that
    has no float16 or bfloat16 arithmetic runs them too.

    Returns:
        The argument ``custom_translation_table`` of ``torch.onnx.export(..., dynamo=True)``: a
        new dictionary, to which translations of other operators may be added.

    Raises:
        ImportError: onnxscript is not installed.

    Source:
        mylayers/onnx.py: one function for each operator.

    Example:
        >>> import torch
        >>> import mylayers
        >>> net = torch.nn.Sequential(mylayers.MyLinear(5, 3), mylayers.CenteredLayer()).eval()
        >>> program = torch.onnx.export(
        ...     net,
        ...     (torch.rand(2, 5),),
        ...     dynamo=True,
        ...     dynamic_shapes=({0: "rows"},),
        ...     custom_translation_table=mylayers.onnx.translation_table(),
        ...     verbose=False,
        ... )
        >>> [node.op_type for node in program.model.graph]
        ['MatMul', 'Add', 'Relu', 'ReduceMean', 'Sub']
    """
    try:
        from onnxscript import ir, opset18
    except ImportError as error:
        raise ImportError(
            "mylayers.onnx.translation_table: needs onnxscript, as torch.onnx.export does; "
            "install it with pip install 'mylayers[onnx]'"
        ) from error

    op: Any = opset18  # whose own types leave out what the exporter takes
    sixteen_bits = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

    # What the values between two operators are is not known here, so dtype and rank are the
    # input's throughout.
    def widened(x: Any, dtype: Any) -> Any:
        return op.Cast(x, to=ir.DataType.FLOAT) if dtype in sixteen_bits else x

    def rounded(x: Any, dtype: Any) -> Any:
        return op.Cast(x, to=dtype) if dtype in sixteen_bits else x

    def activated(x: Any, dtype: Any, activation: str | None) -> Any:
        if activation is None:
            return x
        known = find(activation)
        if known is None:
            raise ValueError(
                "mylayers.onnx: activation must be one of those translated, "
                f"{NAMES} or None; got {activation!r}"
            )
        if dtype == ir.DataType.DOUBLE and known.onnx_float64 is not None:
            return known.onnx_float64(op, x)
        return known.onnx(op, x)

    def affine(x: Any, dtype: Any, weight: Any, bias: Any, activation: str | None) -> Any:
        y = op.MatMul(widened(x, dtype), widened(weight, dtype))
        if bias is not None:
            y = op.Add(y, widened(bias, dtype))
        return rounded(activated(y, dtype, activation), dtype)

    def centered(x: Any, dtype: Any, dim: Sequence[int] | None) -> Any:
        axes = op.Constant(value_ints=list(dim)) if dim else None
        wide = widened(x, dtype)
        mean = rounded(op.ReduceMean(wide, axes, keepdims=1), dtype)
        return rounded(op.Sub(wide, widened(mean, dtype)), dtype)

    def normalised(x: Any, dtype: Any, step: _programs.Step, weight: Any, bias: Any) -> Any:
        axes = op.Constant(value_ints=[d - len(step.numbers) for d in range(len(step.numbers))])
        y, wide = widened(x, dtype), ir.DataType.FLOAT if dtype in sixteen_bits else dtype
        epsilon = op.Constant(value=ir.tensor(step.epsilon, dtype=wide))
        centered = op.Sub(y, op.ReduceMean(y, axes, keepdims=1))
        variance = op.ReduceMean(op.Mul(centered, centered), axes, keepdims=1)
        y = op.Div(centered, op.Sqrt(op.Add(variance, epsilon)))
        if weight is not None:
            y = op.Mul(y, widened(weight, dtype))
        if bias is not None:
            y = op.Add(y, widened(bias, dtype))
        return rounded(y, dtype)

    def flattened(x: Any, first: int, last: int) -> Any:
        # As many values as before even where there are none, which -1 would leave open.
        end = {} if last == -1 else {"end": last + 1}
        sizes = [op.Shape(x, end=first), op.ReduceProd(op.Shape(x, start=first, **end))]
        if end:
            sizes.append(op.Shape(x, start=last + 1))
        return op.Reshape(x, op.Concat(*sizes, axis=0), allowzero=1)

    def linear_act(
        input: Any, weight: Any, bias: Any = None, activation: str | None = "relu"
    ) -> Any:
        return affine(input, input.dtype, weight, bias, activation)

    def center(input: Any, dim: Sequence[int] | None = None) -> Any:
        # A 0-D tensor has no dimension that could be named.
        return centered(input, input.dtype, dim if len(input.shape) else None)

    def sequential(input: Any, parameters: Sequence[Any], program: str) -> Any:
        values, dtype, given = [input], input.dtype, iter(parameters)
        for step in _programs.parse(program):
            x = values[step.inputs[0]]
            weight = next(given) if step.has_weight else None
            bias = next(given) if step.has_bias else None
            if step.is_linear:
                if step.name == "linear_t":
                    weight = op.Transpose(weight, perm=[1, 0])
                x = affine(x, dtype, weight, bias, step.activation)
            elif step.name == "center":
                x = centered(x, dtype, step.numbers if len(input.shape) else None)
            elif step.name == "layer_norm":
                x = normalised(x, dtype, step, weight, bias)
            elif step.name == "flatten":
                x = flattened(x, *step.numbers)
            elif step.name == "add":
                other = values[step.inputs[1]]
                x = rounded(op.Add(widened(x, dtype), widened(other, dtype)), dtype)
            else:
                x = rounded(activated(widened(x, dtype), dtype, step.name), dtype)
            values.append(x)
        return values[-1]

    ops = torch.ops.mylayers
    return {
        ops.linear_act.default: linear_act,
        ops.center.default: center,
        ops.sequential.default: sequential,
    }
