"""``python -m mylayers explain``: which way a product goes on the CPU, in words.

The plan itself is C++ (``csrc/cpu/gemm/plan.cpp``), a pure function of sizes, strides, dtype and
machine; this prints it.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any

import torch

from mylayers._extension import _C

DTYPES = ("float32", "float64", "float16", "bfloat16")
MOST = 1 << 24  # of anything: the bytes of a weight of so many squared fit in 64 bits

WAYS = {
    "microkernels": "in microkernels, block by block: sums stay in registers while terms go by",
    "bands": "in bands: the weight is packed, and the rows of one microkernel take all its columns",
    "skinny": "as a skinny product: the weight is read once, as it lies",
    "skinny_many": "as a skinny product of many rows: each vector of the weight serves all rows",
    "skinny_transposed": (
        "as a skinny product with a weight (out, in): squares of it are transposed in registers"
    ),
    "vnni": "in microkernels of AVX512-BF16, the weight packed in the VNNI layout",
    "vnni_skinny": (
        "as a skinny product on AVX512-BF16: the weight gets the VNNI layout on the way"
    ),
    "amx_columns": "on the tiles of AMX: each thread packs and multiplies columns of its own",
    "amx_rows": "on the tiles of AMX: all threads pack, then each multiplies rows of its own",
}


def plan(
    rows: int,
    in_units: int,
    units: int,
    dtype: str = "float32",
    *,
    transposed: bool = False,
    rounds: bool = False,
    working_set_bytes: int = 0,
    threads: int = 1,
    machine: str | None = None,
) -> dict[str, Any]:
    """The plan of ``x (rows, in_units) @ weight (in_units, units)``, both contiguous.

    Args:
        rows: rows of ``x``, as ``in_units`` and ``units`` above 0.
        in_units: the terms of each sum.
        units: columns of the result.
        dtype: ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"``.
        transposed: the weight lies as ``(units, in_units)``, as ``nn.Linear`` has it.
        rounds: PyTorch's setting lets float32 products be rounded to bfloat16.
        working_set_bytes: bytes of all weights that are read in turn with this one.
        threads: how many there are.
        machine: a name of ``_C.machines()``; None: this machine.

    Raises:
        ValueError: for a size or number of threads below 1, or an unknown dtype or machine.
    """
    weight = (1, in_units) if transposed else (units, 1)
    return _C.plan(
        rows,
        units,
        in_units,
        dtype,
        (in_units, 1),
        weight,
        rounds,
        working_set_bytes,
        threads,
        machine,
    )


def in_words(rows: int, in_units: int, units: int, dtype: str, told: dict[str, Any]) -> str:
    """Several lines, for people."""
    task, last = told["task"], told["last_task"]
    blocks = told["row_blocks"] * told["column_blocks"]
    lines = [
        f"x ({rows}, {in_units}) @ weight ({in_units}, {units}) in {dtype} on {told['machine']}",
        f"  way        {WAYS[task['path']]}",
    ]
    if told["rounds"]:
        lines.append("  rounding   float32 is rounded to bfloat16, as PyTorch's setting allows")
    on_amx = task["path"].startswith("amx")
    if not on_amx:
        where = "memory" if told["memory"] else "a cache"
        lines.append(f"  weight     likely to come from {where}")
    threads = "1 thread" if told["threads"] == 1 else f"{told['threads']} threads"
    if on_amx:
        lines.append(f"  threads    {threads}")
    else:
        cut = "1 task" if blocks == 1 else f"{blocks} tasks"
        lines.append(
            f"  cut        {cut} of up to {min(told['rows'], rows)} rows and "
            f"{min(told['columns'], units)} columns, on {threads}"
        )
        lines.append(f"  passes     {task['kc']} of {in_units} terms at a time")
    prepared = [
        what
        for key, what in (
            ("copies_a", "rows of x are copied first"),
            ("packs_b", "the weight is packed first"),
            ("keeps_a", "microkernels copy x as they read it"),
            ("keeps_b", "microkernels copy the weight as they read it"),
        )
        if task[key]
    ]
    lines.append(f"  memory     {'; '.join(prepared) or 'both are read as they lie'}")
    if last["path"] != task["path"]:
        lines.append(f"  last task  {WAYS[last['path']]}")
    return "\n".join(lines)


def _shape(text: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})x(\d{1,9})", text, re.ASCII)
    rows, in_units, units = map(int, found.groups()) if found else (0, 0, 0)
    if not all(0 < size <= MOST for size in (rows, in_units, units)):
        raise argparse.ArgumentTypeError(
            f"a shape is ROWSxINxOUT, three numbers from 1 to {MOST} as in 16x1024x1024; "
            f"got {text!r}"
        )
    return rows, in_units, units


def main(arguments: Sequence[str]) -> int:
    """Print the plan that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m mylayers explain",
        description="Which way a product x @ weight goes on the CPU, and how it is cut.",
    )
    parser.add_argument("shape", type=_shape, metavar="ROWSxINxOUT")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--machine", choices=_C.machines(), help="a microarchitecture (default: this machine's)"
    )
    parser.add_argument(
        "--transposed", action="store_true", help="the weight lies as (out, in), as nn.Linear's"
    )
    parser.add_argument(
        "--medium",
        action="store_true",
        help='as under torch.set_float32_matmul_precision("medium")',
    )
    asked = parser.parse_args(arguments)
    if not 0 < asked.threads <= MOST:
        parser.error(f"argument --threads: expected a number from 1 to {MOST}; got {asked.threads}")
    rows, in_units, units = asked.shape
    told = plan(
        rows,
        in_units,
        units,
        asked.dtype,
        transposed=asked.transposed,
        rounds=asked.medium,
        threads=asked.threads,
        machine=asked.machine,
    )
    print(in_words(rows, in_units, units, asked.dtype, told))
    return 0
