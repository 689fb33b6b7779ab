"""The one builder of sample inputs, and the yardsticks their results are held to.

Forward, gradcheck and opcheck tests all draw from here.

Sizes sit around zero, one and the kernels' block edges: register tiles of 6 rows, vectors of
4, 8 and 16 values, panels of 64 columns, blocks of 256 in depth and 240 in rows for products;
chunks of 256 rows and 8192 values, 64 narrow columns, strips of 1024 columns, groups of 8 rows and
32768 values per thread for means.

A sample's values depend on its name and dtype alone. With ``large=False`` there are only
small samples whose memory does not overlap, and no pre-activation lies near a kink of its
activation: what ``torch.autograd.gradcheck`` needs.
"""

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mylayers import activations, reference

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# For what takes an activation whatever it is: one in registers, of its output, of either, of its
# input, and none. test_activations.py has each of reference.ACTIVATIONS.
ACTIVATIONS = ("relu", "tanh", "elu", "gelu", None)
# Those whose derivative is a function of their output, and those of whose input it is.
OF_OUTPUT = tuple(name for name, one in activations.ACTIVATIONS.items() if not one.reads_input)
OF_INPUT = tuple(name for name, one in activations.ACTIVATIONS.items() if one.reads_input)
WITH_SETTINGS = ("elu(0.5)", "leaky_relu(0.2)", "celu(2.0)", "celu(0.25)")

# relu's first derivative jumps at 0, and elu's second.
KINKED = ("relu", "elu")
# Finite differences move a pre-activation by less than this.
KINK_MARGIN = 1e-2


@dataclass(frozen=True)
class Sample:
    """One call: ``operator(*args, **kwargs)``; tensors (and None) are in ``args``."""

    name: str
    args: tuple[Tensor | None, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


# ---- layouts ---------------------------------------------------------------------------

Draw = Callable[..., Tensor]


def _transposed(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw(*shape[::-1]).permute(*reversed(range(len(shape))))


def _stepped(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw(*(2 * n + 1 for n in shape))[tuple(slice(1, None, 2) for _ in shape)]


def _row_slice(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw(*shape[:-1], shape[-1] + 3)[..., 2:-1]


def _flipped(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return _transposed(draw, shape).flip(0)


def _expanded_rows(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw(*(1 for _ in shape[:-1]), shape[-1]).expand(shape)


def _expanded_columns(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw(*shape[:-1], 1).expand(shape)


def _overlapping(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    # Windows that move by one value: every stride is 1.
    return draw(sum(shape) + 1).as_strided(shape, [1] * len(shape), storage_offset=1)


def _misaligned(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    values = draw(*shape)
    return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(shape)


def _negated(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return torch._neg_view(draw(*shape))


LAYOUTS: dict[str, Callable[[Draw, tuple[int, ...]], Tensor]] = {
    "contiguous": lambda draw, shape: draw(*shape),
    "transposed": _transposed,
    "stepped": _stepped,
    "row_slice": _row_slice,
    "flipped": _flipped,
    "misaligned": _misaligned,
    "negated": _negated,
    "expanded_rows": _expanded_rows,
    "expanded_columns": _expanded_columns,
    "overlapping": _overlapping,
}
OVERLAPPING = ("expanded_rows", "expanded_columns", "overlapping")


def drawer(name: str, dtype: torch.dtype, attempt: int = 0) -> Draw:
    """``draw(*shape)``: standard normal values that depend on the name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + attempt)
    wide = torch.complex128 if dtype.is_complex else torch.float64

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)

    return draw


# ---- linear_act ------------------------------------------------------------------------

# Leading sizes, in_units, units.
_SMALL_PRODUCTS = [
    ((), 3, 2),
    ((1,), 1, 1),
    ((2,), 5, 3),
    ((7,), 4, 9),
    ((2, 3), 4, 5),
    ((2, 1, 2), 3, 4),
    ((1, 2, 1, 2), 3, 2),
    ((0,), 3, 2),
    ((2, 0), 3, 2),
    ((3,), 0, 2),
    ((2,), 3, 0),
    ((0,), 0, 0),
]
_LARGE_PRODUCTS = [
    ((5,), 15, 17),
    ((6,), 16, 16),
    ((7,), 17, 15),
    ((12,), 64, 64),
    ((13,), 8, 9),
    ((), 300, 65),
    ((1,), 256, 64),
    ((3,), 31, 129),
    ((2,), 1000, 1),
    ((239,), 255, 63),
    ((240,), 256, 64),
    ((241,), 257, 65),
    ((481,), 513, 128),
    ((300,), 600, 530),
    ((3, 5, 17), 40, 33),
    # Rows of 4 KiB in float32: of the input, of the weight and the gradient, of a large weight.
    ((75,), 1024, 139),
    ((75,), 139, 1024),
    ((13,), 300, 1024),
    ((0,), 300, 65),
    ((300,), 0, 65),
    # More rows than one piece of the weight gradient's sum: 2, 3 and 65 pieces.
    ((2049,), 7, 33),
    ((4097,), 33, 17),
    ((2, 67000), 3, 2),
]
# Where a kernel applies an activation: along one vector, streams of few rows or little depth,
# tiles and blocks cut in each size; more rows than one chunk of the bias gradient's sum.
_ACTIVATED_PRODUCTS = [
    ((), 300, 65),
    ((3,), 31, 129),
    ((13,), 2, 130),
    ((241,), 257, 65),
    ((300,), 17, 15),
]


def in_float64(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Detached copies in float64."""
    return tuple(None if t is None else t.detach().to(torch.float64) for t in tensors)


def _linear_act_sample(
    sizes: tuple[tuple[int, ...], int, int],
    dtype: torch.dtype,
    requires_grad: bool,
    away_from_kinks: bool,
    activation: str | None = "relu",
    input_layout: str = "contiguous",
    weight_layout: str = "contiguous",
    bias_layout: str | None = "contiguous",
) -> Sample:
    lead, in_units, units = sizes
    name = (
        f"{(*lead, in_units)}->{units}-{activation}-{input_layout}-{weight_layout}-{bias_layout}"
    ).replace(" ", "")
    for attempt in itertools.count():
        draw = drawer(name, dtype, attempt)
        tensors = (
            LAYOUTS[input_layout](draw, (*lead, in_units)),
            LAYOUTS[weight_layout](draw, (in_units, units)),
            None if bias_layout is None else LAYOUTS[bias_layout](draw, (units,)),
        )
        args = tuple(t if t is None else t.detach().requires_grad_(requires_grad) for t in tensors)
        sample = Sample(name, args, {"activation": activation})
        if not (away_from_kinks and activation in KINKED):
            return sample
        pre_activation = reference.linear_act(*in_float64(*args), activation=None)
        if bool((pre_activation.abs() > KINK_MARGIN).all()):
            return sample
    raise AssertionError("unreachable")


def linear_act_samples(
    dtype: torch.dtype, requires_grad: bool = False, large: bool = True
) -> Iterator[Sample]:
    """Samples of ``linear_act``: ``args`` are input, weight, bias; ``kwargs`` the activation.

    Args:
        dtype: of all tensors. A complex dtype has no kernel for an activation, so its is None.
        requires_grad: whether the tensors (leaves) ask for gradients.
        large: also sizes around block edges and overlapping memory; see the module's text.
    """

    def sample(sizes: tuple[tuple[int, ...], int, int], **options: Any) -> Sample:
        if dtype.is_complex:
            options["activation"] = None
        return _linear_act_sample(sizes, dtype, requires_grad, not large, **options)

    for sizes in _SMALL_PRODUCTS + (_LARGE_PRODUCTS if large else []):
        yield sample(sizes)
    layouts = [name for name in LAYOUTS if large or name not in OVERLAPPING]
    # With large, every layout meets full and cut tiles, panels and blocks in depth.
    matrix = ((13,), 258, 70) if large else ((4,), 3, 5)
    for bias_layout in (None, *layouts):
        yield sample(matrix, activation=None, bias_layout=bias_layout)
    if not dtype.is_complex:
        yield sample(matrix, bias_layout=None)
    for layout in layouts[1:]:
        yield sample(matrix, input_layout=layout)
        yield sample(matrix, weight_layout=layout)
        yield sample(((2, 3), 4, 5), input_layout=layout, weight_layout=layout, bias_layout=None)
    yield sample(matrix, activation=None, input_layout="transposed", weight_layout="transposed")
    yield sample(((), 9, 7), input_layout="stepped", weight_layout="stepped")
    if dtype.is_complex:
        return
    for activation in ACTIVATIONS[1:-1]:  # relu: all of the above
        yield sample(matrix, activation=activation)
        yield sample(((2, 3), 4, 5), activation=activation, bias_layout=None)
        if large:
            for sizes in _ACTIVATED_PRODUCTS:
                yield sample(sizes, activation=activation)
            yield sample(((3,), 31, 129), activation=activation, weight_layout="transposed")


# ---- center ----------------------------------------------------------------------------

_SMALL_MEANS: list[tuple[tuple[int, ...], Any]] = [
    ((5,), None),
    ((), None),
    ((), 0),
    ((), -1),
    ((1,), 0),
    ((0,), None),
    ((0, 3), None),
    ((0, 3), 0),
    ((3, 0), 0),
    ((3, 4), None),
    ((3, 4), ()),
    ((3, 4), 0),
    ((3, 4), 1),
    ((3, 4), -1),
    ((3, 4), (1, 0)),
    ((3, 1), 1),
    ((2, 3, 4), 1),
    ((2, 3, 4), (0, 2)),
    ((2, 3, 4), (-1, 1)),
    ((2, 3, 4), [0, 1]),
    ((2, 3, 2, 2), (1, -1)),
    ((2, 1, 3, 2, 2), (2,)),
    ((2, 1, 3, 2, 2), (0, 2, 4)),
]
_LARGE_MEANS: list[tuple[tuple[int, ...], Any]] = [
    *(((n,), None) for n in (7, 8, 63, 64, 65, 255, 257)),
    *(((n,), None) for n in (4097, 8191, 8192, 8193, 32768, 32769, 65537)),
    ((3, 8192), 1),
    ((3, 8193), 1),
    ((9, 8193), 1),
    ((130, 3), 1),
    ((65, 15), 1),
    ((65, 16), 1),
    ((70, 1000), 1),
    ((4097, 3), 0),
    ((255, 17), 0),
    ((256, 16), 0),
    ((257, 15), 0),
    ((513, 129), 0),
    ((1030, 64), 0),
    ((1030, 65), 0),
    *(((rows, 33), 0) for rows in (7, 8, 9, 15)),
    ((17, 1024), 0),
    ((17, 1025), 0),
    ((3, 40000), 0),
    ((300, 1100), 0),
    ((3, 300, 200), 1),
    ((40, 9, 17), 1),
    ((1, 100), 0),
    ((2, 257, 3), 1),
    ((5, 300, 64), (0, 1)),
    ((30, 4, 300), (0, 2)),
    ((30, 4, 31), (0, 2)),
    ((300, 8, 32), (0, 2)),
    ((3, 2, 8193), (0, 2)),
    ((2, 4, 3, 40), (0, 2)),
    ((3, 20, 21, 22), (2, 3)),
]


def center_samples(
    dtype: torch.dtype, requires_grad: bool = False, large: bool = True
) -> Iterator[Sample]:
    """Samples of ``center``: ``args`` is the input, ``kwargs`` the ``dim``.

    Args:
        dtype: of the input.
        requires_grad: whether the input (a leaf) asks for its gradient.
        large: also sizes around chunk edges and overlapping memory; see the module's text.
    """

    def sample(shape: tuple[int, ...], dim: Any, layout: str) -> Sample:
        name = f"{shape}-dim={dim}-{layout}".replace(" ", "")
        x = LAYOUTS[layout](drawer(name, dtype), shape).detach().requires_grad_(requires_grad)
        return Sample(name, (x,), {"dim": dim})

    for shape, dim in _SMALL_MEANS + (_LARGE_MEANS if large else []):
        yield sample(shape, dim, "contiguous")
    for layout in LAYOUTS:
        if layout == "contiguous" or (layout in OVERLAPPING and not large):
            continue
        for dim in (None, 0, -1, (0, 2)):
            yield sample((3, 4, 5), dim, layout)
        if large:
            for dim in (None, 0, 1):
                yield sample((261, 130), dim, layout)
    channels_last = torch.channels_last
    for dim in (None, 1, (2, 3)):
        name = f"(2,3,4,5)-dim={dim}-channels_last".replace(" ", "")
        x = drawer(name, dtype)(2, 3, 4, 5).to(memory_format=channels_last)
        yield Sample(name, (x.requires_grad_(requires_grad),), {"dim": dim})


# ---- devices ---------------------------------------------------------------------------


def moved(t: Tensor | None, device: str | torch.device) -> Tensor | None:
    """On another device, with its strides, offset and overlap; ``Tensor.to`` would tidy them."""
    if t is None:
        return None
    if t.is_neg():
        return torch._neg_view(moved(torch._neg_view(t.detach()), device)).requires_grad_(
            t.requires_grad
        )
    whole = t.detach().as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
    there = whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())
    return there.requires_grad_(t.requires_grad)


def moved_sample(sample: Sample, device: str | torch.device) -> Sample:
    """The same call on another device."""
    return Sample(sample.name, tuple(moved(t, device) for t in sample.args), sample.kwargs)


# ---- yardsticks ------------------------------------------------------------------------


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """``torch.set_num_threads(count)``, undone at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def integer_of(dtype: torch.dtype) -> torch.dtype:
    """The integers that have the bits of ``dtype``."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def nans_like(t: Tensor) -> Tensor:
    """NaNs of many bits and both signs, quiet ones."""
    bits = torch.full_like(t, torch.nan).view(integer_of(t.dtype)).clone()
    places = torch.arange(t.numel()).view(t.shape)
    bits |= (places % 29 + 1).to(bits.dtype) << (1 if t.dtype.itemsize == 2 else t.itemsize * 4)
    bits[places % 2 == 1] |= torch.iinfo(bits.dtype).min
    return bits.view(t.dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and bits: tells 0 from -0, and NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    view = integer_of(a.dtype)
    return torch.equal(a.detach().contiguous().view(view), b.detach().contiguous().view(view))


def units_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many steps to the next number of their dtype lie between two numbers; 0 from 0 to -0."""

    def position(t: Tensor) -> Tensor:
        integer = integer_of(t.dtype)
        bits = t.detach().contiguous().view(integer).to(torch.int64)
        return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)

    return (position(a) - position(b)).abs()


def product_tolerance(dtype: torch.dtype, terms: int, magnitude: Tensor, exact: Tensor) -> Tensor:
    """How far a sum of products may lie from its exact value, element by element.

    ``terms`` roundings of the accumulator, each at most half its epsilon of a partial sum that
    is at most ``magnitude`` (the sum of the products' absolute values), add up as their root;
    then comes one rounding to ``dtype``, down to its smallest subnormal number. What float64 is
    measured against is a sum of float64 itself, whose roundings come to ours.
    """
    accumulator = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype)
    result = torch.finfo(dtype)
    roundings = (terms + 1) * (2 if dtype == torch.float64 else 1)
    summed = accumulator.eps * roundings**0.5 * magnitude
    return summed + result.eps / 2 * (exact.abs() + summed) + result.eps / 2 * result.tiny


def activation_tolerance(activation: str | None, dtype: torch.dtype, exact: Tensor) -> Tensor:
    """How far the activation of an accumulator may lie from its exact value.

    Those that choose do not round, the others by 4 units in the last place: in float32 by 2 from
    PyTorch's, which are off by up to 2 themselves. Where sigmoid is less than the smallest normal
    number, e^-x overflows, and it is 0.
    """
    if activation in (None, "relu", "relu6", "hardtanh"):
        return torch.zeros_like(exact)
    accumulator = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype)
    return 4 * accumulator.eps * exact.abs() + accumulator.tiny


def assert_within(actual: Tensor, exact: Tensor, tolerance: Tensor) -> None:
    """``actual`` lies within ``tolerance`` of ``exact`` at every element."""
    assert actual.shape == exact.shape
    excess = (actual.double() - exact).abs() - tolerance
    assert bool((excess <= 0).all()), f"off by {excess.max().item():.3g} more than the tolerance"


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the call returns, or the type of the exception it raises."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return type(error)
