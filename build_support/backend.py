"""setuptools' build backend, told where to find the torch that is already installed.

The extension must be compiled against the very torch that it will be loaded into. pip
builds in an isolated environment that hides it, but there ``sysconfig`` still names the
folder that the package will be installed to: a torch found in that folder is used in
place, and only where there is none is one asked for.
"""

import os
import sys
import sysconfig
from typing import Any

from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

# The release this project is tested with, used where no torch is installed yet.
DEFAULT_TORCH = "torch==2.13.0"


def _torch_folder() -> str | None:
    for key in ("platlib", "purelib"):
        folder = sysconfig.get_path(key)
        if os.path.isfile(os.path.join(folder, "torch", "version.py")):
            return folder
    return None


_found = _torch_folder()
if _found is not None and _found not in sys.path:
    # Last, so that what the isolated environment holds (setuptools) comes first.
    sys.path.append(_found)


def _missing(config_settings: Any = None) -> list[str]:  # noqa: ARG001
    # setuptools' own hook would run setup.py, which imports torch, to learn that it needs
    # nothing else.
    return [] if _found is not None else [DEFAULT_TORCH]


get_requires_for_build_wheel = _missing
get_requires_for_build_editable = _missing
get_requires_for_build_sdist = _missing
