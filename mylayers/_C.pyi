from collections.abc import Sequence
from typing import Any

from torch import Tensor

def linear_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, /
) -> Tensor: ...
def center(input: Tensor, dim: int | Sequence[int] | None, /) -> Tensor: ...
def build_info() -> dict[str, Any]: ...
