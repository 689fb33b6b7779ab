"""The two formulas in plain PyTorch: what the compiled kernels are checked against.

Imports nothing compiled, so that the tests and benchmarks have an independent oracle, and
reads as the definition of the layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["center", "linear_act"]


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
    if activation == "relu":
        return torch.relu(output)
    if activation is None:
        return output
    raise ValueError(f'linear_act: activation must be "relu" or None; got {activation!r}')


def center(input: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    """``input - input.mean(dim)``, as :func:`mylayers.functional.center`."""
    if dim is None:
        return input - input.mean()
    return input - input.mean(dim if isinstance(dim, int) else tuple(dim), keepdim=True)
