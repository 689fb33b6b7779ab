"""What ``torch.utils.flop_counter`` counts for our operators: as for stock layers, their products.

One of ``(m, k)`` and ``(k, n)`` is ``2 m n k`` operations there; sums, means and activations are
none. PyTorch's counter imports Triton where that is installed, which takes a tenth of the time of
all of PyTorch, so it is not imported for this: whoever imports it gets our formulas with it.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from math import prod
from types import ModuleType
from typing import Any

import torch

__all__ = ["register"]

# The counter gives formulas each tensor's shape, and ``out_shape``, which ours have no use for.
_Shape = Sequence[int]


def _linear_act(input: _Shape, weight: _Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(input) * weight[1]


def _linear_act_backward(
    grad_output: _Shape,
    input: _Shape | None,
    weight: _Shape | None,
    _output: _Shape | None,
    _activation: str | None,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    flops = 0
    if output_mask[0] and weight is not None:
        flops += 2 * prod(grad_output) * weight[0]
    if output_mask[1] and input is not None:
        flops += 2 * prod(input) * grad_output[-1]
    return flops


def _center(*_: Any, **__: Any) -> int:
    return 0


def _sequential(input: _Shape, parameters: Sequence[_Shape], program: str, **_: Any) -> int:
    flops, shape, left = 0, tuple(input), iter(parameters)
    for step in program.split("; "):
        if step.startswith("linear"):
            weight = next(left)
            if "+bias" in step:
                next(left)
            units = weight[0 if step.startswith("linear_t") else 1]
            flops += 2 * prod(shape) * units
            shape = (*shape[:-1], units)
        elif step.startswith("flatten"):
            shape = shape or (1,)
            first, last = (int(d) % len(shape) for d in step[len("flatten(") : -1].split(","))
            shape = (*shape[:first], prod(shape[first : last + 1]), *shape[last + 1 :])
    return flops


def _sequential_backward(
    grad_outputs: Sequence[_Shape | None],
    input: _Shape | None,
    outputs: Sequence[_Shape | None],
    parameters: Sequence[_Shape | None],
    flattened: Sequence[int],
    program: str,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    before_flattens = []
    while flattened:
        rank = flattened[0]
        before_flattens.append(flattened[1 : 1 + rank])
        flattened = flattened[1 + rank :]
    flops = 0
    shape: _Shape | None = None  # of the gradient on its way back, once there is one
    place, parameter = len(outputs), len(parameters)
    for step in reversed(program.split("; ")):
        if step.startswith("flatten"):
            sizes = before_flattens.pop()
            shape = sizes if shape is not None else None
            continue
        place -= 1
        shape = grad_outputs[place] if shape is None else shape
        if not step.startswith("linear"):
            continue
        parameter -= 2 if "+bias" in step else 1
        if shape is None:
            continue
        factor, weight = outputs[place - 1] if place else input, parameters[parameter]
        if output_mask[1 + parameter] and factor is not None:
            flops += 2 * prod(factor) * shape[-1]
        if not any(output_mask[: 1 + parameter]) or weight is None:
            break
        in_units = weight[1 if step.startswith("linear_t") else 0]
        flops += 2 * prod(shape) * in_units
        shape = (*shape[:-1], in_units)
    return flops


_FORMULAS = {
    "linear_act": _linear_act,
    "linear_act_backward": _linear_act_backward,
    "center": _center,
    "sequential": _sequential,
    "sequential_outputs": _sequential,
    "sequential_backward": _sequential_backward,
}


def _register_with(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        operator = getattr(torch.ops.mylayers, name)
        if operator not in counter.flop_registry:  # as after a second import of one of the two
            counter.register_flop_formula(operator)(formula)


_COUNTER = "torch.utils.flop_counter"


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register_with(module)


class _Finder:
    """Finds the counter where Python's own finder does, and has it loaded with our formulas."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def register() -> None:
    """Let PyTorch's counter know our operators, now or when it is imported."""
    if _COUNTER in sys.modules:
        _register_with(importlib.import_module(_COUNTER))  # done, if it is just being imported
    else:
        sys.meta_path.insert(0, _Finder)
