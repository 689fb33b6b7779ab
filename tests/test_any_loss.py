"""``forward_backward`` with a criterion that it must call, against the three lines, to the bit.

What a criterion may do is open: it is given the graph that the three lines would give it. Held to
the three lines are the loss, all gradients, what the criterion did on its way, how often it was
called, and errors.
"""

# What a criterion is given is not always used.
# ruff: noqa: ARG001, ARG004, ARG005

import copy
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from samples import KERNEL_DTYPES, drawer, num_threads, same_bits
from test_training import made, three_lines
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint

from mylayers import FusedSequential, forward_backward, training_step

Criterion = Callable[[Any, Any], Any]


class ToldError(Exception):
    """What a criterion raises of its own."""


def result_of(
    step: Callable[..., Tensor],
    make: Callable[[nn.Module, dict[str, Any]], Criterion],
    network: nn.Module,
    x: Tensor,
    target: Any,
) -> dict[str, Any]:
    """All that a call leaves: made anew for each way, so that nothing is shared."""
    network, x, target = copy.deepcopy((network, x, target))
    torch.manual_seed(0)
    seen: dict[str, Any] = {"calls": 0}
    criterion = make(network, seen)

    def counted(output: Tensor, wanted: Any) -> Any:
        seen["calls"] += 1
        return criterion(output, wanted)

    try:
        loss = step(network, counted, x, target)
        seen["loss"], seen["requires_grad"] = loss, loss.requires_grad
    except Exception as error:
        seen["error"] = type(error), str(error)
    seen["grads"] = [p.grad for p in network.parameters()]
    seen["parameters"] = list(network.parameters())
    seen["random"] = torch.get_rng_state().numpy().tobytes()
    return seen


def assert_alike(ours: Any, theirs: Any, place: str = "") -> None:
    assert type(ours) is type(theirs), place
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_alike(value, theirs[key], f"{place}/{key}")
    elif isinstance(ours, list):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_alike(a, b, f"{place}/{number}")
    elif isinstance(ours, Tensor):
        assert same_bits(ours, theirs), place
        assert ours.stride() == theirs.stride(), place
        assert ours._version == theirs._version, place
    else:
        assert ours == theirs, place


def check(
    make: Callable[[nn.Module, dict[str, Any]], Criterion],
    network: nn.Module | None = None,
    x: Tensor | None = None,
    target: Any = None,
) -> dict[str, Any]:
    draw = drawer("any loss", torch.float32)
    given = (
        made() if network is None else network,
        draw(4, 5) if x is None else x,
        draw(4, 3) if target is None else target,
    )
    ours, theirs = (result_of(step, make, *given) for step in (forward_backward, three_lines))
    assert_alike(ours, theirs)
    return ours


# ---- PyTorch's losses ------------------------------------------------------------------


def _classes(values: Tensor) -> Tensor:
    return values.argmax(1)


def _signs(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)


def _as_is(values: Tensor) -> Tensor:
    return values


def _weights(values: int = 3) -> Tensor:
    return torch.arange(1.0, values + 1)


Made = Callable[[str, torch.dtype], Criterion]
# A loss of a reduction and a dtype; what it takes for a target.
LOSSES: dict[str, tuple[Made, Callable[[Tensor], Any]]] = {
    **{
        f"{cls.__name__}": (lambda r, _, cls=cls: cls(reduction=r), target)
        for cls, target in (
            (nn.L1Loss, _as_is),
            (nn.MSELoss, _as_is),
            (nn.SmoothL1Loss, _as_is),
            (nn.HuberLoss, _as_is),
            (nn.PoissonNLLLoss, _as_is),
            (nn.NLLLoss, _classes),
            (nn.CrossEntropyLoss, _classes),
            (nn.MultiMarginLoss, _classes),
            (nn.KLDivLoss, torch.sigmoid),
            (nn.BCEWithLogitsLoss, torch.sigmoid),
            (nn.MultiLabelSoftMarginLoss, torch.sigmoid),
            (nn.SoftMarginLoss, _signs),
            (nn.HingeEmbeddingLoss, _signs),
        )
    },
    "BCELoss": (lambda r, _: lambda y, t: nn.BCELoss(reduction=r)(y.sigmoid(), t), torch.sigmoid),
    "BCELoss, weights": (
        lambda r, d: lambda y, t: nn.BCELoss(_weights().to(d), reduction=r)(y.sigmoid(), t),
        torch.sigmoid,
    ),
    "BCEWithLogitsLoss, weights": (
        lambda r, d: nn.BCEWithLogitsLoss(
            _weights().to(d), reduction=r, pos_weight=_weights().to(d)
        ),
        torch.sigmoid,
    ),
    "NLLLoss, weights": (lambda r, d: nn.NLLLoss(_weights().to(d), reduction=r), _classes),
    "CrossEntropyLoss, weights": (
        lambda r, d: nn.CrossEntropyLoss(_weights().to(d), reduction=r),
        _classes,
    ),
    "CrossEntropyLoss, smoothing": (
        lambda r, _: nn.CrossEntropyLoss(label_smoothing=0.1, reduction=r),
        _classes,
    ),
    "CrossEntropyLoss, probabilities": (
        lambda r, _: nn.CrossEntropyLoss(reduction=r),
        lambda values: values.softmax(1),
    ),
    "KLDivLoss, logs": (
        lambda r, _: nn.KLDivLoss(reduction=r, log_target=True),
        lambda values: values.log_softmax(1),
    ),
    "MultiLabelMarginLoss": (
        lambda r, _: nn.MultiLabelMarginLoss(reduction=r),
        lambda values: values.argsort(1),
    ),
    "GaussianNLLLoss": (
        lambda r, _: lambda y, t: nn.GaussianNLLLoss(reduction=r)(y, t, t * t + 1),
        _as_is,
    ),
    "CosineEmbeddingLoss": (
        lambda r, _: lambda y, t: nn.CosineEmbeddingLoss(reduction=r)(y, t, _signs(t[:, 0])),
        _as_is,
    ),
    "MarginRankingLoss": (
        lambda r, _: lambda y, t: nn.MarginRankingLoss(reduction=r)(y, t, _signs(t)),
        _as_is,
    ),
    "TripletMarginLoss": (
        lambda r, _: lambda y, t: nn.TripletMarginLoss(reduction=r)(y, t, t.flip(0)),
        _as_is,
    ),
}


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_pytorch(name, reduction, dtype):
    if (reduction == "batchmean") != ("KLDiv" in name and reduction not in ("mean", "sum", "none")):
        pytest.skip("no reduction of this loss")
    make, target = LOSSES[name]
    draw = drawer("every loss", dtype)
    network, x, wanted = made(dtype=dtype), draw(4, 5), target(draw(4, 3))
    loss = make(reduction, dtype)

    def reduced(_: nn.Module, __: dict[str, Any]) -> Criterion:
        if reduction == "none":  # and a user's own
            return lambda y, t: (loss(y, t) * torch.linspace(0.5, 2, 4, dtype=dtype)[:, None]).sum()
        return loss

    check(reduced, network, x, wanted)
    if reduction != "none":  # the module itself, which may be one that is computed here
        results = [
            result_of(step, lambda *_: loss, network, x, wanted)
            for step in (
                lambda net, _, *given: forward_backward(net, loss, *given),
                lambda net, _, *given: three_lines(net, loss, *given),
            )
        ]
        assert_alike(*results)


@pytest.mark.parametrize("seed", range(30))
def test_functions_drawn_at_random(seed):
    """A few operations in a row on the output, the target or what came before, then a sum."""
    generator = torch.Generator().manual_seed(seed)
    unary = [torch.tanh, torch.square, torch.exp, torch.abs, F.softplus, lambda v: v.softmax(-1)]
    binary = [torch.add, torch.sub, torch.mul, torch.minimum, torch.atan2]
    ends = [torch.mean, torch.sum, lambda v: v.logsumexp((0, 1)), lambda v: v.norm(), torch.amax]

    def drawn(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    plan = [(drawn(2), drawn(30), drawn(30)) for _ in range(1 + drawn(6))]
    end = ends[drawn(len(ends))]

    def function(_: nn.Module, __: dict[str, Any]) -> Criterion:
        def criterion(y: Tensor, t: Tensor) -> Tensor:
            values = [t, y]
            for is_binary, which, other in plan:
                if is_binary:
                    operand = values[other % len(values)]
                    values.append(binary[which % len(binary)](values[-1], operand))
                else:
                    values.append(unary[which % len(unary)](values[-1]))
            return end(values[-1])

        return criterion

    with num_threads(1 + seed % 2):
        check(function)


# ---- what else a criterion does --------------------------------------------------------


def in_place(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: y.mul_(2).sub_(t).square().mean()


def weight_decay(network: nn.Module, _: dict[str, Any]) -> Criterion:
    return lambda y, t: F.mse_loss(y, t) + 0.1 * sum(p.square().sum() for p in network.parameters())


def weight_decay_of_one(network: nn.Module, _: dict[str, Any]) -> Criterion:
    return lambda y, t: F.mse_loss(y, t) + network[2].weight.abs().sum()


def own_parameters(_: nn.Module, seen: dict[str, Any]) -> Criterion:
    temperature = torch.ones(3, requires_grad=True)
    seen["own"] = [temperature]

    def criterion(y: Tensor, t: Tensor) -> Tensor:
        return F.mse_loss(y * temperature, t)

    seen["gradient"] = _Later(lambda: temperature.grad)
    return criterion


class _Later:
    """Read when it is compared."""

    def __init__(self, read: Callable[[], Tensor | None]) -> None:
        self.read = read

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, _Later)
        mine, others = self.read(), other.read()
        return mine is not None and others is not None and same_bits(mine, others)

    __hash__ = None  # type: ignore[assignment]


def the_network_again(network: nn.Module, _: dict[str, Any]) -> Criterion:
    return lambda y, t: F.mse_loss(y, t) + F.mse_loss(network(torch.ones(2, 5)), t[:2])


def part_of_the_network_again(network: nn.Module, _: dict[str, Any]) -> Criterion:
    return lambda y, t: F.mse_loss(network[0](torch.ones(4, 5))[:, :3] + y, t)


def gradient_penalty(network: nn.Module, _: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        found = torch.autograd.grad(y.sum(), list(network.parameters()), create_graph=True)
        return F.mse_loss(y, t) + sum(g.square().sum() for g in found)

    return criterion


def gradients_of_the_parameters(network: nn.Module, seen: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        loss = F.mse_loss(y, t)
        seen["found"] = list(
            torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        )
        return loss

    return criterion


def own_backward(_: nn.Module, __: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        loss = F.mse_loss(y, t)
        loss.backward(retain_graph=True)
        return loss

    return criterion


def own_backward_that_frees(_: nn.Module, __: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        loss = F.mse_loss(y, t)
        loss.backward()
        return loss

    return criterion


def own_backward_of_a_sum(_: nn.Module, __: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, _: Tensor) -> Tensor:
        loss = y.sum()
        loss.backward()
        return loss

    return criterion


def hook_on_the_output(_: nn.Module, seen: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        y.register_hook(lambda grad: seen.setdefault("at", []).append(grad.clone()))
        y.register_hook(lambda grad: 2 * grad)
        return F.mse_loss(y, t)

    return criterion


def hook_between(_: nn.Module, seen: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        difference = y - t
        difference.register_hook(lambda grad: grad.sign())
        return difference.square().mean()

    return criterion


def retained_gradient(_: nn.Module, seen: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        y.retain_grad()
        seen["later"] = _Later(lambda: y.grad)
        return F.mse_loss(y, t)

    return criterion


def hook_on_the_node(_: nn.Module, seen: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        y.grad_fn.register_hook(lambda grads, _: seen.update(count=len(grads)))
        y.grad_fn.register_prehook(lambda grads: (3 * grads[0], *grads[1:]))
        return F.mse_loss(y, t)

    return criterion


def hook_on_a_parameter(network: nn.Module, _: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        network[0].weight.register_hook(lambda grad: 2 * grad)
        return F.mse_loss(y, t)

    return criterion


def hook_after_accumulation(network: nn.Module, seen: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        network[0].weight.register_post_accumulate_grad_hook(
            lambda p: seen.update(then=p.grad.clone())
        )
        return F.mse_loss(y, t)

    return criterion


def a_frozen_parameter(network: nn.Module, _: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        network[0].weight.requires_grad_(False)
        return F.mse_loss(y, t)

    return criterion


def a_changed_parameter(network: nn.Module, _: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            network[2].weight.mul_(2)
        return F.mse_loss(y, t)

    return criterion


def another_parameter(network: nn.Module, _: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        network[0].weight = nn.Parameter(torch.zeros(7, 5))
        return F.mse_loss(y, t)

    return criterion


def a_gradient_that_is_there(network: nn.Module, _: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        for p in network.parameters():
            p.grad = torch.full_like(p, 0.1)
        return F.mse_loss(y, t)

    return criterion


def random_numbers(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: F.mse_loss(F.dropout(y), t + torch.randn(4, 3))


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


class _Nothing(_Doubled):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # type: ignore[override]
        return None


class _Failing(_Doubled):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ToldError("backward")


def own_function(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: F.mse_loss(_Doubled.apply(y), t)


def function_without_gradient(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: F.mse_loss(_Nothing.apply(y), t)


def function_that_fails(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: F.mse_loss(_Failing.apply(y), t)


def checkpointed(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: checkpoint(lambda v: (v.exp() - t).square().mean(), y, use_reentrant=True)


def several_ways(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: (y.exp() * y).sum() + (y[0] * y[1]).sum() + y.T.matmul(t).norm()


def many_nodes(_: nn.Module, __: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        for _ in range(100):
            y = y * 0.99 + t
        return y.mean()

    return criterion


def views(_: nn.Module, __: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        y[:, 1].mul_(2)
        y.T[0].add_(t[:, 0])
        return y.square().mean()

    return criterion


def detached_in_part(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: F.mse_loss(y, y.detach() + t)


def under_no_grad(_: nn.Module, __: dict[str, Any]) -> Criterion:
    @torch.no_grad()
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        return F.mse_loss(y, t)

    return criterion


def under_autocast(_: nn.Module, __: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.mse_loss(y @ t.T, torch.ones(4, 4, dtype=torch.bfloat16))

    return criterion


def under_hooks_on_saved_tensors(_: nn.Module, seen: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda v: 0.5 * v, lambda v: v):
            return F.mse_loss(y, t)

    return criterion


def anomaly_mode(_: nn.Module, __: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        with torch.autograd.set_detect_anomaly(True):
            return F.mse_loss(y, t)

    return criterion


def scaled(_: nn.Module, __: dict[str, Any]) -> Criterion:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return lambda y, t: scaler.scale(F.mse_loss(y, t))


def another_dtype(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: F.mse_loss(y.double(), t.double())


def another_shape(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: F.mse_loss(y, t)[None, None]


def infinite(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: (y / 0).sum()


def raises(_: nn.Module, __: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        raise ToldError("forward")

    return criterion


def no_scalar(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: y - t


def no_tensor(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: 1.0


def nothing(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: None


def a_constant(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: t.sum()


def another_leaf(_: nn.Module, seen: dict[str, Any]) -> Criterion:
    leaf = torch.ones(3, requires_grad=True)
    seen["later"] = _Later(lambda: leaf.grad)
    return lambda y, t: (leaf * t).sum()


def a_leaf_itself(_: nn.Module, seen: dict[str, Any]) -> Criterion:
    leaf = torch.ones((), requires_grad=True)
    seen["later"] = _Later(lambda: leaf.grad)
    return lambda y, t: leaf


def a_complex_number(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: torch.complex(y, t).sum()


def the_graph_is_kept(_: nn.Module, seen: dict[str, Any]) -> Criterion:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        loss = F.mse_loss(y, t)

        def again() -> Tensor:
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                loss.backward()
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                y.sum().backward()
            return torch.ones(())

        seen["later"] = _Later(again)
        return loss

    return criterion


class _Own(Tensor):
    pass


def a_class_of_its_own(_: nn.Module, __: dict[str, Any]) -> Criterion:
    return lambda y, t: F.mse_loss(y.as_subclass(_Own), t)


CRITERIA = [
    in_place,
    weight_decay,
    weight_decay_of_one,
    own_parameters,
    the_network_again,
    part_of_the_network_again,
    gradient_penalty,
    gradients_of_the_parameters,
    own_backward,
    own_backward_that_frees,
    own_backward_of_a_sum,
    hook_on_the_output,
    hook_between,
    retained_gradient,
    hook_on_the_node,
    hook_on_a_parameter,
    hook_after_accumulation,
    a_frozen_parameter,
    a_changed_parameter,
    another_parameter,
    a_gradient_that_is_there,
    random_numbers,
    own_function,
    function_without_gradient,
    function_that_fails,
    checkpointed,
    several_ways,
    many_nodes,
    views,
    detached_in_part,
    under_no_grad,
    under_autocast,
    under_hooks_on_saved_tensors,
    anomaly_mode,
    scaled,
    another_dtype,
    another_shape,
    infinite,
    raises,
    no_scalar,
    no_tensor,
    nothing,
    a_constant,
    another_leaf,
    a_leaf_itself,
    a_complex_number,
    the_graph_is_kept,
    a_class_of_its_own,
]


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("there", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("make", CRITERIA)
def test_whatever_a_criterion_does(make, there):
    network = made()
    if there:
        for p in network.parameters():
            p.grad = torch.linspace(-1, 1, p.numel()).view_as(p)
    seen = check(make, network)
    assert seen["calls"] == 1


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_any_number_of_rows(rows):
    draw = drawer("rows", torch.float32)
    network = made(sizes=(5, 129, 64, 3))
    check(lambda *_: lambda y, t: (y - t).square().sum(), network, draw(rows, 5), draw(rows, 3))


def test_the_output_itself_is_a_loss():
    draw = drawer("itself", torch.float32)
    check(lambda *_: lambda y, _: y, made(sizes=(5, 7, 1)), draw(1, 5), draw(1, 1))


def test_a_target_of_any_type():
    target = {"mean": torch.ones(3), "scale": 2.0}
    check(
        lambda *_: lambda y, t: ((y - t["mean"]) / t["scale"]).square().mean(),
        target=target,
    )


def test_a_tied_parameter():
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    network = FusedSequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 3))
    check(lambda *_: lambda y, t: (y - t).square().mean(), network)


def calls_of(function: Callable[[], object], name: str) -> int:
    """How often Python functions of this name were called meanwhile."""
    count = 0

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_name == name

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "criterion",
    [
        lambda y, t: (y - t).square().mean(),
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0])),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.PoissonNLLLoss(),
    ],
    ids=["function", "weights", "smoothing", "another loss"],
)
def test_it_does_without_the_engine_for_the_parameters(criterion):
    network, draw = made(), drawer("engine", torch.float32)
    x, target = draw(4, 5), draw(4, 3)
    if isinstance(criterion, nn.CrossEntropyLoss):
        target = target.argmax(1)
    forward_backward(network, criterion, x, target)
    assert calls_of(lambda: forward_backward(network, criterion, x, target), "backward") == 0
    assert calls_of(lambda: three_lines(network, criterion, x, target), "backward") > 0


@pytest.mark.parametrize("name", ["a function", "weight decay", "weights"])
def test_it_trains_to_the_very_same_parameters(name):
    networks = [made(), made()]
    losses: list[Tensor] = []
    for network, one_call in zip(networks, (True, False), strict=True):
        optimizer = Adam(network.parameters(), lr=0.01)
        criterion: Criterion = {
            "a function": lambda y, t: (y - t).abs().pow(1.5).mean(),
            "weight decay": weight_decay(network, {}),
            "weights": nn.BCEWithLogitsLoss(pos_weight=_weights()),
        }[name]
        for number in range(100):
            draw = torch.Generator().manual_seed(number)
            x, target = torch.randn(8, 5, generator=draw), torch.rand(8, 3, generator=draw)
            if one_call:
                losses.append(training_step(network, criterion, optimizer, x, target))
            else:
                optimizer.zero_grad()
                losses.append(three_lines(network, criterion, x, target))
                optimizer.step()
    assert all(map(same_bits, losses[:100], losses[100:]))
    assert all(map(same_bits, networks[0].parameters(), networks[1].parameters()))
