"""Everything that traces: opcheck, fake tensors, torch.compile, torch.export, compiled autograd.

The oracle is the eager call; that is checked against the formula elsewhere. A traced call runs
the same kernels, so its results have the same bits unless Inductor fuses what lies around them.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from mylayers import CenteredLayer, LazyMyLinear, MyLinear, functional, reference

ops = torch.ops.mylayers
IN_UNITS, UNITS = 5, 3

# torch scripts its own helpers when its compilers are first used in a process, and warns.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.script\w*` is deprecated:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch._dynamo.reset()
    counters.clear()


def assert_same_bits(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_close(actual: Any, expected: Any, terms: int = 64) -> None:
    """Within the rounding of sums of ``terms`` products."""
    for a, e in zip(actual, expected, strict=True):
        magnitude = max([1.0, *e.detach().abs().flatten().tolist()])
        torch.testing.assert_close(a, e, rtol=0, atol=terms * torch.finfo(e.dtype).eps * magnitude)


# ---- opcheck ---------------------------------------------------------------------------

any_activation = pytest.mark.parametrize("activation", samples.ACTIVATIONS)
any_of_output = pytest.mark.parametrize(
    "activation", [a for a in samples.ACTIVATIONS if a not in samples.OF_INPUT]
)
requires_grad = pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def by_name(make: Callable[..., Any], dtype: torch.dtype) -> Any:
    """Parametrises over the samples; each test draws its own, with what it asks for."""
    names = [s.name for s in make(dtype, large=False)]
    return pytest.mark.parametrize("index", range(len(names)), ids=names)


def nth(make: Callable[..., Any], index: int, **options: Any) -> samples.Sample:
    return list(make(large=False, **options))[index]


@pytest.mark.grid(one_in=4)
@requires_grad
@by_name(samples.linear_act_samples, torch.float32)
def test_opcheck_of_linear_act(index: int, requires_grad: bool) -> None:
    sample = nth(
        samples.linear_act_samples, index, dtype=torch.float32, requires_grad=requires_grad
    )
    opcheck(ops.linear_act, sample.args, sample.kwargs)


@pytest.mark.grid(one_in=4)
@requires_grad
@by_name(samples.center_samples, torch.float32)
def test_opcheck_of_center(index: int, requires_grad: bool) -> None:
    sample = nth(samples.center_samples, index, dtype=torch.float32, requires_grad=requires_grad)
    opcheck(ops.center, sample.args, sample.kwargs)


MASKS = [
    (True, True, True),
    (True, False, False),
    (False, True, False),
    (False, False, True),
    (True, False, True),
    (False, True, True),
    (False, False, False),
]


def backward_arguments(
    mask: tuple[bool, bool, bool],
    activation: str | None,
    dtype: torch.dtype = torch.float32,
    lead: tuple[int, ...] = (2, 4),
    requires_grad: bool = False,
) -> tuple[Any, ...]:
    """Arguments of linear_act_backward; a tensor that is not read is None."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    torch.manual_seed(0)
    return (
        draw(*lead, UNITS).requires_grad_(requires_grad),
        draw(*lead, IN_UNITS).requires_grad_(requires_grad) if mask[1] else None,
        draw(IN_UNITS, UNITS).requires_grad_(requires_grad) if mask[0] else None,
        reference.ACTIVATIONS[activation](draw(*lead, UNITS)) if activation else None,
        activation,
        mask,
    )


@pytest.mark.grid(one_in=4)
@any_of_output
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lead", [(2, 4), (), (0,)], ids=str)
def test_opcheck_of_linear_act_backward(
    lead: tuple[int, ...], mask: tuple[bool, bool, bool], activation: str | None
) -> None:
    opcheck(ops.linear_act_backward, backward_arguments(mask, activation, lead=lead))


@any_of_output
def test_opcheck_of_linear_act_backward_for_double_backward(activation: str | None) -> None:
    arguments = backward_arguments((True, True, True), activation, requires_grad=True)
    opcheck(ops.linear_act_backward, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_in_every_compiled_dtype(dtype: torch.dtype) -> None:
    x, weight, bias = (
        torch.randn(s, dtype=dtype, requires_grad=True)
        for s in ((4, IN_UNITS), (IN_UNITS, UNITS), (UNITS,))
    )
    opcheck(ops.center, (x, [0]))
    for activation in samples.ACTIVATIONS[:-1]:
        opcheck(ops.linear_act, (x, weight, bias, activation))
        if activation in samples.OF_OUTPUT:
            arguments = backward_arguments((True, True, True), activation, dtype)
            opcheck(ops.linear_act_backward, arguments)


def test_opcheck_of_complex_center() -> None:
    opcheck(ops.center, (torch.randn(3, 4, dtype=torch.complex64, requires_grad=True), [1]))


# ---- shapes without values -------------------------------------------------------------


@pytest.mark.road("meta device")
@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("make", [samples.linear_act_samples, samples.center_samples])
def test_meta_and_fake_results_look_like_the_real_ones(
    device: str, make: Callable[..., Any]
) -> None:
    operator = functional.linear_act if make is samples.linear_act_samples else functional.center
    mode = FakeTensorMode()
    convert = mode.from_tensor if device == "fake" else partial(Tensor.to, device="meta")
    for sample in make(torch.bfloat16, large=False):
        real = operator(*sample.args, **sample.kwargs)
        args = [t if t is None else convert(t) for t in sample.args]
        with mode if device == "fake" else torch.no_grad():
            shape_only = operator(*args, **sample.kwargs)
        assert isinstance(shape_only, FakeTensor) == (device == "fake")
        assert shape_only.shape == real.shape, sample
        assert shape_only.stride() == real.stride(), sample
        assert shape_only.dtype == real.dtype, sample


@pytest.mark.road("meta device")
def test_fake_tensors_carry_backward() -> None:
    with FakeTensorMode():
        net = layers()
        x = torch.empty(4, IN_UNITS, requires_grad=True)
        net(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(isinstance(p.grad, FakeTensor) and p.grad.shape == p.shape for p in net.parameters())


def test_fake_tensors_are_refused_as_real_ones_are() -> None:
    with FakeTensorMode():
        with pytest.raises(RuntimeError, match="linear_act: weight must be"):
            functional.linear_act(torch.empty(2, 4), torch.empty(5, 3))
        with pytest.raises(IndexError, match="center: dim must be in"):
            functional.center(torch.empty(2, 4), 2)


@pytest.mark.road("meta device")
def test_symbolic_sizes_stay_symbolic() -> None:
    def both(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.center(functional.linear_act(x, weight, bias), 0)

    def draw(rows: int, in_units: int, units: int) -> tuple[Tensor, ...]:
        return torch.randn(rows, in_units), torch.randn(in_units, units), torch.randn(units)

    # No two sizes alike: torch gives equal ones a common symbol.
    graph = make_fx(both, tracing_mode="symbolic")(*draw(6, 5, 3))
    other = draw(9, 7, 4)
    assert_same_bits(graph(*other), both(*other))
    sizes = graph.shape_env.var_to_range
    assert all(r.lower <= 2 and r.upper > 2**31 for r in sizes.values()), sizes


@pytest.mark.road("torch.compile, dynamic shapes")
def test_unbacked_sizes_are_checked_at_run_time() -> None:
    """A size that is data (``x.nonzero()``) passes the meta kernels without a guard."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        rows = mode.shape_env.create_unbacked_symint()
        torch._check(rows >= 0)
        y = functional.linear_act(torch.empty(rows, IN_UNITS), torch.empty(IN_UNITS, UNITS))
        assert y.shape[0] is rows or y.shape[0] == rows
        assert functional.center(y, 0).shape[1] == UNITS


# ---- torch.compile ---------------------------------------------------------------------


def layers(activation: str | None = "relu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        MyLinear(IN_UNITS, 8, activation=activation),
        CenteredLayer(),
        nn.Linear(8, 6),
        MyLinear(6, UNITS, bias=False),
        CenteredLayer(dim=-1),
    )


def step(net: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.pow(3).sum(), (x, *module.parameters()))]


@pytest.mark.grid(one_in=2)
@pytest.mark.road("torch.compile")
@any_activation
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_without_a_graph_break_forward_and_backward(
    backend: str, activation: str | None
) -> None:
    module, x = layers(activation), torch.randn(4, IN_UNITS)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert_close(step(compiled, module, x), step(module, module, x))


@pytest.mark.road("torch.compile")
@pytest.mark.parametrize("sample_of", ["linear_act", "center"])
def test_compiled_function_on_every_layout_has_the_bits_of_eager(sample_of: str) -> None:
    make = getattr(samples, f"{sample_of}_samples")
    operator = getattr(functional, sample_of)
    for sample in make(torch.float32, large=False):
        torch._dynamo.reset()
        compiled = torch.compile(
            partial(operator, **sample.kwargs), fullgraph=True, backend="aot_eager", dynamic=False
        )
        assert_same_bits(compiled(*sample.args), operator(*sample.args, **sample.kwargs))


@pytest.mark.road("torch.compile, dynamic shapes")
def test_dynamic_batch_compiles_once() -> None:
    module = layers()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for rows in (4, 7, 2, 129, 64):
        x = torch.randn(rows, IN_UNITS)
        # Rounding aside: the mean over everything couples all rows and units.
        assert_close(step(compiled, module, x), step(module, module, x), terms=64 * rows)
        assert counter.frame_count == 1


@pytest.mark.road("torch.compile, dynamic shapes")
def test_marked_dynamic_batch_compiles_once_with_inductor() -> None:
    module = layers()
    compiled = torch.compile(module, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (4, 7, 33):
            x = torch.randn(rows, IN_UNITS)
            torch._dynamo.mark_dynamic(x, 0)
            # Not through step(): a clone would carry no mark.
            y = compiled(x)
            assert_close([y.detach()], [module(x).detach()], terms=64 * rows)
            actual = torch.autograd.grad(y.sum(), tuple(module.parameters()))
            expected = torch.autograd.grad(module(x).sum(), tuple(module.parameters()))
            assert_close(actual, expected, terms=64 * rows)


@pytest.mark.road("torch.compile, dynamic shapes")
def test_automatic_dynamic_shapes_compile_twice() -> None:
    module = layers()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for rows in (4, 7, 2, 129):
        compiled(torch.randn(rows, IN_UNITS))
    assert counter.frame_count == 2  # once for 4 rows, once for any number


@pytest.mark.road("torch.compile, dynamic shapes")
def test_a_dim_that_changes_compiles_as_that_of_a_stock_mean() -> None:
    # From the second on, torch.compile passes such an integer as a symbol.
    x = torch.randn(5, 7)
    compiled = torch.compile(functional.center, fullgraph=True, backend="aot_eager")
    for dim in (0, 1, -1, None, (0, 1), 0):
        assert torch.equal(compiled(x, dim), functional.center(x, dim))


@pytest.mark.road("torch.compile")
def test_parameters_may_change_without_recompiling() -> None:
    module, x = layers(), torch.randn(4, IN_UNITS)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        before = compiled(x)
        with torch.no_grad():
            module[0].weight.mul_(2)
        after = compiled(x)
    assert not torch.equal(before, after)
    assert_same_bits(after, module(x))


@pytest.mark.road("torch.compile")
def test_compile_records_the_operators_and_not_their_formula() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    leaves = [
        torch.randn(*s, requires_grad=True) for s in ((4, IN_UNITS), (IN_UNITS, UNITS), (UNITS,))
    ]
    aot_function(
        lambda *a: functional.center(functional.linear_act(*a)), fw_compiler=keep, bw_compiler=keep
    )(*leaves).sum().backward()
    forward, backward = (
        [
            str(n.target)
            for n in g.graph.nodes
            if n.op == "call_function" and "mylayers" in str(n.target)
        ]
        for g in graphs
    )
    assert forward == ["mylayers.linear_act.default", "mylayers.center.default"]
    assert backward == ["mylayers.center.default", "mylayers.linear_act_backward.default"]


@pytest.mark.road("torch.compile")
def test_compiled_code_gives_frozen_parameters_no_gradient() -> None:
    module, x = layers(), torch.randn(4, IN_UNITS)
    module[0].requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert module[0].weight.grad is None
    assert module[3].weight.grad is not None


@pytest.mark.road("torch.compile")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compile_in_modes_without_gradients(mode: Callable[[], Any]) -> None:
    module, x = layers(), torch.randn(4, IN_UNITS)
    with mode():
        y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        assert_same_bits(y, module(x))
    assert not y.requires_grad


@pytest.mark.road("autocast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compile_with_autocast_inside(dtype: torch.dtype) -> None:
    # Two layers of ours alone: stock layers may round elsewhere when compiled.
    torch.manual_seed(0)
    module = nn.Sequential(MyLinear(IN_UNITS, 8), CenteredLayer(0), MyLinear(8, UNITS))

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return module(x)

    x = torch.randn(4, IN_UNITS)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual, expected = step(compiled, module, x), step(run, module, x)
    assert_same_bits(actual, expected)
    assert [t.dtype for t in actual] == [dtype, *[torch.float32] * 5]


@pytest.mark.road("autocast")
def test_compile_under_autocast() -> None:
    module, x = MyLinear(IN_UNITS, UNITS), torch.randn(4, IN_UNITS)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = step(compiled, module, x), step(module, module, x)
    assert actual[0].dtype == torch.bfloat16
    assert_same_bits(actual, expected)


def test_compile_reports_a_bad_shape() -> None:
    compiled = torch.compile(MyLinear(IN_UNITS, UNITS), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="linear_act: weight must be"):
        compiled(torch.randn(4, IN_UNITS + 1))


def test_compiled_lazy_layer_works_once_it_knows_its_sizes() -> None:
    layer, x = LazyMyLinear(UNITS), torch.randn(4, IN_UNITS)
    expected = layer(x)
    assert_same_bits(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.road("functorch")
def test_compiled_transforms() -> None:
    """Dynamo traces torch.func through the operators."""
    weight, bias = torch.randn(IN_UNITS, UNITS), torch.randn(UNITS)

    def loss(w: Tensor, row: Tensor) -> Tensor:
        return functional.center(functional.linear_act(row, w, bias)).pow(3).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    rows = torch.randn(4, 2, IN_UNITS)
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    assert_close([compiled(weight, rows)], [per_sample(weight, rows)])


# Compiled autograd itself reads .grad of the tensors it traces, with stock layers as well.
reads_grad = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@pytest.mark.road("compiled autograd")
@reads_grad
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd(backend: str) -> None:
    module, x = layers(), torch.randn(4, IN_UNITS)
    module(x).pow(3).sum().backward()
    expected = [p.grad for p in module.parameters()]
    module.zero_grad(set_to_none=True)

    compiler = torch.compile(fullgraph=True, backend=backend)
    with torch._dynamo.compiled_autograd._enable(compiler):
        for _ in range(2):
            module.zero_grad(set_to_none=True)
            module(x).pow(3).sum().backward()
            assert_close([p.grad for p in module.parameters()], expected)
    assert counters["compiled_autograd"]["captures"] == 1  # the second backward reuses it


@pytest.mark.road("compiled autograd")
@reads_grad
def test_compiled_autograd_of_a_compiled_step() -> None:
    module, x = layers(), torch.randn(4, IN_UNITS)
    expected = step(module, module, x)

    def train(v: Tensor) -> Tensor:
        y = module(v)
        y.pow(3).sum().backward()
        return y.detach()

    x.requires_grad_()
    with torch._dynamo.config.patch(compiled_autograd=True):
        y = torch.compile(train, backend="aot_eager")(x)
    assert counters["compiled_autograd"]["captures"] == 1
    assert_close([y, x.grad, *(p.grad for p in module.parameters())], expected)


# ---- torch.export, make_fx, torch.jit.trace --------------------------------------------


@pytest.mark.grid(one_in=2)
@pytest.mark.road("torch.export")
@any_activation
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_program_takes_any_batch_and_survives_a_file(
    strict: bool, activation: str | None, tmp_path: Path
) -> None:
    module = layers(activation).eval()
    rows = torch.export.Dim("rows")
    program = torch.export.export(
        module, (torch.randn(4, IN_UNITS),), dynamic_shapes=({0: rows},), strict=strict
    )
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {"mylayers.linear_act.default", "mylayers.center.default"} <= targets
    path = tmp_path / "layers.pt2"
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    for n in (1, 4, 9, 130):
        x = torch.randn(n, IN_UNITS)
        assert_same_bits(loaded(x), module(x))


# torch.export's own use of its pytree module.
@pytest.mark.road("torch.export")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_exported_program_decomposes_to_the_operators() -> None:
    module = layers().eval()
    program = torch.export.export(module, (torch.randn(4, IN_UNITS),)).run_decompositions()
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count("mylayers.linear_act.default") == 2
    assert targets.count("mylayers.center.default") == 2
    x = torch.randn(4, IN_UNITS)
    assert_close([program.module()(x)], [module(x)])


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_records_forward_and_backward(tracing_mode: str) -> None:
    def gradient(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = functional.center(functional.linear_act(*leaves), 0)
        return torch.autograd.grad(y.pow(3).sum(), leaves)

    args = (torch.randn(4, IN_UNITS), torch.randn(IN_UNITS, UNITS), torch.randn(UNITS))
    graph = make_fx(gradient, tracing_mode=tracing_mode)(*args)
    targets = [str(n.target) for n in graph.graph.nodes if "mylayers" in str(n.target)]
    assert targets == [
        "mylayers.linear_act.default",
        "mylayers.center.default",
        "mylayers.center.default",
        "mylayers.linear_act_backward.default",
    ]
    assert_same_bits(graph(*args), gradient(*args))


@pytest.mark.road("torch.jit.trace")
def test_jit_trace_records_the_operators(tmp_path: Path) -> None:
    module = layers().eval()
    traced = torch.jit.trace(module, torch.randn(4, IN_UNITS))
    kinds = [n.kind() for n in traced.inlined_graph.nodes()]
    assert kinds.count("mylayers::linear_act") == 2
    assert kinds.count("mylayers::center") == 2
    traced.save(tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    x = torch.randn(9, IN_UNITS)
    assert_same_bits(loaded(x), module(x))


@pytest.mark.road("state_dict and pickle")
def test_compiled_module_is_copied_and_saved_like_a_plain_one() -> None:
    module, x = layers(), torch.randn(4, IN_UNITS)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x)
    clone = layers("relu")
    clone.load_state_dict(copy.deepcopy(compiled)._orig_mod.state_dict())
    assert_same_bits(clone(x), module(x))
