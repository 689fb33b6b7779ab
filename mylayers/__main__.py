"""``python -m mylayers``: what was built, what it runs on, and whether it computes right.

``python -m mylayers explain 16x1024x1024 --dtype bfloat16``: which way a product goes.
"""

import itertools
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mylayers import __version__, _explain, build_info, functional, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _with_gradients(output: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def _errors(dtype: torch.dtype, device: str) -> Iterator[tuple[str, float]]:
    """Each layer's output and gradients against the reference in float64.

    Yields the layer's name and its largest error as a fraction of what rounding explains: half
    a unit in the last place of the result, and as many units of the accumulator as a sum has
    terms (of order one, as these are).
    """
    generator = torch.Generator().manual_seed(0)
    last_place = torch.finfo(dtype).eps
    accumulator = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    def worst(got: list[Tensor], want: list[Tensor], slack: float) -> float:
        return max(
            ((g.double() - w).abs() / (last_place * w.abs() + slack)).max().item()
            for g, w in zip(got, want, strict=True)
        )

    for rows, in_units, units in ((1, 64, 64), (33, 129, 65), (500, 70, 20)):
        x, weight, bias = inputs = draw(rows, in_units), draw(in_units, units), draw(units)
        x64, weight64, bias64 = exact = [t.detach().double().requires_grad_() for t in inputs]
        grad = draw(rows, units).detach()
        output = functional.linear_act(x, weight, bias)
        got = _with_gradients(output, inputs, grad)
        # relu is told apart from the affine map, as at 0 the two sides may disagree: the
        # exact gradient takes its mask from the output under test, the exact output does not.
        masked = grad.double() * (output > 0)
        want = _with_gradients(
            reference.linear_act(x64, weight64, bias64, activation=None), exact, masked
        )
        want[0] = want[0].relu()
        yield "MyLinear", worst(got, want, accumulator * max(rows, in_units))
    for shape in ((5,), (33, 129), (100_000,)):
        x, grad = draw(*shape), draw(*shape).detach()
        exact_x = x.detach().double().requires_grad_()
        got = _with_gradients(functional.center(x), (x,), grad)
        want = _with_gradients(reference.center(exact_x), (exact_x,), grad.double())
        yield "CenteredLayer", worst(got, want, last_place)


def _cuda(info: dict[str, Any]) -> str:
    if info["cuda"] is None:
        return f"none ({info['cuda_detail']}); CUDA tensors take PyTorch's own operators"
    found = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch finds"
    return f"CUDA {info['cuda']}, for {info['cuda_detail']}; GPU here: {found}"


def devices() -> list[str]:
    """Those that have kernels in this build, and are here."""
    has_cuda = build_info()["cuda"] is not None and torch.cuda.is_available()
    return ["cpu", "cuda"] if has_cuda else ["cpu"]


def main() -> int:
    """Print the report; 0 if every check passed, 1 otherwise."""
    info = build_info()
    print(f"mylayers {__version__}")
    print(f"  built for    torch {info['torch']}, {info['compiler']}, C++ {info['cplusplus']}")
    sets = ", ".join(info["instruction_sets"])
    tuned_for = info["tuned_for"] or "none that was measured"
    print(f"  CPU kernels  {sets}; this machine runs {info['kernels']}, tuned for {tuned_for}")
    torchs = "PyTorch's, but for small ones; MYLAYERS_PRODUCTS=own makes all ours"
    print(f"  products     {torchs if info['products'] == 'torch' else 'ours'}")
    units = "AVX512-BF16" if info["bfloat16_units"] else "float32 arithmetic"
    units = "the tiles of AMX" if info["amx"] else units
    print(f"  bfloat16     on {units}")
    print(f"  huge pages   {'asked for' if info['huge_pages'] else 'not asked for'}")
    shared = "PyTorch's own" if info["openmp"] else "but kernels use one: built without OpenMP"
    print(f"  threads      {torch.get_num_threads()}, {shared}")
    print(f"  CUDA kernels {_cuda(info)}")
    print(
        f"  runs on      Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.machine()}"
    )
    print(f"  file         {info['file']}")
    print("self-check against the reference: worst error, 1 being all that rounding explains")
    passed = True
    for device, dtype in itertools.product(devices(), DTYPES):
        worst: dict[str, float] = {}
        for name, error in _errors(dtype, device):
            worst[name] = error if math.isnan(error) else max(worst.get(name, 0.0), error)
        for name, error in worst.items():
            right = error <= 1  # False for NaN
            passed = passed and right
            verdict = "ok" if right else "WRONG"
            print(f"  {device:<4} {name:<13} {str(dtype)[6:]:<9} {error:5.2f}  {verdict}")
    print("all right" if passed else "FAILED: this build computes wrong results here")
    return 0 if passed else 1


def run(arguments: Sequence[str]) -> int:
    """The command line behind ``python -m mylayers``."""
    if not arguments:
        return main()
    if arguments[0] == "explain":
        return _explain.main(arguments[1:])
    print(
        f"python -m mylayers: expected nothing, or explain ROWSxINxOUT; got {' '.join(arguments)}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
