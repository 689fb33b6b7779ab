"""optimize and restore: models built from stock modules, fused in place and back."""

import copy
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from chains import assert_close
from common import COPIES, Calls
from samples import drawer, same_bits
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrizations, prune

import mylayers
from mylayers import CenteredLayer, FusedSequential, LazyMyLinear, MyLinear, Report

# ---- models ----------------------------------------------------------------------------


class MLP(nn.Sequential):
    """In torchvision's way: a list of layers handed to nn.Sequential."""

    def __init__(self, in_channels: int, hidden: list[int], dropout: float) -> None:
        layers: list[nn.Module] = []
        for units in hidden[:-1]:
            layers += [
                nn.Linear(in_channels, units),
                nn.GroupNorm(1, units),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
            ]
            in_channels = units
        super().__init__(*layers, nn.Linear(in_channels, hidden[-1]), nn.Dropout(dropout))
        self.hidden = hidden


class Doubled(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Called(nn.Sequential):
    def __call__(self, *args: Any) -> Any:
        return 2 * super().__call__(*args)


class Reversed(nn.Sequential):
    """Its forward is nn.Sequential's, over other children."""

    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(self._modules.values()))


class Net(nn.Module):
    """A body, a head beside it, and arithmetic that no rewriting touches."""

    def __init__(self, body: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(4, 2) if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x - x.mean())


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(27, 8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def two_layers() -> nn.Sequential:
    return nn.Sequential(linear(), nn.Tanh())


def tied() -> nn.Sequential:
    net = nn.Sequential(linear(), nn.Tanh(), linear(), nn.Sequential(linear(), nn.Sigmoid()))
    net[2].weight = net[3][0].weight = net[0].weight
    return net


def shared() -> Net:
    block = two_layers()
    return Net(nn.Sequential(block, nn.GroupNorm(1, 4), block), block)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda m, args, y: y + 1)  # noqa: ARG005
    return layer


def replaced(net: nn.Module) -> nn.Module:
    own = net.forward
    net.forward = lambda x: 2 * own(x)
    return net


NO_KERNEL = "{0} has no fused kernel".format
OUTSIDE = "it is not in an nn.Sequential that fuses"
HEAD = "Net.forward is not followed there: what it does depends on values"
ALONE_IN_POLICY = "ActorCriticPolicy.forward has no layer to fuse it with"
OF_ITS_CLASS = (
    "ActorCriticPolicy.forward is not followed there: "
    "self._get_action_dist_from_latent is of its class"
)
COMPUTED = "its weight or bias is computed, not a parameter"
ALONE = "there is no layer to fuse it with"
IN_TRAINING = "dropout is random in training"

Row = tuple[str, str, str]


class Model(NamedTuple):
    """How to make a model, and the report of optimizing it in training and eval mode."""

    make: Callable[[], nn.Module]
    training: list[Row]
    eval: list[Row] | None = None  # as in training
    shape: tuple[int, ...] = (6, 4)

    def made(self, training: bool = True) -> nn.Module:
        torch.manual_seed(0)
        return self.make().train(training)

    def rows(self, training: bool) -> list[Row]:
        return self.training if training or self.eval is None else self.eval

    def input(self) -> Tensor:
        return drawer("input", torch.float32)(*self.shape)


MODELS: dict[str, Model] = {
    "plain": Model(
        lambda: nn.Sequential(linear(), nn.ReLU(), linear()), [("", "Linear + ReLU + Linear", "")]
    ),
    "torchvision's MLP": Model(
        lambda: MLP(4, [8, 6, 3], 0.2),
        [
            ("", "Linear", ""),
            ("1", "GroupNorm", NO_KERNEL("GroupNorm")),
            ("2", "ReLU", "it works in place on what it is given"),
            ("3", "Dropout", IN_TRAINING),
            ("", "Linear", ""),
            ("5", "GroupNorm", NO_KERNEL("GroupNorm")),
            ("6", "ReLU", "it works in place on what it is given"),
            ("7", "Dropout", IN_TRAINING),
            ("", "Linear", ""),
            ("9", "Dropout", IN_TRAINING),
        ],
        [
            ("", "Linear", ""),
            ("1", "GroupNorm", NO_KERNEL("GroupNorm")),
            ("2", "ReLU", "it works in place on what it is given"),
            ("", "Dropout + Linear", ""),
            ("5", "GroupNorm", NO_KERNEL("GroupNorm")),
            ("6", "ReLU", "it works in place on what it is given"),
            ("", "Dropout + Linear + Dropout", ""),
        ],
    ),
    "at every depth": Model(
        lambda: nn.Sequential(nn.Sequential(nn.Sequential(linear(), nn.ELU()), nn.GELU())),
        [("0.0", "Linear + ELU", "")],
    ),
    "below another model": Model(
        lambda: Net(nn.Sequential(linear(), nn.Sigmoid(), linear())),
        [("body", "Linear + Sigmoid + Linear", ""), ("head", "Linear", HEAD)],
    ),
    "convolutions with a classifier": Model(
        ConvNet,
        [
            ("classifier", "Flatten + Linear + ReLU", ""),
            ("classifier.3", "Dropout", IN_TRAINING),
            ("classifier", "Linear", ""),
        ],
        [("classifier", "Flatten + Linear + ReLU + Dropout + Linear", "")],
        (2, 1, 8, 8),
    ),
    "a module in several places": Model(shared, [("body.0", "Linear + Tanh", "")]),
    "own forward": Model(
        lambda: Net(Doubled(linear(), nn.Tanh())),
        [("body", "Linear + Tanh", ""), ("head", "Linear", HEAD)],
    ),
    "own call": Model(
        lambda: Net(Called(linear(), nn.Tanh())),
        [("body", "Called", "Called overrides Sequential.__call__"), ("head", "Linear", HEAD)],
    ),
    "forward replaced": Model(
        lambda: Net(replaced(two_layers())),
        [("body", "Sequential", "its forward was replaced"), ("head", "Linear", HEAD)],
    ),
    "hooked layer": Model(
        lambda: nn.Sequential(linear(), hooked(nn.Tanh()), linear(), hooked(linear())),
        [
            ("", "Linear", ""),
            ("1", "Tanh", "it has hooks"),
            ("", "Linear", ""),
            ("3", "Linear", "it has hooks"),
        ],
    ),
    "hooked and alone": Model(
        lambda: Net(nn.Sequential(hooked(linear()))),
        [("body.0", "Linear", "it has hooks"), ("head", "Linear", HEAD)],
    ),
    "hooked network": Model(lambda: hooked(two_layers()), [("", "Linear + Tanh", "")]),
    "parametrised": Model(
        lambda: nn.Sequential(
            linear(),
            parametrizations.weight_norm(linear()),
            nn.Tanh(),
            prune.identity(linear(), "bias"),
        ),
        [
            ("", "Linear", ""),
            ("1", "ParametrizedLinear", COMPUTED),
            ("2", "Tanh", ALONE),
            ("3", "Linear", "it has hooks"),
        ],
    ),
    "other alpha": Model(
        lambda: nn.Sequential(linear(), nn.ELU(-2.0)),
        [("", "Linear", ""), ("1", "ELU", "its alpha is -2.0, no number from 0.0001 to 100")],
    ),
    "ours": Model(
        lambda: nn.Sequential(
            MyLinear(4, 5, activation="tanh"), CenteredLayer(0), MyLinear(5, 4, bias=False)
        ),
        [("", "MyLinear + CenteredLayer + MyLinear", "")],
    ),
    "ours outside": Model(lambda: Net(nn.Identity(), MyLinear(4, 4)), [("head", "MyLinear", HEAD)]),
    "one activation and layers without a kernel": Model(
        lambda: nn.Sequential(nn.Tanh(), nn.GroupNorm(1, 4), nn.Softmax(-1)), []
    ),
    "tied": Model(
        lambda: tied(),
        [
            ("", "Linear + Tanh + Linear", ""),
            ("3", "Linear + Sigmoid", ""),
        ],
    ),
    "already fused by hand": Model(
        lambda: Net(FusedSequential(linear(), nn.Tanh())),
        [("body", "Linear + Tanh", ""), ("head", "Linear", HEAD)],
    ),
    "transformer": Model(
        lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
        [
            ("self_attn.out_proj", "NonDynamicallyQuantizableLinear", OUTSIDE),
            ("linear1", "Linear", OUTSIDE),
            ("linear2", "Linear", OUTSIDE),
        ],
        shape=(2, 3, 4),
    ),
    "other children order": Model(
        lambda: Reversed(nn.Tanh(), linear(), nn.Linear(4, 4)),
        [("", "Reversed", "Reversed overrides Sequential.__iter__")],
    ),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
either_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


# ---- yardsticks ------------------------------------------------------------------------


def results(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Output and the gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    parameters = [p for p in net.parameters() if p.requires_grad]
    torch.manual_seed(0)  # dropout
    y = net(x * 1)
    return [y.detach(), *torch.autograd.grad(y.pow(3).sum(), [x, *parameters], allow_unused=True)]


def rows_of(report: Report) -> list[Row]:
    return [(f.path, f.layers, f.reason) for f in report.findings]


def operator_calls(net: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), Calls() as calls:
        net(x)
    return [name for name, _ in calls.seen].count("sequential")


def anatomy(net: nn.Module) -> list[Any]:
    """All that a round trip must leave: objects, classes, names, attributes, modes."""
    return [
        [(name, id(m), type(m), m.training, sorted(vars(m))) for name, m in net.named_modules()],
        [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in net.named_parameters()],
        [(name, id(b)) for name, b in net.named_buffers()],
        list(net.state_dict()),
    ]


# ---- the round trip --------------------------------------------------------------------


@pytest.mark.grid
@either_mode
@every_model
def test_the_report_has_a_row_for_everything(model, training):
    report = mylayers.optimize(model.made(training))
    assert rows_of(report) == model.rows(training)
    assert [f for f in report.findings if f.fused] == list(report.fused)
    assert [f for f in report.findings if not f.fused] == list(report.unfused)
    assert all(f.fused == (f.reason == "") for f in report.findings)


@pytest.mark.grid
@either_mode
@every_model
def test_an_optimized_model_computes_what_it_did_and_is_restored_whole(model, training):
    net, x = model.made(training), model.input()
    before, state = anatomy(net), {k: v.clone() for k, v in net.state_dict().items()}
    own_classes = [type(m) for m in net.modules()]
    expected = results(net, x)
    net.load_state_dict(state)  # batch norm counts calls

    report = mylayers.optimize(net)
    assert anatomy(net)[1:] == before[1:]
    assert all(isinstance(m, cls) for m, cls in zip(net.modules(), own_classes, strict=True))
    if not any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        for _ in range(2):
            assert_close(results(net, x), expected)
        assert (operator_calls(net, x) > 0) == bool(report.fused)
    else:
        assert_close(results(net, x), expected)
        net.load_state_dict(state)
    assert list(net.state_dict()) == list(state)
    assert all(same_bits(v, state[k]) for k, v in net.state_dict().items() if v.is_floating_point())

    mylayers.restore(net)
    assert anatomy(net) == before
    assert_close(results(net, x), expected)


@every_model
def test_optimizing_twice_is_optimizing_once(model):
    net = model.made()
    first = mylayers.optimize(net)
    after = anatomy(net)
    second = mylayers.optimize(net)
    assert anatomy(net) == after
    assert second.fused == first.fused
    assert [f.path for f in second.findings] == [f.path for f in first.findings]


@every_model
def test_restore_names_what_optimize_changed_and_leaves_all_else(model):
    net = model.made()
    before = anatomy(net)
    assert mylayers.restore(net) == ()
    assert anatomy(net) == before
    report = mylayers.optimize(net)
    changed = dict.fromkeys(f.path for f in report.fused)
    if any(type(m) is FusedSequential for m in model.made().modules()):
        changed = {}
    assert mylayers.restore(net) == tuple(changed)
    assert mylayers.restore(net) == ()
    assert anatomy(net) == before


def test_only_containers_of_the_users_are_left_by_restore():
    net = nn.Sequential(FusedSequential(linear()), two_layers())
    mylayers.optimize(net)
    assert mylayers.restore(net) == ("1",)
    assert [type(m) for m in net] == [FusedSequential, nn.Sequential]


@pytest.mark.parametrize("function", [mylayers.optimize, mylayers.restore])
@pytest.mark.parametrize("value", [None, nn.Linear, torch.ones(2), [linear()]], ids=str)
def test_what_is_no_module_is_a_type_error(function, value):
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be an nn.Module; got"):
        function(value)


@every_model
def test_state_goes_between_an_optimized_model_and_a_stock_one(model):
    x = model.input()
    for source, target in itertools.product([False, True], repeat=2):
        nets = model.made(False), model.made(False)
        for net, optimized in zip(nets, (source, target), strict=True):
            if optimized:
                mylayers.optimize(net)
        with torch.no_grad():
            for p in nets[0].parameters():
                p.add_(0.25)
        nets[1].load_state_dict(nets[0].state_dict())
        assert_close([nets[1](x)], [nets[0](x)])


every_copy = pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)


@pytest.mark.grid
@every_copy
@pytest.mark.parametrize(
    "name", ["plain", "torchvision's MLP", "tied", "ours", "below another model"]
)
def test_copies_of_an_optimized_model_are_optimized_and_restored_alike(name, make_copy):
    model = MODELS[name]
    net, x = model.made(False), model.input()
    own_classes = [type(m) for m in net.modules()]
    mylayers.optimize(net)
    expected = net(x)
    twin = make_copy(net)
    assert [type(m) for m in twin.modules()] == [type(m) for m in net.modules()]
    assert operator_calls(twin, x) == operator_calls(net, x) > 0
    assert same_bits(twin(x), expected)
    mylayers.restore(twin)
    assert [type(m) for m in twin.modules()] == own_classes
    assert_close([twin(x)], [expected])
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert same_bits(net(x), expected)


class Guarded(nn.Sequential):
    """Decides itself what is pickled: a lock cannot be."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


@every_copy
def test_a_class_that_decides_what_is_pickled_still_does(make_copy):
    net, x = Guarded(linear(), nn.Tanh()), torch.randn(3, 4)
    mylayers.optimize(net)
    y = net(x)
    twin = make_copy(net)
    assert same_bits(twin(x), y)
    assert isinstance(twin, Guarded)
    assert twin.lock is not net.lock


# ---- training --------------------------------------------------------------------------


def train(net: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    losses = []
    for step in range(steps):
        torch.manual_seed(step)  # dropout
        optimizer.zero_grad()
        loss = net(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize(
    "make_optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        functools.partial(torch.optim.Adam, lr=0.01),
    ],
    ids=["sgd", "adam"],
)
@pytest.mark.parametrize(
    "name",
    ["plain", "torchvision's MLP", "tied", "below another model", "convolutions with a classifier"],
)
def test_training_goes_on_as_it_would_have(name, make_optimizer):
    """One optimizer, made before, through optimize and restore; in float64, so that the rounding
    of a step is far below what a wrong gradient would do."""
    model = MODELS[name]
    x, runs = model.input().double(), []
    for rewrite in (True, False):
        net = model.made().double()
        optimizer = make_optimizer(net.parameters())
        losses = train(net, x, optimizer, 3)
        if rewrite:
            mylayers.optimize(net)
        losses += train(net, x, optimizer, 5)
        if rewrite:
            mylayers.restore(net)
        losses += train(net, x, optimizer, 3)
        runs.append([*losses, *net.parameters()])
    for a, e in zip(*runs, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-9)


@either_mode
def test_layers_of_this_package_train_to_the_same_bits(training):
    x, runs = drawer("bits", torch.float32)(33, 20), []
    for rewrite in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(
            MyLinear(20, 30, activation="tanh"),
            nn.Dropout(0.2),
            CenteredLayer(0),
            MyLinear(30, 20, activation="elu"),
            MyLinear(20, 3, activation=None),
        ).train(training)
        if rewrite:
            assert mylayers.optimize(net).fused
        runs.append([*train(net, x, torch.optim.SGD(net.parameters(), 0.01), 5), *net.parameters()])
    assert all(same_bits(a, e) for a, e in zip(*runs, strict=True))


def test_train_and_eval_reach_the_children():
    net, x = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)), torch.randn(6, 4)
    mylayers.optimize(net)
    assert not torch.equal(net(x), net(x))
    assert operator_calls(net, x) == 2
    net.eval()
    assert torch.equal(net(x), net(x))
    assert operator_calls(net, x) == 1
    assert not net[1].training
    net.train()
    assert net[1].training
    assert not torch.equal(net(x), net(x))


# ---- hooks, lazy layers, compilers -----------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["plain", "tied", "below another model", "ours"])
def test_hooks_on_every_module_are_called_in_stocks_order(name, when):
    model, runs = MODELS[name], []
    for rewrite in (True, False):
        net, events = model.made(), []
        if rewrite and when == "after":
            mylayers.optimize(net)
            net(model.input())
        for path, m in net.named_modules():

            def note(kind: str, path: str = path, events: Any = events) -> Callable[..., None]:
                return lambda *given: events.append((kind, path, len(given)))

            m.register_forward_pre_hook(note("pre"))
            m.register_forward_hook(note("post"))
            m.register_full_backward_hook(note("back"))
        if rewrite and when == "before":
            mylayers.optimize(net)
        runs.append((results(net, model.input()), events))
        if rewrite:
            mylayers.restore(net)
            assert all(len(m._forward_hooks) == 1 for m in net.modules())
    (actual, events), (expected, expected_events) = runs
    assert events == expected_events
    assert len(events) == 3 * len(list(model.made().modules()))
    assert_close(actual, expected)


def test_lazy_layers_are_fused_once_they_know_their_sizes():
    net, x = (
        nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 5), LazyMyLinear(2)),
        torch.randn(3, 4),
    )
    unknown = "its sizes are not known yet"
    assert rows_of(mylayers.optimize(net)) == [
        ("0", "LazyLinear", unknown),
        ("", "Tanh + Linear", ""),
        ("3", "LazyMyLinear", unknown),
    ]
    net(x)
    assert operator_calls(net, x) == 1
    assert_close(results(net, x), results(nn.Sequential(*net), x))
    mylayers.restore(net)
    assert type(net) is nn.Sequential


def test_a_method_and_attributes_of_the_users_class_are_kept():
    class Scaled(MLP):
        scale = 3.0

        def forward_scaled(self, x: Tensor) -> Tensor:
            return self.scale * self(x)

    net, x = Scaled(4, [5, 2], 0.0).eval(), torch.randn(3, 4)
    expected = net.forward_scaled(x)
    mylayers.optimize(net)
    assert isinstance(net, Scaled)
    assert isinstance(net, FusedSequential)
    assert net.hidden == [5, 2]
    assert_close([net.forward_scaled(x)], [expected])


def test_layers_changed_after_optimizing_take_effect():
    net, x = nn.Sequential(linear(), nn.ReLU(), linear()), torch.randn(3, 4)
    mylayers.optimize(net)
    net(x)
    net[1] = nn.Tanh()
    net.append(nn.Softmax(-1))
    net[0].bias = None
    mylayers.optimize(net)
    assert_close(results(net, x), results(nn.Sequential(*net), x))


def test_an_optimized_model_compiles_and_exports():
    torch._dynamo.reset()
    model = MODELS["below another model"]
    net, x = model.made(False), model.input()
    mylayers.optimize(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_close([compiled(x)], [net(x)])
    program = torch.export.export(net, (x,))
    targets = [str(n.target) for n in program.graph.nodes]
    assert targets.count("mylayers.sequential.default") == 1
    assert_close([program.module()(x)], [net(x)])
    mylayers.restore(net)
    assert_close([compiled(x)], [net(x)])


# ---- the report as text ----------------------------------------------------------------


def test_the_report_prints_as_a_table():
    assert str(mylayers.optimize(MODELS["parametrised"].made())).splitlines() == [
        "module       layers              fused",
        "(the model)  Linear              yes",
        f"1            ParametrizedLinear  no: {COMPUTED}",
        f"2            Tanh                no: {ALONE}",
        "3            Linear              no: it has hooks",
    ]
    assert str(mylayers.optimize(nn.Sequential())) == "module  layers  fused"


# ---- policies of stable-baselines3 -----------------------------------------------------

HIDDEN = "Linear + {0} + Linear + {0}".format


@pytest.fixture
def policies() -> dict[str, tuple[nn.Module, list[Row]]]:
    """PPO's and DQN's default policies, as for CartPole, and the reports to expect."""
    spaces = pytest.importorskip("gymnasium.spaces")
    actor_critic = pytest.importorskip("stable_baselines3.common.policies")
    dqn = pytest.importorskip("stable_baselines3.dqn.policies")
    torch.manual_seed(0)
    arguments = (spaces.Box(-1.0, 1.0, (4,)), spaces.Discrete(2), lambda _: 1e-3)
    layers = HIDDEN("ReLU") + " + Linear"
    return {
        "PPO": (
            actor_critic.ActorCriticPolicy(*arguments),
            [
                ("mlp_extractor.policy_net", HIDDEN("Tanh"), ""),
                ("mlp_extractor.value_net", HIDDEN("Tanh"), ""),
                ("action_net", "Linear", ALONE_IN_POLICY),
                ("value_net", "Linear", OF_ITS_CLASS),
            ],
        ),
        "DQN": (
            dqn.DQNPolicy(*arguments),
            [("q_net.q_net", layers, ""), ("q_net_target.q_net", layers, "")],
        ),
    }


@pytest.mark.parametrize("algorithm", ["PPO", "DQN"])
def test_policies_of_stable_baselines3_act_alike(algorithm, policies):
    policy, rows = policies[algorithm]
    observations = drawer("observations", torch.float32)(500, 4).numpy()
    expected = policy.predict(observations, deterministic=True)[0]  # sets the mode
    before = anatomy(policy)
    assert rows_of(mylayers.optimize(policy)) == rows
    assert anatomy(policy)[1:] == before[1:]
    assert (policy.predict(observations, deterministic=True)[0] == expected).all()
    one_by_one = [policy.predict(o, deterministic=True)[0].item() for o in observations[:50]]
    assert one_by_one == expected[:50].tolist()
    assert (copy.deepcopy(policy).predict(observations, deterministic=True)[0] == expected).all()
    mylayers.restore(policy)
    assert anatomy(policy) == before
    assert (policy.predict(observations, deterministic=True)[0] == expected).all()


def test_ppos_policy_trains_alike(policies):
    policy, _ = policies["PPO"]
    observations = drawer("observations", torch.float32)(64, 4)
    runs = []
    for rewrite in (True, False):
        net = copy.deepcopy(policy)
        optimizer = torch.optim.SGD(net.parameters(), 1e-2)
        if rewrite:
            mylayers.optimize(net)
        for _ in range(5):
            values, log_prob, entropy = net.evaluate_actions(observations, torch.arange(64) % 2)
            loss = values.pow(2).mean() - log_prob.mean() - entropy.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        runs.append(list(net.parameters()))
    for a, e in zip(*runs, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=64 * torch.finfo(a.dtype).eps)


# ---- fully_shard -----------------------------------------------------------------------


def test_restore_leaves_the_class_that_fully_shard_gave():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        net, x = nn.Sequential(two_layers(), linear()), torch.randn(3, 4)
        expected = net(x)
        assert mylayers.optimize(net).fused
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for module in (net[0], net):
            fully_shard(module, mesh=mesh)
        sharded = [type(module) for module in net.modules()]
        assert mylayers.restore(net) == ()
        assert [type(module) for module in net.modules()] == sharded
        assert isinstance(net, FSDPModule)
        assert_close([net(x)], [expected])
        net(x).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    finally:
        distributed.destroy_process_group()
