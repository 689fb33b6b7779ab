"""Loads the compiled half, ``mylayers._C``, under the torch it was built for."""

import os
from typing import Any

import torch

from mylayers._built_for import TORCH as _BUILT_FOR


def _series(version: str) -> str:
    """``"2.13"`` of ``"2.13.0+cpu"``: the part across which PyTorch's C++ ABI changes."""
    return ".".join(version.split(".")[:2])


if _series(torch.__version__) != _series(_BUILT_FOR):
    raise ImportError(
        f"mylayers was compiled for torch {_series(_BUILT_FOR)} ({_BUILT_FOR}) and cannot be "
        f"loaded into torch {torch.__version__}. Build it again for the torch that is installed, "
        "from a checkout of mylayers: pip install --force-reinstall --no-deps ."
    )

from mylayers import _C  # noqa: E402  (only once the versions are known to agree)

__all__ = ["_C", "build_info", "cmake_prefix_path"]


def build_info() -> dict[str, Any]:
    """What the compiled half was built with and which kernels it runs here.

    Returns:
        - ``torch``, ``compiler``, ``cplusplus``: the versions compiled with (the last is
          ``__cplusplus``).
        - ``instruction_sets``: those compiled; ``kernels``: the one that this processor runs
          (lowered by ``ATEN_CPU_CAPABILITY``, as PyTorch's own kernels are); ``tuned_for``: the
          microarchitecture that their numbers were measured on, the nearest to this one, or None
          where no machine with these kernels was measured (``"generic"``, ``"neon"``).
        - ``products``: ``"own"`` where these kernels compute every product; ``"torch"`` where
          PyTorch's do, but for those of up to 2^15 multiply-adds: that is where ``tuned_for`` is
          None, unless ``MYLAYERS_PRODUCTS=own`` was set before the import. A row's bits then
          depend on the other rows of its batch, and on the number of threads.
        - ``bfloat16_units``: whether bfloat16 products run on the processor's 16-bit matrix
          units (AVX512-BF16 or AMX), which take subnormal values for zero; ``amx``: whether on
          the tiles of AMX, which float32 products take too where PyTorch's setting
          ``torch.set_float32_matmul_precision("medium")`` allows it.
        - ``huge_pages``: whether results of 4 MiB and more ask Linux for huge pages (not with
          ``MYLAYERS_HUGE_PAGES=0``, read once at the first of them).
        - ``openmp``: whether kernels share PyTorch's threads.
        - ``cuda``: the version whose kernels were compiled, or None; ``cuda_detail``: for which
          architectures, or why not.
        - ``file``: the extension's path.

    Example:
        >>> import mylayers
        >>> sorted(mylayers.build_info())[:4]
        ['amx', 'bfloat16_units', 'compiler', 'cplusplus']
    """
    return {**_C.build_info(), "file": os.path.abspath(_C.__file__)}


def cmake_prefix_path() -> str:
    """Where CMake's ``find_package(mylayers)`` looks, beside ``torch.utils.cmake_prefix_path``.

    Its target ``mylayers::mylayers`` is ``libmylayers.so``, the operators without Python, and
    libtorch; docs/deploy.md has a program that uses it.

    Returns:
        An absolute path, for ``CMAKE_PREFIX_PATH``.

    Example:
        >>> import os
        >>> import mylayers
        >>> os.listdir(mylayers.cmake_prefix_path())
        ['mylayersConfig.cmake']
    """
    return os.path.join(os.path.dirname(os.path.abspath(_C.__file__)), "cmake")
