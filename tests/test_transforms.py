"""torch.func and forward mode: every transform of an operator equals that of its formula.

Each test applies one transform to the same call twice, with ``mylayers.functional`` and with
``mylayers.reference`` in the place of ``lib``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from samples import ACTIVATIONS
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from mylayers import CenteredLayer, MyLinear, functional, reference

pytestmark = [
    # torch scripts its own decompositions when forward mode is first used in a process, and warns.
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script` is deprecated:DeprecationWarning"),
    # torch.func.linearize warns of the constants it folds itself, for any function.
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

any_activation = pytest.mark.parametrize("activation", ACTIVATIONS)

ROWS, IN_UNITS, UNITS, BATCH = 4, 3, 2, 5
SHAPES = {"input": (ROWS, IN_UNITS), "weight": (IN_UNITS, UNITS), "bias": (UNITS,)}


class Form(NamedTuple):
    """A way to call an operator of ``lib``, and the names (in SHAPES) of its tensors."""

    call: Callable[..., Tensor]
    names: tuple[str, ...]


FORMS = {
    **{
        f"linear_act-{activation}-bias": Form(
            lambda lib, x, w, b, activation=activation: lib.linear_act(x, w, b, activation),
            ("input", "weight", "bias"),
        )
        for activation in ACTIVATIONS
    },
    "linear_act-relu": Form(lambda lib, x, w: lib.linear_act(x, w), ("input", "weight")),
    "linear_act-None": Form(
        lambda lib, x, w: lib.linear_act(x, w, activation=None), ("input", "weight")
    ),
    "center": Form(lambda lib, x: lib.center(x), ("input",)),
    "center-rows": Form(lambda lib, x: lib.center(x, -1), ("input",)),
    "center-columns": Form(lambda lib, x: lib.center(x, 0), ("input",)),
    "center-both": Form(lambda lib, x: lib.center(x, (0, 1)), ("input",)),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    return FORMS[request.param]


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def arguments(form: Form, seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(draw(SHAPES[name], seed + i) for i, name in enumerate(form.names))


def assert_close(actual: Any, expected: Any) -> None:
    """Equal structure; values within the rounding of a sum of at most TERMS products."""
    (got, got_spec), (want, want_spec) = tree_flatten(actual), tree_flatten(expected)
    assert got_spec == want_spec
    terms = BATCH * ROWS * IN_UNITS * UNITS
    for a, e in zip(got, want, strict=True):
        magnitude = max([1.0, *e.detach().abs().flatten().tolist()])
        atol = terms * torch.finfo(e.dtype).eps * magnitude
        torch.testing.assert_close(a, e, rtol=0, atol=atol)


def both(run: Callable[[Any], Any]) -> None:
    assert_close(run(functional), run(reference))


def loss_of(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # The cube leaves something of every argument in derivatives of the third order.
    return lambda *args: f(*args).pow(3).sum()


def all_of(args: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(args)))


# name -> (operator as a function, its arguments, tangents of the same shapes) -> results
DERIVATIVES: dict[str, Callable[..., Any]] = {
    "grad": lambda f, a, _: grad(loss_of(f), all_of(a))(*a),
    "grad_and_value": lambda f, a, _: grad_and_value(loss_of(f), all_of(a))(*a),
    "grad of grad": lambda f, a, _: grad(
        lambda *args: sum(g.pow(2).sum() for g in grad(loss_of(f), all_of(a))(*args)), all_of(a)
    )(*a),
    "vjp": lambda f, a, _: vjp(f, *a)[1](f(*a)),
    "jvp": lambda f, a, t: jvp(f, a, t),
    "jvp of grad": lambda f, a, t: jvp(grad(loss_of(f), all_of(a)), a, t),
    "grad of jvp": lambda f, a, t: grad(lambda *args: jvp(f, args, t)[1].pow(2).sum(), all_of(a))(
        *a
    ),
    "jvp of jvp": lambda f, a, t: jvp(lambda *args: jvp(loss_of(f), args, t)[1], a, t),
    "linearize": lambda f, a, t: linearize(f, *a)[1](*t),
    "jacrev": lambda f, a, _: jacrev(f, all_of(a))(*a),
    "jacrev in chunks": lambda f, a, _: jacrev(f, all_of(a), chunk_size=3)(*a),
    "jacfwd": lambda f, a, _: jacfwd(f, all_of(a))(*a),
    "hessian": lambda f, a, _: hessian(loss_of(f), all_of(a))(*a),
    "jacrev of jacfwd": lambda f, a, _: jacrev(jacfwd(loss_of(f), all_of(a)), all_of(a))(*a),
    "jacrev of jacrev": lambda f, a, _: jacrev(jacrev(loss_of(f), all_of(a)), all_of(a))(*a),
    "functionalize": lambda f, a, _: functionalize(f)(*a),
    "functionalize of grad": lambda f, a, _: functionalize(grad(loss_of(f), all_of(a)))(*a),
    "autograd.functional.jacobian": lambda f, a, _: torch.autograd.functional.jacobian(
        f, a, vectorize=True, strategy="forward-mode"
    ),
    "autograd.functional.hessian": lambda f, a, _: torch.autograd.functional.hessian(
        loss_of(f), a, vectorize=True
    ),
    "autograd.functional.hvp": lambda f, a, t: torch.autograd.functional.hvp(loss_of(f), a, t),
}


@pytest.mark.grid
@pytest.mark.road("functorch")
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivative_equals_that_of_the_formula(derivative: Callable[..., Any], form: Form) -> None:
    args, tangents = arguments(form), arguments(form, seed=10)
    both(lambda lib: derivative(lambda *a: form.call(lib, *a), args, tangents))


@pytest.mark.parametrize("argument", range(3))
def test_derivative_by_one_argument_alone(argument: int) -> None:
    form = FORMS["linear_act-relu-bias"]
    args = arguments(form)
    tangent = draw(args[argument].shape, 10)

    def run(lib: Any) -> Any:
        def f(v: Tensor) -> Tensor:
            return form.call(lib, *args[:argument], v, *args[argument + 1 :])

        v = args[argument]
        return grad(loss_of(f))(v), jvp(f, (v,), (tangent,)), jacrev(f)(v), jacfwd(f)(v)

    both(run)


def test_transform_of_an_argument_that_requires_grad_records_both_levels() -> None:
    form = FORMS["linear_act-relu-bias"]

    def run(lib: Any) -> Any:
        args = [a.requires_grad_() for a in arguments(form)]
        inner = grad(loss_of(lambda *a: form.call(lib, *a)), all_of(args))(*args)
        return inner, torch.autograd.grad(sum(g.pow(2).sum() for g in inner), args)

    both(run)


# in_dims of (input, weight, bias); None: the argument is shared by the whole batch.
IN_DIMS = [
    (0, None, None),
    (1, None, None),
    (-1, None, None),
    (None, 0, None),
    (None, 2, None),
    (None, None, 0),
    (None, None, 1),
    (0, 0, None),
    (0, None, 1),
    (None, 1, 0),
    (0, 0, 0),
    (2, 1, 1),
]


def batched(names: tuple[str, ...], in_dims: tuple[int | None, ...]) -> tuple[Tensor, ...]:
    """Arguments with a dimension of size BATCH where in_dims says."""
    args = []
    for i, (name, d) in enumerate(zip(names, in_dims, strict=True)):
        shape = list(SHAPES[name])
        if d is not None:
            shape.insert(d if d >= 0 else len(shape) + 1 + d, BATCH)
        args.append(draw(tuple(shape), i))
    return tuple(args)


@pytest.mark.grid
@pytest.mark.road("functorch")
@any_activation
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap_of_linear_act_over_any_argument(
    in_dims: tuple[int | None, ...], activation: str | None
) -> None:
    args = batched(("input", "weight", "bias"), in_dims)

    def run(lib: Any) -> Any:
        def f(*a: Tensor) -> Tensor:
            return lib.linear_act(*a, activation)

        return (
            vmap(f, in_dims)(*args),
            vmap(f, in_dims, out_dims=1)(*args),
            vmap(f, in_dims, chunk_size=2)(*args),
            vmap(grad(loss_of(f), (0, 1, 2)), in_dims)(*args),
            vmap(jacfwd(f), in_dims)(*args),
        )

    both(run)


@pytest.mark.grid
@pytest.mark.road("functorch")
@pytest.mark.parametrize("dim", [None, 0, -1, (0, 1)], ids=str)
@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
def test_vmap_of_center_counts_dim_without_the_batch(
    in_dim: int, dim: int | tuple[int, ...] | None
) -> None:
    (x,) = batched(("input",), (in_dim,))

    def run(lib: Any) -> Any:
        def f(v: Tensor) -> Tensor:
            return lib.center(v, dim)

        return vmap(f, in_dim)(x), vmap(grad(loss_of(f)), in_dim)(x), vmap(jacrev(f), in_dim)(x)

    both(run)
    one_by_one = torch.stack([functional.center(v, dim) for v in x.unbind(in_dim)])
    assert_close(vmap(lambda v: functional.center(v, dim), in_dim)(x), one_by_one)


def test_vmap_computes_what_a_loop_over_the_batch_computes(form: Form) -> None:
    args = batched(form.names, (0,) * len(form.names))

    def f(*a: Tensor) -> Tensor:
        return form.call(functional, *a)

    assert_close(vmap(f)(*args), torch.stack([f(*a) for a in zip(*args, strict=True)]))


@pytest.mark.road("functorch")
def test_nested_vmap(form: Form) -> None:
    # The outer level batches the input, the inner one every other argument (or it again).
    outer = draw((BATCH, BATCH, *SHAPES["input"]))
    others = batched(form.names[1:], (0,) * (len(form.names) - 1))

    def run(lib: Any) -> Any:
        inner = vmap(lambda *a: form.call(lib, *a))
        return vmap(lambda x: inner(x, *others))(outer)

    both(run)


@any_activation
def test_vmap_over_the_backward_operator(activation: str | None) -> None:
    """The batch meets no vmap before backward: it reaches linear_act_backward itself."""
    args = arguments(FORMS["linear_act-relu-bias"])
    grad_outputs = draw((BATCH, ROWS, UNITS), 20)

    def run(lib: Any) -> Any:
        leaves = [a.clone().requires_grad_() for a in args]
        y = lib.linear_act(*leaves, activation)
        return torch.autograd.grad(y, leaves, grad_outputs, is_grads_batched=True)

    both(run)


def test_vmap_of_a_plain_backward_call_of_center() -> None:
    grad_outputs = draw((BATCH, ROWS, IN_UNITS), 20)

    def run(lib: Any) -> Any:
        x = draw(SHAPES["input"]).requires_grad_()
        return torch.autograd.grad(lib.center(x, 0), x, grad_outputs, is_grads_batched=True)

    both(run)


def test_vmap_over_zero_sized_rows_keeps_the_shapes(form: Form) -> None:
    args = batched(form.names, (0,) * len(form.names))
    args = (args[0][:, :0], *args[1:])
    # The mean of nothing is NaN, but there is no element left to receive it.
    both(lambda lib: vmap(lambda *a: form.call(lib, *a))(*args))


class Net(nn.Module):
    """Both layers and a stock one, small and in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            MyLinear(IN_UNITS, 4, dtype=torch.float64),
            CenteredLayer(),
            MyLinear(4, UNITS, activation=None, dtype=torch.float64),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def net_formula(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """What Net computes, from its parameters by name."""
    hidden = reference.linear_act(x, params["body.0.weight"], params["body.0.bias"])
    return reference.linear_act(
        reference.center(hidden), params["body.2.weight"], params["body.2.bias"], None
    )


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_functional_call_uses_the_given_parameters(net: Net) -> None:
    x = draw((ROWS, IN_UNITS))
    given = tree_map(lambda p: p * 0.5 + 1, parameters_of(net))
    assert_close(functional_call(net, given, x), net_formula(given, x))
    assert_close(net(x), net_formula(parameters_of(net), x))


def test_grad_of_functional_call(net: Net) -> None:
    x, params = draw((ROWS, IN_UNITS)), parameters_of(net)
    actual = grad(lambda p: functional_call(net, p, x).pow(3).sum())(params)
    assert_close(actual, grad(lambda p: net_formula(p, x).pow(3).sum())(params))


@pytest.mark.road("functorch")
def test_per_sample_gradients_by_vmap_of_grad(net: Net) -> None:
    x, params = draw((BATCH, IN_UNITS)), parameters_of(net)

    def sample_loss(p: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(net, p, row.unsqueeze(0)).pow(3).sum()

    per_sample = vmap(grad(sample_loss), in_dims=(None, 0))(params, x)
    one_by_one = [grad(sample_loss)(params, row) for row in x]
    assert_close(per_sample, tree_map(lambda *g: torch.stack(g), *one_by_one))
    assert_close(
        per_sample,
        vmap(grad(lambda p, row: net_formula(p, row.unsqueeze(0)).pow(3).sum()), (None, 0))(
            params, x
        ),
    )


@pytest.mark.road("functorch")
def test_jacobian_by_parameters_of_a_module(net: Net) -> None:
    x, params = draw((ROWS, IN_UNITS)), parameters_of(net)
    for jacobian in (jacrev, jacfwd):
        actual = jacobian(lambda p: functional_call(net, p, x))(params)
        assert_close(actual, jacobian(lambda p: net_formula(p, x))(params))


@pytest.mark.road("functorch")
@pytest.mark.parametrize("x_in_dim", [None, 0], ids=["shared input", "own input"])
def test_ensemble_by_stack_module_state(x_in_dim: int | None) -> None:
    torch.manual_seed(0)
    members = [Net() for _ in range(BATCH)]
    params, buffers = stack_module_state(members)
    skeleton = Net().to("meta")
    x = draw((ROWS, IN_UNITS) if x_in_dim is None else (BATCH, ROWS, IN_UNITS))
    outputs = vmap(lambda p, b, v: functional_call(skeleton, (p, b), v), (0, 0, x_in_dim))(
        params, buffers, x
    )
    own = [x] * BATCH if x_in_dim is None else list(x)
    alone = [m(v) for m, v in zip(members, own, strict=True)]
    assert_close(outputs, torch.stack(alone))

    outputs.pow(3).sum().backward()
    torch.stack(alone).pow(3).sum().backward()
    for name, stacked in params.items():
        assert_close(stacked.grad, torch.stack([m.get_parameter(name).grad for m in members]))


@pytest.mark.parametrize("duals", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_ad_tangent_on_some_arguments(duals: tuple[int, ...], requires_grad: bool) -> None:
    args = arguments(FORMS["linear_act-relu-bias"])
    tangents = arguments(FORMS["linear_act-relu-bias"], seed=10)

    def run(lib: Any) -> Any:
        leaves = [a.clone().requires_grad_(requires_grad) for a in args]
        with forward_ad.dual_level():
            made = [
                forward_ad.make_dual(p, tangents[i]) if i in duals else p
                for i, p in enumerate(leaves)
            ]
            primal, tangent = forward_ad.unpack_dual(lib.linear_act(*made))
            if requires_grad:
                # Reverse over forward: the tangent is differentiable in turn.
                return primal, tangent, torch.autograd.grad((primal.pow(3) * tangent).sum(), leaves)
            return primal, tangent

    both(run)


@pytest.mark.grid
@pytest.mark.road("functorch")
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_forward_ad_of_every_form(form: Form, grad_mode: Callable[[], Any]) -> None:
    args, tangents = arguments(form), arguments(form, seed=10)

    def run(lib: Any) -> Any:
        with grad_mode(), forward_ad.dual_level():
            made = map(forward_ad.make_dual, args, tangents)
            return tuple(forward_ad.unpack_dual(form.call(lib, *made)))

    both(run)


@pytest.mark.road("functorch")
def test_forward_ad_through_backward(form: Form) -> None:
    """A tangent on grad_output reaches the backward operator in forward mode."""
    args = arguments(form)

    def run(lib: Any) -> Any:
        leaves = [a.clone().requires_grad_() for a in args]
        y = form.call(lib, *leaves)
        with forward_ad.dual_level():
            grad_output = forward_ad.make_dual(draw(y.shape, 20), draw(y.shape, 21))
            grads = torch.autograd.grad(y, leaves, grad_output)
            return [tuple(forward_ad.unpack_dual(g)) for g in grads]

    both(run)


def test_forward_ad_through_layers(net: Net) -> None:
    x, tangent = draw((ROWS, IN_UNITS)), draw((ROWS, IN_UNITS), 10)
    with forward_ad.dual_level():
        actual = forward_ad.unpack_dual(net(forward_ad.make_dual(x, tangent))).tangent
    _, expected = jvp(lambda v: net_formula(parameters_of(net), v), (x,), (tangent,))
    assert_close(actual.detach(), expected)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transforms_keep_the_dtype(form: Form, dtype: torch.dtype) -> None:
    args = tuple(a.to(dtype) for a in arguments(form))
    tangents = tuple(a.to(dtype) for a in arguments(form, seed=10))

    def f(*a: Tensor) -> Tensor:
        return form.call(functional, *a)

    results = (
        grad(lambda *a: f(*a).sum(), all_of(args))(*args),
        jvp(f, args, tangents),
        vmap(f)(*(a.expand(BATCH, *a.shape) for a in args)),
    )
    assert {leaf.dtype for leaf in tree_leaves(results)} == {dtype}


def test_errors_under_a_transform_are_the_operators_own() -> None:
    with pytest.raises(RuntimeError, match="linear_act: weight must be"):
        vmap(functional.linear_act, in_dims=(0, None))(draw((5, 4, 7)), draw((3, 2)))
    with pytest.raises(IndexError, match="center: dim must be in"):
        vmap(lambda v: functional.center(v, 2))(draw((5, 4, 3)))


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["linear_act", "center"])
def test_an_eager_call_shows_itself_to_modes_and_profiler(name):
    x, weight = torch.randn(2, 3), torch.randn(3, 4)
    arguments = {"linear_act": (x, weight), "center": (x,)}[name]

    def call():
        return getattr(functional, name)(*arguments)

    call()  # with nothing watching: straight to the kernel
    with _Seen() as seen:
        call()
    assert seen.names == [f"mylayers::{name}"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    assert f"mylayers::{name}" in [event.key for event in profile.key_averages()]
    with torch.inference_mode():
        assert call().is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call().dtype == (torch.bfloat16 if name == "linear_act" else torch.float32)
