"""Whether two versions of mylayers give the same bits on this machine, over all samples.

    python tests/bits.py FOLDER

FOLDER has the other version: an environment's site-packages, or a tree that was built in place.
Compared are the values of each operator and the gradients of all its tensors. Samples are drawn
once, by this version; each version computes them in a process of its own. What only one of them
takes, a new activation for instance, is counted and named. Exit status 1 where a bit differs.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# (name, operator, arguments of which tensors ask for gradients)
Case = tuple[str, str, list[Any]]


def cases() -> Iterator[Case]:
    # These import mylayers: the process that computes may have another one.
    import chains
    import samples

    for dtype in samples.KERNEL_DTYPES:
        short = str(dtype)[6:]
        for sample in samples.linear_act_samples(dtype):
            activation = sample.kwargs.get("activation", "relu")
            yield f"linear_act {short} {sample}", "linear_act", [*sample.args, activation]
        for sample in samples.center_samples(dtype):
            dim = sample.kwargs["dim"]
            dims = [dim] if isinstance(dim, int) else dim if dim is None else list(dim)
            yield f"center {short} {sample}", "center", [*sample.args, dims]
        for program in chains.PROGRAMS:
            x, *parameters = chains.arguments(program, (4,), dtype)
            yield f"sequential {short} {program}", "sequential", [x, parameters, program]
        program = "linear_t+bias+tanh; linear+relu; linear_t+bias"
        for rows, *units in ((1, 64, 64, 64, 8), (300, 64, 64, 64, 8), (70, 300, 520, 1030, 9)):
            x = samples.drawer(program, dtype)(rows, units[0])
            parameters = chains.draw_parameters(program, (units[0],), units[1:], dtype)
            name = f"sequential {short} {rows} rows of {units} {program}"
            yield name, "sequential", [x, parameters, program]


def tensors_in(args: list[Any]) -> list[Tensor]:
    flat = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
    return [t for t in flat if isinstance(t, Tensor)]


def digest(operator: str, args: list[Any]) -> str:
    """Of a call's value and of its gradients; what went wrong, if it did."""
    tensors = tensors_in(args)
    for t in tensors:
        t.requires_grad_()
    try:
        value = getattr(torch.ops.mylayers, operator)(*args)
    except (RuntimeError, ValueError) as error:
        return f"refused: {str(error).splitlines()[0]}"
    generator = torch.Generator().manual_seed(value.numel())
    grad_output = torch.randn(value.shape, generator=generator).to(value.dtype)
    results = (value, *torch.autograd.grad(value, tensors, grad_output))
    said = hashlib.sha256()
    for t in results:
        said.update(f"{t.dtype} {tuple(t.shape)}".encode())
        said.update(t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return said.hexdigest()


def digests(file: Path, folder: str | None) -> dict[str, str]:
    """By the name of the case, from a process that imports mylayers from this folder."""
    environment = dict(os.environ)
    if folder is not None:
        environment["PYTHONPATH"] = folder
    command = [sys.executable, __file__, "--compute", str(file)]
    lines = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    print(f"{len(lines) - 1:,} cases by {lines[0]}")
    return dict(line.split("\t") for line in lines[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--compute", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compute is not None:
        import mylayers

        print(mylayers.__file__)
        for name, operator, args in torch.load(given.compute):
            print(name, digest(operator, args), sep="\t")
        return 0
    if given.folder is None:
        parser.error("FOLDER is missing")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "cases"
        detached = [
            (name, operator, [a.detach() if isinstance(a, Tensor) else a for a in args])
            for name, operator, args in cases()
        ]
        torch.save(detached, file)
        here, there = digests(file, None), digests(file, given.folder)
    unknown = [n for n in here if "refused" in here[n] or "refused" in there[n]]
    different = [n for n in here if n not in unknown and here[n] != there[n]]
    same = len(here) - len(unknown) - len(different)
    print(f"{same:,} the same, {len(different):,} different, {len(unknown):,} not in both")
    for name in different:
        print(f"different: {name}")
    for name in unknown:
        print(f"not in both: {name}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
