"""Reverse-mode autograd outside transforms: gradients, what is saved, hooks, modes, threads.

The oracle is autograd through ``mylayers.reference``; ``lib`` stands for it or for
``mylayers.functional``.
"""

import copy
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import samples
import torch
from common import Calls
from samples import OF_INPUT, OF_OUTPUT
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mylayers import CenteredLayer, MyLinear, functional, reference

ROWS, IN_UNITS, UNITS = 7, 5, 3
# A value or gradient of these sizes sums at most so many products per layer.
TERMS = ROWS * IN_UNITS * UNITS
NAMES = ("input", "weight", "bias")
SUBSETS = [s for n in range(4) for s in itertools.combinations(NAMES, n)]

any_activation = pytest.mark.parametrize("activation", samples.ACTIVATIONS)
any_wants = pytest.mark.parametrize("wants", SUBSETS[1:], ids="+".join)
any_layer = pytest.mark.parametrize(
    "make_layer",
    [
        *(
            partial(MyLinear, IN_UNITS, UNITS, activation=activation, dtype=torch.float64)
            for activation in samples.ACTIVATIONS
        ),
        partial(CenteredLayer),
        partial(CenteredLayer, 0),
    ],
    ids=[*map(str, samples.ACTIVATIONS), "center", "center-0"],
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def arguments(wants: Sequence[str] = NAMES) -> list[Tensor]:
    """Input, weight and bias; leaves that require grad where named in ``wants``."""
    shapes = {"input": (ROWS, IN_UNITS), "weight": (IN_UNITS, UNITS), "bias": (UNITS,)}
    return [
        draw(*shape, seed=i).requires_grad_(name in wants)
        for i, (name, shape) in enumerate(shapes.items())
    ]


def assert_close(actual: Sequence[Any], expected: Sequence[Any], terms: int = TERMS) -> None:
    """Values within the rounding of sums of ``terms`` products; None equals None alone."""
    for a, e in zip(actual, expected, strict=True):
        if e is None:
            assert a is None
        else:
            magnitude = max([1.0, *e.detach().abs().flatten().tolist()])
            atol = terms * torch.finfo(e.dtype).eps * magnitude
            torch.testing.assert_close(a, e, rtol=0, atol=atol)


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def cube(y: Tensor) -> Tensor:
    """A loss whose gradient differs from entry to entry."""
    return y.pow(3).sum()


# ---- numerical derivatives -------------------------------------------------------------

linear_act_sample = pytest.mark.parametrize(
    "sample",
    list(samples.linear_act_samples(torch.float64, requires_grad=True, large=False)),
    ids=str,
)
center_sample = pytest.mark.parametrize(
    "sample",
    list(samples.center_samples(torch.float64, requires_grad=True, large=False)),
    ids=str,
)


def numerically(
    check: Callable[..., bool], operator: Any, sample: samples.Sample, **o: Any
) -> None:
    tensors = [t for t in sample.args if t is not None]
    assert check(partial(operator, **sample.kwargs), tensors, check_batched_grad=True, **o)


first_order = partial(numerically, gradcheck, check_forward_ad=True)
second_order = partial(
    numerically, gradgradcheck, check_fwd_over_rev=True, gen_non_contig_grad_outputs=True
)
# torch scripts its own decompositions when forward mode is first used in a process, and warns.
uses_forward_mode = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.script` is deprecated:DeprecationWarning"
)


@pytest.mark.grid(one_in=2)
@uses_forward_mode
@linear_act_sample
def test_gradcheck_of_linear_act(sample: samples.Sample) -> None:
    # Stock torch.matmul refuses a batch of tangents (outside torch.func) for a 1-D input and
    # for a 3-D view with the negative bit; with a tangent, linear_act is that formula.
    x = sample.args[0]
    batched_tangents = x.dim() == 2 or (x.dim() > 2 and not x.is_neg())
    first_order(functional.linear_act, sample, check_batched_forward_grad=batched_tangents)


@pytest.mark.grid(one_in=3)
@pytest.mark.road("double backward")
@uses_forward_mode
@linear_act_sample
def test_gradgradcheck_of_linear_act(sample: samples.Sample) -> None:
    second_order(functional.linear_act, sample)


@pytest.mark.grid(one_in=2)
@uses_forward_mode
@center_sample
def test_gradcheck_of_center(sample: samples.Sample) -> None:
    first_order(functional.center, sample, check_batched_forward_grad=True)


@pytest.mark.grid(one_in=3)
@pytest.mark.road("double backward")
@uses_forward_mode
@center_sample
def test_gradgradcheck_of_center(sample: samples.Sample) -> None:
    second_order(functional.center, sample)


@pytest.mark.grid
@pytest.mark.road("double backward")
@any_activation
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_gradients_of_three_orders_equal_those_of_the_formula(
    has_bias: bool, activation: str | None
) -> None:
    def run(lib: Any) -> list[list[Tensor]]:
        leaves = arguments()[: 3 if has_bias else 2]
        scalar = cube(lib.linear_act(*leaves, activation=activation))
        return orders(scalar, leaves)

    for actual, expected in zip(run(functional), run(reference), strict=True):
        assert_close(actual, expected, terms=TERMS**2)


@pytest.mark.road("double backward")
@pytest.mark.parametrize("dim", [None, 0, 1], ids=str)
def test_center_gradients_of_three_orders_equal_those_of_the_formula(dim: int | None) -> None:
    def run(lib: Any) -> list[list[Tensor]]:
        x = arguments()[0]
        return orders(lib.center(x, dim).pow(4).sum(), [x])

    for actual, expected in zip(run(functional), run(reference), strict=True):
        assert_close(actual, expected, terms=TERMS**2)


def orders(scalar: Tensor, leaves: list[Tensor]) -> list[list[Tensor]]:
    """Gradients, gradients of a scalar made of them, and once more."""
    found = []
    for _ in range(3):
        grads = torch.autograd.grad(scalar, leaves, create_graph=True)
        found.append([g.detach() for g in grads])
        scalar = sum(g.pow(2).sum() for g in grads)
    return found


# ---- who needs a gradient --------------------------------------------------------------


@pytest.mark.grid
@any_activation
@pytest.mark.parametrize("wants", SUBSETS, ids=lambda s: "+".join(s) or "nothing")
def test_only_the_gradients_that_are_due(wants: tuple[str, ...], activation: str | None) -> None:
    def run(lib: Any) -> tuple[Tensor, list[Tensor | None]]:
        leaves = arguments(wants)
        y = lib.linear_act(*leaves, activation)
        if wants:
            cube(y).backward()
        return y, [leaf.grad for leaf in leaves]

    with Calls() as calls:
        y, grads = run(functional)
    expected_y, expected = run(reference)
    assert y.requires_grad == expected_y.requires_grad == bool(wants)
    assert (y.grad_fn is None) == (not wants)
    assert_close(grads, expected)
    # No work for the others: the kernel is asked for these gradients alone.
    assert calls.masks() == ([[name in wants for name in NAMES]] if wants else [])


@pytest.mark.parametrize("asked", SUBSETS[1:], ids="+".join)
def test_autograd_grad_computes_only_what_it_is_asked_for(asked: tuple[str, ...]) -> None:
    def run(lib: Any) -> Sequence[Tensor]:
        leaves = dict(zip(NAMES, arguments(), strict=True))
        y = lib.linear_act(*leaves.values())
        return torch.autograd.grad(cube(y), [leaves[name] for name in asked])

    with Calls() as calls:
        grads = run(functional)
    assert_close(grads, run(reference))
    assert calls.masks() == [[name in asked for name in NAMES]]


@any_activation
def test_without_bias_its_gradient_is_never_computed(activation: str | None) -> None:
    x, weight, _ = arguments()
    with Calls() as calls:
        cube(functional.linear_act(x, weight, activation=activation)).backward()
    assert calls.masks() == [[True, True, False]]


def test_frozen_layer_passes_the_gradient_on() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(MyLinear(4, 6), MyLinear(6, 5), MyLinear(5, 2))
    x = torch.rand(3, 4)
    cube(net(x)).backward()
    trained = [p.grad.clone() for p in (*net[0].parameters(), *net[2].parameters())]
    net.zero_grad(set_to_none=True)
    net[1].requires_grad_(False)
    cube(net(x)).backward()
    assert net[1].weight.grad is None
    assert net[1].bias.grad is None
    assert_same_bits([p.grad for p in (*net[0].parameters(), *net[2].parameters())], trained)


def test_center_records_nothing_when_nothing_needs_a_gradient() -> None:
    y = functional.center(arguments(())[0])
    assert not y.requires_grad
    assert y.grad_fn is None


def test_same_tensor_as_input_and_weight_gets_both_gradients() -> None:
    def run(lib: Any) -> Tensor:
        x = draw(4, 4).requires_grad_()
        return torch.autograd.grad(cube(lib.linear_act(x, x)), x)[0]

    assert_close([run(functional)], [run(reference)])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode: Callable[[], Any]) -> None:
    leaves = arguments()
    for call in (functional.linear_act, lambda x, *_: functional.center(x)):
        recorded = call(*leaves)
        with mode():
            y = call(*leaves)
        assert recorded.requires_grad
        assert not y.requires_grad
        assert y.is_inference() == (mode is torch.inference_mode)
        assert_same_bits([y], [recorded.detach()])


@pytest.mark.grid
@pytest.mark.parametrize("name", NAMES)
@any_wants
@any_activation
def test_inference_tensor_in_training_is_refused_where_it_would_be_saved(
    name: str, wants: tuple[str, ...], activation: str | None
) -> None:
    def run(lib: Any) -> list[Tensor | None]:
        leaves = arguments([w for w in wants if w != name])
        with torch.inference_mode():
            leaves[NAMES.index(name)] = leaves[NAMES.index(name)].clone()
        y = lib.linear_act(*leaves, activation)
        if y.requires_grad:
            cube(y).backward()
        return [leaf.grad for leaf in leaves]

    saved = (name == "input" and "weight" in wants) or (name == "weight" and "input" in wants)
    if saved:
        for lib in (reference, functional):
            with pytest.raises(
                RuntimeError, match="Inference tensors cannot be saved for backward"
            ):
                run(lib)
    else:
        assert_close(run(functional), run(reference))


# ---- backward once, twice, after edits -------------------------------------------------


@any_activation
def test_second_backward_needs_retain_graph(activation: str | None) -> None:
    leaves = arguments()
    loss = functional.linear_act(*leaves, activation).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@any_activation
def test_second_backward_with_retain_graph_gives_the_same_bits(activation: str | None) -> None:
    leaves = arguments()
    loss = cube(functional.center(functional.linear_act(*leaves, activation)))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_same_bits(torch.autograd.grad(loss, leaves), first)


def test_center_saves_nothing_that_a_second_backward_could_miss() -> None:
    def run(lib: Any) -> Tensor:
        x = arguments()[0]
        loss = lib.center(x, 0)[0].sum()  # indexing saves sizes only
        loss.backward()
        loss.backward()
        return x.grad

    assert_close([run(functional)], [run(reference)])


@pytest.mark.grid
@pytest.mark.parametrize("edited", [*NAMES, "output", "detached output"])
@any_wants
@any_activation
def test_in_place_edit_before_backward_is_an_error_where_the_value_is_needed(
    edited: str, wants: tuple[str, ...], activation: str | None
) -> None:
    def run(lib: Any) -> list[Tensor | None]:
        leaves = arguments(wants)
        tensors = dict(zip(NAMES, (leaf.clone() for leaf in leaves), strict=True))
        y = lib.linear_act(*tensors.values(), activation)
        tensors |= {"output": y, "detached output": y.detach()}
        tensors[edited].mul_(2)
        y.sum().backward()
        return [leaf.grad for leaf in leaves]

    needed = {
        "input": "weight" in wants,
        "weight": "input" in wants,
        "bias": False,
        "output": activation in OF_OUTPUT,
        "detached output": activation in OF_OUTPUT,
    }
    if needed[edited]:
        # PyTorch's elu keeps its input, not its output.
        keeps_input = activation == "elu" and "output" in edited
        for lib in (functional,) if keeps_input else (reference, functional):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                run(lib)
    else:
        assert_close(run(functional), run(reference))


@pytest.mark.parametrize("edited", ["input", "output"])
def test_center_tolerates_in_place_edits_before_backward(edited: str) -> None:
    def run(lib: Any) -> Tensor:
        leaf = arguments()[0]
        x = leaf.clone()
        y = lib.center(x, 0)
        (x if edited == "input" else y).mul_(2)
        (y * draw(ROWS, IN_UNITS, seed=9)).sum().backward()
        return leaf.grad

    assert_close([run(functional)], [run(reference)])


def test_mutation_on_saved_tensors_can_be_allowed() -> None:
    leaves = arguments()
    expected = torch.autograd.grad(cube(functional.linear_act(*leaves)), leaves)
    with allow_mutation_on_saved_tensors():
        clones = [leaf.clone() for leaf in leaves]
        y = functional.linear_act(*clones)
        for clone in clones:
            clone.zero_()
        assert_same_bits(torch.autograd.grad(cube(y), leaves), expected)


# ---- grad_output -----------------------------------------------------------------------

GRAD_OUTPUTS: dict[str, Callable[[], Tensor]] = {
    "expanded scalar": lambda: draw(1).expand(ROWS, UNITS),
    "expanded row": lambda: draw(UNITS).expand(ROWS, UNITS),
    "expanded column": lambda: draw(ROWS, 1).expand(ROWS, UNITS),
    "transposed": lambda: draw(UNITS, ROWS).T,
    "stepped": lambda: draw(2 * ROWS, 2 * UNITS)[::2, 1::2],
    "flipped": lambda: draw(ROWS, UNITS).flip(0),
    "negated": lambda: torch._neg_view(draw(ROWS, UNITS)),
    "zero": lambda: torch.zeros(ROWS, UNITS, dtype=torch.float64),
}


@pytest.mark.grid
@pytest.mark.parametrize("make", GRAD_OUTPUTS.values(), ids=GRAD_OUTPUTS)
@any_activation
def test_grad_output_of_any_strides(make: Callable[[], Tensor], activation: str | None) -> None:
    def run(lib: Any) -> Sequence[Tensor]:
        leaves = arguments()
        return torch.autograd.grad(lib.linear_act(*leaves, activation), leaves, make())

    assert_close(run(functional), run(reference))


@pytest.mark.grid
@pytest.mark.parametrize("make", GRAD_OUTPUTS.values(), ids=GRAD_OUTPUTS)
@pytest.mark.parametrize("dim", [None, 0, 1], ids=str)
def test_center_grad_output_of_any_strides(make: Callable[[], Tensor], dim: int | None) -> None:
    def run(lib: Any) -> Sequence[Tensor]:
        x = draw(ROWS, UNITS).requires_grad_()
        return torch.autograd.grad(lib.center(x, dim), x, make())

    assert_close(run(functional), run(reference))


class _NoGradient(torch.autograd.Function):
    """The identity that hands no gradient to its input."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:  # noqa: ARG004
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> None:  # noqa: ARG004
        return None


def test_undefined_grad_output_gives_no_gradient() -> None:
    def run(lib: Any) -> list[Tensor | None]:
        leaves = arguments()
        _NoGradient.apply(lib.linear_act(*leaves)).sum().backward()
        x = arguments()[0]
        _NoGradient.apply(lib.center(x)).sum().backward()
        return [leaf.grad for leaf in (*leaves, x)]

    assert run(reference) == [None] * 4
    assert_close(run(functional), run(reference))


def test_gradients_accumulate_into_grad() -> None:
    def run(lib: Any) -> list[Tensor]:
        leaves = arguments()
        leaves[1].grad = torch.ones_like(leaves[1])
        kept = leaves[1].grad
        for scale in (1, 2):
            (scale * cube(lib.linear_act(*leaves))).backward()
        assert leaves[1].grad is kept
        return [leaf.grad for leaf in leaves]

    assert_close(run(functional), run(reference))


def test_layer_used_twice_gets_the_sum_of_both_gradients() -> None:
    torch.manual_seed(0)
    layer = MyLinear(4, 4, dtype=torch.float64)
    x = draw(ROWS, 4)
    parameters = (layer.weight, layer.bias)
    actual = torch.autograd.grad(cube(layer(layer(x))), parameters)
    hidden = reference.linear_act(x, *parameters)
    expected = torch.autograd.grad(cube(reference.linear_act(hidden, *parameters)), parameters)
    assert_close(actual, expected)


# ---- what is saved ---------------------------------------------------------------------


@pytest.mark.grid
@any_wants
@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", None])
def test_only_what_backward_reads_is_saved(wants: tuple[str, ...], activation: str | None) -> None:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x, weight, bias = arguments(wants)
    with saved_tensors_hooks(pack, lambda t: t):
        y = functional.linear_act(x, weight, bias, activation)
    expected = [
        tensor
        for tensor, read in (
            (x, "weight" in wants),
            (weight, "input" in wants),
            (y, activation is not None),
        )
        if read
    ]
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in expected)


def test_center_saves_nothing() -> None:
    def refuse(t: Tensor) -> Tensor:
        raise AssertionError(f"saved a tensor of shape {t.shape}")

    with saved_tensors_hooks(refuse, lambda t: t):
        functional.center(arguments()[0], 0)


@pytest.mark.parametrize("frozen", [True, False])
def test_input_lives_as_long_as_the_weight_gradient_needs_it(frozen: bool) -> None:
    layer = MyLinear(IN_UNITS, UNITS, activation=None, dtype=torch.float64)
    layer.weight.requires_grad_(not frozen)
    x = draw(ROWS, IN_UNITS).requires_grad_() * 1
    alive = weakref.ref(x)
    y = layer(x)
    del x
    gc.collect()
    assert (alive() is None) == frozen
    y.sum().backward()
    gc.collect()
    assert alive() is None


@any_activation
def test_saved_tensor_hooks_pack_and_unpack(activation: str | None) -> None:
    leaves = arguments()
    expected = torch.autograd.grad(cube(functional.linear_act(*leaves, activation)), leaves)
    unpacked = []

    def unpack(packed: Any) -> Tensor:
        unpacked.append(packed)
        return torch.from_numpy(packed)

    with saved_tensors_hooks(lambda t: t.detach().numpy().copy(), unpack):
        y = functional.linear_act(*leaves, activation)
    assert unpacked == []
    assert_same_bits(torch.autograd.grad(cube(y), leaves), expected)
    assert len(unpacked) == (2 if activation is None else 3)


def test_save_on_cpu() -> None:
    leaves = arguments()
    expected = torch.autograd.grad(cube(functional.linear_act(*leaves)), leaves)
    with save_on_cpu():
        y = functional.linear_act(*leaves)
    assert_same_bits(torch.autograd.grad(cube(y), leaves), expected)


# ---- hooks -----------------------------------------------------------------------------


@any_layer
def test_module_hooks_fire_in_order_with_the_right_sizes(
    make_layer: Callable[[], nn.Module],
) -> None:
    layer = make_layer()
    events: list[tuple[str, torch.Size]] = []
    layer.register_forward_pre_hook(lambda _, args: events.append(("pre", args[0].shape)))
    layer.register_forward_hook(lambda _, args, y: events.append(("forward", y.shape)))  # noqa: ARG005
    layer.register_full_backward_pre_hook(lambda _, g: events.append(("backward pre", g[0].shape)))
    layer.register_full_backward_hook(lambda _, gi, go: events.append(("backward", gi[0].shape)))  # noqa: ARG005
    x = draw(ROWS, IN_UNITS).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert events == [
        ("pre", x.shape),
        ("forward", y.shape),
        ("backward pre", y.shape),
        ("backward", x.shape),
    ]


@any_layer
def test_module_hooks_may_replace_what_passes(make_layer: Callable[[], nn.Module]) -> None:
    layer = make_layer()
    x = draw(ROWS, IN_UNITS).requires_grad_()
    y = layer(x * 2) + 1
    (expected,) = torch.autograd.grad(y, x, torch.full_like(y, 3))
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    layer.register_forward_hook(lambda _, args, out: out + 1)  # noqa: ARG005
    layer.register_full_backward_pre_hook(lambda _, grads: (grads[0] * 3,))
    hooked = layer(x)
    assert_same_bits([hooked], [y])
    assert_same_bits(torch.autograd.grad(hooked, x, torch.ones_like(y)), [expected])


def test_tensor_and_node_hooks_fire_and_may_replace_gradients() -> None:
    def run(lib: Any) -> tuple[list[str], list[Tensor]]:
        events: list[str] = []
        x, weight, bias = leaves = arguments()
        y = lib.linear_act(*leaves)
        y.retain_grad()
        y.grad_fn.register_prehook(lambda grads: events.append("node pre"))  # noqa: ARG005
        y.grad_fn.register_hook(lambda gi, go: events.append("node"))  # noqa: ARG005
        y.register_hook(lambda g: g * 2)
        x.register_hook(lambda g: g * 3)
        weight.register_hook(lambda g: g.neg())
        bias.register_post_accumulate_grad_hook(
            lambda leaf: events.append(f"bias {leaf.grad.shape}")
        )
        cube(y).backward()
        return events, [y.grad, *(leaf.grad for leaf in leaves)]

    (events, grads), (expected_events, expected) = run(functional), run(reference)
    assert sorted(events) == sorted(expected_events)
    assert len(events) == 3
    assert_close(grads, expected)


# ---- anomaly mode, checkpointing -------------------------------------------------------


def test_anomaly_mode_leaves_gradients_as_they_are() -> None:
    def run(context: Any) -> Sequence[Tensor]:
        leaves = arguments()
        with context:
            loss = cube(functional.center(functional.linear_act(*leaves)))
            return torch.autograd.grad(loss, leaves)

    anomaly = torch.autograd.set_detect_anomaly(True)
    try:
        found = run(anomaly)
    finally:
        torch.autograd.set_detect_anomaly(False)
    assert_same_bits(found, run(nullcontext()))


@pytest.mark.parametrize(
    ("call", "node"),
    [
        (functional.linear_act, "LinearAct"),
        (lambda x, *_: functional.center(x), "Center"),
    ],
    ids=["linear_act", "center"],
)
def test_anomaly_mode_names_the_operator_and_the_forward_call(
    call: Callable[..., Tensor], node: str
) -> None:
    leaves = arguments()
    with torch.autograd.set_detect_anomaly(True):
        y = call(*leaves)
        with (
            pytest.warns(UserWarning, match=rf"(?s)Error detected in .*{node}.*{__file__}"),
            pytest.raises(RuntimeError, match=rf"{node}.* returned nan values"),
        ):
            y.backward(torch.full_like(y, float("nan")))


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        MyLinear(IN_UNITS, 8), CenteredLayer(), MyLinear(8, UNITS, activation=None)
    ).double()


@pytest.mark.road("gradient checkpointing")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_recomputes_and_gives_the_same_bits(
    net: nn.Sequential, use_reentrant: bool
) -> None:
    x = draw(ROWS, IN_UNITS).requires_grad_()
    cube(net(x)).backward()
    tensors = (x, *net.parameters())
    expected = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    runs = []
    net[0].register_forward_hook(lambda *_: runs.append(None))
    y = checkpoint(net, x, use_reentrant=use_reentrant)
    assert len(runs) == 1
    cube(y).backward()
    assert len(runs) == 2
    assert_same_bits([t.grad for t in tensors], expected)


@pytest.mark.road("gradient checkpointing")
def test_selective_checkpointing_can_keep_the_operators_results(net: nn.Sequential) -> None:
    x = draw(ROWS, IN_UNITS).requires_grad_()
    expected = torch.autograd.grad(cube(net(x).sin()), tuple(net.parameters()))
    keep = [torch.ops.mylayers.linear_act.default]

    def policy(ctx: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        del ctx
        return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE

    with Calls() as calls:
        y = checkpoint(
            lambda v: net(v).sin(),
            x,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, policy),
        )
        grads = torch.autograd.grad(cube(y), tuple(net.parameters()))
    assert_same_bits(grads, expected)
    assert [name for name, _ in calls.seen].count("linear_act") == 2  # one per layer, none again


# ---- threads ---------------------------------------------------------------------------


def big_net() -> nn.Sequential:
    """Wide enough that the kernels use several threads of their own."""
    torch.manual_seed(0)
    return nn.Sequential(MyLinear(300, 129), CenteredLayer(), MyLinear(129, 65))


def step(net: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, *net.parameters()))]


def test_backward_from_another_thread() -> None:
    net, x = big_net(), torch.rand(70, 300)
    expected = step(net, x)
    y = net(x.requires_grad_())
    with ThreadPoolExecutor(1) as pool:
        grads = pool.submit(torch.autograd.grad, y.square().sum(), (x, *net.parameters())).result()
    assert_same_bits([y, *grads], expected)


def test_eight_threads_on_one_module_compute_the_same_bits() -> None:
    net = big_net()
    inputs = [torch.rand(70, 300) for _ in range(8)]
    expected = [step(net, x) for x in inputs]
    start = threading.Barrier(8)

    def work(x: Tensor) -> list[list[Tensor]]:
        start.wait()
        return [step(net, x) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        for found, right in zip(pool.map(work, inputs), expected, strict=True):
            for one in found:
                assert_same_bits(one, right)


def test_eight_threads_accumulate_into_one_grad() -> None:
    # Small whole numbers: every order of adding them gives the same sum.
    layer = MyLinear(16, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-3, 4, (16, 8)))
        layer.bias.copy_(torch.randint(-3, 4, (8,)))
    inputs = [torch.randint(-3, 4, (10, 16)).float() for _ in range(8)]
    layer(torch.cat(inputs)).sum().backward()
    expected = [p.grad for p in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    start = threading.Barrier(8)

    def work(x: Tensor) -> None:
        start.wait()
        layer(x).sum().backward()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, inputs))
    assert_same_bits([p.grad for p in layer.parameters()], expected)


# ---- autocast --------------------------------------------------------------------------


@pytest.mark.grid
@pytest.mark.road("autocast")
@any_activation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gradients_come_in_the_parameters_dtype(
    dtype: torch.dtype, activation: str | None
) -> None:
    leaves = [leaf.detach().float().requires_grad_() for leaf in arguments()]
    with torch.autocast("cpu", dtype=dtype):
        y = functional.linear_act(*leaves, activation)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert [g.dtype for g in grads] == [torch.float32] * 3

    rounded = [leaf.detach().to(dtype).double().requires_grad_() for leaf in leaves]
    exact = reference.linear_act(*rounded, activation)
    expected = torch.autograd.grad(exact, rounded, torch.ones_like(exact))
    # Sums in float32, rounded to dtype once: half a unit in the last place, and float32's.
    eps = torch.finfo(dtype).eps
    unit = eps / 2 + TERMS * torch.finfo(torch.float32).eps
    # A derivative that comes from the rounded output, and is rounded: at most 1 - y * y, which is
    # off by twice half a unit, and half. Sums of it, for the gradients:
    error = 0 if activation in (None, "relu") else 1.5 * eps
    x, weight, _ = (t.detach().abs() for t in rounded)
    # gelu is taken of sums that are rounded before.
    before = reference.linear_act(*rounded, None).detach().abs() if activation in OF_INPUT else 0
    sums = (before, weight.sum(1), x.sum(0)[:, None], ROWS)
    for a, e, inherited in zip((y, *grads), (exact, *expected), sums, strict=True):
        tolerance = unit * e.abs() + TERMS * 2.0**-23 + error * inherited
        samples.assert_within(a.detach(), e.detach(), tolerance)


@pytest.mark.road("autocast")
def test_autocast_leaves_center_in_its_dtype() -> None:
    x = arguments()[0].detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.center(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert y.dtype == grad.dtype == torch.float32
    y_plain = functional.center(x)
    assert_same_bits([y, grad], [y_plain, *torch.autograd.grad(y_plain.square().sum(), x)])


def optimised(net: nn.Module, x: Tensor, dtype: torch.dtype, scaler: torch.amp.GradScaler) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=dtype):
        loss = net(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.road("gradient scaling")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaled_step_equals_an_unscaled_one(net: nn.Sequential, dtype: torch.dtype) -> None:
    net, x = net.float(), draw(ROWS, IN_UNITS).float()
    before, plain = copy.deepcopy(net), copy.deepcopy(net)
    optimised(plain, x, dtype, torch.amp.GradScaler("cpu", enabled=False))
    optimised(net, x, dtype, torch.amp.GradScaler("cpu", init_scale=2.0**8))
    for scaled, unscaled, start in zip(
        net.parameters(), plain.parameters(), before.parameters(), strict=True
    ):
        assert not torch.equal(scaled, start)
        # A power of two moves no bit but of float16's subnormal numbers.
        torch.testing.assert_close(scaled, unscaled, rtol=0, atol=torch.finfo(torch.float16).eps)


@pytest.mark.road("gradient scaling")
def test_a_step_whose_gradients_overflow_is_left_out(net: nn.Sequential) -> None:
    net, x = net.float(), draw(ROWS, IN_UNITS).float()
    before = copy.deepcopy(net.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    optimised(net, x, torch.float16, scaler)
    assert scaler.get_scale() == 2.0**29
    assert_same_bits(net.state_dict().values(), before.values())
