"""The operators without Python: libmylayers.so, find_package(mylayers), examples/cpp."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mylayers

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "cpp"
CONFIG = Path(mylayers.cmake_prefix_path())
LIBRARY = CONFIG.parent / "libmylayers.so"

pytestmark = pytest.mark.road("C++ without Python")


def run(
    *command: Any, input: str | None = None, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    # CMake and Ninja from PyPI lie beside Python, which need not be on the PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [str(part) for part in command],
        input=input,
        cwd=cwd,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )


def python(code: str, *arguments: Any, cwd: Path) -> str:
    done = run(sys.executable, "-c", code, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def configure(build: Path, *prefixes: Any) -> subprocess.CompletedProcess[str]:
    return run(
        *("cmake", "-S", EXAMPLE, "-B", build, "-G", "Ninja"),
        f"-DCMAKE_PREFIX_PATH={';'.join(map(str, prefixes))}",
    )


class Example(NamedTuple):
    """What the commands of docs/deploy.md leave in their folder, and print."""

    program: Path
    network: Path
    rows: str
    printed: list[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Example:
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    (commands,) = [block for block in blocks if "cmake --build" in block]
    # As some systems tell their linkers: leave out libraries of which no symbol is named.
    done = run("bash", "-euc", commands, cwd=folder, LDFLAGS="-Wl,--as-needed")
    assert done.returncode == 0, done.stdout + done.stderr
    out = folder / "out"
    rows = (out / "rows.txt").read_text()
    return Example(out / "cpp/run_network", out / "network.pt2", rows, done.stdout.splitlines())


@pytest.fixture(scope="module")
def example() -> Any:
    """examples/cpp/export.py as a module."""
    spec = importlib.util.spec_from_file_location("export", EXAMPLE / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(lines: list[str]) -> Tensor:
    return torch.tensor([[float(number) for number in line.split()] for line in lines])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within the rounding of sums of 64 products: Inductor may fuse what lies between layers."""
    atol = 64 * torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.whole
def test_the_documented_commands_print_the_same_from_python_and_without(built: Example) -> None:
    count = len(built.rows.splitlines())
    assert count > 1
    assert_close(parsed(built.printed[-count:]), parsed(built.printed[:count]))


@pytest.mark.parametrize("count", [1, 2, 257])
def test_the_exported_network_takes_any_batch(built: Example, example: Any, count: int) -> None:
    net = example.build()
    rows = torch.randn(count, 64)
    done = run(built.program, built.network, input=example.as_text(rows))
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert_close(parsed(done.stdout.splitlines()), net(rows))


def test_no_python_is_in_the_process(built: Example) -> None:
    # The loader's own account of every library, that of the exported network included.
    done = run(built.program, built.network, input=built.rows, LD_DEBUG="files")
    loaded = {
        os.path.basename(line.split("calling init: ")[1])
        for line in done.stderr.splitlines()
        if "calling init: " in line
    }
    assert "libmylayers.so" in loaded
    assert any(name.endswith(".wrapper.so") for name in loaded)  # the network
    assert not [name for name in loaded if "python" in name.lower() or name.startswith("_C")]


@pytest.mark.parametrize(
    ("package", "text", "message"),
    [
        ("none.pt2", "1 2\n", "file open failed"),
        (None, "1 2\n3\n", "line 2 has 1 numbers; the first has 2"),
        (None, "1 two\n", "line 1 is not a line of numbers: 1 two"),
        (None, "1 2\n", "linear_act: weight must be (in_units, units) with in_units = 2"),
    ],
    ids=["no package", "ragged rows", "no numbers", "other columns"],
)
def test_bad_use_of_the_example_is_one_clear_line(
    built: Example, package: str | None, text: str, message: str
) -> None:
    done = run(built.program, package or built.network, input=text)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{built.program}: ")
    assert message in last


def test_the_example_without_a_network_prints_its_usage(built: Example) -> None:
    done = run(built.program)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage:" in done.stderr


def test_the_library_needs_no_python() -> None:
    needed = run("readelf", "--dynamic", LIBRARY).stdout
    assert "libtorch_cpu.so" in needed
    assert "python" not in needed.lower()
    undefined = run("nm", "--dynamic", "--undefined-only", LIBRARY).stdout.split()
    assert not [name for name in undefined if name.startswith(("Py", "_Py", "_ZN8pybind11"))]


@pytest.mark.road("CUDA-free build")
@pytest.mark.skipif(mylayers.build_info()["cuda"] is not None, reason="built for CUDA")
@pytest.mark.parametrize("library", [LIBRARY, mylayers.build_info()["file"]], ids=["ops", "_C"])
def test_a_build_without_cuda_needs_none_of_its_libraries(library: Path | str) -> None:
    needed = [
        line
        for line in run("readelf", "--dynamic", library).stdout.splitlines()
        if "NEEDED" in line
    ]
    assert any("libc10.so" in line for line in needed)
    assert not [line for line in needed if "cu" in line or "nv" in line or "hip" in line]


@pytest.mark.parametrize("place", ["installed", pytest.param("copied", marks=pytest.mark.whole)])
def test_operators_loaded_before_the_package_are_registered_once(
    place: str, tmp_path: Path
) -> None:
    library = LIBRARY if place == "installed" else shutil.copy(LIBRARY, tmp_path)
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); import mylayers; "
        "print(mylayers.CenteredLayer()(torch.tensor([1.0, 3.0])).tolist(), "
        "torch.ops.mylayers.center(torch.tensor([1.0, 3.0])).tolist())"
    )
    assert python(code, library, cwd=tmp_path) == "[-1.0, 1.0] [-1.0, 1.0]\n"


@pytest.mark.whole
def test_the_library_after_the_package_changes_nothing(tmp_path: Path) -> None:
    code = "import sys, torch, mylayers; torch.ops.load_library(sys.argv[1]); print('still here')"
    assert python(code, LIBRARY, cwd=tmp_path) == "still here\n"


@pytest.mark.whole
def test_find_package_without_torch_names_torch(tmp_path: Path) -> None:
    done = configure(tmp_path, CONFIG)
    assert done.returncode != 0
    assert "Torch" in done.stderr


def test_find_package_refuses_another_series_of_torch_with_both_versions(tmp_path: Path) -> None:
    package = tmp_path / "mylayers"
    shutil.copytree(CONFIG, package / "cmake")
    (package / "libmylayers.so").symlink_to(LIBRARY)
    (package / "_built_for.py").write_text('TORCH = "2.11.0"\n')
    done = configure(tmp_path / "build", torch.utils.cmake_prefix_path, package / "cmake")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "mylayers was compiled for torch 2.11; find_package(Torch) found" in message
    assert torch.__version__.split("+")[0] in message


def test_find_package_in_the_source_folder_says_that_it_is_not_compiled(tmp_path: Path) -> None:
    shutil.copytree(CONFIG, tmp_path / "cmake")
    done = configure(tmp_path / "build", torch.utils.cmake_prefix_path, tmp_path / "cmake")
    assert done.returncode != 0
    assert "has no libmylayers.so: it is mylayers' source folder" in " ".join(done.stderr.split())
