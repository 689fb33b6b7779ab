"""The two formulas in plain PyTorch: what the compiled kernels are checked against.

Imports nothing compiled, so that the tests and benchmarks have an independent oracle, and
reads as the definition of the layers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mylayers import activations

__all__ = ["ACTIVATIONS", "center", "linear_act"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: activation.formula for name, activation in activations.ACTIVATIONS.items()
}


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "relu",
) -> Tensor:
    """``act(input @ weight + bias)``, as :func:`mylayers.functional.linear_act`."""
    output = torch.matmul(input, weight)
    if bias is not None:
        output = output + bias
    if activation is None:
        return output
    if not isinstance(activation, str):
        kind = type(activation).__name__
        raise TypeError(f"linear_act: activation must be a str or None; got {kind}")
    known = activations.find(activation)
    if known is None:
        raise ValueError(
            f"linear_act: activation must be one of {activations.NAMES} or None; got {activation!r}"
        )
    return known.formula(output)


def center(input: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    """``input - input.mean(dim)``, as :func:`mylayers.functional.center`."""
    if dim is None:
        return input - input.mean()
    return input - input.mean(dim if isinstance(dim, int) else tuple(dim), keepdim=True)
