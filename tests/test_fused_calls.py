"""FusedSequential against ``nn.Sequential``: hooks, copies, threads, and what watches calls."""

import contextlib
import copy
import gc
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from chains import (
    EDITS,
    MARKS,
    assert_close,
    assert_like_stock,
    assert_same_bits,
    hooked,
    programs,
    pruned,
    replaced,
    results,
    small,
    split_net,
    stock,
)
from common import COPIES, Calls
from samples import drawer, outcome, same_bits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

import mylayers
from mylayers import (
    CenteredLayer,
    FusedSequential,
    LazyMyLinear,
    MyLinear,
)

pytestmark = MARKS


@pytest.fixture
def x() -> Tensor:
    return drawer("input", torch.float32)(5, 4)


# ---- FusedSequential: hooks ------------------------------------------------------------

HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward pre": lambda m, f: m.register_forward_pre_hook(lambda m, a: f(a[0].shape)),  # noqa: ARG005
    "forward pre with kwargs": lambda m, f: m.register_forward_pre_hook(
        lambda m, a, k: f(a[0].shape, k),  # noqa: ARG005
        with_kwargs=True,
    ),
    "forward": lambda m, f: m.register_forward_hook(lambda m, a, y: f(a[0].shape, y.shape)),  # noqa: ARG005
    "always": lambda m, f: m.register_forward_hook(
        lambda m, a, y: f(y.shape),  # noqa: ARG005
        always_call=True,
    ),
    "full backward pre": lambda m, f: m.register_full_backward_pre_hook(lambda m, g: f(g[0].shape)),  # noqa: ARG005
    "full backward": lambda m, f: m.register_full_backward_hook(
        lambda m, i, o: f(o[0].shape)  # noqa: ARG005
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("place", [0, 1, 5, None], ids=str)
@pytest.mark.parametrize("make", [small, split_net])
def test_hooks_are_called_with_what_stock_gives_them(make, place, register, x):
    runs = []
    for fused in (True, False):
        net = make()
        net(x)
        net = net if fused else stock(net)
        events: list[Any] = []
        handle = register(
            net if place is None else net[place],
            lambda *seen, events=events: events.append(seen),
        )
        found = results(net, x)
        assert len(events) == 1
        handle.remove()
        net(x)
        assert len(events) == 1
        runs.append((events, found))
    (events, actual), (expected_events, expected) = runs
    assert events == expected_events
    assert_close(actual, expected)


@pytest.mark.parametrize(
    "register",
    [
        global_hooks.register_module_forward_pre_hook,
        global_hooks.register_module_forward_hook,
        global_hooks.register_module_full_backward_pre_hook,
        global_hooks.register_module_full_backward_hook,
    ],
)
def test_global_hooks_see_every_layer(register, x):
    runs = []
    for wrap in (lambda n: n, stock):
        net = small()
        net(x)
        net = wrap(net)
        events: list[Any] = []
        handle = register(lambda m, *_, events=events: events.append(len(list(m.modules()))))
        try:
            found = results(net, x)
        finally:
            handle.remove()
        count = len(events)
        results(net, x)
        assert len(events) == count
        runs.append((events, found))
    (events, actual), (expected_events, expected) = runs
    assert len(events) == 9
    assert events == expected_events
    assert_close(actual, expected)


def test_hooks_on_all_modules_are_found_where_their_dictionary_is_another(monkeypatch, x):
    """PyTorch's own tests put one in its place between them."""
    net, seen = small(), []
    net(x)
    monkeypatch.setattr(global_hooks, "_global_forward_hooks", OrderedDict())
    handle = global_hooks.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    results(net, x)
    assert seen == [*map(type, net), type(net)]
    handle.remove()
    with Calls() as calls:
        results(net, x)
    assert len(seen) == len(net) + 1
    assert [name for name, _ in calls.seen if name.startswith("sequential")] != []


# Of the parameters that torch.nn.functional.linear takes, those that our operators refuse.
SHAPES: dict[str, Callable[[nn.Linear], Any]] = {
    "a bias of one": lambda m: setattr(m, "bias", nn.Parameter(torch.rand(1))),
    "a scalar bias": lambda m: setattr(m, "bias", nn.Parameter(torch.rand(()))),
    "a bias of two dimensions": lambda m: setattr(m, "bias", nn.Parameter(torch.rand(1, 3))),
    "a bias for each row": lambda m: setattr(m, "bias", nn.Parameter(torch.rand(5, 3))),
    "a vector for a weight": lambda m: (
        setattr(m, "bias", None),
        setattr(m, "weight", nn.Parameter(torch.rand(6))),
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize("edit", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.filterwarnings("error")
def test_parameters_of_shapes_that_pytorchs_linear_takes(edit, calls, traced):
    x = torch.rand(5, 4)
    net = FusedSequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    for _ in range(calls):
        net(x)
    edit(net[2])
    expected = results(stock(net), x)
    if traced:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            torch.testing.assert_close(torch.jit.trace(net, x)(x), stock(net)(x))
    for _ in range(3):
        assert_close(results(net, x), expected)
    (found,) = (row for row in mylayers.optimize(net).findings if not row.fused)
    assert found.path == "2"


@pytest.mark.parametrize("cls", [nn.Tanh, nn.Linear, MyLinear])
def test_a_child_that_was_not_initialised_fails_as_in_stock(cls, x):
    net = FusedSequential(nn.Linear(5, 4), nn.Tanh())
    net._modules["1"] = cls.__new__(cls)
    assert outcome(net, x) == outcome(stock(net), x)
    net._modules["1"] = cls.__new__(cls)
    net._modules["1"].__dict__["_parameters"] = None
    assert outcome(net, x) == outcome(stock(net), x)


@pytest.mark.parametrize(
    "child", [nn.Flatten(10**25), nn.Flatten(0, -(10**25)), CenteredLayer(10**25)], ids=repr
)
def test_dims_beyond_64_bits_fail_as_the_layer_does(child, x):
    net = FusedSequential(nn.Linear(5, 4), child, nn.Linear(4, 3))
    assert outcome(net, x) == outcome(stock(net), x)


OBSTACLES: dict[str, Callable[[FusedSequential], Any]] = {
    "nothing": lambda n: None,  # noqa: ARG005
    "hook": lambda n: hooked(n[5]),
    "hooks": lambda n: [hooked(child) for child in n],
    "hook of its own": hooked,
    "weight norm": lambda n: parametrizations.weight_norm(n[5]),
    "pruned": lambda n: pruned(n[5]),
    "forward replaced": lambda n: replaced(n[5]),
    "forward of its own": replaced,
    "alpha": lambda n: setattr(n[1], "alpha", -2.0),
    "dims in a list": lambda n: setattr(n[2], "dim", [0]),
    "class with its own forward": lambda n: n.__setitem__(7, _Counted(5, 3)),
    "in training": lambda n: n.train(),
    "foreign weight": lambda n: setattr(n[5], "weight", nn.Parameter(_Tagged(n[5].weight))),
    "attribute that came and went": lambda n: (setattr(n[5], "note", 1), delattr(n[5], "note")),
}


class _Counted(nn.Linear):
    """Changes its class at every call."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(input)


def planned(net: FusedSequential, x: Tensor, monkeypatch: pytest.MonkeyPatch, calls: int) -> int:
    """How many plans so many calls make."""
    made, module = [], sys.modules["mylayers.sequential"]
    keep_plan = module._keep_plan
    with monkeypatch.context() as patch:
        patch.setattr(module, "_keep_plan", lambda n: (made.append(n), keep_plan(n))[1])
        for _ in range(calls):
            net(x)
    return len(made)


@pytest.mark.parametrize("change", OBSTACLES.values(), ids=OBSTACLES)
def test_a_plan_is_made_once_whatever_is_in_the_way(change, monkeypatch, x):
    net = small()
    assert planned(net, x, monkeypatch, 4) == 1
    change(net)
    net(x)
    assert planned(net, x, monkeypatch, 4) == 0
    assert planned(net, _Tagged(x), monkeypatch, 4) == 0
    with torch.device("cpu"):
        assert planned(net, x, monkeypatch, 4) == 0
    handle = global_hooks.register_module_forward_hook(lambda *_: None)
    try:
        assert planned(net, x, monkeypatch, 4) == 0
    finally:
        handle.remove()
    torch.manual_seed(0)
    expected = stock(net)(x) * (2 if "forward" in vars(net) else 1)
    torch.manual_seed(0)
    assert_close(net(x), expected)


def test_a_plan_is_found_again_while_a_function_is_replaced(monkeypatch, x):
    net, calls = small(), []
    wanted = sum(isinstance(layer, nn.Linear) for layer in net)
    assert planned(net, x, monkeypatch, 4) == 1
    own = F.linear

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return own(*args)

    for first in (1, 0):
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", counted)
            assert planned(net, x, monkeypatch, 4) == first
        assert len(calls) == 4 * wanted
        calls.clear()
        assert planned(net, x, monkeypatch, 4) == 0
        assert not calls


def test_what_changes_back_and_forth_is_not_planned_anew(monkeypatch, x):
    net = small()

    def round_trip() -> None:
        for change in (net.train, net.eval):
            change()
            net(x)
        handle = hook(net[5])
        net(x)
        handle.remove()

    def hook(layer: nn.Module) -> Any:
        return layer.register_forward_hook(lambda *_: None)

    round_trip()
    made, module = [], sys.modules["mylayers.sequential"]
    monkeypatch.setattr(module, "_keep_plan", made.append)
    for _ in range(3):
        round_trip()
    assert not made


def test_a_dropout_of_no_probability_is_refused_as_ever(x):
    net = small()
    net(x)
    net[3].p = 2.0
    for called in (net, stock(net)):
        with pytest.raises(ValueError, match="dropout probability"):
            called(x)


def test_a_child_may_change_those_behind_it_while_it_runs(x):
    """As where nn.Sequential iterates over them."""
    for edit in (
        lambda n: n.__setitem__(4, nn.Linear(6, 3).requires_grad_(False)),
        lambda n: n.__setitem__(5, nn.Sigmoid()),
        lambda n: hooked(n[4]),
        lambda n: setattr(n[4], "weight", nn.Parameter(n[4].weight * 2)),
        lambda n: n.append(nn.Tanh()),
        lambda n: n.__delitem__(5),
    ):
        found = []
        for kind in (FusedSequential, nn.Sequential):
            net = kind(*split_net())
            net(x)
            once = []

            def change(*_: Any, net: Any = net, once: Any = once, edit: Any = edit) -> None:
                if not once:
                    once.append(torch.manual_seed(0))
                    edit(net)

            net[2].register_forward_hook(change)
            results = []
            for _ in range(2):
                try:
                    results.append(net(x))
                except RuntimeError as e:
                    results.append(str(e))
            found.append(results)
        for ours, stocks in zip(*found, strict=True):
            assert type(ours) is type(stocks)
            assert ours == stocks if isinstance(ours, str) else torch.allclose(ours, stocks)


def test_a_child_may_replace_a_function_that_those_behind_it_call(monkeypatch, x):
    net, calls, own = split_net(), [], F.relu

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return own(*args, **kwargs)

    net[2].register_forward_hook(lambda *_: monkeypatch.setattr(F, "relu", counted))
    for _ in range(3):
        net(x)
        assert len(calls) == 1
        calls.clear()
        monkeypatch.setattr(F, "relu", own)


def test_hooks_on_tensors_and_parameters_fire(x):
    net, events = small(), []
    net[5].weight.register_hook(lambda g: events.append(g.shape))
    net[0].bias.register_post_accumulate_grad_hook(lambda p: events.append(p.grad.shape))
    y = net(x)
    y.register_hook(lambda g: g * 0)
    y.sum().backward()
    assert sorted(events) == [(5, 6), (6,)]
    assert all(p.grad.eq(0).all() for p in net.parameters())


# ---- FusedSequential: lazy layers, copies, threads -------------------------------------


@pytest.mark.parametrize("make", [small, split_net])
def test_gradient_penalty_is_stocks(make, x):
    """The gradient of a gradient, as in training with a penalty on the input's."""
    net, found = make(), []
    for called in (net, net, stock(net)):
        v = x.clone().requires_grad_()
        (inner,) = torch.autograd.grad(called(v).pow(2).sum(), v, create_graph=True)
        loss = (inner.norm(dim=1) - 1).pow(2).sum()
        found.append(torch.autograd.grad(loss, tuple(net.parameters()), allow_unused=True))
    for actual in found[:2]:
        zeros = [torch.zeros_like(p) for p in net.parameters()]
        assert_close(
            *(
                [z if g is None else g for g, z in zip(f, zeros, strict=True)]
                for f in (actual, found[2])
            )
        )


def test_lazy_layers_take_their_sizes_and_are_fused_from_then_on(x):
    net = FusedSequential(nn.LazyLinear(5), nn.Tanh(), LazyMyLinear(3))
    assert net(x).shape == (5, 3)
    assert type(net[0]) is nn.Linear
    assert type(net[2]) is MyLinear
    assert programs(net, x) == ["linear_t+bias+tanh; linear+bias+relu"]
    assert_like_stock(net, x)


every_copy = pytest.mark.parametrize(
    "make_copy", [*COPIES.values(), copy.copy], ids=[*COPIES, "copy"]
)


@pytest.mark.grid
@every_copy
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("make", [small, split_net])
def test_copies_compute_the_same_and_share_nothing_they_should_not(make, calls, make_copy, x):
    net = make()
    for _ in range(calls):
        net(x)
    expected = stock(net)(x)
    twin = make_copy(net)
    assert type(twin) is FusedSequential
    for _ in range(2):
        assert_close(twin(x), expected)
    twin.train()
    assert not net.training
    if make_copy is not copy.copy:
        twin[0].weight.data.zero_()
        assert_close(net(x), expected)


@every_copy
def test_a_compiled_network_is_copied_as_a_stock_one_is(make_copy, x):
    net = FusedSequential(nn.Linear(4, 3), nn.Tanh())
    net.compile(backend="eager")
    y = net(x)
    assert_close(make_copy(net)(x), y)


@pytest.mark.parametrize("toggle", [False, True])
def test_threads_on_one_network_compute_the_same_bits(toggle, x):
    """Also while the first call plans, or another thread's change makes a plan anew."""
    threads, interval = 4, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            net = FusedSequential(
                nn.Linear(4, 6), nn.Tanh(), nn.GroupNorm(1, 6), nn.Linear(6, 3)
            ).eval()
            expected = nn.Sequential(net[:2], net[2], net[3:])(x)
            start = threading.Barrier(threads)

            def work(_: int, net: Any = net, start: Any = start) -> list[Tensor]:
                start.wait()
                found = []
                for call in range(6):
                    if toggle:
                        net.training = call % 2 == 0
                    found.append(net(x))
                return found

            with ThreadPoolExecutor(threads) as pool:
                for found in pool.map(work, range(threads)):
                    assert_same_bits(found, [expected] * 6)
    finally:
        sys.setswitchinterval(interval)


def test_threads_train_one_network_while_another_replaces_its_parameters():
    """A call holds what it read: the replaced parameter may die while it computes."""
    net, x, stop = (
        FusedSequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 3)),
        torch.rand(40, 300),
        [],
    )

    def replace() -> None:
        while not stop:
            net[0].weight = nn.Parameter(torch.zeros(300, 300))
            net[0].bias = nn.Parameter(torch.zeros(300))

    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    expected = net(x)
    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(100):
            assert same_bits(net(x), expected)
    finally:
        stop.append(True)
        thread.join()


def test_nothing_keeps_a_network_its_parameters_or_its_input_alive(x):
    net = small()
    net(x).sum().backward()
    with pytest.raises(RuntimeError, match="weight must be"):
        net(torch.randn(5, 5))
    layer = net[5]
    counts = [sys.getrefcount(t) for t in (layer.weight, layer.bias, x, layer)]
    for _ in range(50):
        net(x)
        with contextlib.suppress(RuntimeError):
            net(x[:, :3])
    assert [sys.getrefcount(t) for t in (layer.weight, layer.bias, x, layer)] == counts
    alive = [weakref.ref(net), weakref.ref(layer), weakref.ref(layer.weight)]
    del net, layer
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


# ---- FusedSequential: what watches calls -----------------------------------------------


def test_a_default_device_changes_nothing(x):
    net = small()
    expected = net(x)
    torch.set_default_device("cpu")
    try:
        assert same_bits(net(x), expected)
    finally:
        torch.set_default_device(None)
    with torch.device("cpu"):
        assert same_bits(net(x), expected)


def test_a_function_mode_sees_the_operator(x):
    net, seen = small(), []
    net(x)

    class Spy(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Spy():
        net(x)
    assert [s for s in seen if "mylayers" in s] == ["mylayers.sequential"]


class _Tagged(Tensor):
    """A tensor that overrides what operators do, and counts them."""

    seen: tuple[str, ...] = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _Tagged.seen = (*_Tagged.seen, getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("make", [small, split_net])
@pytest.mark.parametrize("which", ["input", "weight"])
def test_tensor_subclasses_are_given_to_the_children(which, make, x):
    net = make()
    expected = stock(net)(x)
    net(x)
    _Tagged.seen = ()
    if which == "input":
        y = net(x.as_subclass(_Tagged))
    else:
        weight = net[5 if make is small else 4].weight.detach().as_subclass(_Tagged)
        layer = net[5 if make is small else 4]
        del layer._parameters["weight"]
        layer._parameters["weight"] = weight
        y = net(x)
    assert type(y) is _Tagged
    assert "linear" in _Tagged.seen
    assert_close(y.as_subclass(Tensor), expected)


@pytest.mark.parametrize("value", [None, 3.0, [1.0], "text"])
@pytest.mark.parametrize("calls", [0, 1])
def test_an_input_that_is_no_tensor_is_a_type_error(calls, value, x):
    net = small()
    for _ in range(calls):
        net(x)
    with pytest.raises(TypeError, match=r"FusedSequential: input must be a torch\.Tensor; got"):
        net(value)


def test_wrong_ways_to_call_end_as_stocks(x):
    net = small()
    net(x)
    assert_close(net(input=x), net(x))
    for args, kwargs in (((), {}), ((x, x), {}), ((x,), {"input": x}), ((), {"unknown": x})):
        assert outcome(net, *args, **kwargs) is outcome(stock(net), *args, **kwargs) is TypeError


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_profiler_shows_one_operator(grad_mode, x):
    net = small()
    net(x)
    with (
        grad_mode(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        net(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["mylayers::sequential"] == 1
    assert "mylayers::linear_act" not in counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_network(dtype, x):
    net = small()
    net(x)
    with torch.autocast("cpu", dtype=dtype):
        actual, expected = results(net, x), results(stock(net), x)
    assert actual[0].dtype == dtype
    # Stock rounds to the dtype before each activation, and ours once after it.
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        atol = 64 * torch.finfo(dtype).eps * max(1.0, e.abs().max().item())
        torch.testing.assert_close(a, e, rtol=0, atol=atol)


def test_checkpointing_gives_the_same_bits(x):
    net = small()
    expected = results(net, x)
    for reentrant in (True, False):
        v = x.clone().requires_grad_()
        net.zero_grad()
        y = torch.utils.checkpoint.checkpoint(net, v, use_reentrant=reentrant)
        y.pow(3).sum().backward()  # the reentrant kind knows no torch.autograd.grad
        assert_same_bits([y.detach(), v.grad, *(p.grad for p in net.parameters())], expected)


def test_symbolic_trace_computes_the_same(x):
    net = split_net()
    net(x)
    traced = torch.fx.symbolic_trace(net)
    assert_close(traced(x), net(x))
    assert_like_stock(net, x)


def test_jit_trace_records_the_operator(tmp_path, x):
    net = small()
    net(x)
    traced = torch.jit.trace(net, x)
    kinds = [n.kind() for n in traced.inlined_graph.nodes()]
    assert kinds.count("mylayers::sequential") == 1
    traced.save(tmp_path / "traced.pt")
    other = torch.randn(9, 4)
    assert same_bits(torch.jit.load(tmp_path / "traced.pt")(other), net(other))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.grid
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize(
    ("make", "backend"), [(small, "aot_eager"), (split_net, "aot_eager"), (small, "inductor")]
)
def test_compile_without_a_graph_break(make, backend, calls, x):
    net = make()
    for _ in range(calls):
        net(x)
    compiled_net = torch.compile(net, fullgraph=True, backend=backend)
    actual, expected = results(compiled_net, x, net), results(net, x)
    if backend == "aot_eager" and make is small:
        assert_same_bits(actual, expected)
    assert_close(actual, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_dynamic_batch_compiles_once():
    net, counter = small(), CompileCounterWithBackend("aot_eager")
    compiled_net = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    frames = 0
    for rows in (9, 7, 2, 129):  # first a number that no layer has
        v = torch.randn(rows, 4)
        assert_same_bits(results(compiled_net, v, net), results(net, v))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


@pytest.mark.whole  # compiles at each change
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_network_notices_changes(x):
    net = small()
    compiled_net = torch.compile(net, fullgraph=True, backend="aot_eager")
    for edit in (
        "data",
        "activation",
        "bias removed",
        "replaced by another type",
        "dropout trains",
    ):
        compiled_net(x)
        EDITS[edit](net)
        torch.manual_seed(1)
        actual = compiled_net(x)
        torch.manual_seed(1)
        assert_close(actual, stock(net)(x))


@pytest.mark.grid
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("calls", [0, 1])
def test_exported_program_holds_the_operator_and_takes_any_batch(calls, strict, tmp_path, x):
    net = small()
    for _ in range(calls):
        net(x)
    program = torch.export.export(
        net, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=strict
    )
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets == ["mylayers.sequential.default"]
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for rows in (1, 5, 130):
        v = torch.randn(rows, 4)
        assert same_bits(loaded(v), net(v))
