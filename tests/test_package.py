"""The package as installed: versions, what it says of itself, and what it says when it cannot."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import mylayers
from mylayers import __main__ as report

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = Path(mylayers.functional.__file__).resolve().parent


def run(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def copy_package(to, leave_out=(), **files):
    """The installed package under another folder, without some files and with others."""
    package = to / "mylayers"
    package.mkdir()
    for file in INSTALLED.iterdir():
        if file.is_file() and not file.name.startswith(leave_out):
            (package / file.name).symlink_to(file)
    for name, text in files.items():
        (package / f"{name}.py").unlink(missing_ok=True)
        (package / f"{name}.py").write_text(text)
    return to


def test_the_metadata_require_the_series_of_torch_it_was_built_for():
    series = ".".join(mylayers.build_info()["torch"].split(".")[:2])
    assert f"torch=={series}.*" in importlib.metadata.requires("mylayers")
    assert torch.__version__.startswith(series + ".")


def test_the_versions_of_metadata_and_module_agree():
    assert importlib.metadata.version("mylayers") == mylayers.__version__


@pytest.mark.road("CUDA-free build")
def test_build_info_tells_what_was_built():
    info = mylayers.build_info()
    assert info["kernels"] in info["instruction_sets"]
    assert isinstance(info["bfloat16_units"], bool)
    assert info["tuned_for"] in (
        "Zen 3",
        "Zen 4",
        "Zen 5",
        "Golden Cove",
        "Golden Cove with AMX",
        None,
    )
    assert (info["tuned_for"] is None) == (info["kernels"] in ("generic", "neon"))
    assert isinstance(info["amx"], bool)
    assert info["bfloat16_units"] or not info["amx"]
    assert Path(info["file"]).parent == INSTALLED
    assert info["cuda_detail"]


def test_cuda_kernels_are_registered_where_they_were_built():
    built = mylayers.build_info()["cuda"] is not None
    for name in ("linear_act", "linear_act_backward", "center"):
        found = torch._C._dispatch_has_kernel_for_dispatch_key(f"mylayers::{name}", "CUDA")
        assert found == built, name


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [("default", "generic"), pytest.param("avx2", "avx2", marks=pytest.mark.whole)],
)
def test_aten_cpu_capability_lowers_the_kernels_and_they_pass_the_self_check(
    capability, kernels, tmp_path
):
    if kernels not in mylayers.build_info()["instruction_sets"]:
        pytest.skip(f"{kernels} kernels are not built for this processor")
    done = run("-m", "mylayers", cwd=tmp_path, ATEN_CPU_CAPABILITY=capability)
    assert f"this machine runs {kernels}" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr


def bfloat16(done):
    return re.search(r"^  bfloat16 .*$", done.stdout, re.M)[0]


@pytest.fixture(scope="module")
def usual_bfloat16(tmp_path_factory):
    return bfloat16(run("-m", "mylayers", cwd=tmp_path_factory.mktemp("usual")))


@pytest.mark.whole  # a process for each, where the test above has one
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_what_onednn_may_not_use_makes_no_difference(isa, usual_bfloat16, tmp_path):
    done = run("-m", "mylayers", cwd=tmp_path, DNNL_MAX_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout + done.stderr
    assert bfloat16(done) == usual_bfloat16
    assert re.search(r"MyLinear +bfloat16 .* ok", done.stdout)


def test_the_report_names_torch_and_ends_all_right(capsys):
    assert report.main() == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert text.endswith("all right\n")
    assert text.count(" ok\n") == 2 * len(report.DTYPES) * len(report.devices())


@pytest.mark.parametrize("name", ["linear_act", "center"])
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_the_self_check_fails_for_a_wrong_kernel(name, factor, monkeypatch, capsys):
    right = getattr(mylayers.functional, name)
    monkeypatch.setattr(mylayers.functional, name, lambda *args: right(*args) * factor)
    assert report.main() == 1
    text = capsys.readouterr().out
    assert "WRONG" in text
    assert "FAILED" in text


def test_another_series_of_torch_is_refused_with_both_versions_and_the_remedy(tmp_path):
    copy_package(tmp_path, _built_for='TORCH = "2.11.0"\n')
    done = run("-c", "import mylayers", cwd=tmp_path)
    assert done.returncode == 1
    assert "ImportError: mylayers was compiled for torch 2.11 (2.11.0)" in done.stderr
    assert torch.__version__ in done.stderr
    assert "pip install" in done.stderr


def test_another_patch_release_of_torch_is_taken(tmp_path):
    series = ".".join(torch.__version__.split(".")[:2])
    copy_package(tmp_path, _built_for=f'TORCH = "{series}.99"\n')
    done = run("-c", "import mylayers; print(mylayers.build_info()['file'])", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_a_source_folder_hands_over_to_the_installed_package(tmp_path):
    copy_package(tmp_path, leave_out=("_C.", "layers", "functional", "_built_for"))
    code = "import mylayers, mylayers.layers as m; print(mylayers.__file__); print(m.__file__)"
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shadow, layers = map(Path, done.stdout.split())
    assert shadow.parent.parent == tmp_path
    assert layers.resolve().parent == INSTALLED


def test_a_source_folder_alone_says_that_it_is_not_compiled(tmp_path):
    copy_package(tmp_path, leave_out=("_C.", "_built_for"))
    done = run("-S", "-c", "import mylayers", cwd=tmp_path)  # -S: no installed packages
    assert done.returncode == 1
    assert "ImportError: mylayers was imported from its source folder" in done.stderr
    assert f"pip install {tmp_path}" in done.stderr


@pytest.fixture
def build(tmp_path):
    """Runs setup.py's build in a folder of its own, with some environment."""

    def run_build(**environment):
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            (tmp_path / name).symlink_to(ROOT / name)
        (tmp_path / "mylayers").symlink_to(ROOT / "mylayers")
        return run("setup.py", "-q", "build_ext", cwd=tmp_path, **environment)

    return run_build


def test_a_missing_compiler_says_what_to_install(build):
    done = build(CXX="no-such-compiler")
    assert done.returncode == 1
    assert "found no compiler ('no-such-compiler' is not on the PATH)" in done.stderr
    assert "apt-get install g++" in done.stderr


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_a_system_that_is_not_linux_is_told_so_before_anything_is_compiled(system, tmp_path):
    code = (
        "import runpy, sys, setuptools\n"
        f"sys.platform = {system!r}\n"
        f"runpy.run_path({str(ROOT / 'setup.py')!r})\n"
    )
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 1
    assert "built on Linux alone (x86-64 or 64-bit Arm)" in done.stderr
    assert f"this is {system}. On macOS and Windows" in done.stderr


def test_the_import_draws_no_random_number_and_brings_no_compiler_counter_or_dtensor():
    code = (
        "import sys, torch\n"
        "torch.manual_seed(0)\n"
        "expected = torch.rand(1)\n"
        "torch.manual_seed(0)\n"
        "before = set(sys.modules)\n"
        "import mylayers\n"
        "assert torch.rand(1) == expected\n"
        "assert not {'torch._dynamo', 'torch._inductor', 'sympy'} & (set(sys.modules) - before)\n"
        "assert not {'torch.utils.flop_counter', 'torch.distributed.tensor'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def sdist(tree, to):
    """What the backend packs of a tree, as pip and ``python -m build`` would have it; unpacked."""
    code = f"import backend; print(backend.build_sdist({str(to)!r}))"
    done = run("-c", code, cwd=tree, PYTHONPATH=str(tree / "build_support"))
    assert done.returncode == 0, done.stderr
    name = done.stdout.split()[-1]
    with tarfile.open(to / name) as archive:
        archive.extractall(to, filter="data")
    return to / name.removesuffix(".tar.gz")


def test_the_source_distribution_has_all_that_the_repository_has_but_builds_and_runs(tmp_path):
    def left_out(folder, names):
        outside = {name for name in names if name.startswith(".") or name.endswith(".egg-info")}
        return outside | {"build", "dist", "out"} if Path(folder) == ROOT else {"__pycache__"}

    tree = tmp_path / "tree"
    ours = shutil.ignore_patterns("runs", "*.so", "_built_for.py")
    shutil.copytree(ROOT, tree, ignore=lambda f, names: left_out(f, names) | set(ours(f, names)))
    expected = files_in(tree)
    assert {"build_support/backend.py", "csrc/cpu/kernels/kernels-inl.h"} <= expected
    assert {"docs/architecture.md", "benchmarks/results/zen-4-avx-512/results.csv"} <= expected
    for name in ("_C.abi.so", "libmylayers.so", "_built_for.py", "__pycache__/layers.pyc"):
        (tree / "mylayers" / name).parent.mkdir(exist_ok=True)
        (tree / "mylayers" / name).touch()
    (tree / "benchmarks" / "runs").mkdir()
    (tree / "benchmarks" / "runs" / "results.csv").touch()

    unpacked = sdist(tree, tmp_path)
    made = {name for name in files_in(unpacked) if ".egg-info" in name} | {"PKG-INFO", "setup.cfg"}
    assert files_in(unpacked) - made == expected
    # Its own backend runs, which imports what setup.py does, and packs the same again.
    (tmp_path / "again").mkdir()
    assert files_in(sdist(unpacked, tmp_path / "again")) - made == expected
