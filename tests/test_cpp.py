"""The operators without Python: libmylayers.so, find_package(mylayers), examples/cpp."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mylayers

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cpp"
CONFIG = Path(mylayers.cmake_prefix_path())
LIBRARY = CONFIG.parent / "libmylayers.so"

pytestmark = pytest.mark.road("C++ without Python")


def run(*command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=180, **options
    )


def python(code: str, *arguments: Any, cwd: Path) -> str:
    done = run(sys.executable, "-c", code, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def configure(build: Path, *prefixes: Any) -> subprocess.CompletedProcess[str]:
    return run(
        *("cmake", "-S", EXAMPLE, "-B", build, "-G", "Ninja"),
        f"-DCMAKE_PREFIX_PATH={';'.join(map(str, prefixes))}",
        # As some systems tell their linkers: leave out libraries of which no symbol is named.
        "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed",
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run_network, built."""
    build = tmp_path_factory.mktemp("build")
    for done in (
        configure(build, torch.utils.cmake_prefix_path, CONFIG),
        run("cmake", "--build", build),
    ):
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "run_network"


@pytest.fixture(scope="module")
def example() -> Any:
    """examples/cpp/export.py as a module."""
    spec = importlib.util.spec_from_file_location("export", EXAMPLE / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The network and the rows that export.py writes, and what it prints."""
    folder = tmp_path_factory.mktemp("exported")
    network, rows = folder / "network.pt2", folder / "rows.txt"
    done = run(sys.executable, EXAMPLE / "export.py", network, rows, cwd=folder)
    assert done.returncode == 0, done.stderr
    return network, rows, done.stdout


def parsed(text: str) -> Tensor:
    return torch.tensor([[float(number) for number in line.split()] for line in text.splitlines()])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within the rounding of sums of 64 products: Inductor may fuse what lies between layers."""
    atol = 64 * torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_the_example_prints_what_python_printed(
    program: Path, exported: tuple[Path, Path, str]
) -> None:
    network, rows, printed = exported
    done = run(program, network, input=rows.read_text())
    assert done.returncode == 0, done.stderr
    assert_close(parsed(done.stdout), parsed(printed))


@pytest.mark.parametrize("count", [1, 2, 257])
def test_the_exported_network_takes_any_batch(
    program: Path, exported: tuple[Path, Path, str], example: Any, count: int
) -> None:
    net = example.build()
    rows = torch.randn(count, 64)
    done = run(program, exported[0], input=example.as_text(rows))
    with torch.no_grad():
        assert_close(parsed(done.stdout), net(rows))


def test_no_python_is_in_the_process(program: Path, exported: tuple[Path, Path, str]) -> None:
    network, rows, _ = exported
    # The loader's own account of every library, those of the exported network included.
    environment = {**os.environ, "LD_DEBUG": "files"}
    done = run(program, network, input=rows.read_text(), env=environment)
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
    program: Path, exported: tuple[Path, Path, str], package: str | None, text: str, message: str
) -> None:
    done = run(program, package or exported[0], input=text)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{program}: ")
    assert message in last


def test_the_example_without_a_network_prints_its_usage(program: Path) -> None:
    done = run(program)
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


@pytest.mark.parametrize("place", ["installed", "copied"])
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


def test_the_library_after_the_package_changes_nothing(tmp_path: Path) -> None:
    code = "import sys, torch, mylayers; torch.ops.load_library(sys.argv[1]); print('still here')"
    assert python(code, LIBRARY, cwd=tmp_path) == "still here\n"


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
