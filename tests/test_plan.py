"""Which way products go on the CPU: pinned for each microarchitecture, on any machine.

``python tests/test_plan.py > tests/plans.txt`` writes the table anew, to be read in review.
"""

import difflib
import subprocess
import sys
from pathlib import Path

import pytest

import mylayers
from mylayers import _C, __main__, _explain

TABLE = Path(__file__).with_name("plans.txt")
THREADS = 2
PATHS = set(_explain.WAYS)

# (rows, in, out), dtype and whether the weight lies as (out, in): the networks and layers of the
# benchmarks, and one on each side of the thresholds.
SHAPES = [
    *[(shape, dtype, False) for dtype in ("float32", "bfloat16") for shape in (
        (1, 64, 64), (1, 1024, 1024), (1, 4096, 4096), (4, 1024, 1024), (5, 1024, 1024),
        (16, 1024, 1024), (17, 4096, 4096), (32, 256, 256), (64, 1024, 1024), (100, 784, 100),
        (256, 256, 256), (1024, 1024, 1024), (1024, 8, 1024), (1024, 16, 1024), (4096, 64, 1024),
    )],
    *[(shape, "float16", False) for shape in (
        (1, 1024, 1024), (16, 1024, 1024), (64, 1024, 1024), (65, 1024, 1024), (1024, 16, 512),
    )],
    *[(shape, "float64", False) for shape in ((16, 1024, 1024), (1024, 1024, 1024))],
    *[(shape, dtype, True) for dtype in ("float32", "bfloat16") for shape in (
        (1, 1024, 1024), (4, 1000, 1000), (5, 1024, 1024), (1024, 1024, 1024),
    )],
]  # fmt: skip


def one_plan(machine: str, shape: tuple[int, int, int], dtype: str, transposed: bool) -> str:
    told = _explain.plan(*shape, dtype, transposed=transposed, threads=THREADS, machine=machine)
    task = told["task"]
    cut = f"{min(told['rows'], shape[0])}x{min(told['columns'], shape[2])}"
    flags = "".join(
        f" {what}" for what in ("copies_a", "packs_b", "keeps_a", "keeps_b") if task[what]
    )
    where = "memory" if told["memory"] else "cache"
    layout = "out-in" if transposed else "in-out"
    return (
        f"{'x'.join(map(str, shape)):<15} {dtype:<9}{layout:<7} {task['path']:<18}"
        f"{told['row_blocks']}*{told['column_blocks']} of {cut:<10} on {told['threads']}, "
        f"{task['kc']} terms, from {where}{flags}"
    )


def table() -> str:
    lines = [f"Plans on {THREADS} threads; see test_plan.py."]
    for machine in _C.machines():
        lines += ["", f"[{machine}]", *(one_plan(machine, *case) for case in SHAPES)]
    return "\n".join(lines) + "\n"


def test_every_product_goes_the_way_of_the_table_on_every_machine():
    pinned, got = TABLE.read_text(), table()
    changed = difflib.unified_diff(
        pinned.splitlines(), got.splitlines(), "tests/plans.txt", "now", lineterm="", n=0
    )
    assert pinned == got, "\n".join(changed)


def test_the_table_knows_every_way():
    assert {path for path in PATHS if f" {path} " in TABLE.read_text()} == PATHS


@pytest.mark.grid
@pytest.mark.parametrize("machine", _C.machines())
@pytest.mark.parametrize("dtype", _explain.DTYPES)
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_tasks_cover_the_result_once_and_keep_the_threads_busy(machine, dtype, threads):
    for rows in (1, 4, 5, 33, 257, 1025):
        for in_units, units in ((1, 3), (8, 1024), (100, 65), (1024, 257)):
            for transposed in (False, True):
                told = _explain.plan(
                    rows, in_units, units, dtype,
                    transposed=transposed, threads=threads, machine=machine,
                )  # fmt: skip
                for count, size, whole in (
                    (told["row_blocks"], told["rows"], rows),
                    (told["column_blocks"], told["columns"], units),
                ):
                    assert (count - 1) * size < whole <= count * size
                assert 1 <= told["threads"] <= threads
                assert {told["task"]["path"], told["last_task"]["path"]} <= PATHS


def test_float32_is_rounded_on_amx_alone_and_only_in_large_weights():
    def rounds(units, machine):
        return _explain.plan(64, units, units, rounds=True, machine=machine)

    assert [m for m in _C.machines() if rounds(1024, m)["rounds"]] == ["Golden Cove with AMX"]
    assert rounds(512, "Golden Cove with AMX")["task"]["path"] == "amx_columns"
    assert not rounds(511, "Golden Cove with AMX")["rounds"]


def test_this_machine_is_one_of_the_table_and_plans_as_its_row_does():
    info = mylayers.build_info()
    assert info["tuned_for"] in _C.machines()
    here = _explain.plan(1024, 1024, 1024)
    assert here["machine"] == info["tuned_for"]
    if info["bfloat16_units"]:  # else the nearest row has units that this processor lacks
        row = _explain.plan(1024, 1024, 1024, "bfloat16", machine=info["tuned_for"])
        assert _explain.plan(1024, 1024, 1024, "bfloat16") == row


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "int8"}, "dtype must be .* got int8"),
        ({"machine": "Z80"}, "machine must be .* got 'Z80'"),
        ({"rows": 0}, "must be positive"),
        ({"threads": 0}, "must be positive"),
    ],
)
def test_what_cannot_be_planned_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        _explain.plan(**{"rows": 1, "in_units": 8, "units": 8, **change})


def test_the_command_prints_the_plan_in_words():
    arguments = ["explain", "16x1024x1024", "--dtype", "bfloat16", "--threads", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "mylayers", *arguments, "--machine", "Zen 5"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "x (16, 1024) @ weight (1024, 1024) in bfloat16 on Zen 5" in done.stdout
    assert "skinny product on AVX512-BF16" in done.stdout
    assert "2 tasks of up to 16 rows and 512 columns, on 2 threads" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("explain", "16x1024"), "ROWSxINxOUT"),
        (("explain", "16x0x8"), "ROWSxINxOUT"),
        (("explain", "1x8x8", "--machine", "Z80"), "Z80"),
        (("explain", "16x00x8"), "ROWSxINxOUT"),
        (("explain", "1x8x16777217"), "from 1 to 16777216"),
        (("explain", "1x8x8", "--threads", "0"), "from 1 to 16777216; got 0"),
        (("explain", "1x8x8", "--threads", f"{10**30}"), "from 1 to 16777216"),
        (("explian",), "got explian"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_arguments(arguments, said, capsys):
    try:
        status = __main__.run(arguments)
    except SystemExit as error:  # argparse
        status = error.code
    assert status == 2
    assert said in capsys.readouterr().err


if __name__ == "__main__":
    print(table(), end="")
