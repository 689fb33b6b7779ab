"""``forward_backward`` against the three lines that it stands for, to the bit.

Whether a call made a graph is seen from outside: the engine numbers the nodes of graphs.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from common import Calls
from samples import (
    ACTIVATIONS,
    KERNEL_DTYPES,
    LAYOUTS,
    OVERLAPPING,
    drawer,
    num_threads,
    outcome,
    same_bits,
)
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

from mylayers import CenteredLayer, FusedSequential, MyLinear, forward_backward, optimize

ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}
CRITERIA: dict[str, Callable[..., Tensor]] = {
    **{
        f"{cls.__name__}-{reduction}": cls(reduction=reduction)
        for cls in (
            nn.MSELoss,
            nn.L1Loss,
            nn.SmoothL1Loss,
            nn.HuberLoss,
            nn.BCELoss,
            nn.BCEWithLogitsLoss,
            nn.NLLLoss,
            nn.CrossEntropyLoss,
        )
        for reduction in ("mean", "sum")
    },
    "SmoothL1Loss-beta": nn.SmoothL1Loss(beta=0.25),
    "SmoothL1Loss-beta 0": nn.SmoothL1Loss(beta=0),
    "NLLLoss-ignored": nn.NLLLoss(ignore_index=1),
    **{
        f"KLDivLoss-{reduction}-{log_target}": nn.KLDivLoss(
            reduction=reduction, log_target=log_target
        )
        for reduction in ("sum", "batchmean")
        for log_target in (False, True)
    },
    "HuberLoss-delta": nn.HuberLoss(delta=0.5),
    "CrossEntropyLoss-ignored": nn.CrossEntropyLoss(ignore_index=1),
    "mse_loss": F.mse_loss,
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
    "cross_entropy": F.cross_entropy,
    "l1_loss": F.l1_loss,
    "binary_cross_entropy": F.binary_cross_entropy,
    "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
    "nll_loss": F.nll_loss,
}
every_criterion = pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d)[6:])


def three_lines(
    network: nn.Module, criterion: Callable[..., Tensor], x: Tensor, target: Tensor
) -> Tensor:
    loss = criterion(network(x), target)
    loss.backward()
    return loss.detach()


@contextlib.contextmanager
def graphs() -> Iterator[list[int]]:
    """The numbers of the nodes that are made meanwhile."""
    made: list[int] = []
    first = torch._C._autograd._get_sequence_nr()
    yield made
    made.extend(range(first, torch._C._autograd._get_sequence_nr()))


def last_layers(criterion: Callable[..., Tensor] | None) -> list[nn.Module]:
    """What makes a network's output one that the criterion takes."""
    is_bce = isinstance(criterion, nn.BCELoss) or criterion is F.binary_cross_entropy
    return [nn.Sigmoid()] if is_bce else []


def target_for(criterion: Callable[..., Tensor] | None, values: Tensor) -> Tensor:
    """Of rows of any values, those that the criterion takes."""
    name = getattr(criterion, "__name__", type(criterion).__name__).lower().replace("_", "")
    if name.startswith(("crossentropy", "nll")):
        return values.argmax(1)
    if name.startswith(("bce", "binary", "kl")):
        return values.sigmoid()
    return values


def made(
    activation: str = "tanh",
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, ...] = (5, 7, 6, 3),
    criterion: Callable[..., Tensor] | None = None,
) -> FusedSequential:
    """A network that has been called, so that what can be prepared is."""
    torch.manual_seed(sum(sizes))
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, dtype=dtype), ACTIVATION_MODULES[activation]()]
    network = FusedSequential(*layers[:-1], *last_layers(criterion))
    network(torch.zeros(2, sizes[0], dtype=dtype))
    return network


def twin(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network)


def data(
    criterion: Callable[..., Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    rows: int = 4,
) -> tuple[Tensor, Tensor]:
    draw = drawer("training", dtype)
    return draw(rows, 5), target_for(criterion, draw(rows, 3))


def grads(network: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in network.parameters()]


def assert_same(network: nn.Module, other: nn.Module) -> None:
    for ours, theirs in zip(grads(network), grads(other), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert same_bits(ours, theirs)
            assert ours.stride() == theirs.stride()
            assert not ours.requires_grad


# ---- without a graph -------------------------------------------------------------------


@pytest.mark.grid
@every_dtype
@every_criterion
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name is not None])
def test_loss_and_gradients_have_the_bits_of_the_three_lines(activation, criterion, dtype):
    network = made(activation, dtype, criterion=criterion)
    other, (x, target) = twin(network), data(criterion, dtype)
    with graphs() as saved:
        loss = forward_backward(network, criterion, x, target)
    assert not saved
    assert same_bits(loss, three_lines(other, criterion, x, target))
    assert loss.grad_fn is None
    assert not loss.requires_grad
    assert all(grad is not None for grad in grads(network))
    assert_same(network, other)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 33, 700])
def test_any_number_of_rows(rows, threads):
    network = made(sizes=(5, 129, 64, 3))
    other, (x, target) = twin(network), data(rows=rows)
    criterion = nn.MSELoss(reduction="sum")
    with num_threads(threads), graphs() as saved:
        loss = forward_backward(network, criterion, x, target)
    assert not saved
    assert same_bits(loss, three_lines(other, criterion, x, target))
    assert_same(network, other)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: FusedSequential(nn.Linear(5, 3)),
    "no bias": lambda: FusedSequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)),
    "MyLinear": lambda: FusedSequential(MyLinear(5, 4), MyLinear(4, 3, activation=None)),
    "center": lambda: FusedSequential(MyLinear(5, 4), CenteredLayer(), nn.Linear(4, 3)),
    "flatten": lambda: FusedSequential(nn.Flatten(), nn.Linear(5, 3), nn.Tanh()),
    "dropout in evaluation": lambda: FusedSequential(nn.Linear(5, 3), nn.Dropout()).eval(),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_any_chain(make):
    network, (x, target) = make(), data()
    network(x)
    other = twin(network)
    with graphs() as saved:
        loss = forward_backward(network, F.mse_loss, x, target)
    assert not saved
    assert same_bits(loss, three_lines(other, F.mse_loss, x, target))
    assert_same(network, other)


def test_a_model_that_was_optimized():
    network = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    optimize(network)
    x, target = data()
    other = twin(network)
    for _ in range(2):  # the first call prepares
        with graphs() as saved:
            forward_backward(network, F.mse_loss, x, target)
        three_lines(other, F.mse_loss, x, target)
        assert_same(network, other)
    assert not saved


def test_gradients_are_added_to_those_that_are_there():
    network = made()
    other, (x, target) = twin(network), data()
    for step in (forward_backward, forward_backward, three_lines):
        step(network, F.mse_loss, x, target)
    for _ in range(3):
        three_lines(other, F.mse_loss, x, target)
    assert_same(network, other)
    kept = [parameter.grad for parameter in network.parameters()]
    forward_backward(network, F.mse_loss, x, target)
    assert all(a is b for a, b in zip(kept, grads(network), strict=True))  # in place, as ever


def test_a_frozen_parameter_gets_no_gradient():
    network = made()
    network[0].weight.requires_grad_(False)
    network[2].bias.requires_grad_(False)
    other, (x, target) = twin(network), data()
    with graphs() as saved:
        forward_backward(network, F.mse_loss, x, target)
    assert not saved
    three_lines(other, F.mse_loss, x, target)
    assert network[0].weight.grad is None
    assert network[2].bias.grad is None
    assert_same(network, other)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in OVERLAPPING])
def test_parameters_and_data_of_any_strides(layout):
    network, draw = made(), drawer(layout, torch.float32)
    for layer in (network[0], network[2]):
        layer.weight = nn.Parameter(LAYOUTS[layout](draw, tuple(layer.weight.shape)))
    x, target = LAYOUTS[layout](draw, (4, 5)), LAYOUTS[layout](draw, (4, 3))
    other = FusedSequential(*map(copy.copy, network))
    for layer in other:
        layer._parameters = {
            name: nn.Parameter(p.detach()) for name, p in layer._parameters.items()
        }
    for _ in range(2):
        with graphs() as saved:
            loss = forward_backward(network, F.mse_loss, x, target)
        assert bool(saved) == (layout == "negated")  # which the dispatcher resolves
        assert same_bits(loss, three_lines(other, F.mse_loss, x, target))
        assert_same(network, other)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_trains_to_the_very_same_parameters(make):
    network = made("relu")
    other, (x, target) = twin(network), data(F.cross_entropy, rows=32)
    losses = []
    for net, step in ((network, forward_backward), (other, three_lines)):
        optimizer = make(net.parameters())
        for _ in range(30):
            optimizer.zero_grad()
            losses.append(step(net, F.cross_entropy, x, target))
            optimizer.step()
    assert losses[29] < 0.9 * losses[0]
    assert same_bits(losses[29], losses[59])
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert same_bits(ours, theirs)


def test_many_threads_train_networks_of_their_own():
    start, (x, target) = made(), data(rows=64)

    def trained(step: Callable[..., Tensor]) -> nn.Module:
        network = twin(start)
        for _ in range(20):
            step(network, F.mse_loss, x, target)
        return network

    expected = trained(three_lines)
    with ThreadPoolExecutor(4) as pool:
        for network in pool.map(trained, [forward_backward] * 16):
            assert_same(network, expected)


def test_nothing_is_written_to_but_gradients():
    network, (x, target) = made(), data()
    before = [t.clone() for t in (x, target, *network.parameters())]
    forward_backward(network, F.mse_loss, x, target)
    for tensor, value in zip((x, target, *network.parameters()), before, strict=True):
        assert same_bits(tensor, value)


# ---- with a graph ----------------------------------------------------------------------
#
# Each gives a network, a criterion and its data that a graph is made for.


def doubled_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def hooked_parameter(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    network[0].weight.register_hook(lambda grad: 2 * grad)
    return network, F.mse_loss, x, target


def hooked_after_accumulation(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    def double(parameter: Tensor) -> None:
        parameter.grad.mul_(2)

    network[0].weight.register_post_accumulate_grad_hook(double)
    return network, F.mse_loss, x, target


def hooked_accumulator(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    def count(*_: Any) -> None:
        network[0].bias.data.add_(1)

    weight = network[0].weight
    accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(count)
    network.kept = accumulator
    return network, F.mse_loss, x, target


def hooked_layer(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    network[0].register_full_backward_hook(lambda *_: None)
    return network, F.mse_loss, x, target


def hooked_network(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    network.register_forward_hook(doubled_output)
    return network, F.mse_loss, x, target


def hooked_criterion(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    criterion = nn.MSELoss()
    criterion.register_forward_hook(doubled_output)
    return network, criterion, x, target


def own_criterion(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    class Doubled(nn.MSELoss):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(output, target)

    return network, Doubled(), x, target


def replaced_criterion(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    criterion = nn.MSELoss()
    criterion.forward = lambda output, target: (output - target).abs().sum()
    return network, criterion, x, target


def own_forward(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    class Doubled(FusedSequential):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    doubled = Doubled(*network)
    doubled(x)
    return doubled, F.mse_loss, x, target


def tied(_: nn.Module, x: Tensor, target: Tensor) -> Any:
    layer = nn.Linear(5, 5)
    net = FusedSequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 3))
    net(x)
    return net, F.mse_loss, x, target


def parametrized(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    parametrizations.weight_norm(network[0])
    return network, F.mse_loss, x, target


def not_one_chain(_: nn.Module, x: Tensor, target: Tensor) -> Any:
    net = FusedSequential(nn.Linear(5, 4), nn.Softshrink(), nn.Linear(4, 3))
    net(x)
    return net, F.mse_loss, x, target


def stock(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    return nn.Sequential(*network), F.mse_loss, x, target


def computed_weight(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    network[0]._parameters["weight"] = network[2].weight[:5, :5].sum() * torch.ones(7, 5)
    return network, F.mse_loss, x, target


def gradient_of_another_dtype(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    network[0].weight.grad_dtype = torch.float64
    return network, F.mse_loss, x, target


def input_that_learns(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    return network, F.mse_loss, x.requires_grad_(), target


def target_that_learns(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    return network, F.mse_loss, x, target.requires_grad_()


def target_of_another_dtype(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    return network, F.mse_loss, x, target.half()


def target_that_is_broadcast(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    return network, F.mse_loss, x, target[:1]


def probabilities(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    return network, F.cross_entropy, x, target.softmax(1)


def weighted_classes(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    return network, criterion, x, target.argmax(1)


def smoothed_labels(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    return network, nn.CrossEntropyLoss(label_smoothing=0.1), x, target.argmax(1)


def any_function(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    return network, lambda output, target: (output - target).square().mean(), x, target


def a_mean_that_warns(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    return network, nn.KLDivLoss(), x, target.sigmoid()


def weighted_logits(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]))
    return network, criterion, x, target.sigmoid()


def weights_that_came_later(network: nn.Module, x: Tensor, target: Tensor) -> Any:
    criterion = nn.BCEWithLogitsLoss()
    forward_backward(network, criterion, x, target.sigmoid())
    network.zero_grad()
    criterion.pos_weight = torch.tensor([1.0, 2.0, 3.0])
    return network, criterion, x, target.sigmoid()


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize(
    "change",
    [
        hooked_parameter,
        hooked_after_accumulation,
        hooked_accumulator,
        hooked_layer,
        hooked_network,
        hooked_criterion,
        own_criterion,
        replaced_criterion,
        own_forward,
        tied,
        parametrized,
        not_one_chain,
        stock,
        computed_weight,
        gradient_of_another_dtype,
        input_that_learns,
        target_that_learns,
        target_of_another_dtype,
        target_that_is_broadcast,
        probabilities,
        weighted_classes,
        smoothed_labels,
        any_function,
        a_mean_that_warns,
        weighted_logits,
        weights_that_came_later,
    ],
)
def test_what_needs_a_graph_gets_one(change):
    results = []
    for step in (forward_backward, three_lines):
        torch.manual_seed(0)
        network, criterion, x, target = change(made(), *data())
        with graphs() as saved:
            loss = step(network, criterion, x, target)
        assert saved
        tensors = (x, target, *network.parameters())
        results.append(
            [loss, *(t.detach() for t in tensors), *(t.grad for t in tensors if t.is_leaf)]
        )
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or same_bits(ours, theirs)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {
    "dispatch mode": Calls,
    "function mode": Watching,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": torch.autograd.detect_anomaly,
    "profiler": torch.autograd.profiler.profile,
    "hooks on saved tensors": lambda: saved_tensors_hooks(lambda t: t * 0.5, lambda t: t),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_modes_that_watch_or_change_the_graph_see_it(mode):
    network = made()
    other, (x, target) = twin(network), data()
    with mode(), graphs() as saved:
        loss = forward_backward(network, nn.MSELoss(), x, target)
    assert saved
    with mode():
        assert same_bits(loss, three_lines(other, nn.MSELoss(), x, target))
    assert_same(network, other)


# Dynamo reads .grad of the loss.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_in_a_compiled_function():
    network = made()
    other, (x, target) = twin(network), data()
    step = torch.compile(lambda *args: forward_backward(network, *args), backend="aot_eager")
    loss = step(nn.MSELoss(), x, target)
    assert torch.allclose(loss, three_lines(other, nn.MSELoss(), x, target))
    for ours, theirs in zip(grads(network), grads(other), strict=True):
        assert torch.allclose(ours, theirs)


# It reads .grad of what is no leaf, too.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_autograd_captures_the_step():
    network, captured = made(), []
    with compiled_autograd._enable(lambda graph: captured.append(graph) or graph):
        forward_backward(network, nn.MSELoss(), *data())
    assert len(captured) == 1


def test_on_the_meta_device():
    network = made().to("meta")
    loss = forward_backward(network, nn.MSELoss(), *(t.to("meta") for t in data()))
    assert loss.is_meta
    assert all(grad.is_meta for grad in grads(network))


# ---- errors ----------------------------------------------------------------------------

ERRORS: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "input sizes": lambda net, x, t: (net, F.mse_loss, x[:, :4], t),
    "input dtype": lambda net, x, t: (net, F.mse_loss, x.double(), t),
    "no tensor": lambda net, x, t: (net, F.mse_loss, x.tolist(), t),
    "target sizes": lambda net, x, t: (net, F.mse_loss, x, t[:3]),
    "no target": lambda net, x, _: (net, F.mse_loss, x, None),
    "class out of range": lambda net, x, _: (net, F.cross_entropy, x, torch.tensor([0, 1, 2, 3])),
    "number of classes": lambda net, x, _: (net, F.cross_entropy, x, torch.tensor([0, 1, 2])),
    "int32 classes": lambda net, x, t: (net, F.cross_entropy, x, t.argmax(1).int()),
    "no reduction": lambda net, x, t: (net, nn.MSELoss(reduction="none"), x, t),
    "unknown reduction": lambda net, x, t: (net, nn.MSELoss(reduction="max"), x, t),
    "negative delta": lambda net, x, t: (net, nn.HuberLoss(delta=-1.0), x, t),
    "huge delta": lambda net, x, t: (net, nn.HuberLoss(delta=10**400), x, t),
    "huge beta": lambda net, x, t: (net, nn.SmoothL1Loss(beta=10**400), x, t),
    "huge ignore_index": lambda net, x, t: (
        net,
        nn.CrossEntropyLoss(ignore_index=2**70),
        x,
        t.argmax(1),
    ),
    "BCE of what is no probability": lambda net, x, t: (net, nn.BCELoss(), 100 * x, t.sigmoid()),
    "BCE sizes": lambda net, x, t: (net, nn.BCEWithLogitsLoss(), x, t[:3]),
    "NLL class out of range": lambda net, x, t: (net, nn.NLLLoss(), x, t.argmax(1) + 1),
    "negative beta": lambda net, x, t: (net, nn.SmoothL1Loss(beta=-1.0), x, t),
    "nothing to learn": lambda net, x, t: (net.requires_grad_(False), F.mse_loss, x, t),
    "no criterion": lambda net, x, t: (net, None, x, t),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("arguments", ERRORS.values(), ids=ERRORS)
def test_errors_are_those_of_the_three_lines_and_leave_no_gradient(arguments):
    network = made()
    given = arguments(network, *data())
    assert outcome(forward_backward, *given) == outcome(three_lines, *given)
    assert grads(network) == [None] * 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_there_is_nothing_to_learn(mode):
    network, (x, target) = made(), data()
    with mode(), pytest.raises(RuntimeError, match="does not require grad"):
        forward_backward(network, nn.MSELoss(), x, target)


@pytest.mark.parametrize("which", [0, 1])
def test_inference_tensors_are_refused_as_ever(which):
    network, tensors = made(), list(data())
    with torch.inference_mode():
        tensors[which] = tensors[which].clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        forward_backward(network, nn.MSELoss(), *tensors)
