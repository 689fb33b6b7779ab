"""Whether the CUDA kernels are built: every answer of nvcc and torch, here told by stand-ins."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "build_support" / "cuda_build.py"


def load():
    spec = importlib.util.spec_from_file_location("cuda_build", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses looks for it
    spec.loader.exec_module(module)
    return module


cuda_build = load()

TOOLKIT = cuda_build.Toolkit(
    "/opt/cuda/bin/nvcc", Path("/opt/cuda"), "13.0", ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")
)
LIBRARIES = cuda_build.Libraries(library=Path("/opt/cuda/lib64/libcublasLt.so"))


def decide(torch_cuda="13.0", toolkit=TOOLKIT, libraries=LIBRARIES, **environ):
    return cuda_build.decide(environ, torch_cuda, toolkit, libraries)


def test_nvcc_and_a_cuda_torch_are_enough():
    assert decide() == cuda_build.Decision("7.5;8.0;9.0;10.0;12.0+PTX")
    assert decide(MYLAYERS_CUDA="1") == decide()
    assert decide(MYLAYERS_CUDA="") == decide()


def test_a_gpu_is_never_asked_for():
    assert "is_available" not in SOURCE.read_text()
    assert "is_available" not in (ROOT / "setup.py").read_text()


def test_another_minor_version_of_cuda_is_taken():
    assert decide(torch_cuda="13.2").architectures is not None


def test_zero_builds_without():
    assert decide(MYLAYERS_CUDA="0") == cuda_build.Decision(None, "MYLAYERS_CUDA=0")


def test_torchs_own_list_of_architectures_is_kept():
    assert decide(TORCH_CUDA_ARCH_LIST="9.0").architectures == "9.0"


def test_the_list_ends_in_ptx_of_the_newest_that_nvcc_knows():
    old = cuda_build.Toolkit("nvcc", Path("/opt"), "12.6", ("7.5", "8.0", "8.9", "9.0"))
    assert decide("12.6", old).architectures == "7.5;8.0;9.0+PTX"
    new = cuda_build.Toolkit("nvcc", Path("/opt"), "15.0", ("13.0", "14.0"))
    assert decide("15.0", new).architectures == "14.0+PTX"


MISSING = {
    "torch without CUDA": ({"torch_cuda": None}, "this torch is built without CUDA"),
    "no nvcc": ({"toolkit": None, "libraries": None}, "no working nvcc"),
    "another major version": (
        {"torch_cuda": "12.8"},
        "/opt/cuda/bin/nvcc is of CUDA 13.0 and torch is built for CUDA 12.8; the major versions "
        "must agree",
    ),
    "another compiler": (
        {"toolkit": dataclasses.replace(TOOLKIT, complaint="#error -- unsupported GNU version!")},
        "/opt/cuda/bin/nvcc does not go with this C++ compiler: #error -- unsupported GNU version!",
    ),
    "no headers": (
        {"libraries": cuda_build.Libraries(library=Path("x"), missing=["cusparse.h"])},
        "cusparse.h found neither in /opt/cuda nor in pip's nvidia packages",
    ),
    "no library": ({"libraries": cuda_build.Libraries()}, "libcublasLt.so found neither in"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_told_and_one_fails_with_it(case):
    given, reason = MISSING[case]
    decision = decide(**given)
    assert decision.architectures is None
    assert reason in decision.reason
    assert decide(**given, MYLAYERS_CUDA="0").reason == "MYLAYERS_CUDA=0"
    with pytest.raises(SystemExit, match="MYLAYERS_CUDA=1, but .*" + re.escape(reason)):
        decide(**given, MYLAYERS_CUDA="1")


def test_another_value_is_refused():
    with pytest.raises(SystemExit, match="must be 0 or 1, or not be set; got 'yes'"):
        decide(MYLAYERS_CUDA="yes")


NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 12.8, V12.8.93" ;;
  --dryrun*) echo "#$ TOP={home}/bin/.." >&2 ;;
  --list-gpu-arch) printf 'compute_75\\ncompute_90\\ncompute_100\\n' ;;
esac
"""


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_a_toolkit_is_where_nvcc_says_however_it_was_found(tmp_path):
    home, links = tmp_path / "cuda-12.8", tmp_path / "bin"
    script(home / "bin" / "nvcc", NVCC.format(home=home))
    script(links / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    for environ in ({"PATH": str(links)}, {"CUDA_HOME": str(home)}, {"CUDA_PATH": str(home)}):
        found = cuda_build.find_toolkit(environ)
        assert (found.home, found.version) == (home, "12.8")
        assert found.architectures == ("7.5", "9.0", "10.0")
        assert not found.complaint


def test_an_nvcc_that_refuses_the_compiler_says_so(tmp_path):
    refusal = 'echo "host_config.h:158: error: unsupported GNU version" >&2; exit 1'
    text = NVCC.format(home=tmp_path).replace("esac", f"  -std*) {refusal} ;;\nesac")
    script(tmp_path / "bin" / "nvcc", text)
    found = cuda_build.find_toolkit({"CUDA_HOME": str(tmp_path)})
    assert found.complaint == "host_config.h:158: error: unsupported GNU version"


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 1\n", "#!/bin/sh\necho hello\n"])
def test_an_nvcc_that_does_not_work_is_none(text, tmp_path):
    script(tmp_path / "bin" / "nvcc", text)
    assert cuda_build.find_toolkit({"CUDA_HOME": str(tmp_path)}) is None
    assert cuda_build.find_toolkit({"CUDA_HOME": str(tmp_path / "nowhere")}) is None


def test_headers_and_library_come_from_the_toolkit_or_from_pips_packages(tmp_path):
    home, site = tmp_path / "cuda", tmp_path / "site-packages"
    (home / "include").mkdir(parents=True)
    assert cuda_build.find_libraries(home, site).missing == list(cuda_build.HEADERS)

    package = site / "nvidia" / "cu13"
    for folder in ("include", "lib"):
        (package / folder).mkdir(parents=True)
    for header in cuda_build.HEADERS:
        (package / "include" / header).touch()
    (package / "lib" / "libcublasLt.so.13").touch()
    found = cuda_build.find_libraries(home, site)
    beside = [Path("nvidia", "cu13", "lib")]
    assert found == cuda_build.Libraries(
        [package / "include"], package / "lib" / "libcublasLt.so.13", [], beside
    )

    (home / "lib64").mkdir()
    (home / "lib64" / "libcublasLt.so").touch()
    for header in cuda_build.HEADERS:
        (home / "include" / header).touch()
    found = cuda_build.find_libraries(home, site)
    assert found == cuda_build.Libraries([], home / "lib64" / "libcublasLt.so", [], beside)


def test_a_program_without_python_is_told_of_every_package_that_is_linked(tmp_path):
    for library in (
        "cublas/lib/libcublasLt.so.12",
        "cuda_runtime/lib/libcudart.so.12",
        "nccl/lib/x",
    ):
        (tmp_path / "nvidia" / library).parent.mkdir(parents=True)
        (tmp_path / "nvidia" / library).touch()
    found = cuda_build.find_libraries(tmp_path / "cuda", tmp_path)
    assert found.packages == [Path("nvidia/cublas/lib"), Path("nvidia/cuda_runtime/lib")]
