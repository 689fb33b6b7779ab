"""Refuses interpreters that are not the process's main one, before torch is imported.

PyTorch works in one interpreter alone. Where another imports it, PyTorch's own module reads memory
that it has freed: mostly it then refuses, and sometimes the process dies.
"""

import importlib
from typing import Any


def _interpreters() -> Any:
    for name in ("_interpreters", "_xxsubinterpreters"):  # the second up to Python 3.12
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            pass
    return None


_found = _interpreters()
if _found is not None and _found.get_current() != _found.get_main():
    raise ImportError(
        "mylayers: must be imported by the main interpreter, as PyTorch works in no other; got "
        f"interpreter {_found.get_current()}"
    )
