from collections.abc import Sequence
from typing import Any

from torch import Tensor

def linear_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, /
) -> Tensor: ...
def center(input: Tensor, dim: int | Sequence[int] | None, /) -> Tensor: ...
def make_chain(
    program: str,
    parent: type,
    first: int,
    siblings: int,
    children: tuple[tuple[type, tuple[tuple[str, Any], ...], bool, bool], ...],
) -> object: ...
def run_chain(chain: object, modules: dict[str, Any], input: object, /) -> Any: ...
def call_fused(fused: object, input: object, /) -> Any: ...
def forward_backward(
    network: object,
    criterion: object,
    loss: tuple[int, int, float, int],
    input: object,
    target: object,
    /,
) -> Any: ...
def build_info() -> dict[str, Any]: ...
