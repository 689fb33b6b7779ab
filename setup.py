"""Builds the compiled half; everything that needs no code stands in pyproject.toml.

That is two libraries: ``libmylayers.so`` holds the operators and needs no Python, so that C++
programs may link it too; ``mylayers._C`` is what Python needs beside it, and is linked to it.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

if sys.platform != "linux":
    raise SystemExit(
        "mylayers is built on Linux alone (x86-64 or 64-bit Arm): its libraries are linked, and "
        f"find each other, by what Linux's linkers have; this is {sys.platform}. On macOS and "
        "Windows install it in a Linux container or virtual machine."
    )

try:
    import torch
except ModuleNotFoundError:
    raise SystemExit(
        "mylayers is compiled against torch, and this environment has none. Leave out "
        "--no-build-isolation, or install torch first (pip install torch)."
    ) from None

sys.path.append(str(Path(__file__).resolve().parent / "build_support"))
import cuda_build

OLDEST_TORCH = (2, 11)
# Memory that one compiler process may take; torch's autograd headers need most of it.
GIB_PER_JOB = 1.5

series = tuple(int(part) for part in torch.__version__.split(".")[:2])
if series < OLDEST_TORCH:
    raise SystemExit(
        f"mylayers needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer; this environment "
        f"has {torch.__version__}. Upgrade it (pip install --upgrade torch) and try again."
    )

# Before torch's build helper is imported, which reads CUDA_HOME then.
toolkit = cuda_build.find_toolkit(os.environ) if torch.version.cuda else None
libraries = toolkit and cuda_build.find_libraries(
    toolkit.home, Path(torch.__file__).resolve().parent.parent
)
cuda = cuda_build.decide(os.environ, torch.version.cuda, toolkit, libraries)
if cuda.architectures is not None:
    os.environ["CUDA_HOME"] = str(toolkit.home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = cuda.architectures

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def jobs() -> int:
    """As many compilers at once as there are processors and memory for."""
    processors = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return processors or 1
    return max(1, min(processors or 1, int(free_kib / 2**20 / GIB_PER_JOB)))


COMPILER = shlex.split(os.environ.get("CXX", "c++"))


def check_tools() -> None:
    if shutil.which(COMPILER[0]) is None:
        raise SystemExit(
            f"mylayers compiles C++ and found no compiler ('{COMPILER[0]}' is not on the PATH). "
            "Install one and try again: 'apt-get install g++' on Debian and Ubuntu, "
            "'dnf install gcc-c++' on Fedora; or name yours in the environment variable CXX."
        )
    if not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")):
        raise SystemExit(
            "mylayers compiles against Python's headers and found no Python.h. Install them and "
            "try again: 'apt-get install python3-dev' on Debian and Ubuntu, 'dnf install "
            "python3-devel' on Fedora."
        )


def compiler_flags() -> list[str]:
    """What g++ and clang want told differently.

    -fopenmp is for at::parallel_for, and is not given to the linker: GOMP_parallel then binds to
    the OpenMP runtime that torch has loaded, and both share one pool of threads. clang calls
    another runtime, which torch does not have; kernels that it compiles run on one thread.
    """
    try:
        version = subprocess.run([*COMPILER, "--version"], capture_output=True, text=True).stdout
    except OSError:  # check_tools says so, if it comes to compiling
        return []
    if "clang" in version:
        return ["-Wno-unknown-pragmas"]  # OpenMP's own
    # g++ 12 warns inside its own AVX-512 headers (GCC bug 105593), and for Arm of stores behind a
    # loop's last.
    arm = ["-Wno-stringop-overflow"] if platform.machine() == "aarch64" else []
    return ["-fopenmp", "-Wno-maybe-uninitialized", *arm]


class Build(BuildExtension):
    """Checks for the tools first, and leaves a note of the torch that it built for.

    The note is what ``import mylayers`` reads before it loads the extension: under another
    minor series loading fails on a missing symbol at best.
    """

    def run(self) -> None:
        check_tools()
        kernels = f"for {cuda.architectures}" if cuda.architectures else f"no: {cuda.reason}"
        print(f"mylayers: CUDA kernels: {kernels}", flush=True)
        os.environ.setdefault("MAX_JOBS", str(jobs()))
        super().run()
        self._leave_note(Path(self.build_lib, "mylayers"))

    def get_ext_filename(self, name: str) -> str:
        # Python's suffix names its version and ABI, which are nothing to this library.
        if name.endswith("libmylayers"):
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, ext: CppExtension) -> None:
        # One run of ninja compiles for both libraries: after each run a processor waited for the
        # longest file. It starts with the kernels, which take longest.
        if ext is operators:
            alone = [source for source in ext.sources if Path(source).parent.name in ALONE]
            others = [source for source in ext.sources if source not in alone]
            joined = [
                self._joined("operators", others),
                self._joined("bindings", bindings.sources),
            ]
            print(
                f"mylayers: compiling {len(alone) + len(joined)} files, "
                f"{os.environ['MAX_JOBS']} at a time; each takes up to a minute or two",
                flush=True,
            )
            *ext.extra_objects, binding = self.compiler.compile(
                [*alone, *joined],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args,
            )
            bindings.extra_objects = [binding]
        self.compiler.link_shared_object(
            ext.extra_objects,
            self.get_ext_fullpath(ext.name),
            libraries=self.get_libraries(ext),
            # Where libmylayers.so lies by the time that _C is linked to it.
            library_dirs=[*ext.library_dirs, os.path.join(self.build_lib, "mylayers")],
            runtime_library_dirs=ext.runtime_library_dirs,
            extra_postargs=ext.extra_link_args,
            target_lang="c++",
        )

    def _joined(self, name: str, sources: list[str]) -> str:
        """One source that includes the others, so that torch's headers are read once for all.

        They took most of the time of each file that was compiled by itself. [lab: build-time]
        """
        file = Path(self.build_temp, f"{name}.cpp").resolve()
        paths = (os.path.relpath(Path(source).resolve(), file.parent) for source in sources)
        # Without this macro torch's headers include those of all its operators.
        text = "#define AT_PER_OPERATOR_HEADERS\n"
        text += "".join(f'#include "{path}"\n' for path in paths)
        if not file.exists() or file.read_text() != text:  # else ninja would compile it again
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return str(file)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self._leave_note(Path("mylayers"))

    def _leave_note(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, "_built_for.py").write_text(f'TORCH = "{torch.__version__}"\n')


FILES = sorted(path for path in Path("csrc").rglob("*.*") if path.is_file())
# What build_info() tells.
MACROS = {
    "MYLAYERS_TORCH_VERSION": torch.__version__,
    "MYLAYERS_CUDA_DETAIL": cuda.architectures or cuda.reason,
    **({"MYLAYERS_CUDA_VERSION": toolkit.version} if cuda.architectures else {}),
}


def extension(
    name: str, sources: list[Path], kind: type[CppExtension] = CppExtension, **options: list[str]
) -> CppExtension:
    # After all other folders: pip's have a runtime too, which need not be nvcc's.
    folders = libraries.include if kind is CUDAExtension else []
    return kind(
        name,
        list(map(str, sources)),
        depends=list(map(str, FILES)),
        extra_compile_args={
            "cxx": [
                *(f"-D{macro}={json.dumps(value)}" for macro, value in MACROS.items()),
                "-std=c++20",
                "-O3",
                "-ffp-contract=off",  # csrc/cpu/kernels says itself where to fuse
                "-g0",
                "-fvisibility=hidden",
                "-Wall",
                # 64-byte vectors never cross a function that is not inlined.
                "-Wno-psabi",
                *compiler_flags(),
                *(flag for folder in folders for flag in ("-isystem", str(folder))),
                # Last, so that they win; torch's build helper takes CFLAGS alone, and first.
                *shlex.split(os.environ.get("CXXFLAGS", "")),
            ],
            "nvcc": ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden,-Wall"],
        },
        **options,
    )


# Folders whose files are compiled one by one: they include little of torch, or its CUDA headers.
ALONE = ("kernels", "cuda")
BINDINGS = Path("csrc/python")  # alone in needing Python
# By this name a process knows that it has the library, wherever a second copy lies: operators can
# be registered only once.
link = ["-Wl,-soname,libmylayers.so"]
sources = [path for path in FILES if path.suffix == ".cpp" and path.parent != BINDINGS]
if cuda.architectures is not None:
    kind = CUDAExtension
    sources += [path for path in FILES if path.suffix == ".cu"]
    link += [str(libraries.library), *(f"-Wl,-rpath,$ORIGIN/../{p}" for p in libraries.packages)]
else:
    kind = CppExtension
    sources = [path for path in sources if path.parent.name != "cuda"]
operators = extension("mylayers.libmylayers", sources, kind, extra_link_args=link)
operators.libraries.remove("torch_python")
bindings = extension(
    "mylayers._C",
    sorted(BINDINGS.glob("*.cpp")),
    libraries=["mylayers"],
    runtime_library_dirs=["$ORIGIN"],
)

setup(
    ext_modules=[operators, bindings],  # in the order of linking
    cmdclass={"build_ext": Build},
    install_requires=[f"torch=={series[0]}.{series[1]}.*"],
)
