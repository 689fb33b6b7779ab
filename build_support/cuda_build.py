"""Whether ``setup.py`` compiles the CUDA kernels, for which GPUs, and if not, why.

What decides is the compiler and the torch that are here, never whether this machine has a GPU:
a build machine often has none.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# One for each generation from Turing on; the members of a generation run its code. The newest that
# nvcc knows is also built as PTX, which the driver compiles for whatever comes after it.
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
# What ATen's CUDA headers include and what is linked, beyond the compiler and its runtime.
HEADERS = ("cublas_v2.h", "cublasLt.h", "cusolverDn.h", "cusparse.h")
LIBRARY = "libcublasLt.so"
RUNTIME = "libcudart.so"


@dataclass(frozen=True)
class Toolkit:
    """An nvcc and what belongs to it.

    Attributes:
        nvcc: the compiler.
        home: the folder of its toolkit, which CUDA_HOME stands for.
        version: of the toolkit, such as "13.0".
        architectures: what it compiles for, such as "9.0".
        complaint: about the C++ compiler that it found, too new for it for example.
    """

    nvcc: str
    home: Path
    version: str
    architectures: tuple[str, ...]
    complaint: str = ""


@dataclass(frozen=True)
class Decision:
    """What is built.

    Attributes:
        architectures: as TORCH_CUDA_ARCH_LIST names them; None if no kernels are built.
        reason: why none are.
    """

    architectures: str | None
    reason: str = ""


@dataclass(frozen=True)
class Libraries:
    """Where the headers and the library are.

    Attributes:
        include: folders beside the toolkit's own.
        library: cuBLASLt; None if it is nowhere.
        missing: headers that are nowhere.
        packages: folders beside torch's with libraries that are linked. In Python torch has loaded
            them before; a program without Python is told by these where they are.
    """

    include: list[Path] = field(default_factory=list)
    library: Path | None = None
    missing: list[str] = field(default_factory=list)
    packages: list[Path] = field(default_factory=list)


def find_toolkit(environ: Mapping[str, str]) -> Toolkit | None:
    """The nvcc of CUDA_HOME or CUDA_PATH, of PATH or of /usr/local/cuda; None if none works."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    nvcc = (
        str(Path(home, "bin", "nvcc"))
        if home
        else shutil.which("nvcc", path=environ.get("PATH")) or "/usr/local/cuda/bin/nvcc"
    )
    try:
        version = re.search(r"release (\d+\.\d+)", _ask(nvcc, "--version"))
        # nvcc may be a link or a script that stands elsewhere: only it knows its own folder.
        top = re.search(r"^#\$ TOP=(.+)$", _ask(nvcc, "--dryrun", "-x", "cu", "/dev/null"), re.M)
        known = re.findall(r"compute_(\d+)(\d)\b", _ask(nvcc, "--list-gpu-arch"))
    except (OSError, subprocess.CalledProcessError):
        return None
    if version is None or top is None:
        return None
    architectures = tuple(f"{major}.{minor}" for major, minor in known)
    try:
        _ask(nvcc, "-std=c++20", "-x", "cu", "-E", "/dev/null", "-o", "/dev/null")
        complaint = ""
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").splitlines()
        complaint = next((line for line in lines if "error" in line), f"exit {error.returncode}")
    return Toolkit(nvcc, Path(top[1].strip()).resolve(), version[1], architectures, complaint)


def find_libraries(home: Path, site_packages: Path) -> Libraries:
    """In a whole toolkit, or in the nvidia-* packages that pip installs for torch."""
    packages = sorted(site_packages.glob("nvidia/*"))
    include, missing = [], []
    for header in HEADERS:
        if (home / "include" / header).is_file():
            continue
        folder = next((p / "include" for p in packages if (p / "include" / header).is_file()), None)
        if folder is None:
            missing.append(header)
        elif folder not in include:
            include.append(folder)
    # By its full name, since pip's packages have no plain libcublasLt.so.
    found = [
        library
        for folder in (home / "lib64", home / "lib", *(p / "lib" for p in packages))
        for library in sorted(folder.glob(LIBRARY + "*"))
    ]
    beside = [
        (package / "lib").relative_to(site_packages)
        for package in packages
        if any([*package.glob(f"lib/{name}*")] for name in (LIBRARY, RUNTIME))
    ]
    return Libraries(include, found[0] if found else None, missing, beside)


def decide(
    environ: Mapping[str, str],
    torch_cuda: str | None,
    toolkit: Toolkit | None,
    libraries: Libraries | None,
) -> Decision:
    """Whether to build the kernels.

    Args:
        environ: MYLAYERS_CUDA, 0 or 1, overrides the choice; TORCH_CUDA_ARCH_LIST the
            architectures.
        torch_cuda: the CUDA version that torch was built for; None for a torch without CUDA.
        toolkit: the compiler; None if there is none.
        libraries: what was found for it.

    Raises:
        SystemExit: MYLAYERS_CUDA is 1 and they cannot be built, or it is neither 0 nor 1.
    """
    wish = environ.get("MYLAYERS_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"MYLAYERS_CUDA must be 0 or 1, or not be set; got {wish!r}")
    if wish == "0":
        return Decision(None, "MYLAYERS_CUDA=0")
    reason = _obstacle(torch_cuda, toolkit, libraries)
    if reason and wish == "1":
        raise SystemExit(f"MYLAYERS_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    if reason or toolkit is None:
        return Decision(None, reason)
    known = [a for a in ARCHITECTURES if a in toolkit.architectures] or toolkit.architectures[-1:]
    return Decision(environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(known) + "+PTX")


def _obstacle(torch_cuda: str | None, toolkit: Toolkit | None, libraries: Libraries | None) -> str:
    """What stands in the way, or nothing."""
    if torch_cuda is None:
        return "this torch is built without CUDA"
    if toolkit is None or libraries is None:
        return (
            "no working nvcc, in CUDA_HOME, on the PATH or in /usr/local/cuda "
            f"(torch is built for CUDA {torch_cuda})"
        )
    if toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        return (
            f"{toolkit.nvcc} is of CUDA {toolkit.version} and torch is built for CUDA "
            f"{torch_cuda}; the major versions must agree (CUDA_HOME names another nvcc)"
        )
    if toolkit.complaint:
        return f"{toolkit.nvcc} does not go with this C++ compiler: {toolkit.complaint}"
    if libraries.missing or libraries.library is None:
        lacking = ", ".join([*libraries.missing, *([] if libraries.library else [LIBRARY])])
        return f"{lacking} found neither in {toolkit.home} nor in pip's nvidia packages"
    return ""


def _ask(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "NVCC_APPEND_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout + done.stderr  # a dry run goes to the latter
