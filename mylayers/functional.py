"""The operators as functions. ``mylayers.layers`` wraps them in modules.

An eager call of plain tensors goes straight into the extension, which hands it to
PyTorch's dispatcher; that saves the argument parsing of ``torch.ops``. Where something
watches calls by their Python name (a compiler, ``torch.jit.trace``, a tensor or mode that
overrides ``__torch_function__``), the call goes through ``torch.ops`` so that it is seen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from mylayers._extension import _C

__all__ = ["center", "linear_act"]

# Looked up once: a small call would notice its modules' attributes (docs/lab, constants).
# (torch.compiler.is_compiling asks more and takes twice as long; export has a mode of its own.)
_is_compiling = torch.compiler.is_dynamo_compiling
_tracing_state = torch._C._get_tracing_state


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "relu",
) -> Tensor:
    r"""Affine map and activation in one pass: ``act(input @ weight + bias)``.

    Args:
        input: ``(..., in_units)`` or ``(in_units)``, any strides. float32, float64, float16
            and bfloat16 run compiled kernels; every other dtype, layout or device takes the
            same formula in PyTorch's own operators.
        weight: ``(in_units, units)``, any strides; dtype and device of ``input``. (The
            transpose of ``torch.nn.functional.linear``'s.)
        bias: ``(units)``, or None for no bias.
        activation: None or the name of one, with PyTorch's defaults: ``"relu"``, ``"tanh"``,
            ``"sigmoid"``, ``"elu"``, ``"gelu"``, ``"gelu_tanh"`` (its approximation), ``"silu"``,
            ``"leaky_relu"``, ``"selu"``, ``"celu"``, ``"softplus"``, ``"logsigmoid"``,
            ``"mish"``, ``"hardtanh"``, ``"relu6"``, ``"hardswish"``, ``"hardsigmoid"``,
            ``"softsign"``. ``"elu(0.5)"`` and ``"celu(0.5)"`` say alpha, ``"leaky_relu(0.2)"`` the
            slope below zero, from 0.0001 to 100.

    Returns:
        ``(..., units)``, contiguous. Sums are formed in float32 for the 16-bit dtypes and in
        the dtype itself for the others, and rounded once. A row's result does not depend on
        the other rows nor on the number of threads, to the bit.

    Raises:
        TypeError: an argument is not a tensor, or ``activation`` not a string.
        ValueError: ``activation`` is an unknown name.
        RuntimeError: shapes, dtypes or devices do not fit together.

    Source:
        csrc/cpu/linear_act.cpp; the gradient in csrc/autograd/linear_act.cpp.

    Example:
        >>> import torch
        >>> from mylayers.functional import linear_act
        >>> x = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
        >>> weight, bias = torch.eye(2), torch.tensor([0.5, 0.5])
        >>> linear_act(x, weight, bias)
        tensor([[1.5000, 2.5000],
                [3.5000, 0.0000]])
    """
    if (
        _is_compiling()
        or has_torch_function_variadic(input, weight, bias)
        or _tracing_state() is not None
    ):
        return torch.ops.mylayers.linear_act(input, weight, bias, activation)  # type: ignore[no-any-return]
    return _C.linear_act(input, weight, bias, activation)


def center(input: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    r"""Subtract the mean: ``input - input.mean(dim, keepdim=True)``.

    Args:
        input: any shape and strides. float32, float64, float16 and bfloat16 run compiled
            kernels; every other dtype, layout or device takes the same formula in PyTorch's
            own operators.
        dim: the dimension or dimensions to average over; all of them if None or empty, as
            in ``torch.mean``.

    Returns:
        A tensor of ``input``'s shape. The sum is formed in float64 once eight values have met
        in their own accumulator (float32 for the 16-bit dtypes), so that its accuracy does not
        fall with length; the mean is rounded to the dtype of ``input``. The result does not
        depend on the number of threads, to the bit.

    Raises:
        TypeError: ``input`` is not a tensor, or ``dim`` not an integer or sequence of them.
        IndexError: ``dim`` is out of range.
        RuntimeError: ``dim`` names a dimension twice, or the dtype has no mean (integers).

    Source:
        csrc/cpu/center.cpp; the gradient, which is the operator itself, in
        csrc/autograd/center.cpp.

    Example:
        >>> import torch
        >>> from mylayers.functional import center
        >>> center(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
        tensor([-2., -1.,  0.,  1.,  2.])
    """
    if _is_compiling() or has_torch_function_variadic(input) or _tracing_state() is not None:
        # A list also where an integer is symbolic, which torch.compile makes of one that changes.
        dims = [dim] if isinstance(dim, int) else dim
        return torch.ops.mylayers.center(input, dims)  # type: ignore[no-any-return]
    return _C.center(input, dim)


def _center_in_a_script(input: Tensor, dim: int | list[int] | None = None) -> Tensor:
    if isinstance(dim, int):
        return torch.ops.mylayers.center(input, [dim])  # type: ignore[no-any-return]
    return torch.ops.mylayers.center(input, dim)  # type: ignore[no-any-return]


# TorchScript, which asks for this, knows no Sequence.
center.__prepare_scriptable__ = lambda: _center_in_a_script  # type: ignore[attr-defined]
