"""Our operators on ``DTensor``, and tensor parallelism, in real gloo processes."""

import copy
import itertools
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from samples import ACTIVATIONS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from mylayers import CenteredLayer, FusedSequential, LazyMyLinear, MyLinear, functional, reference
from mylayers.distributed import ColwiseParallel, RowwiseParallel

CLOSE = {"rtol": 1e-12, "atol": 1e-12}

Placements = tuple[Placement, ...]


def line() -> DeviceMesh:
    """All processes in one dimension."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def placed(tensor: Tensor, mesh: DeviceMesh, placements: Placements) -> DTensor:
    """A leaf with a tensor's values; where partial, these are the sum of different parts."""
    if any(p.is_partial() for p in placements):
        whole = [Replicate() if p.is_partial() else p for p in placements]
        local = distribute_tensor(tensor, mesh, whole).to_local()
        for i, p in enumerate(placements):
            if p.is_partial():
                size = mesh.size(i)
                local = local * (2 * (mesh.get_local_rank(i) + 1) / (size * (size + 1)))
        result = DTensor.from_local(
            local, mesh, placements, shape=tensor.shape, stride=tensor.stride()
        )
    else:
        result = distribute_tensor(tensor, mesh, placements)
    return result.detach().requires_grad_()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def check_linear_act(
    mesh: DeviceMesh,
    shapes: tuple[tuple[int, ...], int, int],
    activation: str | None,
    placements: tuple[Placements, Placements, Placements | None],
) -> DTensor:
    """Output and gradients are the unsharded ones; returns the output."""
    lead, in_units, units = shapes
    whole = [draw(*lead, in_units), draw(in_units, units), draw(units)]
    tensors = [placed(t, mesh, p) for t, p in zip(whole, placements, strict=True) if p is not None]
    expected = [t.requires_grad_() for t, p in zip(whole, placements, strict=True) if p]
    output = functional.linear_act(*tensors, activation=activation)
    want = reference.linear_act(*expected, activation=activation)
    assert isinstance(output, DTensor)
    torch.testing.assert_close(output.full_tensor(), want, **CLOSE)
    grad = draw(*want.shape)
    output.backward(distribute_tensor(grad, mesh, [Replicate()] * mesh.ndim))
    want.backward(grad)
    for ours, theirs in zip(tensors, expected, strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, **CLOSE)
    return output


# Even shards, uneven ones, and fewer units than processes; inputs of one, two and three dimensions.
PRODUCTS = [((5,), 7, 3), ((8,), 4, 8), ((2, 3), 5, 6), ((), 6, 5)]


@pytest.mark.road("DTensor")
@in_processes(2, 4)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_act_is_the_unsharded_one(activation: str | None) -> None:
    mesh = line()
    # Where to place what does not depend on which activation it is.
    for shapes in PRODUCTS if activation in (None, "relu") else PRODUCTS[:1]:
        for of_input, of_weight in itertools.product(
            (Replicate(), Partial(), *map(Shard, range(len(shapes[0]) + 1))),
            (Replicate(), Shard(0), Shard(1)),
        ):
            of_bias = Shard(0) if of_weight == Shard(1) else Replicate()
            with_bias = shapes is not PRODUCTS[1]
            placements = (of_input,), (of_weight,), (of_bias,) if with_bias else None
            check_linear_act(mesh, shapes, activation, placements)


@pytest.mark.road("DTensor")
@in_processes(4)
def test_linear_act_is_the_unsharded_one_on_a_mesh_of_two_dimensions() -> None:
    mesh, whole = square(), Replicate()
    for activation, of_input, of_weight in itertools.product(
        (None, "tanh"),
        itertools.product((whole, Shard(0)), (whole, Shard(0), Shard(1))),
        itertools.product((whole, Shard(0)), (whole, Shard(0), Shard(1))),
    ):
        of_bias = (whole, Shard(0)) if activation else None
        check_linear_act(mesh, ((5,), 7, 6), activation, (of_input, of_weight, of_bias))


@in_processes(2, 4)
def test_batch_and_column_shards_stay_where_they_are() -> None:
    replicated, rows, columns = (Replicate(),), (Shard(0),), (Shard(1),)
    for shapes in PRODUCTS[:2]:
        for placements, output in (
            ((rows, replicated, replicated), rows),
            ((replicated, columns, rows), columns),
        ):
            tensors = [
                placed(draw(*shape), line(), placement)
                for shape, placement in zip(
                    ((*shapes[0], shapes[1]), shapes[1:], shapes[2:]), placements, strict=True
                )
            ]
            with CommDebugMode() as communicated:
                result = functional.linear_act(*tensors)
                result.backward(result.detach())
            assert result.placements == output
            assert communicated.get_total_counts() == 0


@pytest.mark.road("DTensor")
@in_processes(2, 4)
def test_a_partial_sum_passes_no_activation_and_no_bias() -> None:
    # One call after another, with shards alike: the rule for one must not be kept for the next.
    row_wise = (Shard(1),), (Shard(0),)
    for activation in (None, "relu", None, "tanh", None):
        for bias in (None, (Replicate(),)):
            output = check_linear_act(line(), ((4,), 8, 4), activation, (*row_wise, bias))
            is_partial = output.placements[0].is_partial()
            assert is_partial == (activation is None and bias is None)


@pytest.mark.road("DTensor")
@in_processes(2)
def test_the_gradients_asked_for_are_a_part_of_the_rule() -> None:
    # Alike in shape and shards, so that nothing but the mask and the Nones tells them apart.
    mesh = line()
    backward = torch.ops.mylayers.linear_act_backward
    grad, x, weight = (placed(draw(4, 4), mesh, (Shard(0),)).detach() for _ in range(3))
    g, whole_x, w = (t.full_tensor() for t in (grad, x, weight))
    for mask in itertools.product((False, True), repeat=3):
        gradients = backward(
            grad, x if mask[1] else None, weight if mask[0] else None, None, None, mask
        )
        for wanted, ours, theirs in zip(
            mask, gradients, (g @ w.T, whole_x.T @ g, g.sum(0)), strict=True
        ):
            if wanted:
                torch.testing.assert_close(ours.full_tensor(), theirs, **CLOSE)
            else:
                assert ours is None


# For each shape, what to average over, and the dimensions that it names.
MEANS: dict[tuple[int, ...], list[tuple[Any, set[int]]]] = {
    (8,): [(None, {0}), (0, {0})],
    (5, 3): [(None, {0, 1}), (0, {0}), (1, {1}), ((0, -1), {0, 1})],
    (3, 4, 5): [(None, {0, 1, 2}), (0, {0}), (-1, {2}), ([1, 2], {1, 2}), ((0, 2), {0, 2})],
}


def check_center(mesh: DeviceMesh, shapes: Iterable[tuple[int, ...]]) -> None:
    for shape in shapes:
        one = (Replicate(), Partial("sum"), Partial("avg"), *map(Shard, range(len(shape))))
        for placements in itertools.product(one, repeat=mesh.ndim):
            if len({p for p in placements if p.is_partial()}) > 1:
                continue
            # In turns over dim, with all else alike: what is right for one is not for the next.
            for dim, averaged in MEANS[shape]:
                x = placed(draw(*shape), mesh, placements)
                whole = x.full_tensor().detach().requires_grad_()
                with CommDebugMode() as communicated:
                    y = functional.center(x, dim)
                split = sum(p.is_shard() and p.dim in averaged for p in placements)
                assert communicated.get_total_counts() == split
                assert y.placements == placements
                want = reference.center(whole, dim)
                assert y.stride() == want.stride()
                torch.testing.assert_close(y.full_tensor(), want, **CLOSE)
                grad = draw(*shape)
                y.backward(distribute_tensor(grad, mesh, [Replicate()] * mesh.ndim))
                want.backward(grad)
                torch.testing.assert_close(x.grad.full_tensor(), whole.grad, **CLOSE)


@pytest.mark.road("DTensor")
@in_processes(2, 4)
def test_center_is_the_unsharded_one() -> None:
    check_center(line(), MEANS)


@pytest.mark.road("DTensor")
@in_processes(4)
def test_center_is_the_unsharded_one_on_a_mesh_of_two_dimensions() -> None:
    check_center(square(), [(5, 3)])


@in_processes(2)
def test_center_of_what_is_reduced_otherwise_than_by_adding() -> None:
    x = DTensor.from_local(draw(4), line(), [Partial("max")])
    whole = x.full_tensor()
    torch.testing.assert_close(functional.center(x).full_tensor(), whole - whole.mean(), **CLOSE)


@in_processes(2)
def test_center_of_shards_sums_wide_and_rounds_the_mean_once() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        whole = draw(5, 3).to(dtype)
        y = functional.center(distribute_tensor(whole, line(), [Shard(0)]))
        assert torch.equal(y.full_tensor(), whole - whole.double().mean().to(dtype))


@in_processes(2, 4)
def test_center_counts_the_values_of_uneven_shards_whose_common_size_is_not_given() -> None:
    shards = [draw(rows + 1, 3) for rows in range(dist.get_world_size())]
    whole = torch.cat(shards)
    own = shards[dist.get_rank()]
    # Without shape=, from_local takes the other processes' shards for as large as its own.
    x = DTensor.from_local(own.clone(), line(), [Shard(0)]).requires_grad_()
    for dim in (None, 0):
        y = functional.center(x, dim).to_local()
        mean = whole.mean() if dim is None else whole.mean(dim)
        torch.testing.assert_close(y, own - mean, **CLOSE)
        (grad,) = torch.autograd.grad(y, x, own)
        torch.testing.assert_close(grad.to_local(), own - mean, **CLOSE)


@in_processes(2)
def test_center_of_complex_shards() -> None:
    whole = torch.complex(draw(5, 3), draw(5, 3))
    y = functional.center(distribute_tensor(whole, line(), [Shard(0)]))
    torch.testing.assert_close(y.full_tensor(), whole - whole.mean(), **CLOSE)


@in_processes(2)
def test_bad_input_on_dtensors_is_named_as_on_tensors() -> None:
    mesh = line()
    x = distribute_tensor(draw(4, 6), mesh, [Shard(0)])
    with pytest.raises(
        IndexError, match=r"center: dim must be in \[-2, 1\] for a 2-D input; got 2"
    ):
        functional.center(x, 2)
    with pytest.raises(RuntimeError, match=r"center: dim must name each dimension once"):
        functional.center(x, (0, 0))
    with pytest.raises(RuntimeError, match=r"(?i)integer|floating"):
        functional.center(distribute_tensor(torch.arange(4), mesh, [Shard(0)]))
    weight = distribute_tensor(draw(5, 3), mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match=r"in_units = 6 to match input \[4, 6\]; got weight"):
        functional.linear_act(x, weight)
    with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
        functional.linear_act(x, draw(6, 3))


# ---- tensor parallelism ----------------------------------------------------------------


def network(
    activation: str | None, sizes: tuple[int, int, int], bias: bool = True
) -> nn.Sequential:
    torch.manual_seed(1)
    first, hidden, last = sizes
    return nn.Sequential(
        MyLinear(first, hidden, bias, activation), MyLinear(hidden, last, bias, activation)
    ).double()


def assert_trains_like(ours: nn.Module, alone: nn.Module, x: Tensor, share: slice) -> None:
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (ours, alone)]
    for _ in range(2):
        for net, batch, optimizer in zip((ours, alone), (x[share], x), optimizers, strict=True):
            optimizer.zero_grad()
            y = net(batch)
            if isinstance(y, DTensor):
                y = y.full_tensor()
            (y.square().sum() * len(x) / len(batch)).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.full_tensor(), b, **CLOSE)


@pytest.mark.road("tensor parallelism")
@in_processes(2, 4)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_column_and_row_styles_train_to_the_parameters_of_one_process(
    activation: str | None,
) -> None:
    for sizes, bias in (((3, 8, 5), True), ((3, 8, 5), False), ((5, 7, 3), True)):
        alone = network(activation, sizes, bias)
        even = sizes[1] % dist.get_world_size() == 0
        plan = {"0": ColwiseParallel(use_local_output=even), "1": RowwiseParallel()}
        net = parallelize_module(copy.deepcopy(alone), line(), plan)
        assert [p.placements for p in net.parameters()] == [
            *[(Shard(1),), (Shard(0),)][: bias + 1],
            *[(Shard(0),), (Replicate(),)][: bias + 1],
        ]
        assert_trains_like(net, alone, draw(4, sizes[0]), slice(None))


@in_processes(2)
def test_styles_move_one_sum_forward_and_one_backward() -> None:
    reduce_scatter = torch.ops.c10d_functional.reduce_scatter_tensor
    all_reduce = torch.ops.c10d_functional.all_reduce
    for layout, forward in ((Replicate(), all_reduce), (Shard(0), reduce_scatter)):
        net = network("relu", (3, 8, 4))
        alone = copy.deepcopy(net)
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel(output_layouts=layout)}
        net = parallelize_module(net, line(), plan)
        x = draw(4, 3)
        with CommDebugMode() as communicated:
            y = net(x)
        assert dict(communicated.get_comm_counts()) == {forward: 1}
        want = alone(x)
        if layout.is_shard():
            want = want.chunk(2)[dist.get_rank()]
        torch.testing.assert_close(y, want, **CLOSE)


@in_processes(2)
def test_styles_take_stock_modules_too_and_shard_what_they_are_given() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5), MyLinear(5, 4)).double()
    alone = copy.deepcopy(net)
    styles = {"0": ColwiseParallel(), "2": RowwiseParallel(), "3": ColwiseParallel()}
    styles["3"] = ColwiseParallel(output_layouts=Replicate())
    net = parallelize_module(net, line(), styles)
    x = draw(4, 3)
    torch.testing.assert_close(net(x), alone(x), **CLOSE)
    frozen = MyLinear(4, 2).double()
    frozen.weight.requires_grad_(False)
    frozen = parallelize_module(frozen, line(), RowwiseParallel())
    assert [p.requires_grad for p in frozen.parameters()] == [False, True]
    twin = copy.deepcopy(frozen)
    x = draw(4, 2)  # this process's half of four inputs
    assert torch.equal(twin(x), frozen(x))


@in_processes(2)
def test_a_fused_network_of_dtensors_runs_its_layers() -> None:
    alone = FusedSequential(MyLinear(3, 8), CenteredLayer(), MyLinear(8, 4)).double()
    plan = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
    styled = parallelize_module(copy.deepcopy(alone), line(), plan)
    placed_by_hand = distribute_module(copy.deepcopy(alone), line())
    x = draw(5, 3)
    alone(x).sum().backward()
    for net in (styled, placed_by_hand):
        y = net(distribute_tensor(x, line(), [Replicate()]))
        torch.testing.assert_close(
            y.full_tensor() if isinstance(y, DTensor) else y, alone(x), **CLOSE
        )
        y.sum().backward()
        for a, b in zip(net.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, **CLOSE)


@in_processes(2)
def test_bad_use_of_styles() -> None:
    with pytest.raises(
        ValueError, match=r"output_layouts must be Replicate\(\) or a Shard.* got P"
    ):
        parallelize_module(MyLinear(4, 2), line(), RowwiseParallel(output_layouts=Partial()))
    with pytest.raises(ValueError, match="ColwiseParallel: LazyMyLinear is uninitialized"):
        parallelize_module(LazyMyLinear(2), line(), ColwiseParallel())
    for style in (ColwiseParallel(), RowwiseParallel()):
        named = rf"{type(style).__name__}: module must be a MyLinear.*got CenteredLayer"
        with pytest.raises(TypeError, match=named):
            parallelize_module(CenteredLayer(), line(), style)


@pytest.mark.road("tensor parallelism")
@in_processes(4)
def test_tensor_and_data_parallelism_together() -> None:
    mesh = square()
    alone = network("tanh", (3, 8, 5))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    net = parallelize_module(copy.deepcopy(alone), mesh["tensor"], plan)
    for layer in net:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(net, mesh=mesh["data"])
    rank = mesh["data"].get_local_rank()
    with warnings.catch_warnings():
        # That a style's local output is a view, as PyTorch's own styles' are.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        assert_trains_like(net, alone, draw(6, 3), slice(3 * rank, 3 * rank + 3))


@pytest.mark.road("tensor parallelism")
@in_processes(2)
def test_a_tensor_parallel_network_compiles_into_one_graph() -> None:
    alone = network("sigmoid", (3, 8, 4))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    net = parallelize_module(copy.deepcopy(alone), line(), plan)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = draw(4, 3)
    y, want = compiled(x), alone(x)
    torch.testing.assert_close(y, want, **CLOSE)
    y.sum().backward()
    want.sum().backward()
    for a, b in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad, **CLOSE)


@in_processes(2)
def test_center_of_shards_compiles_into_one_graph() -> None:
    compiled = torch.compile(CenteredLayer(), fullgraph=True, backend="aot_eager")
    whole = draw(5, 3)
    x = distribute_tensor(whole, line(), [Shard(0)]).requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y.full_tensor(), whole - whole.mean(), **CLOSE)
    y.sum().backward()
    torch.testing.assert_close(x.grad.full_tensor(), torch.zeros(5, 3).double(), **CLOSE)
