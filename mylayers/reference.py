"""The two formulas in plain PyTorch: what the compiled kernels are checked against.

Imports nothing compiled, so that the tests and benchmarks have an independent oracle, and
reads as the definition of the layers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "center", "linear_act"]

# Those whose derivative is a function of their output.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": torch.nn.functional.elu,
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
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"linear_act: activation must be one of {', '.join(ACTIVATIONS)} or None; "
            f"got {activation!r}"
        )
    return ACTIVATIONS[activation](output)


def center(input: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    """``input - input.mean(dim)``, as :func:`mylayers.functional.center`."""
    if dim is None:
        return input - input.mean()
    return input - input.mean(dim if isinstance(dim, int) else tuple(dim), keepdim=True)
