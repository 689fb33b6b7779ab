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

from mylayers import _programs

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
    flops, values, left = 0, [tuple(input)], list(parameters)
    for step in _programs.parse(program):
        shape = values[step.inputs[0]]
        if step.is_linear:
            units = left[0][step.units_dim]
            flops += 2 * prod(shape) * units
            shape = (*shape[:-1], units)
        elif step.name == "flatten":
            shape = shape or (1,)
            first, last = (d % len(shape) for d in step.numbers)
            shape = (*shape[:first], prod(shape[first : last + 1]), *shape[last + 1 :])
        values.append(shape)
        del left[: step.parameters]
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
    steps = _programs.parse(program)
    # Of every value: its shape, where backward reads it; that of the gradient that arrives at it;
    # and whether a gradient that is asked for lies before it.
    values: list[_Shape | None] = [input]
    arriving: list[_Shape | None] = [None]
    leads = [output_mask[0]]
    first_parameters, parameter, place = [], 1, 0
    sizes: list[Sequence[int]] = []
    for step in steps:
        after = parameter + step.parameters
        leads.append(any(leads[i] for i in step.inputs) or any(output_mask[parameter:after]))
        first_parameters.append(parameter)
        parameter = after
        if step.name == "flatten":
            rank = flattened[0]
            sizes.append(flattened[1 : 1 + rank])
            flattened = flattened[1 + rank :]
            source = values[step.inputs[0]]
            values.append(source and (prod(source),))  # its elements are all that is asked for
            arriving.append(None)
        else:
            values.append(outputs[place])
            arriving.append(grad_outputs[place])
            place += 1
    flops = 0
    for value in range(len(steps), 0, -1):
        step, shape, first = steps[value - 1], arriving[value], first_parameters[value - 1]
        before = sizes.pop() if step.name == "flatten" else shape
        if shape is None or not leads[value]:
            continue
        if step.is_linear:
            factor, weight = values[step.inputs[0]], parameters[first - 1]
            if output_mask[first] and factor is not None:
                flops += 2 * prod(factor) * shape[-1]
            if not leads[step.inputs[0]] or weight is None:
                continue
            in_units = weight[1 - step.units_dim]
            flops += 2 * prod(shape) * in_units
            before = (*shape[:-1], in_units)
        for i in step.inputs:
            arriving[i] = arriving[i] or before
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
