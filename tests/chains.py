"""Chains of layers: programs of mylayers::sequential, what their steps compute, and networks."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from common import Calls
from samples import ACTIVATIONS, KERNEL_DTYPES, OF_OUTPUT, drawer, same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_leaves

from mylayers import CenteredLayer, FusedSequential, MyLinear, activations, functional

ops = torch.ops.mylayers
# Of each file of their tests.
MARKS = [
    # torch scripts its own helpers when its compilers or forward mode are first used, and warns.
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning"),
    # Dynamo and opcheck read .grad of the tensors they are given.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d)[6:])


# ---- programs --------------------------------------------------------------------------


def followed_by(activation: str | None) -> str:
    """What a linear step is followed by in a program, for an activation behind it."""
    if activation is None:
        return ""
    return f"+{activation}" if activation in OF_OUTPUT else f"; {activation}"


# Each with the sizes of an input after its batch, and the units of its linear steps.
PROGRAMS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "linear": ((5,), (3,)),
    "linear_t+bias": ((5,), (3,)),
    **{
        f"linear+bias{a}; linear_t+bias{a}; linear{a}; linear_t{a}": ((5,), (4, 3, 3, 2))
        for a in map(followed_by, ACTIVATIONS[:-1])
    },
    "linear_t+bias+tanh; linear_t+bias+tanh; linear_t+bias": ((5,), (7, 6, 3)),
    "linear+bias+sigmoid; center; linear_t+bias+elu": ((5,), (7, 3)),
    "linear; center(-1); linear_t+bias; center(0,1); tanh": ((5,), (7, 3)),
    "flatten(1,-1); linear_t+bias+tanh; linear": ((2, 3), (7, 3)),
    "linear+bias+relu; flatten(1,2); tanh; linear_t+bias; center(0)": ((2, 3), (4, 3)),
    "linear+bias+tanh; flatten(1,2); linear_t": ((2, 3), (4, 3)),
    "sigmoid; elu; linear+bias; tanh; relu; linear_t+tanh": ((5,), (6, 3)),
    "center; linear_t+bias; center(1); sigmoid": ((5,), (3,)),
    "linear_t+bias; layer_norm(7,1e-05)+weight+bias; relu; linear": ((5,), (7, 3)),
    "layer_norm(2,3,0.001)+weight; flatten(1,-1); linear; layer_norm(4,0.5); tanh": ((2, 3), (4,)),
    "tanh": ((5,), ()),
    "flatten(0,1); center(0)": ((5,), ()),
}
every_program = pytest.mark.parametrize("program", PROGRAMS)
# One of each kind, for what costs time.
VARIED = (
    "linear+bias+tanh; linear_t+bias+tanh; linear+tanh; linear_t+tanh",
    "linear+bias+sigmoid; center; linear_t+bias+elu",
    "linear+bias+relu; flatten(1,2); tanh; linear_t+bias; center(0)",
    "sigmoid; elu; linear+bias; tanh; relu; linear_t+tanh",
    "linear_t+bias; layer_norm(7,1e-05)+weight+bias; relu; linear",
)
varied_programs = pytest.mark.parametrize("program", VARIED)


def arguments(
    program: str, lead: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """An input and the parameters, drawn."""
    sizes, units = PROGRAMS[program]
    return (drawer(program, dtype)(*lead, *sizes), *draw_parameters(program, sizes, units, dtype))


def draw_parameters(
    program: str, sizes: tuple[int, ...], units: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    draw, next_units, parameters = drawer(f"{program}{units}", dtype), iter(units), []
    for step in program.split("; "):
        name, options = split(step)
        if name == "flatten":
            sizes = (torch.Size(sizes).numel(),)
        if name.startswith("linear"):
            out = next(next_units)
            shape = (out, sizes[-1]) if name == "linear_t" else (sizes[-1], out)
            parameters.append(draw(*shape) / max(1, sizes[-1]) ** 0.5)
            if "bias" in options:
                parameters.append(draw(out))
            sizes = (*sizes[:-1], out)
        if name == "layer_norm":
            own = tuple(map(int, options[0].split(",")[:-1]))
            parameters += [draw(*own) for _ in options[1:]]
    return parameters


def split(step: str) -> tuple[str, list[str]]:
    """A step's name, and its options: "bias", an activation, dimensions."""
    if activations.row_of(step) is not None:
        return step, []
    if not step.startswith("linear"):
        step = step.replace("(", "+").replace(")", "")
    name, *options = step.split("+")
    return name, options


def outputs_one_by_one(x: Tensor, parameters: Sequence[Tensor], program: str) -> list[Tensor]:
    """What each computing step gives, by itself."""
    left, outputs = iter(parameters), []
    for step in program.split("; "):
        name, options = split(step)
        if name.startswith("linear"):
            weight = next(left)
            bias = next(left) if "bias" in options else None
            activation = next((o for o in options if o != "bias"), None)
            if name == "linear_t":
                weight = weight.t()
            x = functional.linear_act(x, weight, bias, activation)
        elif name == "center":
            x = functional.center(x, [int(d) for d in options[0].split(",")] if options else None)
        elif name == "flatten":
            first, last = map(int, options[0].split(","))
            x = x.flatten(first, last)
            continue
        elif name == "layer_norm":
            x = ops.sequential(x, [next(left) for _ in options[1:]], step)
        else:
            x = ops.sequential(x, [], name)
        outputs.append(x)
    return outputs


def flattened_sizes(x: Tensor, outputs: Sequence[Tensor], program: str) -> list[int]:
    """For each flatten the number of its input's dimensions and their sizes."""
    left, sizes = iter(outputs), []
    for step in program.split("; "):
        name, options = split(step)
        if name == "flatten":
            sizes += [x.dim(), *x.shape]
            x = x.flatten(*map(int, options[0].split(",")))
        else:
            x = next(left)
    return sizes


def one_by_one(x: Tensor, parameters: Sequence[Tensor], program: str) -> Tensor:
    return outputs_one_by_one(x, parameters, program)[-1]


def leaves(tensors: Sequence[Tensor], wanted: Sequence[bool] | None = None) -> list[Tensor]:
    wanted = [True] * len(tensors) if wanted is None else wanted
    return [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]


def run(
    operator: Callable[..., Tensor],
    program: str,
    args: Sequence[Tensor],
    wanted: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """Output and all gradients."""
    x, *parameters = made = leaves(args, wanted)
    output = operator(x, parameters, program)
    if output.requires_grad:
        output.backward(drawer("gradient", output.dtype)(*output.shape).to(output.device))
    return [output.detach(), *(t.grad for t in made)]


def assert_same_bits(
    actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], what: Any = ""
) -> None:
    for place, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e is None:
            assert a is None, (what, place)
        else:
            assert a is not None, (what, place)
            assert same_bits(a, e), (what, place)


def assert_close(actual: Any, expected: Any, terms: int = 4096) -> None:
    """Values within the rounding of sums of ``terms`` products; None equals None alone."""
    got, want = tree_leaves(actual), tree_leaves(expected)
    for a, e in zip(got, want, strict=True):
        if e is None:
            assert a is None
            continue
        magnitude = max([1.0, *e.detach().abs().flatten().tolist()])
        torch.testing.assert_close(
            a.detach(), e.detach(), rtol=0, atol=terms**0.5 * torch.finfo(e.dtype).eps * magnitude
        )


# ---- networks --------------------------------------------------------------------------


def programs(net: nn.Module, x: Tensor) -> list[str]:
    """The programs of the operator calls of one call of ``net``."""
    with torch.no_grad(), Calls() as calls:
        net(x)
    return [args[2] for name, args in calls.seen if name == "sequential"]


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def replaced(layer: nn.Module) -> nn.Module:
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.5)


def halved(layer: nn.Module, name: str) -> nn.Module:
    class Half(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value / 2

    parametrize.register_parametrization(layer, name, Half())
    return layer


def stock(net: nn.Sequential) -> nn.Sequential:
    """The very children in an nn.Sequential."""
    plain = nn.Sequential()
    plain._modules = dict(net._modules)
    plain.training = net.training
    return plain


def results(net: nn.Module, x: Tensor, inner: nn.Module | None = None) -> list[Tensor | None]:
    """Output, and the gradients of the input and of all parameters of ``inner``."""
    x = x.clone().requires_grad_()
    parameters = [p for p in (inner or net).parameters() if p.requires_grad]
    torch.manual_seed(1)  # dropout
    y = net(x * 1)
    return [y.detach(), *torch.autograd.grad(y.pow(3).sum(), [x, *parameters], allow_unused=True)]


def assert_like_stock(net: FusedSequential, x: Tensor) -> None:
    """Twice: the first call plans, the second is quick."""
    for _ in range(2):
        assert_close(results(net, x), results(stock(net), x))


def small() -> FusedSequential:
    """One chain; every kind of layer."""
    torch.manual_seed(0)
    net = FusedSequential(
        MyLinear(4, 6, activation="tanh"),
        nn.ELU(),
        CenteredLayer(0),
        nn.Dropout(0.5),
        nn.Identity(),
        nn.Linear(6, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    return net.eval()


def split_net() -> FusedSequential:
    """Two chains around a layer that runs by itself."""
    torch.manual_seed(0)
    return FusedSequential(
        nn.Linear(4, 6), nn.Tanh(), nn.GroupNorm(1, 6), nn.Dropout(0.5), nn.Linear(6, 3), nn.ReLU()
    ).eval()


# Every one changes the result of a network that was called before.
EDITS: dict[str, Callable[[FusedSequential], Any]] = {
    "data": lambda n: n[0].weight.data.mul_(2),
    "data replaced": lambda n: setattr(n[0].weight, "data", n[0].weight.data * 2),
    "in place": lambda n: torch.no_grad()(n[5].bias.add_)(1),
    "new parameter": lambda n: setattr(n[5], "weight", nn.Parameter(n[5].weight.detach() + 1)),
    "bias removed": lambda n: setattr(n[0], "bias", None),
    "bias made": lambda n: setattr(n[7], "bias", nn.Parameter(torch.ones(3))),
    "both biases": lambda n: (setattr(n[5], "bias", None), setattr(n[0], "bias", None)),
    "activation": lambda n: setattr(n[0], "activation", "sigmoid"),
    "no activation": lambda n: setattr(n[0], "activation", None),
    "elu alpha": lambda n: setattr(n[1], "alpha", 2.0),
    "center dim": lambda n: setattr(n[2], "dim", 1),
    "center list": lambda n: setattr(n[2], "dim", [0, 1]),
    "dropout trains": lambda n: n[3].train(),
    "all train": lambda n: n.train(),
    "replaced by another type": lambda n: n.__setitem__(6, nn.Tanh()),
    "replaced by an unfused type": lambda n: n.__setitem__(6, nn.Hardtanh(0.1, 0.2)),
    "replaced by its own type": lambda n: n.__setitem__(5, nn.Linear(6, 5)),
    "replaced by a subclass": lambda n: n.__setitem__(7, Doubled(5, 3)),
    "append": lambda n: n.append(nn.Linear(3, 2)),
    "append what is not fused": lambda n: n.append(nn.Softmax(-1)),
    "insert": lambda n: n.insert(0, nn.Linear(4, 4)),
    "extend": lambda n: n.extend([nn.Tanh(), nn.Linear(3, 1)]),
    "pop": lambda n: n.pop(-1),
    "delete": lambda n: n.__delitem__(2),
    "delete a slice": lambda n: n.__delitem__(slice(5, None)),
    "add": lambda n: n.__iadd__(nn.Sequential(nn.Linear(3, 4))),
    "add_module": lambda n: n.add_module("last", nn.Linear(3, 2)),
    "hook": lambda n: n[6].register_forward_hook(lambda m, a, y: y + 1),  # noqa: ARG005
    "pre-hook": lambda n: n[5].register_forward_pre_hook(lambda m, a: (a[0] + 1,)),  # noqa: ARG005
    "parametrised": lambda n: halved(n[5], "weight"),
    "bias parametrised": lambda n: halved(n[0], "bias"),
    "pruned": lambda n: pruned(n[0]),
    "forward of one child": lambda n: replaced(n[5]),
    "loaded": lambda n: n.load_state_dict({k: v + 1 for k, v in n.state_dict().items()}),
    "loaded by assignment": lambda n: n.load_state_dict(
        {k: v + 1 for k, v in n.state_dict().items()}, assign=True
    ),
    "modules reversed": lambda n: setattr(
        n, "_modules", {k: n._modules[k] for k in sorted(n._modules, key=lambda k: k in "12")}
    ),
    "optimiser step": lambda n: torch.optim.SGD(n.parameters(), 0.1).step(
        lambda: n(torch.ones(5, 4)).sum().backward()
    ),
}
