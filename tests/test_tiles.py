"""The kernels for AMX's tiles, value by value, on a model of the tiles in software.

tests/tile_model/tiles.cpp is compiled here: on the model for any machine, and on the tiles of the
processor where it has them, which must then agree with the model to the bit.
"""

import ctypes
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import mylayers
from mylayers.functional import linear_act

Array = NDArray[Any]

SOURCE = Path(__file__).resolve().parent / "tile_model" / "tiles.cpp"
# As the level of AVX-512 has them, for functions that inline its vectors.
AVX512 = [f"-mavx512{unit}" for unit in ("f", "bw", "vl", "dq", "bf16")] + ["-mfma", "-mf16c"]
INFO = mylayers.build_info()
needs_amx = pytest.mark.skipif(
    not INFO["amx"], reason="this processor has no AMX, or may not use it"
)

EDGE, TERMS, PANEL = 16, 32, 64  # rows of a tile, its terms of bfloat16, columns of a panel
ACTIVATIONS = ["none", "relu", "tanh", "sigmoid", "elu"]
SIGN, INFINITY, QUIET, DEFAULT_NAN = 0x80000000, 0x7F800000, 0x00400000, 0xFFC00000


class TileError(Exception):
    """The model says that the processor would raise an exception."""


class Kernels:
    """A library made of tiles.cpp: C functions of integers, flags and arrays (None: null)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p

        def call(*args: Any) -> None:
            fault = function(*map(argument, args))
            if fault is not None:
                raise TileError(fault.decode())

        return call


def argument(value: Any) -> Any:
    if isinstance(value, str):
        return ctypes.c_int(ACTIVATIONS.index(value))
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_void_p() if value is None else ctypes.c_int64(value)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Kernels]:
    """The kernels of a level, on the model or on the processor's tiles, compiled once."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    folder = tmp_path_factory.mktemp("tiles")
    made: dict[tuple[str, bool], Kernels] = {}

    def get(level: str, model: bool) -> Kernels:
        if shutil.which(compiler[0]) is None:
            pytest.skip(f"no C++ compiler: {compiler[0]} is not on the PATH (CXX names another)")
        if (level, model) not in made:
            path = folder / f"{level}_{'model' if model else 'processor'}.so"
            flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wno-psabi", "-fPIC", "-shared"]
            flags += AVX512 if level == "avx512" else []
            flags += [f"-DMYLAYERS_ISA={level}", *(["-DMYLAYERS_TILE_MODEL"] if model else [])]
            done = subprocess.run(
                [*compiler, *flags, str(SOURCE), "-o", str(path)], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            made[level, model] = Kernels(path)
        return made[level, model]

    return get


@pytest.fixture
def model(kernels: Callable[[str, bool], Kernels]) -> Kernels:
    return kernels("generic", True)


@pytest.fixture(params=["generic", "avx512"])
def level(request: pytest.FixtureRequest) -> str:
    if request.param == "avx512" and not INFO["bfloat16_units"]:
        pytest.skip("this processor has no AVX512-BF16, or may not use it")
    return request.param


@pytest.fixture
def on_model(kernels: Callable[[str, bool], Kernels], level: str) -> Kernels:
    return kernels(level, True)


# ---- the instruction's arithmetic, as the manual has it ------------------------------------


def shifted(bits: int) -> int:
    """A finite float32, given by its bits, times 2^149; subnormal numbers are zero."""
    exponent = bits >> 23 & 0xFF
    magnitude = (bits & 0x7FFFFF | 0x800000) << (exponent - 1) if exponent else 0
    return -magnitude if bits & SIGN else magnitude


def rounded(value: int, zero: int) -> int:
    """The bits of value / 2^298 in float32, to nearest even; zero, which is -0 or 0, for 0."""
    if value == 0:
        return zero
    sign, value = (SIGN, -value) if value < 0 else (0, value)
    drop = value.bit_length() - 24
    if drop > 0:
        low, half = value & (1 << drop) - 1, 1 << drop - 1
        value >>= drop
        value += low > half or (low == half and value & 1)
    else:
        value <<= -drop
    if value == 1 << 24:
        value, drop = 1 << 23, drop + 1
    exponent = drop + 23 - 298
    if exponent < -126:
        return sign
    return sign | INFINITY if exponent > 127 else sign | exponent + 127 << 23 | value & 0x7FFFFF


def fused(a: int, b: int, c: int) -> int:
    """The bits of a * b + c for those of float32: one rounding, subnormal numbers are zero.

    The manual does not say which NaN a sum becomes; a processor takes the first of a, b and c.
    """
    for x in (a, b, c):
        if x & ~SIGN > INFINITY:
            return x | QUIET
    sign = (a ^ b) & SIGN
    if INFINITY in (a & ~SIGN, b & ~SIGN):
        is_nan = not a & INFINITY or not b & INFINITY or c == (sign ^ SIGN | INFINITY)
        return DEFAULT_NAN if is_nan else sign | INFINITY
    if c & ~SIGN == INFINITY:
        return c
    return rounded(shifted(a) * shifted(b) + (shifted(c) << 149), sign & c & SIGN)


def manual_product(c: Array, a: Array, b: Array) -> Array:
    """TDPBF16PS: c (m, n) + a (m, 2 * k) @ b (k, 2 * n) of pairs, all as bits."""
    one = 0x3F800000
    out = np.zeros_like(c)
    for m, n in np.ndindex(c.shape):
        even = odd = 0
        for k in range(len(b)):
            even = fused(int(a[m, 2 * k]) << 16, int(b[k, 2 * n]) << 16, even)
            odd = fused(int(a[m, 2 * k + 1]) << 16, int(b[k, 2 * n + 1]) << 16, odd)
        out[m, n] = fused(int(c[m, n]), one, fused(even, one, odd))
    return out


# ---- the same, of arrays -------------------------------------------------------------------


def flushed(x: Array) -> Array:
    tiny = np.abs(x) < np.float32(2**-126)
    return np.where(tiny, np.copysign(np.float32(0), x), x)


def fused_arrays(a: Array, b: Array, c: Array) -> Array:
    """As fused, of float32 without subnormal numbers; any NaN.

    The product is exact in float64, and so is what the sum's rounding took away, whose sign then
    goes to the sum's last bit: rounding that to 24 bits is rounding once.
    """
    with np.errstate(all="ignore"):
        product, start = a.astype(np.float64) * b, c.astype(np.float64)
        total = product + start
        added = total - product
        error = (product - (total - added)) + (start - added)
        bits = total.view(np.int64)
        is_cut = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
        bits += np.where(is_cut, np.where((error > 0) == (total > 0), 1, -1), 0)
        is_tiny = np.abs((total * 2.0**64).astype(np.float32)) < np.float32(2**-62)
        return np.where(is_tiny, np.copysign(0.0, total), total).astype(np.float32)


def widened(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(x: Array) -> Array:
    """float32 to the bits of bfloat16, as PyTorch rounds."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded_up = bits + 0x7FFF + (bits >> 16 & 1)
    return np.where(np.isnan(x), 0x7FC0, rounded_up >> 16).astype(np.uint16)


def block_sums(a: Array, b: Array) -> Array:
    """a (m, k) @ b (k, n), bits of bfloat16, in the kernels' order: 32 terms at a time."""
    m, k = a.shape
    pad = -k % TERMS
    a = flushed(widened(np.pad(a, ((0, 0), (0, pad)))))
    b = flushed(widened(np.pad(b, ((0, pad), (0, 0)))))
    sums = np.zeros((m, b.shape[1]), np.float32)
    with np.errstate(all="ignore"):
        for first in range(0, k + pad, TERMS):
            chains = []
            for begin in (first, first + 1):
                chain = np.zeros_like(sums)
                for p in range(begin, first + TERMS, 2):
                    chain = fused_arrays(a[:, p, None], b[p], chain)
                chains.append(chain)
            sums = flushed(sums + flushed(chains[0] + chains[1]))
    return sums


# ---- tiles by hand -------------------------------------------------------------------------


def shapes(tiles: dict[int, tuple[int, int]], **changed: int) -> Array:
    """What LDTILECFG reads, for tiles of (rows, bytes in a row); b5=1 changes byte 5."""
    memory = np.zeros(128, np.uint8)
    out = memory[-memory.ctypes.data % 64 :][:64]
    out[0] = 1
    for tile, (rows, row_bytes) in tiles.items():
        out[16 + 2 * tile], out[48 + tile] = row_bytes, rows
    for name, value in changed.items():
        out[int(name[1:])] = value
    return out


SUM, A, B = 0, 4, 5  # as the kernels have them


def tile_product(on: Kernels, c: Array, a: Array, b: Array) -> Array:
    on.configure(shapes({t: (len(x), x[0].nbytes) for t, x in ((SUM, c), (A, a), (B, b))}))
    out = np.full_like(c, 0xDEADBEEF)
    on.load_tile(SUM, c, c.strides[0])
    on.load_tile_once(A, a, a.strides[0])
    on.load_tile(B, b, b.strides[0])
    on.multiply(SUM, A, B)
    on.store_tile(SUM, out, out.strides[0])
    on.release()
    return out


ORDINARY = np.array([0, 0x8000, 0x3F80, 0xBF80, 0x3F91, 0xC049, 0x4254, 0xBD13], np.uint16)
SMALL = np.array([1, 0x8001, 0x7F, 0x80FF, 0x80, 0x8080, 0x81, 0x2000, 0xA080, 0x1FFF], np.uint16)
LARGE = np.array([0x7F7F, 0xFF7F, 0x5F80, 0xDF80, 0x7F80, 0xFF80], np.uint16)
NANS = np.array([0x7F81, 0xFF81, 0x7FA3, 0x7FC0, 0xFFC0, 0x7FC5, 0xFFD3, 0x7FFF, 0xFFFF], np.uint16)
KINDS = ["normal", "spread", "bits", "ordinary", "small", "large", "nans"]


def drawn(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> Array:
    """Bits of bfloat16."""
    if kind in ("normal", "spread"):
        scale = 2.0 ** rng.integers(-8, 9, shape) if kind == "spread" else 1
        return narrowed((rng.standard_normal(shape) * scale).astype(np.float32))
    if kind == "bits":
        return rng.integers(0, 2**16, shape).astype(np.uint16)
    out = rng.choice(ORDINARY, shape)
    if kind != "ordinary":
        odd = rng.random(shape) < (0.9 if kind == "small" else 0.04)
        out = np.where(
            odd, rng.choice({"small": SMALL, "large": LARGE, "nans": NANS}[kind], shape), out
        )
    return out.astype(np.uint16)


def drawn_sums(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> Array:
    """Bits of float32, subnormal numbers and kinds of NaN among them."""
    low = rng.integers(0, 2**16, shape, dtype=np.uint32)
    return drawn(rng, kind, shape).astype(np.uint32) << 16 | low


SHAPES = [(16, 16, 16), (1, 1, 1), (3, 16, 16), (16, 5, 16), (16, 16, 7), (9, 2, 11)]


def operands(kind: str, m: int, n: int, pairs: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng([KINDS.index(kind), m, n, pairs])
    c = drawn_sums(rng, kind, (m, n))
    return c, drawn(rng, kind, (m, 2 * pairs)), drawn(rng, kind, (pairs, 2 * n))


@pytest.mark.grid
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_multiplies_as_the_manual_says(model, kind, shape):
    c, a, b = operands(kind, *shape)
    np.testing.assert_array_equal(tile_product(model, c, a, b), manual_product(c, a, b))


def test_these_operands_tell_orders_of_summation_apart():
    c, a, b = operands("spread", *SHAPES[0])
    expected = manual_product(c, a, b)
    turned = [*range(1, 16), 0]
    pairs_turned = manual_product(c, a.reshape(16, 16, 2)[:, turned].reshape(16, 32), b[turned])
    assert (pairs_turned != expected).mean() > 0.2
    # One chain of all terms, from the sum on, as a chain of multiply-adds of float32 has them.
    x, y = widened(a), widened(b).reshape(16, 16, 2)
    chain = c.view(np.float32)
    for p, odd in itertools.product(range(16), range(2)):
        chain = fused_arrays(x[:, 2 * p + odd, None], y[p, :, odd], chain)
    assert (chain.view(np.uint32) != expected).mean() > 0.2


def test_a_result_is_subnormal_or_not_once_it_is_rounded_to_24_bits(model):
    for cut, expected in ((24, 0), (25, 0x800000), (26, 0x800000)):
        for sign in (0, 0x8000):
            a, b = np.zeros((1, 6), np.uint16), np.zeros((3, 2), np.uint16)
            # 2^-126 - 2^-(126 + cut), in one rounding.
            a[0, 0], b[0, 0] = (127 - 62) << 7 | sign, (127 - 64) << 7
            a[0, 2], b[1, 0] = (127 - 75) << 7 | sign ^ 0x8000, (127 + 75 - 126 - cut) << 7
            zero = np.zeros((1, 1), np.uint32)
            product = tile_product(model, zero, a, b)
            assert product == manual_product(zero, a, b)
            assert product & ~np.uint32(SIGN) == expected


def test_arrays_are_multiplied_as_tiles_are():
    for kind in KINDS:
        c, a, b = operands(kind, *SHAPES[0])
        columns = b.reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16)
        expected = manual_product(np.zeros_like(c), a, b).view(np.float32)
        np.testing.assert_array_equal(
            *map(without_kinds_of_nan, (block_sums(a, columns), expected))
        )


def without_kinds_of_nan(x: Array) -> Array:
    return np.where(np.isnan(x), np.uint32(DEFAULT_NAN), x.view(np.uint32))


def assert_loads_and_stores(on: Kernels, configured: Array, tile: int, once: bool) -> None:
    """A tile takes and gives the rows of its shape, and no other bytes."""
    on.configure(configured)
    source = np.arange(1, 1 + 20 * 80, dtype=np.uint32).astype(np.uint8).reshape(20, 80) | 1
    out = np.full((18, 72), 0xEE, np.uint8)
    (on.load_tile_once if once else on.load_tile)(tile, source, 80)
    on.store_tile(tile, out, 72)
    rows, row_bytes = int(configured[48 + tile]), int(configured[16 + 2 * tile])
    first = int(configured[1])
    on.release()
    expected = np.full_like(out, 0xEE)
    # Rows before the first are as they were, zero, and the first is 0 again after the load.
    expected[:rows, :row_bytes] = np.where(
        np.arange(rows)[:, None] < first, 0, source[:rows, :row_bytes]
    )
    np.testing.assert_array_equal(out, expected)


LOADS = [(16, 64, 0), (1, 4, 0), (7, 64, 0), (16, 12, 0), (5, 20, 0), (16, 64, 3), (4, 8, 3)]


@pytest.mark.grid
@pytest.mark.parametrize("once", [False, True], ids=["load", "load once"])
@pytest.mark.parametrize(("rows", "row_bytes", "first"), LOADS)
def test_a_tile_takes_and_gives_the_rows_of_its_shape(model, rows, row_bytes, first, once):
    for tile in range(8):
        assert_loads_and_stores(model, shapes({tile: (rows, row_bytes)}, b1=first), tile, once)


def test_zero_and_configuration_leave_zeros(model):
    ones = np.ones((16, 64), np.uint8)
    out = np.empty_like(ones)
    full = shapes(dict.fromkeys(range(8), (16, 64)))
    for clear in (lambda: model.zero(3), lambda: model.configure(full)):
        model.configure(full)
        model.load_tile(3, ones, 64)
        model.store_tile(3, out, 64)
        assert out.all()
        clear()
        model.store_tile(3, out, 64)
        assert not out.any()
    model.release()


def test_nothing_is_written_beyond_the_shape_of_a_tile(model):
    memory = np.full((16, 64), 0x3F, np.uint8)
    model.configure(shapes({SUM: (5, 20), A: (5, 12), B: (3, 20)}))
    for tile, rows, row_bytes in ((A, 5, 12), (B, 3, 20), (SUM, 5, 20)):
        bytes_ = np.ones_like(memory)
        model.load_tile(tile, memory, 64)
        model.peek(tile, bytes_)
        assert bytes_[:rows, :row_bytes].all()
        assert np.count_nonzero(bytes_) == rows * row_bytes
    model.multiply(SUM, A, B)
    model.peek(SUM, bytes_)
    assert (bytes_[:5, 3:20:4] > 0x3F).all()
    assert not bytes_[5:].any()
    assert not bytes_[:, 20:].any()
    model.release()


def test_a_load_may_go_backwards_or_stand_still(model):
    source = np.arange(16 * 64, dtype=np.uint32).astype(np.uint8).reshape(16, 64)
    out = np.empty_like(source)
    model.configure(shapes({2: (16, 64)}))
    model.load_tile(2, source[15:], -64)
    model.store_tile(2, out, 64)
    np.testing.assert_array_equal(out, source[::-1])
    model.load_tile(2, source, 0)
    model.store_tile(2, out, 64)
    np.testing.assert_array_equal(out, np.broadcast_to(source[0], out.shape))
    model.release()


def whole(**changed: int) -> list[Any]:
    return ["configure", shapes({SUM: (16, 64), A: (16, 64), B: (16, 64)}, **changed).tolist()]


LOAD, STORE, MULTIPLY = (
    ["load_tile", SUM, "memory", 64],
    ["store_tile", SUM, "memory", 64],
    ["multiply", SUM, A, B],
)
# What a processor refuses: instructions, the last of which does not run, and why.
REFUSED = {
    "zero at first": ([["zero", 0]], "no tiles are configured"),
    "load at first": ([LOAD], "no tiles are configured"),
    "store after release": ([whole(), LOAD, STORE, ["release"], STORE], "no tiles are configured"),
    "multiply after palette 0": (
        [whole(), ["configure", [0] * 64], MULTIPLY],
        "no tiles are configured",
    ),
    "tile without a shape": ([whole(), ["load_tile", 3, "memory", 64]], "tile 3 is not configured"),
    "zero of a tile without a shape": ([whole(), ["zero", 1]], "tile 1 is not configured"),
    "palette 2": ([whole(b0=2)], "no palette 2"),
    "byte 2": ([whole(b2=1)], "byte 2 must be zero"),
    "byte 15": ([whole(b15=1)], "byte 15 must be zero"),
    "a ninth tile": ([whole(b32=64, b56=16)], "byte 32 must be zero"),
    "byte 63": ([whole(b63=1)], "byte 63 must be zero"),
    "17 rows": ([whole(b48=17)], "tile 0 has more than 16 rows"),
    "65 bytes": ([whole(b16=65)], "tile 0 has rows of more than 64 bytes"),
    "256 bytes": ([whole(b16=0, b17=1)], "tile 0 has rows of more than 64 bytes"),
    "rows of nothing": ([whole(b16=0)], "tile 0 has no rows or no columns"),
    "no rows": ([whole(b53=0)], "tile 5 has no rows or no columns"),
    "too few rows of sums": ([whole(b48=15), MULTIPLY], "the sums must have the rows of a"),
    "too few columns of sums": ([whole(b16=60), MULTIPLY], "the sums must have the columns of b"),
    "too few rows of b": ([whole(b53=15), MULTIPLY], "a must have a pair for each row of b"),
    "half a number in a load": ([whole(b16=62), LOAD], "whole numbers"),
    "half a number in a store": ([whole(b16=62), ["zero", 0], STORE], "whole numbers"),
    "a first row beyond the last": ([whole(b1=16), LOAD], "no row is left"),
    "a first row beyond that of a tile": ([whole(b1=5, b48=5), STORE], "no row is left"),
    "half a pair": ([whole(b24=62), MULTIPLY], "whole numbers or pairs"),
    "half a sum": ([whole(b16=62, b26=62), MULTIPLY], "whole numbers or pairs"),
}


def run(on: Any, steps: list[list[Any]]) -> None:
    memory = np.zeros((16, 64), np.uint8)
    for name, *args in steps:
        if name == "configure":
            configured = shapes({})
            configured[:] = args[0]
            args = [configured]
        getattr(on, name)(*[memory if isinstance(arg, str) else arg for arg in args])


@pytest.mark.parametrize("case", REFUSED)
def test_the_model_refuses_what_a_processor_does(model, case):
    steps, reason = REFUSED[case]
    model.release()
    run(model, steps[:-1])
    with pytest.raises(TileError, match=reason):
        run(model, steps[-1:])
    model.release()


@pytest.mark.parametrize(("sum", "a", "b"), [(0, 0, 1), (0, 1, 1), (1, 0, 1)])
def test_the_model_refuses_one_tile_for_two(model, sum, a, b):
    model.configure(shapes(dict.fromkeys(range(8), (16, 64))))
    with pytest.raises(TileError, match="three tiles are needed"):
        model.multiply(sum, a, b)
    model.release()


# ---- the kernels' products -----------------------------------------------------------------

ROWS, COLUMNS = 49, 130
DEPTHS = [1, 31, 32, 33, 64, 255, 256, 257, 300]
NAN = 0x7FD5  # in memory that no kernel may use


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def packed(on: Kernels, b: Array) -> tuple[Array, int]:
    """Panels of b (k, n), with what gemm_amx.cpp adds to those of pack_vnni."""
    k, n = b.shape
    whole = up(k, TERMS)
    size = whole * PANEL + TERMS
    panels = np.full(up(n, PANEL) // PANEL * size, NAN, np.uint16)
    on.pairs(k, n, b, b.strides[0] // 2, b.strides[1] // 2, panels, size)
    for panel in panels.reshape(-1, size):
        panel[up(k, 2) * PANEL : whole * PANEL] = 0
    return panels, size


class Guarded:
    """An array for results, amid values that must stay as they are."""

    def __init__(self, rows: int, cols: int, row: int, dtype: Any) -> None:
        self.row = row
        self._nan = NAN if dtype == np.uint16 else NAN << 16 | NAN
        self._memory = np.full((EDGE + rows + EDGE, row), self._nan, dtype)
        self.view = self._memory[EDGE : EDGE + rows, :cols]

    def assert_rest_untouched(self) -> None:
        self.view[:] = self._nan
        assert (self._memory == self._nan).all()


class Product:
    """A product (ROWS, COLUMNS) of k terms, parts of which kernels compute; bits of bfloat16."""

    def __init__(self, k: int, kind: str = "normal") -> None:
        rng = np.random.default_rng([k, KINDS.index(kind)])
        self.k = k
        self.a, self.b = drawn(rng, kind, (ROWS, k)), drawn(rng, kind, (k, COLUMNS))
        self.bias = rng.standard_normal(COLUMNS).astype(np.float32)
        self.sums = block_sums(self.a, self.b)

    def run(
        self,
        on: Kernels,
        m: int,
        cols: int,
        *,
        dtype: Any = np.uint16,
        activation: str = "none",
        bias: bool = False,
        cuts: tuple[int, ...] = (),
        keeps: bool = False,
    ) -> Array:
        """The kernel's output for m rows and cols columns, or its sums if it `keeps` them.

        It comes in calls that begin at terms 0 and `cuts`. Asserts that nothing else is written.
        """
        k, b = self.k, self.b[:, :cols]
        row = up(k, TERMS) + TERMS
        a = np.full((m + 1, row), NAN, np.uint16)
        a[:m, : k // TERMS * TERMS] = self.a[:m, : k // TERMS * TERMS]
        last = np.full((m + 1, TERMS), NAN, np.uint16)
        last[:m] = 0
        last[:m, : k % TERMS] = self.a[:m, k // TERMS * TERMS :]
        sums = Guarded(m, up(cols, PANEL), up(cols, PANEL) + EDGE, np.uint32)
        out = Guarded(m, cols, cols + 3, dtype)
        begins = [0, *cuts]
        for begin, end in zip(begins, [*cuts, k], strict=True):
            panels, size = packed(on, np.ascontiguousarray(b[begin:end]))
            writes = end == k and not keeps
            (on.macrokernel if dtype == np.uint16 else on.macrokernel_f32)(
                *(m, cols, end - begin, a[:, begin:], row, last, panels, size),
                *(sums.view if cuts or keeps else None, sums.row, begin > 0),
                *(self.bias[:cols].copy() if bias and writes else None, activation),
                *(out.view if writes else None, out.row),
            )
        result = (sums if keeps else out).view[:, :cols].copy()
        sums.assert_rest_untouched()
        out.assert_rest_untouched()
        return result

    def expected(
        self, on: Kernels, *, dtype: Any = np.uint16, activation: str = "none", bias: bool = False
    ) -> Array:
        values = self.sums + self.bias if bias else self.sums.copy()
        before = values.copy()
        if activation == "relu":
            values = np.where(values < 0, np.float32(0), values)
        elif activation != "none":
            # By the level's own function, which tests/test_linear_act.py holds to the true one.
            on.activate_values(values.size, values, activation)
            with np.errstate(over="ignore"):
                true = TRUE[activation](before.astype(np.float64))
            np.testing.assert_allclose(values, true, rtol=1e-6, atol=1e-7)
        return narrowed(values) if dtype == np.uint16 else values.view(np.uint32)


TRUE = {
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
}


# What a kernel may do with the sums.
ENDS: list[dict[str, Any]] = [
    {"dtype": dtype, "activation": activation, "bias": bias}
    for dtype in (np.uint16, np.uint32)
    for activation in ACTIVATIONS
    for bias in (False, True)
]


def named(end: dict[str, Any]) -> str:
    kind = "bfloat16" if end["dtype"] == np.uint16 else "float32"
    return f"{kind} {end['activation']}{' bias' if end['bias'] else ''}"


# Every number of rows and every number of columns.
PARTS = [(m, 1 + 37 * m % COLUMNS) for m in range(1, ROWS + 1)]
PARTS += [(1 + 11 * cols % ROWS, cols) for cols in range(1, COLUMNS + 1)]


@pytest.mark.parametrize("k", DEPTHS)
def test_every_value_is_that_of_the_order(on_model, k):
    product = Product(k)
    expected = [product.expected(on_model, **end) for end in ENDS]
    # A part's values are those of the whole: they depend on neither rows nor columns.
    for case, (m, cols) in enumerate(PARTS):
        end = ENDS[case % len(ENDS)]
        out = product.run(on_model, m, cols, **end)
        np.testing.assert_array_equal(
            out, expected[case % len(ENDS)][:m, :cols], str((m, cols, end))
        )


@pytest.mark.parametrize("end", ENDS, ids=named)
def test_every_end_of_a_product_in_several_calls(on_model, end):
    product = Product(300)
    expected = product.expected(on_model, **end)
    for m, cols in ((1, 1), (15, 16), (16, 64), (17, 65), (49, 130), (32, 128), (3, 97), (48, 33)):
        for cuts in ((), (32,), (288,), (64, 96, 256)):
            out = product.run(on_model, m, cols, cuts=cuts, **end)
            np.testing.assert_array_equal(out, expected[:m, :cols], str((m, cols, cuts)))


@pytest.mark.parametrize("k", [1, 32, 300])
def test_sums_are_kept_where_no_output_is_asked_for(on_model, k):
    product = Product(k)
    for m, cols in ((1, 1), (15, 17), (16, 64), (33, 130)):
        for cuts in ((), (32,), (64, 256)) if k == 300 else ((),):
            kept = product.run(on_model, m, cols, cuts=cuts, keeps=True)
            np.testing.assert_array_equal(kept, product.sums[:m, :cols].view(np.uint32))


@pytest.mark.parametrize("kind", ["bits", "small", "large", "nans"])
def test_subnormal_infinite_and_missing_values(on_model, kind):
    product = Product(70, kind)
    sums = product.sums
    for m, cols in ((5, 20), (49, 130)):
        kept = product.run(on_model, m, cols, keeps=True).view(np.float32)
        wide = product.run(on_model, m, cols, dtype=np.uint32).view(np.float32)
        for values in (kept, wide):
            np.testing.assert_array_equal(
                *map(without_kinds_of_nan, (values, sums[:m, :cols].copy()))
            )
        np.testing.assert_array_equal(product.run(on_model, m, cols), narrowed(sums[:m, :cols]))
    assert kind == "bits" or not np.isnan(sums).all()
    assert kind == "small" or not np.isfinite(sums).all()


# ---- its copies ----------------------------------------------------------------------------


def laid_out(rng: np.random.Generator, rows: int, cols: int, layout: str, rounds: bool) -> Array:
    """Random bits (rows, cols) of bfloat16, or of float32 that is to be rounded, amid others."""
    if layout == "columns":
        return laid_out(rng, cols, rows, "rows", rounds).T
    step = 3 if layout == "strided" else 1
    shape = (rows + 1, cols * step + 5)
    values = drawn(rng, "bits", shape)
    if rounds:
        low = rng.integers(0, 1 << 16, shape, np.uint32)
        values = (values.astype(np.uint32) << 16 | low).view(np.float32)
    return values[:rows, : cols * step : step]


def as_pytorch_rounds(source: Array) -> Array:
    """Bits of bfloat16."""
    if source.dtype != np.float32:
        return source
    rounded = torch.from_numpy(np.ascontiguousarray(source)).bfloat16()
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return np.where(np.isnan(source), 0x7FC0, bits)  # PyTorch writes one of two, by a value's place


def strides(source: Array) -> list[int]:
    return [stride // source.itemsize for stride in source.strides]


@pytest.fixture(params=[False, True], ids=["bfloat16", "float32"])
def rounds(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.grid
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_a_copy_has_contiguous_rows_and_zeros_up_to_a_whole_tile(on_model, layout, rounds):
    rng = np.random.default_rng(1)
    copy = on_model.copy_rounded if rounds else on_model.copy
    for rows, k in itertools.product((1, 15, 16, 17, 32, 49), (1, 30, 32, 64, 81, 256)):
        source = laid_out(rng, rows, k, layout, rounds)
        out = Guarded(rows, up(k, TERMS), up(k, TERMS) + TERMS, np.uint16)
        copy(rows, k, source, *strides(source), out.view, up(k, TERMS) + TERMS)
        np.testing.assert_array_equal(out.view[:, :k], as_pytorch_rounds(source))
        np.testing.assert_array_equal(out.view[:, k:], 0)
        out.assert_rest_untouched()


@pytest.mark.grid
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_panels_hold_pairs(on_model, layout, rounds):
    rng = np.random.default_rng(2)
    pairs_of = on_model.pairs_rounded if rounds else on_model.pairs
    for rows, cols in itertools.product(
        (1, 2, 5, 31, 32, 33, 64), (1, 15, 16, 17, 63, 64, 65, 130)
    ):
        source = laid_out(rng, rows, cols, layout, rounds)
        size = up(rows, 2) * PANEL + 7
        panels = np.full(up(cols, PANEL) // PANEL * size, NAN, np.uint16)
        pairs_of(rows, cols, source, *strides(source), panels, size)
        padded = np.zeros((up(rows, 2), up(cols, EDGE)), np.uint16)
        padded[:rows, :cols] = as_pytorch_rounds(source)
        expected = np.full_like(panels, NAN).reshape(-1, size)
        for j in range(0, padded.shape[1], PANEL):
            part = padded[:, j : j + PANEL]
            pairs = part.reshape(-1, 2, part.shape[1]).swapaxes(1, 2).reshape(-1, 2 * part.shape[1])
            into = expected[j // PANEL, :-7].reshape(-1, 2 * PANEL)
            into[:, : pairs.shape[1]] = pairs
        np.testing.assert_array_equal(panels, expected.ravel(), str((rows, cols)))


# ---- the processor's tiles -----------------------------------------------------------------


@pytest.mark.grid
@needs_amx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_processor_agrees_with_the_model_to_the_bit(kernels, kind, shape):
    model, processor = kernels("avx512", True), kernels("avx512", False)
    rng = np.random.default_rng(KINDS.index(kind))
    m, n, pairs = shape
    for _ in range(100):
        c, a = drawn_sums(rng, kind, (m, n)), drawn(rng, kind, (m, 2 * pairs))
        b = drawn(rng, kind, (pairs, 2 * n))
        np.testing.assert_array_equal(
            tile_product(processor, c, a, b), tile_product(model, c, a, b)
        )


@pytest.mark.grid
@needs_amx
@pytest.mark.parametrize("once", [False, True], ids=["load", "load once"])
@pytest.mark.parametrize(("rows", "row_bytes", "first"), LOADS)
def test_the_processor_loads_and_stores_as_the_model(kernels, rows, row_bytes, first, once):
    for tile in range(8):
        assert_loads_and_stores(
            kernels("avx512", False), shapes({tile: (rows, row_bytes)}, b1=first), tile, once
        )


# Instructions in a process of their own, which asks for the tiles as csrc/cpu/gemm_amx.cpp does.
ALONE = """
import ctypes, json, sys
assert ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0
path, steps = json.loads(sys.argv[1])
library = ctypes.CDLL(path)
memory = ctypes.create_string_buffer(16 * 64)
for name, *args in steps:
    kinds = {int: ctypes.c_int64, list: bytes, str: lambda _: memory}
    getattr(library, name)(*[kinds[type(arg)](arg) for arg in args])
"""


@needs_amx
@pytest.mark.parametrize("case", REFUSED)
def test_the_processor_refuses_what_the_model_does(kernels, case):
    steps, _ = REFUSED[case]
    path = str(kernels("avx512", False).path)
    for count, codes in (
        (len(steps) - 1, {0}),
        (len(steps), {-signal.SIGILL, -signal.SIGSEGV}),
    ):
        script = json.dumps([path, steps[:count]])
        done = subprocess.run([sys.executable, "-c", ALONE, script], capture_output=True, text=True)
        assert done.returncode in codes, (count, done)


@needs_amx
@pytest.mark.parametrize("end", ENDS, ids=named)
def test_the_kernels_have_the_same_bits_on_the_processor(kernels, end):
    model, processor = kernels("avx512", True), kernels("avx512", False)
    for k, kind, cuts in (
        (1, "normal", ()),
        (300, "normal", (64, 256)),
        (70, "small", (32,)),
        (70, "bits", (64,)),
    ):
        product = Product(k, kind)
        for m, cols in ((1, 1), (15, 17), (16, 64), (49, 130)):
            out = [product.run(on, m, cols, cuts=cuts, **end) for on in (model, processor)]
            np.testing.assert_array_equal(*out, str((k, kind, m, cols)))


@pytest.mark.grid
@needs_amx
@pytest.mark.parametrize("activation", ["none", "relu", "tanh", "sigmoid", "elu"])
@pytest.mark.parametrize("kind", ["normal", "small", "large", "bits"])
@pytest.mark.parametrize("k", [1, 33, 300])
def test_the_layer_has_the_bits_of_the_model(kernels, k, kind, activation):
    product = Product(k, kind)
    product.bias = widened(narrowed(product.bias))
    expected = product.expected(kernels("avx512", True), activation=activation, bias=True)
    x, w, bias = (
        torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        for bits in (product.a, product.b, narrowed(product.bias))
    )
    for m, cols in ((1, 1), (3, 64), (17, 65), (49, 130)):
        out = linear_act(
            x[:m],
            w[:, :cols].contiguous(),
            bias[:cols],
            None if activation == "none" else activation,
        )
        bits = out.view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(bits, expected[:m, :cols], str((m, cols)))
