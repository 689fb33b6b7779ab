"""Exported to ONNX and run by ONNX Runtime, on a CPU: the numbers are those of the layers."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

import mylayers
from mylayers import CenteredLayer, FusedSequential, MyLinear, activations

ort = pytest.importorskip("onnxruntime")

IN_UNITS, UNITS = 5, 3
# A batch of its own for each dtype.
ANY_ROWS = tuple({0: torch.export.Dim(f"rows_{str(dtype)[6:]}")} for dtype in samples.KERNEL_DTYPES)
# ONNX's numbers of the dtypes.
ELEMENT_TYPES = {torch.float32: 1, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16}

pytestmark = [
    pytest.mark.road("ONNX"),
    # torch.onnx.export's own use of its pytree module.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is:FutureWarning"),
]


class EachDtype(nn.Module):
    """One layer for each dtype that has kernels: one export instead of four."""

    def __init__(self, make: Callable[[torch.dtype], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(dtype) for dtype in samples.KERNEL_DTYPES)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def export(module: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    """A session of ONNX Runtime with the module."""
    program = torch.onnx.export(
        module.eval(),
        inputs,
        dynamo=True,
        custom_translation_table=mylayers.onnx.translation_table(),
        verbose=False,
        **options,
    )
    return ort.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def run(session: Any, inputs: list[Tensor], expected: list[Tensor]) -> list[Tensor]:
    """The session's outputs, which have the expected ones' shapes and dtypes."""

    # NumPy has no bfloat16: the session reads and writes tensors' own memory, of one value more
    # than it needs, as a tensor of none has no address.
    def with_one_more(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat([t.flatten(), t.new_full([1], float("nan"))]) for t in tensors]

    binding = session.io_binding()
    memory = with_one_more(inputs), with_one_more([torch.full_like(e, 9.0) for e in expected])
    for bind, ends, tensors, places in (
        (binding.bind_input, session.get_inputs(), inputs, memory[0]),
        (binding.bind_output, session.get_outputs(), expected, memory[1]),
    ):
        for end, t, place in zip(ends, tensors, places, strict=True):
            bind(end.name, "cpu", 0, ELEMENT_TYPES[t.dtype], tuple(t.shape), place.data_ptr())
    session.run_with_iobinding(binding)
    return [place[:-1].view(e.shape) for place, e in zip(memory[1], expected, strict=True)]


def accumulator_unit(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype).eps


def assert_matches(actual: Tensor, expected: Tensor, summing: float) -> None:
    """Apart by what two ways of summing give, and by one unit of the dtype for both roundings."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    unit = torch.finfo(expected.dtype).eps
    samples.assert_within(actual, expected.double(), summing + unit * expected.double().abs())


def linear_summing(layer: MyLinear, x: Tensor) -> float:
    """A unit of the accumulator for each term, and four for ONNX Runtime's own functions."""
    if x.numel() == 0:
        return 0.0
    bias = 0.0 if layer.bias is None else layer.bias.double().abs()
    terms = x.double().abs() @ layer.weight.double().abs() + bias
    units = layer.in_units + 1 + 4
    return units * accumulator_unit(x.dtype) * max(terms.max().item(), 1.0)


def center_summing(x: Tensor) -> float:
    """As many units of the accumulator as terms, and the mean's rounding to the dtype."""
    if x.numel() == 0:
        return 0.0
    unit = torch.finfo(x.dtype).eps
    return (x.numel() * accumulator_unit(x.dtype) + unit) * x.double().abs().max().item()


def each_dtype(*shape: int) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for dtype in samples.KERNEL_DTYPES]


# An export takes seconds; the chain below has these activations too.
@pytest.mark.parametrize(
    "activation",
    [
        "relu",
        *(pytest.param(a, marks=pytest.mark.whole) for a in ("tanh", "sigmoid", "elu", None)),
    ],
)
def test_linear_act_of_any_batch_and_dtype(activation: str | None) -> None:
    torch.manual_seed(0)
    module = EachDtype(lambda dtype: MyLinear(IN_UNITS, UNITS, activation=activation, dtype=dtype))
    session = export(module, *each_dtype(4, IN_UNITS), dynamic_shapes=(ANY_ROWS,))
    for rows in (1, 4, 9, 0):
        inputs = each_dtype(rows, IN_UNITS)
        expected = module(*inputs)
        actual = run(session, inputs, expected)
        for layer, x, a, e in zip(module.layers, inputs, actual, expected, strict=True):
            assert_matches(a, e, linear_summing(layer, x))


@pytest.mark.parametrize(
    "dim",
    [
        pytest.param(dim, id=str(dim), marks=[pytest.mark.whole] * (dim not in (None, (0, 2))))
        for dim in (None, 0, -1, (0, 2))
    ],
)
def test_center_of_any_batch_and_dtype(dim: Any) -> None:
    torch.manual_seed(0)
    module = EachDtype(lambda _: CenteredLayer(dim))
    session = export(module, *each_dtype(4, 3, 5), dynamic_shapes=(ANY_ROWS,))
    for rows in (1, 4, 9, 0):
        inputs = each_dtype(rows, 3, 5)
        expected = module(*inputs)
        for x, a, e in zip(inputs, run(session, inputs, expected), expected, strict=True):
            assert_matches(a, e, center_summing(x))


class Edges(nn.Module):
    """A row alone, two leading dimensions, no bias; a mean of a single value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = MyLinear(IN_UNITS, UNITS, bias=False)

    def forward(self, row: Tensor, rows: Tensor, scalar: Tensor) -> list[Tensor]:
        return [
            self.layer(row),
            self.layer(rows),
            CenteredLayer()(scalar),
            CenteredLayer(0)(scalar),
        ]


def test_every_rank() -> None:
    torch.manual_seed(0)
    module = Edges()
    inputs = [torch.randn(IN_UNITS), torch.randn(2, 3, IN_UNITS), torch.randn(())]
    actual = run(export(module, *inputs), inputs, expected := module(*inputs))
    for x, a, e in zip(inputs, actual, expected, strict=False):
        assert_matches(a, e, linear_summing(module.layer, x) if x.dim() else 0.0)
    assert actual[3] == 0


class Chain(nn.Module):
    """A program of each kind of step; FusedSequential writes such."""

    PROGRAM = (
        "linear+bias+tanh; center(0); linear_t; relu; layer_norm(2,3,0.01)+weight+bias; "
        "flatten(1,-1); linear_t+bias+elu; layer_norm(2,0.3); sigmoid; center"
    )

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = [(5, 4), (4,), (3, 4), (2, 3), (2, 3), (2, 6), (2,)]
        self.parameters_ = nn.ParameterList(torch.randn(s).to(dtype) for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mylayers.sequential(x, list(self.parameters_), self.PROGRAM)


def test_every_step_of_sequential_in_any_batch_and_dtype() -> None:
    torch.manual_seed(0)
    module = EachDtype(Chain)
    session = export(module, *each_dtype(4, 2, 5), dynamic_shapes=(ANY_ROWS,))
    for rows in (1, 4, 9, 0):
        inputs = each_dtype(rows, 2, 5)
        expected = module(*inputs)
        for a, e in zip(run(session, inputs, expected), expected, strict=True):
            # Each of eight steps rounds to the dtype what is at most a few units large, and the
            # steps that follow do not enlarge it by more than their weights: 32 units in all.
            assert_matches(a, e, 32 * torch.finfo(e.dtype).eps)


class Activations(nn.Module):
    """Each activation, and each setting."""

    def forward(self, x: Tensor) -> list[Tensor]:
        names = [*activations.ACTIVATIONS, *samples.WITH_SETTINGS]
        if x.dtype == torch.float64:
            names.remove("gelu")  # ONNX Runtime has no Erf of float64
        return [torch.ops.mylayers.sequential(x, [], name) for name in names]


@pytest.mark.parametrize("dtype", samples.KERNEL_DTYPES, ids=str)
def test_every_activation(dtype: torch.dtype) -> None:
    module, x = Activations(), torch.linspace(-9, 9, 64).to(dtype)
    expected = module(x)
    for a, e in zip(run(export(module, x), [x], expected), expected, strict=True):
        assert_matches(a, e, 16 * accumulator_unit(dtype) + torch.finfo(dtype).eps)


def test_a_fused_network_beside_stock_layers() -> None:
    torch.manual_seed(0)
    fused = FusedSequential(nn.Linear(6, 8), nn.Tanh(), CenteredLayer(1), MyLinear(8, 4))
    module = nn.Sequential(nn.Flatten(), fused, nn.Linear(4, 2))
    inputs = [torch.randn(4, 2, 3)]
    session = export(module, *inputs, dynamic_shapes=({0: "rows"},))
    for rows in (1, 4, 9):
        inputs, expected = [x := torch.randn(rows, 2, 3)], [module(x).detach()]
        (actual,) = run(session, inputs, expected)
        # Three products of at most 8 terms of order one.
        assert_matches(actual, expected[0], 3 * 8 * 8 * torch.finfo(torch.float32).eps)


def test_sequential_flattens_leading_dimensions_and_centers_a_single_value() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, scalar: Tensor) -> list[Tensor]:
            sequential = torch.ops.mylayers.sequential
            return [
                sequential(x, [], "flatten(0,-2); relu"),
                sequential(x, [], "flatten(1,1); relu"),
                sequential(scalar, [], "tanh; center(0)"),
            ]

    module, inputs = Both(), [torch.randn(2, 3, 4), torch.randn(())]
    for a, e in zip(
        run(export(module, *inputs), inputs, module(*inputs)), module(*inputs), strict=True
    ):
        assert_matches(a, e, 0.0)


def test_every_operator_of_a_network_has_a_translation() -> None:
    forward = {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("mylayers::") and not name.endswith(("_backward", "_outputs"))
    }
    assert forward == {op.name() for op in mylayers.onnx.translation_table()}


@pytest.mark.parametrize("program", [None, "linear+elu", "elu"], ids=str)
def test_an_activation_without_translation_is_refused_by_name(
    program: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(IN_UNITS, UNITS))

        def forward(self, x: Tensor) -> Tensor:
            if program is None:
                return mylayers.functional.linear_act(x, self.weight, activation="elu")
            weights = [self.weight] if "linear" in program else []
            return torch.ops.mylayers.sequential(x, weights, program)

    monkeypatch.delitem(mylayers.activations.ACTIVATIONS, "elu")
    with pytest.raises(
        torch.onnx.errors.OnnxExporterError,
        match=r"one of those translated, relu, .* or None; got 'elu'",
    ):
        export(Network(), torch.randn(2, IN_UNITS))


def test_a_missing_onnxscript_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs onnxscript.*pip install 'mylayers\[onnx\]'"):
        mylayers.onnx.translation_table()
