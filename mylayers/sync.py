"""``center`` over all processes of a group, each of which has a shard of the input.

``mylayers.CenteredLayer`` comes here when it is given a process group.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    _resolve_process_group,
)

from mylayers import functional

__all__ = ["Group", "center"]

# ATen's sum in a wider dtype first converts all of its input into fresh memory. So runs are summed
# as they are, and only their sums are widened. 16-bit values are converted piece by piece.
_SMALL = 1 << 16
_RUN = 128
_PIECE = 1 << 18


class Group(NamedTuple):
    """A process group by name, which unlike the group itself can be copied and pickled."""

    name: Any  # a string, which PyTorch's types tell from others
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, process_group: object) -> "Group":
        """Raises TypeError for what is no group, ValueError for one without this process."""
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "CenteredLayer: process_group must contain this process; got one of other "
                f"processes than rank {dist.get_rank()}"
            )
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                "CenteredLayer: process_group must be a torch.distributed.ProcessGroup or None; "
                f"got {process_group!r}"
            )
        return cls(process_group.group_name, tuple(dist.get_process_group_ranks(process_group)))

    def resolve(self) -> dist.ProcessGroup:
        """The group itself; RuntimeError where it does not exist (any more, or after pickling)."""
        if not dist.is_initialized():
            raise RuntimeError(
                "CenteredLayer: the mean is over a process group, and torch.distributed is not "
                "initialised. Call torch.distributed.init_process_group first, or set "
                "process_group = None for the mean in this process"
            )
        try:
            group = _resolve_process_group(self.name)
        except RuntimeError:
            group = None
        if group is None or tuple(dist.get_process_group_ranks(group)) != self.ranks:
            raise RuntimeError(
                f"CenteredLayer: process group {self.name!r} of ranks {list(self.ranks)} does not "
                "exist in this process. Set process_group to one that does, or to None"
            )
        return group


def sum_wide(input: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The sum over ``dims``, in float64 or complex128; dimensions are kept, with size 1."""
    wide = torch.complex128 if input.is_complex() else torch.float64
    # Asked first, for torch.compile compiles anew where a size passes what it is compared with.
    if torch.compiler.is_compiling() or input.dtype == wide or input.numel() <= _SMALL:
        return input.sum(dims, keepdim=True, dtype=wide)
    if len(dims) == input.dim() > 1:
        return sum_wide(input.flatten(), (0,)).view([1] * input.dim())
    along = dims[0] % input.dim()
    size = input.size(along)
    if input.dtype == torch.float32:
        runs, rest = input.split([size - size % _RUN, size % _RUN], along)  # type: ignore[no-untyped-call]
        pieces = [runs.unflatten(along, (-1, _RUN)).sum(along + 1), rest]
    else:
        pieces = input.split(max(1, _PIECE * size // input.numel()), along)  # type: ignore[no-untyped-call]
    return torch.stack([piece.sum(dims, keepdim=True, dtype=wide) for piece in pieces]).sum(0)


def all_reduce(tensor: Tensor, group: Any) -> Tensor:
    """The sum over a group, given by its name."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    # Not the functions around these operators: they add what lets a result be late, at each call.
    ops = torch.ops._c10d_functional
    real = ops.wait_tensor(ops.all_reduce(real, "sum", group))
    return torch.view_as_complex(real) if tensor.is_complex() else real


def sum_and_count(
    input: Tensor, dims: tuple[int, ...], groups: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """What is summed over ``dims`` and over groups, given by name, and how many values it is."""
    total = sum_wide(input, dims)
    own = math.prod([input.size(d) for d in dims])
    sums = torch.cat([total.flatten(), total.new_full((1,), own)])
    for group in groups:
        sums = all_reduce(sums, group)
    return sums[:-1].view(total.shape), sums[-1].real


class _Center(torch.autograd.Function):
    """``input - total / count``; as P = I - 11'/count is symmetric, its own gradient."""

    @staticmethod
    def forward(
        input: Tensor, dims: tuple[int, ...], group: Any, count: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if count is None:
            total, count = sum_and_count(input, dims, [group])
        else:  # a gradient, of as many
            total = all_reduce(sum_wide(input, dims), group)
        count = count.clone()
        return input - (total / count).to(input.dtype), count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, ctx.dims, ctx.group, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (count,) = ctx.saved_tensors
        centered = _Center.apply(grad, ctx.dims, ctx.group, count)[0]  # type: ignore[no-untyped-call]
        return centered, None, None, None


def _check_kept(input: Tensor, dims: tuple[int, ...], group: Group) -> None:
    """One small all-reduce, for gloo ends the process where all-reduced sizes differ."""
    averaged = {d % max(input.dim(), 1) for d in dims}
    kept = [size for d, size in enumerate(input.shape) if d not in averaged]
    mark = zlib.crc32(repr(kept).encode())
    marks = torch.tensor([mark, -mark], device=input.device)
    largest, negated = collectives.all_reduce(marks, "max", group.name).tolist()
    if largest != -negated:
        raise RuntimeError(
            f"center: input must have the same sizes in every process, but for dim {list(dims)}; "
            f"got {list(input.shape)} here and others elsewhere"
        )


def center(input: Tensor, dim: int | Sequence[int] | None, group: Group) -> Tensor:
    """This process's shard of ``center(torch.cat(shards), dim)``; see ``CenteredLayer``."""
    if not isinstance(input, Tensor):
        raise TypeError(f"center: input must be a torch.Tensor; got {type(input).__name__}")
    if hasattr(input, "device_mesh"):
        raise TypeError(
            "center: input is a DTensor, whose mean is over all its shards already; "
            "process_group must be None for it"
        )
    if not input.is_floating_point() and not input.is_complex():
        raise RuntimeError(f"center: input must be floating point or complex; got {input.dtype}")
    if not torch.compiler.is_compiling():
        group.resolve()
    dims = tuple((dim,) if isinstance(dim, int) else dim or range(input.dim()))
    if input.dim() > 0 and all(d % input.dim() for d in dims):
        return functional.center(input, dims)  # no mean has a part in another process
    if dim is not None and not torch.compiler.is_compiling():
        functional.center(torch.empty(input.shape, device="meta"), dims)  # its errors
        _check_kept(input, dims, group)
    if input.dim() == 0:
        dims = ()  # PyTorch lets the only dimension be named of a tensor that has none
    return _Center.apply(input, dims, group.name, None)[0]  # type: ignore[no-untyped-call,no-any-return]
