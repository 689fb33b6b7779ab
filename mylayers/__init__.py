"""PyTorch layers with compiled, fused kernels.

``MyLinear`` computes ``relu(X @ weight + bias)`` and ``CenteredLayer`` ``X - X.mean()``,
each in one call of one operator, forward and backward. ``mylayers.functional`` has the same
as functions, ``mylayers.reference`` the formulas in plain PyTorch.
"""

import importlib.machinery
import os
import sys

if not any(
    os.path.isfile(os.path.join(__path__[0], "_C" + suffix))
    for suffix in importlib.machinery.EXTENSION_SUFFIXES
):
    # This is the source folder, on sys.path because Python was started beside it; it
    # shadows the installed package, which has the compiled half. Every submodule is taken
    # from there, so that what runs is what was installed.
    _here = os.path.dirname(os.path.abspath(__path__[0]))
    _path = sys.path[:]
    try:
        sys.path[:] = [p for p in _path if os.path.abspath(p or os.curdir) != _here]
        _specs = (finder.find_spec(__name__, None) for finder in sys.meta_path)
        _spec = next(filter(None, _specs), None)
    finally:
        sys.path[:] = _path
    if _spec is None or not _spec.submodule_search_locations:
        raise ImportError(
            f"mylayers was imported from its source folder, {__path__[0]}, where it is not "
            "compiled, and it is not installed in this environment. Install it with "
            f"'pip install {_here}'."
        )
    __path__[:] = _spec.submodule_search_locations

# Before what imports torch.
from mylayers import _main_interpreter  # noqa: F401  # isort: skip
from mylayers import _flops, functional, onnx, reference
from mylayers._extension import build_info, cmake_prefix_path
from mylayers.frozen import Frozen, freeze
from mylayers.layers import CenteredLayer, LazyMyLinear, MyLinear
from mylayers.optimization import Report, optimize, restore
from mylayers.sequential import FusedSequential
from mylayers.training import forward_backward, training_step

__all__ = [
    "CenteredLayer",
    "Frozen",
    "FusedSequential",
    "LazyMyLinear",
    "MyLinear",
    "Report",
    "build_info",
    "cmake_prefix_path",
    "forward_backward",
    "freeze",
    "functional",
    "onnx",
    "optimize",
    "reference",
    "restore",
    "training_step",
]
__version__ = "0.1.0"

_flops.register()
