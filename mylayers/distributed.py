"""Our layers in ``torch.distributed``: centering over processes, and tensor parallelism.

Importing this module teaches ``DTensor`` our operators. It takes half a second, PyTorch's own
``torch.distributed.tensor``, which is why ``import mylayers`` leaves it out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
    parallel,
)
from torch.distributed.tensor._op_schema import OpSchema, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import (
    expand_to_full_mesh_op_strategy,
    register_op_strategy,
)
from torch.nn.parameter import is_lazy

from mylayers import functional, sync
from mylayers.activations import find
from mylayers.layers import CenteredLayer, MyLinear

__all__ = ["ColwiseParallel", "RowwiseParallel", "convert_sync_centered"]

Module = TypeVar("Module", bound=nn.Module)


def convert_sync_centered(model: Module, process_group: dist.ProcessGroup | None = None) -> Module:
    """Give every :class:`mylayers.CenteredLayer` of a model a process group.

    Args:
        model: changed in place.
        process_group: the processes among which batches are split; all of them if None.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or ``process_group`` not a process group.
        ValueError: this process is not in ``process_group``.
        RuntimeError: ``process_group`` is None and torch.distributed is not initialised.

    Source:
        mylayers/sync.py.

    Example:
        >>> import torch.distributed as dist
        >>> from torch import nn
        >>> from mylayers import CenteredLayer
        >>> from mylayers.distributed import convert_sync_centered
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> convert_sync_centered(nn.Sequential(CenteredLayer()))
        Sequential(
          (0): CenteredLayer(ranks=[0])
        )
        >>> dist.destroy_process_group()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"convert_sync_centered: model must be an nn.Module; got {type(model).__name__}"
        )
    if process_group is None:
        if not dist.is_initialized():
            raise RuntimeError(
                "convert_sync_centered: process_group is None, for all processes, and "
                "torch.distributed is not initialised. Call "
                "torch.distributed.init_process_group first"
            )
        process_group = dist.group.WORLD
    for module in model.modules():
        if isinstance(module, CenteredLayer):
            module.process_group = process_group
    return model


# ---- tensor parallelism ----------------------------------------------------------------


class ColwiseParallel(parallel.ColwiseParallel):
    """PyTorch's style of the same name, for :class:`mylayers.MyLinear` too.

    Each process has some of the units: columns of the weight, which is ``(in_units, units)``, and
    their biases. The input is replicated, the output sharded in its last dimension, and the
    gradient of the input summed over the processes.

    Args:
        input_layouts: of the input, if it is no ``DTensor`` yet; replicated if None.
        output_layouts: of the output; ``Shard(-1)`` if None.
        use_local_output: whether the output is this process's part, a plain tensor. Uneven parts
            lose their common size so: pass False for ``units`` that the processes do not divide.

    Raises:
        TypeError: for a module other than ``MyLinear``, ``nn.Linear`` and ``nn.Embedding``.
        ValueError: the layer is lazy and has not seen an input.

    Source:
        The layer's operator on ``DTensor``: mylayers/distributed.py.

    Example:
        >>> import torch.distributed as dist
        >>> from torch import nn
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from mylayers import MyLinear
        >>> from mylayers.distributed import ColwiseParallel, RowwiseParallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> net = nn.Sequential(MyLinear(4, 8), MyLinear(8, 2))
        >>> plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        >>> net = parallelize_module(net, mesh, plan)
        >>> [layer.weight.placements for layer in net]
        [(Shard(dim=1),), (Shard(dim=0),)]
        >>> dist.destroy_process_group()
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check_module(self, module)
        if not isinstance(module, MyLinear):
            return super()._apply(module, device_mesh)
        return distribute_module(
            module,
            device_mesh,
            partial(_shard_parameters, self, weight=Shard(1), bias=Shard(0)),
            partial(self._prepare_input_fn, self.input_layouts, self.desired_input_layouts),
            partial(self._prepare_output_fn, self.output_layouts, self.use_local_output),
        )


class RowwiseParallel(parallel.RowwiseParallel):
    """PyTorch's style of the same name, for :class:`mylayers.MyLinear` too.

    Each process has some of the inputs and their rows of the weight, and the products are summed
    over the processes. Bias and activation come after: ``act(a) + act(b)`` is not ``act(a + b)``.

    Args:
        input_layouts: of the input, if it is no ``DTensor`` yet; ``Shard(-1)`` if None.
        output_layouts: of the output; replicated if None. A shard of it is summed by
            reduce-scatter. ``Partial()`` is refused.
        use_local_output: whether the output is this process's part, a plain tensor.

    Raises:
        TypeError: for a module other than ``MyLinear``, ``nn.Linear`` and ``nn.Embedding``.
        ValueError: ``output_layouts`` is partial, or the layer is lazy and has not seen an input.

    Source:
        The layer's operator on ``DTensor``: mylayers/distributed.py.

    Example:
        Together with :class:`ColwiseParallel`, as there.

        >>> from mylayers.distributed import RowwiseParallel
        >>> RowwiseParallel().output_layouts
        (Replicate(),)
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check_module(self, module)
        if not isinstance(module, MyLinear):
            return super()._apply(module, device_mesh)
        if any(placement.is_partial() for placement in self.output_layouts):
            raise ValueError(
                "RowwiseParallel: output_layouts must be Replicate() or a Shard: MyLinear's bias "
                f"and activation come after the sum; got {self.output_layouts[0]}"
            )
        module = distribute_module(
            module,
            device_mesh,
            partial(_shard_parameters, self, weight=Shard(0), bias=Replicate()),
            partial(self._prepare_input_fn, self.input_layouts, (Shard(-1),)),
            partial(_finish, self.output_layouts, self.use_local_output),  # type: ignore[arg-type]
        )
        module.forward = partial(_product, module)
        return module


def _check_module(style: parallel.ParallelStyle, module: nn.Module) -> None:
    # PyTorch's own check comes later, and its message leaves MyLinear out.
    if not isinstance(module, MyLinear | nn.Linear | nn.Embedding):
        raise TypeError(
            f"{type(style).__name__}: module must be a MyLinear, nn.Linear or nn.Embedding; got "
            f"{type(module).__name__}"
        )


def _shard_parameters(
    style: parallel.ParallelStyle,
    name: str,  # noqa: ARG001  (of the module, from distribute_module)
    module: MyLinear,
    device_mesh: DeviceMesh,
    **placements: Placement,
) -> None:
    if is_lazy(module.weight):
        raise ValueError(
            f"{type(style).__name__}: {type(module).__name__} is uninitialized: its sizes are not "
            "known before the first input, so it cannot be sharded yet"
        )
    for key, parameter in module.named_parameters(recurse=False):
        shard = distribute_tensor(
            parameter, device_mesh, [placements[key]], src_data_rank=style.src_data_rank
        )
        module.register_parameter(key, nn.Parameter(shard, parameter.requires_grad))


def _product(module: nn.Module, input: Tensor) -> Tensor:
    return functional.linear_act(input, module.get_parameter("weight"), activation=None)


def _finish(
    output_layouts: Sequence[Placement],
    use_local_output: bool,
    module: MyLinear,
    partial_output: DTensor,
    device_mesh: DeviceMesh,  # noqa: ARG001  (from distribute_module)
) -> Tensor:
    output: Tensor = partial_output.redistribute(placements=output_layouts)
    if module.bias is not None:
        output = output + module.bias
    if module.activation is not None:
        known = find(module.activation)
        assert known is not None  # MyLinear takes no others
        output = known.formula(output)
    return output.to_local() if use_local_output else output  # type: ignore[attr-defined]


# ---- DTensor's rules -------------------------------------------------------------------
#
# A row has a placement for each result, then for each tensor argument: along one dimension of a
# mesh, arguments so placed give results so placed. DTensor takes the rows that move least.
#
# The public register_sharding knows of no arguments but tensors and integers in its cache's key: it
# took a mask's rows for another's. It also gathers what has fewer rows than there are processes.

_Rows = list[list[Placement | None]]


def _register(op: torch._ops.OpOverload, rows: Callable[[Sequence[Any]], _Rows]) -> None:
    defaults = [argument.default_value for argument in op._schema.arguments]
    results = len(op._schema.returns)

    def strategy(schema: OpSchema) -> OpStrategy:
        # The dispatcher drops arguments that end the list and equal their defaults.
        arguments = [*schema.args_schema, *defaults[len(schema.args_schema) :]]
        missing = {results + i for i, argument in enumerate(arguments) if argument is None}
        return expand_to_full_mesh_op_strategy(
            schema.get_mesh_from_args(),
            schema,
            [[p for i, p in enumerate(row) if i not in missing] for row in rows(arguments)],
            input_index=results,
            allow_uneven_sharding=True,
        )

    # From static_argnum on, what is no tensor is in the cache's key, and so is what is None.
    register_op_strategy(op, RuntimeSchemaInfo(static_argnum=0, needs_pytree=True))(strategy)


def _linear_act_rows(arguments: Sequence[Any]) -> _Rows:
    x, _, bias, activation = arguments
    whole, last = Replicate(), x.ndim - 1
    rows: _Rows = [[whole, whole, whole, whole]]
    rows += [[Shard(d), Shard(d), whole, whole] for d in range(last)]
    rows.append([Shard(last), whole, Shard(1), Shard(0)])
    if bias is None and activation is None:  # neither is right for a part of a sum
        rows.append([Partial(), Shard(last), Shard(0), None])
    return rows


def _linear_act_backward_rows(arguments: Sequence[Any]) -> _Rows:
    grad_output, *_, output_mask = arguments
    whole, part, last = Replicate(), Partial(), grad_output.ndim - 1
    # Gradients of input, weight and bias; grad_output, input, weight, output.
    rows: _Rows = [[whole] * 7]
    rows += [[Shard(d), part, part, Shard(d), Shard(d), whole, Shard(d)] for d in range(last)]
    rows.append([part, Shard(1), Shard(0), Shard(last), whole, Shard(1), Shard(last)])
    rows.append([Shard(last), Shard(0), whole, whole, Shard(last), Shard(0), whole])
    unwanted = {i for i, wanted in enumerate(output_mask) if not wanted}
    return [[None if i in unwanted else p for i, p in enumerate(row)] for row in rows]


_register(torch.ops.mylayers.linear_act.default, _linear_act_rows)
_register(torch.ops.mylayers.linear_act_backward.default, _linear_act_backward_rows)


@torch.library.register_torch_dispatch("mylayers::center", DTensor)  # type: ignore[untyped-decorator]
def _center(
    cls: type,  # noqa: ARG001
    op: torch._ops.OpOverload,
    types: Sequence[type],  # noqa: ARG001
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,  # noqa: ARG001
) -> DTensor:
    """Shards stay where they are: what is summed over the mesh are the sums of those averaged."""
    x, dim = (*args, None)[:2]
    rank = x.dim()
    meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    strides = op(meta, dim).stride()  # and its errors
    dims = tuple({d % max(rank, 1) for d in dim} if dim else range(rank))
    placements = [
        # A mean of parts is a part of the mean, if they are to be added.
        Replicate() if p.is_partial() and p not in (Partial("sum"), Partial("avg")) else p
        for p in x.placements
    ]
    local = x.redistribute(placements=placements).to_local()
    split = [i for i, p in enumerate(placements) if getattr(p, "dim", None) in dims]
    if split:
        # Counted, for x.size is a guess where from_local was given uneven shards alone.
        groups = [x.device_mesh.get_group(mesh_dim).group_name for mesh_dim in split]
        total, count = sync.sum_and_count(local, dims, groups)
        centered = local - (total / count).to(local.dtype)
    else:
        centered = op(local, dim)
    return DTensor.from_local(
        centered, x.device_mesh, placements, run_check=False, shape=x.shape, stride=strides
    )
