"""Data parallelism and centering over processes, in real gloo processes, against one process."""

import copy
import io
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import in_processes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mylayers import CenteredLayer, FusedSequential, MyLinear, functional
from mylayers.distributed import convert_sync_centered

# Steps of rounding apart: sums over a split batch are added in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

# Two and three processes share 9, 8 and 4 rows unevenly, and some get none of the last batch.
BATCHES = (9, 9, 8, 4, 1)


def network() -> nn.Sequential:
    """The same values in every process, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(
        MyLinear(5, 7),
        CenteredLayer(),
        MyLinear(7, 4, activation="tanh"),
        MyLinear(4, 6, bias=False, activation="elu"),
        nn.Linear(6, 3),
    )
    return net.double()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for rows in BATCHES:
        pixels = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
        yield pixels, torch.randint(3, (rows,), generator=generator)


def train(net: nn.Module, share: Callable[[Tensor], Tensor], processes: int) -> None:
    """Each process's loss is that of its samples, so weighted that the average is the batch's."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for pixels, labels in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(share(pixels)), share(labels), reduction="sum")
        (loss * processes / len(labels)).backward()
        optimizer.step()


def train_alone(net: nn.Module) -> nn.Module:
    train(net, lambda batch: batch, 1)
    return net


def train_together(net: nn.Module) -> nn.Module:
    train(net, mine, dist.get_world_size())
    return net


def mine(batch: Tensor) -> Tensor:
    """This process's share."""
    return batch.tensor_split(dist.get_world_size())[dist.get_rank()]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def assert_same_parameters(ours: nn.Module, alone: nn.Module) -> None:
    for a, b in zip(ours.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(a), whole(b), **CLOSE)


def sharded(net: nn.Sequential) -> nn.Sequential:
    """By FSDP2: a unit for each layer that has parameters, and one for the rest."""
    for layer in net:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer)
    return fully_shard(net)


# ---- data parallelism ------------------------------------------------------------------


@pytest.mark.road("DistributedDataParallel")
@in_processes(2, 3)
@pytest.mark.parametrize("views", [False, True])
def test_ddp_trains_to_the_parameters_of_one_process(views: bool) -> None:
    net = DistributedDataParallel(convert_sync_centered(network()), gradient_as_bucket_view=views)
    assert_same_parameters(train_together(net), train_alone(network()))


@pytest.mark.road("FSDP2")
@in_processes(2, 3)
def test_fsdp_trains_to_the_parameters_of_one_process() -> None:
    net = sharded(convert_sync_centered(network()))
    assert isinstance(net[0].weight, DTensor)
    assert_same_parameters(train_together(net), train_alone(network()))


@pytest.mark.road("DistributedDataParallel")
@pytest.mark.road("FSDP2")
@in_processes(2)
def test_fused_networks_train_to_the_parameters_of_one_process() -> None:
    # A mean over processes is left out of the chain, and taken into it without a process group.
    for wrap in (DistributedDataParallel, fully_shard):
        net = FusedSequential(*network())
        net(torch.randn(2, 5, dtype=torch.float64))
        net = wrap(convert_sync_centered(net))
        assert_same_parameters(train_together(net), train_alone(network()))
    plain = [FusedSequential(MyLinear(5, 7), MyLinear(7, 3)).double() for _ in range(2)]
    plain[1].load_state_dict(plain[0].state_dict())
    assert_same_parameters(train_together(fully_shard(plain[0])), train_alone(plain[1]))


@in_processes(2)
def test_without_a_process_group_the_mean_is_of_one_process() -> None:
    net = train_together(DistributedDataParallel(network()))
    with pytest.raises(AssertionError, match="not close"):
        assert_same_parameters(net, train_alone(network()))


@pytest.mark.road("DistributedDataParallel")
@in_processes(2, 3)
def test_ddp_joins_when_a_process_runs_out_of_batches() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = [torch.randn(4, 5, dtype=torch.float64) for _ in range(2 * world)]
    net = nn.Sequential(MyLinear(5, 7), MyLinear(7, 2, activation="sigmoid")).double()
    alone = copy.deepcopy(net)
    ddp = DistributedDataParallel(net)
    ours = torch.optim.SGD(net.parameters(), lr=0.1)
    with Join([ddp]):
        for step in range(rank + 1):
            ours.zero_grad()
            ddp(rows[rank + step]).square().mean().backward()
            ours.step()
    theirs = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(world):
        theirs.zero_grad()
        for other in range(step, world):  # the processes that have this many batches
            (alone(rows[other + step]).square().mean() / world).backward()
        theirs.step()
    assert_same_parameters(net, alone)


@pytest.mark.road("DistributedDataParallel")
@in_processes(2)
@pytest.mark.parametrize("views", [False, True])
def test_gradients_come_in_the_strides_of_their_parameters(views: bool) -> None:
    # DDP warns of strides that differ, and here warnings are errors.
    net = nn.Sequential(MyLinear(5, 7), MyLinear(7, 3, activation=None))
    net[1].weight = nn.Parameter(torch.randn(3, 7).T)
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=views)
    for _ in range(2):
        ddp(torch.randn(4, 5)).sum().backward()
        for parameter in net.parameters():
            assert parameter.grad.stride() == parameter.stride()


@pytest.mark.road("FSDP2")
@in_processes(2, 3)
def test_meta_construction_to_empty_and_reset_parameters_under_fsdp() -> None:
    with torch.device("meta"):
        net = network()
    sharded(convert_sync_centered(net)).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(torch.nan)
    for layer in net:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    start = {name: whole(parameter) for name, parameter in net.named_parameters()}
    assert all(values.isfinite().all() for values in start.values())
    assert start["0.weight"].std() > 0.5
    alone = network()
    alone.load_state_dict(start)
    assert_same_parameters(train_together(net), train_alone(alone))


@pytest.mark.road("FSDP2")
@in_processes(3)
def test_a_checkpoint_saved_by_two_processes_loads_in_three(tmp_path: Path) -> None:
    two = dist.new_group([0, 1])
    trained = network()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(2)
    if dist.get_rank() < 2:
        saved = copy.deepcopy(trained)
        fully_shard(saved, mesh=DeviceMesh.from_group(two, "cpu"))
        dcp.save(get_model_state_dict(saved), checkpoint_id=tmp_path, process_group=two)
    dist.barrier()
    net = sharded(network())
    state = get_model_state_dict(net)
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(net, state)
    for a, b in zip(net.parameters(), trained.parameters(), strict=True):
        assert torch.equal(whole(a), whole(b))


# ---- centering over processes ----------------------------------------------------------


def shards(shape: tuple[int, ...], rows: list[int], dtype: torch.dtype) -> tuple[Tensor, slice]:
    """A whole batch, the same in every process, and the rows of this one."""
    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(sum(rows), *shape, generator=generator, dtype=dtype) + 3
    start = sum(rows[: dist.get_rank()])
    return batch, slice(start, start + rows[dist.get_rank()])


ROWS = {2: [[3, 2], [0, 5], [1, 0], [0, 0]], 3: [[1, 4, 2], [0, 3, 0]]}


@pytest.mark.road("centering over processes")
@in_processes(2, 3)
@pytest.mark.parametrize("dim", [None, 0, (0, -1), -3, 1, (-1,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_centering_is_that_of_one_process(
    dim: int | tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    layer = CenteredLayer(dim, dist.group.WORLD)
    for rows in ROWS[dist.get_world_size()]:
        batch, own = shards((4, 3), rows, dtype)
        weight = torch.randn_like(batch)
        results = []
        for x, w, f in (
            (batch[own], weight[own], layer),
            (batch, weight, lambda x: functional.center(x, dim)),
        ):
            x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
            y = f(x)
            (grad,) = torch.autograd.grad(y, x, w, create_graph=True)
            (second,) = torch.autograd.grad(grad, w, x * 2, create_graph=True)
            (third,) = torch.autograd.grad(second, x, w.detach() * 3)
            results.append([y, grad, second, third])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b[own], **CLOSE)


@in_processes(2)
@pytest.mark.parametrize("dim", [None, 0, (-1,)])
def test_centering_of_a_single_value_in_each_process(dim: int | tuple[int, ...] | None) -> None:
    x = torch.tensor(float(dist.get_rank()), requires_grad=True)
    y = CenteredLayer(dim, dist.group.WORLD)(x)
    (y * y).backward()  # in both processes: y - mean(y), doubled
    assert y.shape == ()
    assert y.item() == x.item() - 0.5
    assert x.grad.item() == 2 * y.item()


@pytest.mark.road("centering over processes")
@in_processes(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_is_summed_wide_and_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    # More values than are summed in one piece, and other numbers of them than come in whole runs.
    unit = torch.finfo(dtype).eps
    for shape, dim in (((), None), ((7, 3), None), ((50,), 0), ((50,), (-1, 0))):
        batch, own = shards(shape, [300_001 // (shape or (1,))[0], 7], dtype)
        mean = batch.double().mean(dim, keepdim=True)
        y = CenteredLayer(dim, dist.group.WORLD)(batch[own])
        # One rounding of the mean, and one of the difference.
        slack = unit / 2 * (mean.abs() + y.double().abs()) * 1.01
        assert ((y.double() - (batch[own].double() - mean)).abs() <= slack).all()


@in_processes(2, 3)
def test_centering_is_over_processes_in_evaluation_too() -> None:
    batch, own = shards((4,), [2] * dist.get_world_size(), torch.float64)
    layer = CenteredLayer(process_group=dist.group.WORLD).eval()
    with torch.inference_mode():
        torch.testing.assert_close(layer(batch[own]), (batch - batch.mean())[own], **CLOSE)


@pytest.mark.road("centering over processes")
@in_processes(2)
def test_centering_takes_one_all_reduce_each_way_and_saves_the_count_alone() -> None:
    all_reduce, saved = torch.ops.c10d_functional.all_reduce, []

    def count(communicated: CommDebugMode) -> int:
        counts = communicated.get_comm_counts()
        assert set(counts) <= {all_reduce}
        return counts[all_reduce]

    batch, own = shards((4,), [3, 2], torch.float32)
    layer = CenteredLayer(process_group=dist.group.WORLD)
    x = batch[own].requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        CommDebugMode() as forward,
    ):
        y = layer(x)
    with CommDebugMode() as backward:
        y.backward(batch[own])
    with CommDebugMode() as kept:
        CenteredLayer(-1, dist.group.WORLD)(x)
    assert [count(forward), count(backward), count(kept)] == [1, 1, 0]
    assert [t.tolist() for t in saved] == [20.0]


@pytest.mark.road("centering over processes")
@in_processes(3)
def test_centering_over_some_of_the_processes() -> None:
    pair = dist.new_group([0, 2])
    batch, _ = shards((4,), [2, 2, 2], torch.float64)
    x = batch[2 * dist.get_rank() :][:2]
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match=r"must contain this process.* than rank 1"):
            CenteredLayer(process_group=pair)
        layer, mean = CenteredLayer(), x.mean()
    else:
        layer = convert_sync_centered(nn.Sequential(CenteredLayer()), pair)
        assert repr(layer[0]) == "CenteredLayer(ranks=[0, 2])"
        mean = torch.cat([batch[:2], batch[4:]]).mean()
    torch.testing.assert_close(layer(x), x - mean, **CLOSE)


@pytest.mark.road("centering over processes")
@in_processes(2)
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.whole)]
)
def test_centering_compiles_into_one_graph(backend: str) -> None:
    layer = CenteredLayer(process_group=dist.group.WORLD)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for rows in ([3, 2], [4, 0], [6, 1]):
        batch, own = shards((4,), rows, torch.float64)
        weight = torch.randn_like(batch)
        x = batch[own].requires_grad_()
        y = compiled(x)
        y.backward(weight[own])
        torch.testing.assert_close(y, (batch - batch.mean())[own], **CLOSE)
        torch.testing.assert_close(x.grad, (weight - weight.mean())[own], **CLOSE)


@pytest.mark.whole
@pytest.mark.road("centering over processes")
@in_processes(2)
def test_centering_compiles_once_for_small_and_large_shards() -> None:
    # 65,536 values and more are summed otherwise where nothing is compiled.
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = CenteredLayer(process_group=dist.group.WORLD)
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for rows in ([300, 200], [20_000, 30_000]):
        batch, own = shards((4,), rows, torch.float32)
        mean = batch.double().mean()
        torch.testing.assert_close(compiled(batch[own]), batch[own] - mean.float())
    assert counter.frame_count == 1


@in_processes(2)
def test_centering_recomputed_by_activation_checkpointing() -> None:
    batch, own = shards((5,), [3, 2], torch.float64)
    nets = [convert_sync_centered(network()), network()]
    for net, x in zip(nets, (batch[own], batch), strict=True):
        checkpoint(net, x, use_reentrant=False).sum().backward()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        dist.all_reduce(a.grad)
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)


@pytest.mark.road("centering over processes")
@in_processes(2)
def test_a_peer_that_never_comes_ends_in_the_groups_timeout() -> None:
    dist.barrier()  # connecting has the same second
    impatient = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    layer = CenteredLayer(process_group=impatient)
    if dist.get_rank() == 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
            layer(torch.randn(3))
        assert time.monotonic() - start < 10


@in_processes(2)
def test_shards_that_do_not_fit_are_refused_in_every_process() -> None:
    x = torch.randn(2, 3 + dist.get_rank())
    message = rf"same sizes in every process, but for dim \[0\]; got \[2, {x.shape[1]}\] here"
    with pytest.raises(RuntimeError, match=message):
        CenteredLayer(0, dist.group.WORLD)(x)
    CenteredLayer(None, dist.group.WORLD)(x)  # a mean of all values has no such need


@in_processes(2)
def test_bad_input_of_centering_over_processes() -> None:
    layer = CenteredLayer(process_group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match=r"must be floating point or complex; got torch.int64"):
        layer(torch.arange(3))
    with pytest.raises(TypeError, match=r"input must be a torch.Tensor; got list"):
        layer([1.0, 2.0])
    mesh = DeviceMesh("cpu", [0, 1])
    with pytest.raises(TypeError, match=r"input is a DTensor.*process_group must be None"):
        layer(DTensor.from_local(torch.randn(2), mesh, [Replicate()]))
    with pytest.raises(IndexError, match=r"dim must be in \[-1, 0\] for a 1-D input; got 1"):
        CenteredLayer((0, 1), dist.group.WORLD)(torch.randn(3))


@in_processes(2)
def test_a_layer_with_a_process_group_copies_pickles_and_keeps_its_state() -> None:
    batch, own = shards((4,), [3, 2], torch.float64)
    net = convert_sync_centered(nn.Sequential(MyLinear(4, 2), CenteredLayer()).double())
    assert repr(net[1]) == "CenteredLayer(ranks=[0, 1])"
    assert list(net.state_dict()) == ["0.weight", "0.bias"]
    assert net[1].process_group is dist.group.WORLD
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(file, weights_only=False),
    )
    for other in copies:
        assert other[1].process_group is dist.group.WORLD
        assert torch.equal(other(batch[own]), net(batch[own]))
    net[1].process_group = None
    assert repr(net[1]) == "CenteredLayer()"
    assert copies[0][1].process_group is dist.group.WORLD
    # A group that is gone, and another that has its name.
    layer = CenteredLayer(process_group=dist.new_group([0, 1]))
    dist.barrier()  # new_group may return while the other process still connects to this one
    dist.destroy_process_group(layer.process_group)
    for lost in (layer, _renamed(copies[0][1], (0, 1, 2))):
        with pytest.raises(RuntimeError, match=r"of ranks \[0, 1.*\] does not exist in this"):
            lost(batch[own])


def _renamed(layer: CenteredLayer, ranks: tuple[int, ...]) -> CenteredLayer:
    layer._group = layer._group._replace(ranks=ranks)
    return layer


def test_process_groups_that_are_none() -> None:
    for wrong in ("gloo", 0, dist.group):
        with pytest.raises(TypeError, match=r"must be a torch.distributed.ProcessGroup or None"):
            CenteredLayer(process_group=wrong)
    with pytest.raises(RuntimeError, match=r"torch.distributed is not initialised"):
        convert_sync_centered(nn.Sequential(CenteredLayer()))
    with pytest.raises(TypeError, match=r"model must be an nn.Module; got list"):
        convert_sync_centered([CenteredLayer()])


def test_a_layer_unpickled_where_there_is_no_process_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = CenteredLayer(process_group=dist.group.WORLD)
        x = torch.randn(4, dtype=torch.float64)
        torch.testing.assert_close(layer(x), x - x.mean(), **CLOSE)
    finally:
        dist.destroy_process_group()
    layer = pickle.loads(pickle.dumps(layer))
    assert repr(layer) == "CenteredLayer(ranks=[0])"
    for use in (lambda: layer(x), lambda: layer.process_group):
        with pytest.raises(RuntimeError, match=r"not\s+initialised.*set process_group = None"):
            use()
    layer.process_group = None
    torch.testing.assert_close(layer(x), x - x.mean(), **CLOSE)


# ---- the example -----------------------------------------------------------------------

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "train_distributed.py"


def run_example(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80"}
    environment.pop("RANK", None)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.mark.parametrize(
    "fsdp",
    [pytest.param([], id="ddp"), pytest.param(["--fsdp"], id="fsdp", marks=pytest.mark.whole)],
)
def test_the_example_gets_the_result_of_one_process(fsdp: list[str]) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_example(*torchrun, str(EXAMPLE), "--epochs", "1", *fsdp)
    assert done.returncode == 0, done.stdout + done.stderr
    # Once each: nothing but process 0 reports.
    assert done.stdout.count("training in 2 processes") == 1
    assert done.stdout.count("Largest difference from one process") == 1
    assert ("FSDPMyLinear" if fsdp else "DistributedDataParallel") in done.stdout


def test_the_example_started_without_torchrun_says_how_to_start_it() -> None:
    done = run_example(str(EXAMPLE))
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2" in done.stderr
