"""``training_step`` against the lines that it stands for, to the bit."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import num_threads, same_bits
from soak import allowed, growth
from test_optimizers import OPTIONS, every_optimizer, same_numbers
from test_training import CRITERIA, graphs, last_layers, target_for
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)
from torch.optim import SGD, Adam, Optimizer, lr_scheduler

import mylayers
from mylayers import _C, FusedSequential, MyLinear, training_step


def plain_lines(
    network: nn.Module,
    criterion: Callable[..., Tensor],
    optimizer: Optimizer,
    x: Tensor,
    target: Tensor,
    *,
    max_norm: float | None = None,
) -> Tensor:
    optimizer.zero_grad()
    loss = criterion(network(x), target)
    loss.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    optimizer.step()
    return loss.detach()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the extension answered each step last."""
    given: list[str] = []
    entry = _C.training_step

    def watched(*arguments: Any) -> Any:
        answer = entry(*arguments)
        if answer is not None:
            kind = {Tensor: "done", tuple: "all but the step"}.get(type(answer), "refused")
            given.append(kind)
        return answer

    monkeypatch.setattr(_C, "training_step", watched)
    return given


def made(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = (5, 7, 6, 3)) -> nn.Module:
    torch.manual_seed(sum(sizes))
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, dtype=dtype), nn.Tanh()]
    return FusedSequential(*layers[:-1])


class Run:
    """A network, its optimiser and what trains it."""

    def __init__(self, network: nn.Module, name: str, **options: Any) -> None:
        cls, known = OPTIONS[name]
        self.network = network
        self.optimizer = cls(network.parameters(), **{**known, **options})

    def tensors(self) -> list[tuple[str, Tensor | None]]:
        found: list[tuple[str, Tensor | None]] = []
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                found += [("parameter", p), ("gradient", p.grad)]
                found += [(key, v) for key, v in self.optimizer.state.get(p, {}).items()]
        return found


def runs(name: str, network: nn.Module | None = None, **options: Any) -> tuple[Run, Run]:
    network = network or made()
    ours, theirs = (Run(copy.deepcopy(network), name, **options) for _ in range(2))
    return ours, theirs


def assert_same(ours: Run, theirs: Run, same: Callable[[Tensor, Tensor], bool] = same_bits) -> None:
    for (key, a), (other, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert key == other
        assert (a is None) == (b is None), key
        if a is not None:
            assert same(a, b), key
            assert a.stride() == b.stride()
            assert a._version == b._version, key
            assert a.requires_grad == b.requires_grad


def batch(
    number: int,
    criterion: Callable[..., Tensor] = F.mse_loss,
    rows: int = 4,
    dtype: torch.dtype = torch.float32,
    columns: tuple[int, int] = (5, 3),
) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(number)
    x, target = (torch.randn(rows, n, generator=draw, dtype=dtype) for n in columns)
    return x, target_for(criterion, target)


# ---- in one call -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@every_optimizer
def test_two_hundred_steps_have_the_bits_of_the_plain_lines(name, dtype, answers):
    ours, theirs = runs(name, made(dtype))
    criterion = nn.MSELoss()
    for number in range(200):
        given = batch(number, dtype=dtype)
        with graphs() as nodes:
            loss = training_step(ours.network, criterion, ours.optimizer, *given)
        assert same_bits(loss, plain_lines(theirs.network, criterion, theirs.optimizer, *given))
        assert not loss.requires_grad
        assert not nodes or number == 0
        if number % 50 == 49:
            assert_same(ours, theirs)
    # The first step is PyTorch's where it makes the state.
    assert answers.count("done") >= 199
    assert "refused" not in answers[1:]


@pytest.mark.grid
@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
@pytest.mark.parametrize("rows", [1, 33])
def test_every_loss_and_any_rows(criterion, rows, answers):
    ours, theirs = runs("Adam", FusedSequential(*made(), *last_layers(criterion)))
    for number in range(5):
        given = batch(number, criterion, rows)
        loss = training_step(ours.network, criterion, ours.optimizer, *given)
        assert same_bits(loss, plain_lines(theirs.network, criterion, theirs.optimizer, *given))
    assert answers.count("done") == 4
    assert_same(ours, theirs)


@pytest.mark.grid
@pytest.mark.parametrize("cls", [nn.MSELoss, nn.L1Loss])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 15, 33, 64, 100, 513, 1365, 1366, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_losses_of_few_and_many_values(count, reduction, dtype, cls):
    criterion = cls(reduction=reduction)
    ours, theirs = runs("SGD", made(dtype, (5, 3)))
    for number in range(2):
        x, target = batch(number, rows=count, dtype=dtype)
        with torch.no_grad():  # some differences are none
            given = x, torch.where(target < 0, ours.network(x), target)
        loss = training_step(ours.network, criterion, ours.optimizer, *given)
        assert same_bits(loss, plain_lines(theirs.network, criterion, theirs.optimizer, *given))
    assert_same(ours, theirs)


@pytest.mark.parametrize("threads", [1, 2])
def test_large_networks_on_any_number_of_threads(threads):
    ours, theirs = runs("Adam, all", made(sizes=(65, 300, 257, 3)))
    for number in range(3):
        given = batch(number, rows=70, columns=(65, 3))
        with num_threads(threads):
            training_step(ours.network, F.mse_loss, ours.optimizer, *given)
            plain_lines(theirs.network, F.mse_loss, theirs.optimizer, *given)
    assert_same(ours, theirs)


def test_own_layers_and_an_optimized_optimizer(answers):
    network = nn.Sequential(MyLinear(5, 4), nn.Flatten(), MyLinear(4, 3, activation=None))
    ours, theirs = runs("SGD, momentum", network)
    assert all(f.fused for f in mylayers.optimize(ours.network, ours.optimizer).findings)
    for number in range(6):
        training_step(ours.network, F.mse_loss, ours.optimizer, *batch(number))
        plain_lines(theirs.network, F.mse_loss, theirs.optimizer, *batch(number))
    assert answers[-4:] == ["done"] * 4
    assert_same(ours, theirs)


def test_gradients_that_are_kept_stay_what_they_were():
    ours, theirs = runs("SGD")
    kept = []
    for run, function in ((ours, training_step), (theirs, plain_lines)):
        function(run.network, F.mse_loss, run.optimizer, *batch(0))
        held = [p.grad for p in run.network.parameters()]
        function(run.network, F.mse_loss, run.optimizer, *batch(1))
        assert not any(p.grad is g for p, g in zip(run.network.parameters(), held, strict=True))
        kept.append(held)
    assert all(map(same_bits, *kept))
    assert_same(ours, theirs)


# ---- to and fro ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@every_optimizer
def test_any_way_at_any_step(name, seed):
    """One call, the plain lines, optimized and not, a checkpoint: drawn anew at each step."""
    draw = torch.Generator().manual_seed(seed)
    network = made()
    network[0].weight.requires_grad_(False)
    ours, theirs = runs(name, network)
    for run in (ours, theirs):
        run.optimizer.add_param_group(
            {"params": [torch.ones(3).requires_grad_()], "lr": 0.02, "weight_decay": 0.1}
        )
    schedulers = [lr_scheduler.ExponentialLR(run.optimizer, 0.98) for run in (ours, theirs)]
    for number in range(60):
        way = int(torch.randint(6, (), generator=draw))
        if way == 0:
            mylayers.optimize(nn.ReLU(), ours.optimizer)
        elif way == 1:
            mylayers.restore(nn.ReLU(), ours.optimizer)
        elif way == 2:
            for run in (ours, theirs):
                run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        max_norm = 0.1 if number % 7 == 3 else None
        function = plain_lines if way == 3 else training_step
        given = batch(number)
        loss = function(ours.network, F.mse_loss, ours.optimizer, *given, max_norm=max_norm)
        assert same_bits(
            loss,
            plain_lines(theirs.network, F.mse_loss, theirs.optimizer, *given, max_norm=max_norm),
        )
        for scheduler in schedulers:
            scheduler.step()
        if number == 30:
            for run in (ours, theirs):
                run.network[0].weight.requires_grad_(True)
    for (key, a), (_, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or same_bits(a, b), key


@pytest.mark.parametrize("kind", ["before", "after"])
def test_a_scheduler_sees_the_steps(kind, answers, recwarn):
    ours, theirs = runs("Adam")
    if kind == "after":
        training_step(ours.network, F.mse_loss, ours.optimizer, *batch(0))
        plain_lines(theirs.network, F.mse_loss, theirs.optimizer, *batch(0))
    schedulers = [lr_scheduler.StepLR(run.optimizer, 3) for run in (ours, theirs)]
    for number in range(1, 12):
        training_step(ours.network, F.mse_loss, ours.optimizer, *batch(number))
        plain_lines(theirs.network, F.mse_loss, theirs.optimizer, *batch(number))
        for scheduler in schedulers:
            scheduler.step()
    assert answers[-9:] == ["done"] * 9
    assert_same(ours, theirs)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_no_numbers():
    ours, theirs = runs("Adam, all")
    for number in range(8):
        x, target = batch(number)
        if number == 3:
            target[0, 0] = math.nan
        if number == 1:
            x[1, 1] = math.inf
        training_step(ours.network, F.mse_loss, ours.optimizer, x, target)
        plain_lines(theirs.network, F.mse_loss, theirs.optimizer, x, target)
    assert_same(ours, theirs, same_numbers)


# ---- the plain lines -------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = FusedSequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.body(x))


def _shared() -> nn.Module:
    layer = nn.Linear(5, 5)
    return FusedSequential(layer, nn.Tanh(), layer, nn.Linear(5, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "no container": Residual,
    "a layer without a kernel": lambda: FusedSequential(nn.Linear(5, 3), nn.Softplus(beta=2)),
    "stock": lambda: nn.Sequential(nn.Linear(5, 3), nn.Tanh()),
    "a shared layer": _shared,
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW, all"])
def test_any_network(network, name):
    torch.manual_seed(0)
    ours, theirs = runs(name, NETWORKS[network]())
    for number in range(8):
        max_norm = 0.5 if number % 2 else None
        losses = [
            function(run.network, F.mse_loss, run.optimizer, *batch(number), max_norm=max_norm)
            for run, function in ((ours, training_step), (theirs, plain_lines))
        ]
        assert same_bits(*losses)
    assert_same(ours, theirs)


ANY_LOSS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a user's own": lambda y, t: ((y - t).abs() ** 1.5).mean(),
    "own reduction": lambda y, t: F.mse_loss(y, t, reduction="none")[1:].sum(),
    "weighted": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0])),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "BCE with logits": lambda y, t: F.binary_cross_entropy_with_logits(y, t.sigmoid()),
    "L1": nn.L1Loss(),
    "KL": lambda y, t: F.kl_div(y.log_softmax(1), t.softmax(1), reduction="batchmean"),
    "in place": lambda y, t: y.mul_(2).sub_(t).square().mean(),
}


@pytest.mark.parametrize("criterion", ANY_LOSS)
def test_any_loss(criterion):
    function = ANY_LOSS[criterion]
    ours, theirs = runs("Adam")
    for number in range(5):
        given = batch(number, function)
        loss = training_step(ours.network, function, ours.optimizer, *given)
        assert same_bits(loss, plain_lines(theirs.network, function, theirs.optimizer, *given))
    assert_same(ours, theirs)


@pytest.mark.parametrize("what", ["optimizer", "parameter", "module"])
def test_hooks_are_called(what):
    ours, theirs = runs("Adam")
    calls: list[list[str]] = []
    for run, function in ((ours, training_step), (theirs, plain_lines)):
        seen: list[str] = []
        function(run.network, F.mse_loss, run.optimizer, *batch(0))
        if what == "optimizer":
            run.optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("step"))
        elif what == "parameter":
            next(run.network.parameters()).register_hook(lambda _, seen=seen: seen.append("grad"))
        else:
            run.network[1].register_forward_hook(lambda *_, seen=seen: seen.append("module"))
        for number in range(1, 4):
            function(run.network, F.mse_loss, run.optimizer, *batch(number))
        calls.append(seen)
    assert len(calls[0]) == 3
    assert calls[0] == calls[1]
    assert_same(ours, theirs)


@pytest.mark.parametrize("method", ["step", "zero_grad"])
def test_a_method_of_the_instance_is_called(method):
    ours, theirs = runs("SGD")
    calls: list[str] = []
    was = getattr(ours.optimizer, method)
    setattr(ours.optimizer, method, lambda *args: (calls.append(method), was(*args))[1])
    for number in range(3):
        training_step(ours.network, F.mse_loss, ours.optimizer, *batch(number))
        plain_lines(theirs.network, F.mse_loss, theirs.optimizer, *batch(number))
    assert calls == [method] * 3
    assert_same(ours, theirs)


class _Doubled(SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


def test_an_optimizer_of_another_class():
    networks = [made(), made()]
    optimizers = [_Doubled(network.parameters(), lr=0.1) for network in networks]
    for number in range(3):
        training_step(networks[0], F.mse_loss, optimizers[0], *batch(number))
        plain_lines(networks[1], F.mse_loss, optimizers[1], *batch(number))
    assert all(map(same_bits, networks[0].parameters(), networks[1].parameters()))


def test_without_gradients_it_fails_as_the_plain_lines_do():
    ours, theirs = runs("SGD")
    for run, function in ((ours, training_step), (theirs, plain_lines)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
            function(run.network, F.mse_loss, run.optimizer, *batch(0))
    assert_same(ours, theirs)


def test_a_step_that_fails_leaves_what_the_plain_lines_leave():
    ours, theirs = runs("Adam")
    for run, function in ((ours, training_step), (theirs, plain_lines)):
        for number in range(2):
            function(run.network, F.mse_loss, run.optimizer, *batch(number))
        with pytest.raises(RuntimeError):
            function(run.network, F.mse_loss, run.optimizer, torch.ones(2, 4), torch.ones(2, 3))
        del run.optimizer.state[run.network[0].weight]["exp_avg"]
        with pytest.raises(KeyError):
            function(run.network, F.mse_loss, run.optimizer, *batch(3))
    assert_same(ours, theirs)


def test_bad_arguments():
    network, given = made(), batch(0)
    with pytest.raises(TypeError, match=r"training_step: optimizer must be .* got Linear"):
        training_step(network, F.mse_loss, nn.Linear(1, 1), *given)  # type: ignore[arg-type]
    optimizer = Adam(network.parameters())
    with pytest.raises(TypeError, match="training_step: max_norm must be a number or None"):
        training_step(network, F.mse_loss, optimizer, *given, max_norm="1")  # type: ignore[arg-type]
    assert all(p.grad is None for p in network.parameters())


# Dynamo reads .grad of a tensor that is no leaf, and would hand on its own warning as an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_as_a_whole():
    ours, theirs = runs("Adam")
    compiled = torch.compile(
        lambda *given: training_step(ours.network, F.mse_loss, ours.optimizer, *given),
        backend="eager",
    )
    for number in range(3):
        compiled(*batch(number))
        plain_lines(theirs.network, F.mse_loss, theirs.optimizer, *batch(number))
    for (_, a), (_, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(a, b)


def test_memory_is_flat_over_many_steps():
    run = Run(made(), "Adam")
    x, target = batch(0)
    criterion = nn.MSELoss()
    calls = 20_000
    more = growth(lambda: training_step(run.network, criterion, run.optimizer, x, target), calls)
    assert more <= allowed(calls)
