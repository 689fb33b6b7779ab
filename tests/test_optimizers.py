"""``step`` and ``zero_grad`` of optimisers that ``optimize`` was given, against the stock ones.

Two runs have the same parameters and gradients, one of them an optimiser of the stock class. Which
steps were made in one call is seen at the extension's entries.
"""

import copy
import gc
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from samples import num_threads, same_bits
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

import mylayers
from mylayers import _C, optimizers

Make = Callable[[list[Tensor]], Optimizer]
SHAPES = ((3,), (16, 17), (), (0, 3), (129, 65), (8,))
OPTIONS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1}),
    "SGD, momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 1e-2}),
    "SGD, Nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "Adam": (Adam, {}),
    "Adam, all": (
        Adam,
        {"lr": 3e-3, "betas": (0.4, 0.98), "eps": 1e-6, "weight_decay": 1e-2, "amsgrad": True},
    ),
    "Adam, maximized": (Adam, {"maximize": True, "amsgrad": True}),
    "AdamW": (AdamW, {}),
    "AdamW, all": (AdamW, {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "RMSprop": (RMSprop, {}),
    "RMSprop, all": (
        RMSprop,
        {"centered": True, "momentum": 0.9, "weight_decay": 1e-2, "maximize": True},
    ),
    "RMSprop, centered": (RMSprop, {"centered": True, "alpha": 0.4}),
    "Adagrad": (Adagrad, {}),
    "Adagrad, all": (
        Adagrad,
        {"lr_decay": 1e-2, "weight_decay": 1e-2, "initial_accumulator_value": 0.1},
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIONS)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:]
)


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """The last of them lies in memory column by column."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [torch.randn(shape, dtype=dtype, generator=draw) for shape in SHAPES]
    columns = torch.randn(7, 5, dtype=dtype, generator=draw).t()
    return [p.requires_grad_() for p in (*shapes, columns)]


def give_gradients(step: int, *runs: list[Tensor]) -> None:
    """Others at each step, of many magnitudes, some of them zero."""
    for index, several in enumerate(zip(*runs, strict=True)):
        draw = torch.Generator().manual_seed(1000 * step + index)
        first = several[0]
        g = torch.randn(first.shape, dtype=first.dtype, generator=draw)
        g = g * 10 ** torch.empty_like(g).uniform_(-6, 2, generator=draw)
        g[torch.rand(g.shape, generator=draw) < 0.05] = 0
        for p in several:
            p.grad = torch.empty_like(p).copy_(g)


def made(name: str, given: list[Tensor]) -> Optimizer:
    cls, options = OPTIONS[name]
    return cls(given, **options)


def fused(optimizer: Optimizer) -> Optimizer:
    (finding,) = mylayers.optimize(nn.ReLU(), optimizer).findings
    assert finding.fused, finding
    return optimizer


def tensors_of(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield "parameter", p
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    yield key, value


def assert_same(ours: Optimizer, theirs: Optimizer) -> None:
    for (key, a), (other, b) in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        assert key == other
        assert same_bits(a, b), key
        assert a.stride() == b.stride()
        assert a._version == b._version, key
        assert a.requires_grad == b.requires_grad


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of each step and zero_grad: how the extension answered last."""
    given: list[str] = []

    def watch(name: str) -> None:
        entry = getattr(_C, name)

        def watched(*arguments: Any) -> Any:
            answer = entry(*arguments)
            if answer is not None:
                given.append("done" if answer is True else "refused")
            return answer

        monkeypatch.setattr(_C, name, watched)

    watch("optimizer_step")
    watch("optimizer_zero_grad")
    return given


def twins(name: str, dtype: torch.dtype = torch.float32) -> tuple[Optimizer, Optimizer]:
    """Ours and theirs, after a first step, which makes the state."""
    ours, theirs = (made(name, parameters(dtype)) for _ in range(2))
    fused(ours)
    step(0, ours, theirs)
    return ours, theirs


def all_parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(number: int, *several: Optimizer) -> None:
    give_gradients(number, *map(all_parameters, several))
    for optimizer in several:
        optimizer.step()


# ---- bits ------------------------------------------------------------------------------


@pytest.mark.grid
@every_dtype
@every_optimizer
def test_two_hundred_steps_have_the_bits_of_the_stock_class(name, dtype, answers):
    ours, theirs = twins(name, dtype)
    answers.clear()
    for number in range(1, 201):
        step(number, ours, theirs)
        if number % 50 == 0:
            assert_same(ours, theirs)
    assert answers == ["done"] * 200


number_of = st.floats(0, 1, allow_nan=False, exclude_max=True)
small = st.floats(0, 0.3)
SETS = st.one_of(
    st.tuples(
        st.just(SGD),
        st.fixed_dictionaries(
            {"lr": small, "momentum": small, "dampening": small, "weight_decay": small}
        ),
    ),
    st.tuples(
        st.just(SGD),
        st.fixed_dictionaries(
            {"lr": st.one_of(small, st.just(1)), "momentum": st.floats(0.1, 1)},
            optional={"nesterov": st.just(True), "weight_decay": small},
        ),
    ),
    st.tuples(
        st.sampled_from([Adam, AdamW]),
        st.fixed_dictionaries(
            {
                "lr": small,
                "betas": st.tuples(number_of, number_of),
                "eps": st.sampled_from([0, 1e-8, 1e-3]),
                "weight_decay": st.one_of(st.just(0), small),
                "amsgrad": st.booleans(),
            }
        ),
    ),
    st.tuples(
        st.just(RMSprop),
        st.fixed_dictionaries(
            {
                "lr": small,
                "alpha": number_of,
                "eps": st.sampled_from([1e-8, 1e-3]),
                "weight_decay": st.one_of(st.just(0), small),
                "momentum": st.one_of(st.just(0), small),
                "centered": st.booleans(),
            }
        ),
    ),
    st.tuples(
        st.just(Adagrad),
        st.fixed_dictionaries(
            {
                "lr": small,
                "lr_decay": st.one_of(st.just(0), small),
                "weight_decay": st.one_of(st.just(0), small),
                "initial_accumulator_value": small,
            }
        ),
    ),
)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """To the bit, but for those of a NaN."""
    nan = a.isnan()
    return bool((nan == b.isnan()).all()) and same_bits(a[~nan], b[~nan])


def forgets_its_mean(options: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether the mean is the gradient itself, by ``lerp`` with a weight of 1.

    PyTorch's vectors then give another sign to a gradient of zero than what is left over behind
    them, so that the sign depends on the place in the tensor.
    """
    beta = options["betas"][0] if "betas" in options else options.get("alpha", 0.5)
    return bool(torch.tensor(1 - beta, dtype=dtype) == 1)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(drawn=SETS, maximize=st.booleans(), double=st.booleans())
def test_any_options(drawn, maximize, double):
    cls, options = drawn
    dtype = torch.float64 if double else torch.float32
    runs = [parameters(dtype) for _ in range(2)]
    ours, theirs = (cls(run, maximize=maximize, **options) for run in runs)
    fused(ours)
    for number in range(20):
        step(number, ours, theirs)
    unsigned = forgets_its_mean(options, dtype)
    for (_, a), (_, b) in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        # + 0 makes 0 of -0
        assert same_numbers(a + 0, b + 0) if unsigned else same_numbers(a, b)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["SGD, momentum", "Adam, all", "RMSprop, all", "Adagrad, all"])
def test_large_parameters_on_any_number_of_threads(name, threads):
    runs = [[torch.linspace(-1, 1, n).requires_grad_() for n in (70_001, 5, 16_384)] for _ in "ab"]
    ours, theirs = (made(name, run) for run in runs)
    fused(ours)
    for number in range(4):
        give_gradients(number, *runs)
        with num_threads(threads):
            ours.step()
        with num_threads(1):
            theirs.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["SGD, Nesterov", "Adam, all", "RMSprop, all", "Adagrad"])
def test_what_is_no_number_stays_none_and_spoils_no_neighbour(name, answers):
    ours, theirs = twins(name)
    answers.clear()
    for number in range(1, 6):
        runs = [all_parameters(optimizer) for optimizer in (ours, theirs)]
        give_gradients(number, *runs)
        for run in runs:
            run[1].grad[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
            run[4].grad[1, 2] = 1e-42
            run[4].grad[1, 3] = 3e38
        ours.step()
        theirs.step()
    assert answers == ["done"] * 5
    for (key, a), (_, b) in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        assert same_numbers(a, b), key
    assert not all_parameters(ours)[1][1:].isnan().any()


# ---- what a loop may do between steps --------------------------------------------------


@every_optimizer
def test_switching_at_any_step(name):
    ours, theirs = twins(name)
    draw = torch.Generator().manual_seed(5)
    for number in range(1, 60):
        if torch.rand((), generator=draw) < 0.4:
            if type(ours) is OPTIONS[name][0]:
                fused(ours)
            else:
                mylayers.restore(nn.ReLU(), ours)
                assert type(ours) is OPTIONS[name][0]
        step(number, ours, theirs)
    assert_same(ours, theirs)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.97),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=60, cycle_momentum=hasattr(optimizer, "momentum")
    ),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_made_before_or_after(kind, before, answers, recwarn):
    ours, theirs = (made("AdamW", parameters()) for _ in range(2))
    if not before:
        fused(ours)
    schedulers = [SCHEDULERS[kind](optimizer) for optimizer in (ours, theirs)]
    if before:
        fused(ours)
    for number in range(40):
        step(number, ours, theirs)
        for scheduler in schedulers:
            scheduler.step()
        if number == 20:
            mylayers.restore(nn.ReLU(), ours)
        if number == 30:
            fused(ours)
    assert answers.count("done") == 29  # the first makes the state
    assert_same(ours, theirs)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]
    mylayers.restore(nn.ReLU(), ours)
    step(41, ours, theirs)
    assert_same(ours, theirs)


@every_optimizer
def test_checkpoints_go_both_ways(name):
    ours, theirs = twins(name)
    for number in range(1, 40):
        step(number, ours, theirs)
        if number % 10 == 0:
            file = io.BytesIO()
            torch.save([ours.state_dict(), theirs.state_dict()], file)
            file.seek(0)
            of_ours, of_theirs = torch.load(file)
            ours.load_state_dict(of_theirs)
            theirs.load_state_dict(of_ours)
    for (key, a), (_, b) in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        assert same_bits(a, b), key
    assert str(ours) == str(theirs)


def test_copies_are_of_the_stock_class():
    ours, theirs = twins("Adam")
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is Adam
        step(1, copied)
    step(1, ours, theirs)
    assert_same(ours, theirs)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert b"mylayers" not in pickle.dumps(ours, protocol)


@pytest.mark.parametrize("name", ["SGD, momentum", "Adam, all", "RMSprop", "Adagrad"])
def test_groups_frozen_parameters_and_a_group_that_comes_later(name, answers):
    cls, options = OPTIONS[name]
    optimizers_, extra = [], []
    for _ in range(2):
        run = parameters()
        run[1].requires_grad_(False)
        groups = [{"params": run[:3]}, {"params": run[3:], "lr": 0.02, "weight_decay": 0.1}]
        optimizers_.append(cls(groups, **options))
        extra.append(torch.ones(5, 4).requires_grad_())
    ours, theirs = optimizers_
    fused(ours)
    for number in range(30):
        runs = [all_parameters(optimizer) for optimizer in optimizers_]
        give_gradients(number, *runs)
        for run in runs:
            run[1].grad = None
            if number % 3 == 2:
                run[4].grad = None
        if number == 10:
            for optimizer, p in zip(optimizers_, extra, strict=True):
                optimizer.add_param_group({"params": [p], "lr": 0.3})
        ours.step()
        theirs.step()
    assert_same(ours, theirs)
    # The first makes the state of most, one later that of those that had no gradient before.
    assert answers.count("refused") <= 3
    assert (
        not any("momentum_buffer" in s for s in ours.state.values())
        or "momentum" in name
        or (name == "RMSprop")
    )


def test_a_grad_scaler(answers):
    losses = []
    for ours in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = Adam(net.parameters(), lr=0.01)
        if ours:
            fused(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for number in range(20):
            x = torch.randn(8, 4)
            optimizer.zero_grad()
            loss = net(x).square().mean() * (math.inf if number == 7 else 1)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
    assert all(map(same_bits, losses[:20], losses[20:]))
    assert answers.count("refused") == 1  # the first


# ---- what is left to the stock class ---------------------------------------------------


def refuses(ours: Optimizer, theirs: Optimizer, answers: list[str]) -> None:
    """That the stock class makes the next step, with its results."""
    answers.clear()
    step(9, ours, theirs)
    assert "done" not in answers
    for (key, a), (_, b) in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        assert same_numbers(a, b), key


def test_hooks_of_an_optimizer_and_of_all(answers):
    ours, theirs = twins("Adam")
    seen: list[Any] = []

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append((optimizer, args, kwargs))

    for register in (
        ours.register_step_pre_hook,
        ours.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ):
        seen.clear()
        handle = register(before)
        refuses(ours, theirs, answers)
        handle.remove()
        assert seen[0] == (ours, (ours,), {})
        step(3, ours, theirs)
        assert answers[-1] == "done"
    assert_same(ours, theirs)


def _tensor_lr(group: dict[str, Any]) -> None:
    group["lr"] = torch.tensor(0.01)


def _foreach(group: dict[str, Any]) -> None:
    group["foreach"] = True


def _fused(group: dict[str, Any]) -> None:
    group["fused"] = True


def _beta_of_one(group: dict[str, Any]) -> None:
    group["betas"] = (0.9, 0.0)
    group["eps"] = True


def _own_class_of_numbers(group: dict[str, Any]) -> None:
    class Rate(float):
        pass

    group["lr"] = Rate(0.01)


def _twice(group: dict[str, Any]) -> None:
    group["params"] = [*group["params"], group["params"][0]]


@pytest.mark.parametrize(
    "change", [_tensor_lr, _foreach, _fused, _beta_of_one, _own_class_of_numbers, _twice]
)
def test_options_of_a_group(change, answers):
    ours, theirs = twins("Adam, all")
    for optimizer in (ours, theirs):
        change(optimizer.param_groups[0])
    refuses(ours, theirs, answers)


class _Tagged(Tensor):
    """A class of tensors that counts its calls."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _Tagged.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_gradients_of_a_class_or_layout_of_their_own(answers):
    ours, theirs = twins("SGD, momentum")
    give_gradients(9, all_parameters(ours), all_parameters(theirs))
    answers.clear()
    for optimizer in (ours, theirs):
        p = all_parameters(optimizer)[4]
        p.grad = torch.empty(p.shape[::-1]).t().copy_(p.grad)
        optimizer.step()
    assert answers == ["refused"]
    assert_same(ours, theirs)
    before = _Tagged.calls
    for optimizer in (ours, theirs):
        p = all_parameters(optimizer)[1]
        p.grad = p.grad.as_subclass(_Tagged)
        optimizer.step()
    assert answers == ["refused"] * 2
    assert _Tagged.calls > before
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW, all"])
def test_tensors_that_share_memory(name, answers):
    def shared() -> tuple[list[Tensor], Optimizer]:
        memory = torch.linspace(-1, 1, 24)
        run = [memory[:16].view(4, 4).requires_grad_(), memory[8:].requires_grad_()]
        return run, made(name, run)

    (ours_run, ours), (theirs_run, theirs) = shared(), shared()
    fused(ours)
    for number in range(3):
        give_gradients(number, ours_run, theirs_run)
        ours.step()
        theirs.step()
    assert "done" not in answers
    assert_same(ours, theirs)
    for run in (ours_run, theirs_run):  # a gradient that is the parameter itself
        run[1].grad = None
        run[0].grad = run[0].detach()
    ours.step()
    theirs.step()
    assert "done" not in answers
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=str)
def test_other_dtypes(dtype, answers):
    runs = [[torch.ones(4, 3, dtype=dtype).requires_grad_()] for _ in range(2)]
    ours, theirs = (Adam(run) for run in runs)
    fused(ours)
    for _ in range(3):
        for optimizer, run in zip((ours, theirs), runs, strict=True):
            run[0].grad = torch.full_like(run[0], 0.5)
            optimizer.step()
    assert "done" not in answers
    assert torch.equal(*(run[0] for run in runs))


def test_sparse_gradients(answers):
    runs = [[torch.ones(4, 3).requires_grad_()] for _ in range(2)]
    ours, theirs = (SGD(run, lr=0.1) for run in runs)
    fused(ours)
    for optimizer, run in zip((ours, theirs), runs, strict=True):
        run[0].grad = torch.eye(4, 3).to_sparse()
        optimizer.step()
    assert answers == ["refused"]
    assert torch.equal(*(run[0] for run in runs))
    adam = fused(Adam(runs[0]))
    with pytest.raises(RuntimeError, match="sparse"):
        adam.step()


def test_a_closure_is_called_as_ever():
    ours, theirs = twins("Adam")
    for optimizer in (ours, theirs):
        calls = []

        def closure(calls: list[bool] = calls) -> float:
            calls.append(torch.is_grad_enabled())
            return 2.5

        assert optimizer.step(closure) == 2.5
        assert optimizer.step(closure=closure) == 2.5
        assert calls == [True, True]
    assert_same(ours, theirs)
    with pytest.raises(TypeError):
        ours.step(1, 2)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_modes_and_profilers_see_the_stock_steps():
    ours, theirs = twins("Adam")
    seen = []
    for optimizer in (ours, theirs):
        with _Operators() as mode:
            optimizer.step()
            optimizer.zero_grad()
        seen.append(mode.seen)
        step(1, optimizer)
        with torch.profiler.profile() as profile:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        seen.append([event.key for event in profile.key_averages()])
    assert seen[0] == seen[2]
    assert sorted(seen[1]) == sorted(seen[3])
    assert "Optimizer.step#Adam.step" in seen[1]
    assert_same(ours, theirs)


def test_a_replaced_function_is_called(monkeypatch, answers):
    ours, theirs = twins("Adam")
    calls = []
    lerp = torch.Tensor.lerp_
    monkeypatch.setattr(
        torch.Tensor, "lerp_", lambda self, *args: (calls.append(1), lerp(self, *args))[1]
    )
    refuses(ours, theirs, answers)
    assert len(calls) == 2 * len(all_parameters(ours))
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["step", "zero_grad", "_init_group"])
def test_a_replaced_method_of_the_stock_class_is_called(name, monkeypatch):
    ours, _ = twins("Adam")
    calls = []
    owner = next(cls for cls in Adam.__mro__ if name in vars(cls))
    was = vars(owner)[name]

    def replacement(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return was(*args, **kwargs)

    replacement.hooked = True  # type: ignore[attr-defined]
    monkeypatch.setattr(owner, name, replacement)
    step(1, ours)
    ours.zero_grad()
    assert calls == [name]
    (finding,) = mylayers.optimize(nn.ReLU(), made("Adam", parameters())).findings
    assert finding.reason == f"{owner.__name__}.{name} was replaced"


def test_compiled_steps(answers):
    """Whose bits are the compiler's: it computes a step's constants as tensors."""
    ours, theirs = twins("Adam")
    compiled = torch.compile(lambda: ours.step(), backend="eager")
    for number in range(1, 4):
        give_gradients(number, all_parameters(ours), all_parameters(theirs))
        compiled()
        theirs.step()
    for (_, a), (_, b) in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        torch.testing.assert_close(a, b)
    answers.clear()
    step(5, ours, theirs)
    assert answers == ["done"]


def test_inference_mode(answers):
    ours, theirs = twins("Adam")
    answers.clear()
    give_gradients(2, all_parameters(ours), all_parameters(theirs))
    with torch.inference_mode():
        ours.step()
        theirs.step()
    assert answers == ["refused"]


def test_a_failing_step_changes_what_the_stock_one_does(answers):
    ours, theirs = twins("Adam")
    for optimizer in (ours, theirs):
        last = all_parameters(optimizer)[-1]
        del optimizer.state[last]["exp_avg_sq"]
    give_gradients(1, all_parameters(ours), all_parameters(theirs))
    answers.clear()
    for optimizer in (ours, theirs):
        with pytest.raises(KeyError):
            optimizer.step()
    assert answers == ["refused"]
    assert_same(ours, theirs)


# ---- zero_grad -------------------------------------------------------------------------


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none, answers):
    ours, theirs = twins("SGD")
    for optimizer in (ours, theirs):
        kept = [p.grad for p in all_parameters(optimizer)]
        versions = [g._version for g in kept]
        all_parameters(optimizer)[2].grad = None
        optimizer.zero_grad(to_none) if not to_none else optimizer.zero_grad()
        for p, was, version in zip(all_parameters(optimizer), kept, versions, strict=True):
            if to_none or p is all_parameters(optimizer)[2]:
                assert p.grad is None
                assert was._version == version
            else:
                assert p.grad is was
                assert same_bits(p.grad, torch.zeros_like(p))
                assert was._version == version + 1
    assert answers[-1] == "done"


def test_zero_grad_of_gradients_with_a_graph(answers):
    for ours in (True, False):
        p = torch.ones(3, requires_grad=True)
        optimizer = SGD([p], lr=0.1)
        if ours:
            fused(optimizer)
        (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
        assert p.grad.requires_grad
        optimizer.zero_grad(set_to_none=False)
        assert not p.grad.requires_grad
        assert p.grad.grad_fn is None
        assert same_bits(p.grad, torch.zeros(3))
    assert answers == ["refused"]


# ---- optimize and restore --------------------------------------------------------------


class Derived(Adam):
    pass


def _shadowed(own: str) -> Make:
    def make(given: list[Tensor]) -> Optimizer:
        optimizer = Adam(given)
        setattr(optimizer, own, lambda *_: None)
        return optimizer

    return make


REFUSED: dict[str, Make] = {
    "Derived is not one of SGD, Adam, AdamW, RMSprop, Adagrad": Derived,
    "Adamax is not one of SGD, Adam, AdamW, RMSprop, Adagrad": torch.optim.Adamax,
    "foreach is True": lambda given: Adam(given, foreach=True),
    "fused is True": lambda given: Adam(given, fused=True),
    "differentiable is True": lambda given: SGD(given, differentiable=True),
    "capturable is True": lambda given: RMSprop(given, capturable=True),
    "its step was replaced": _shadowed("step"),
    "its zero_grad was replaced": _shadowed("zero_grad"),
    "its _init_group was replaced": _shadowed("_init_group"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_stays_what_it_is(reason):
    optimizer = REFUSED[reason](parameters())
    cls, own = type(optimizer), dict(vars(optimizer))
    report = mylayers.optimize(nn.ReLU(), optimizer)
    assert report.unfused[0].reason == reason
    assert reason in str(report)
    assert type(optimizer) is cls
    assert vars(optimizer) == own
    mylayers.restore(nn.ReLU(), optimizer)
    assert type(optimizer) is cls


@every_optimizer
def test_nothing_else_can_be_seen(name):
    ours, theirs = (made(name, parameters()) for _ in range(2))
    own, shown = dict(vars(ours)), str(ours)
    report = mylayers.optimize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ours)
    assert [finding.path for finding in report.fused] == ["", "(the optimizer)"]
    assert vars(ours) == own
    assert str(ours) == shown
    assert isinstance(ours, type(theirs))
    assert fused(ours) is ours  # again
    assert type(ours).__name__ == type(theirs).__name__
    assert pickle.loads(pickle.dumps(type(ours))) is type(ours)
    ours.load_state_dict(ours.state_dict())
    mylayers.restore(nn.ReLU(), ours)
    assert type(ours) is type(theirs)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"optimize: optimizer must be a torch.optim.Optimizer"):
        mylayers.optimize(nn.ReLU(), nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"restore: optimizer must be .* got int"):
        mylayers.restore(nn.ReLU(), 3)  # type: ignore[arg-type]


def test_nothing_is_kept_of_an_optimizer_that_is_gone():
    gc.collect()
    before = _C.known_optimizers()
    ours, theirs = twins("Adam")
    step(1, ours, theirs)
    assert _C.known_optimizers() == before + 1
    del ours, theirs
    gc.collect()
    assert _C.known_optimizers() == before


def test_every_method_has_its_number():
    assert set(optimizers._OPTIMIZED) == {SGD, Adam, AdamW, RMSprop, Adagrad}
