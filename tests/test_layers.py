"""The layers as modules: everything that users expect of ``torch.nn``.

Inputs and parameters are small whole numbers wherever values are compared: every sum is then
exact in every dtype, so results must equal the reference's without a tolerance, but for the
rounding of the activations that have one.
"""

import copy
import io
import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import Parameter, UninitializedParameter, is_lazy
from torch.nn.utils import parametrize, skip_init

from mylayers import CenteredLayer, FusedSequential, LazyMyLinear, MyLinear, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LINEAR_OPTIONS = {
    **{name: {"bias": True, "activation": name} for name in reference.ACTIVATIONS},
    "affine": {"bias": True, "activation": None},
    "relu-no_bias": {"bias": False, "activation": "relu"},
    "product": {"bias": False, "activation": None},
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_option = pytest.mark.parametrize("options", LINEAR_OPTIONS.values(), ids=LINEAR_OPTIONS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def whole(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers from -4 to 4."""
    return torch.randint(-4, 5, shape).to(dtype)


def with_whole_parameters(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(whole(*p.shape))
    return module


def whole_linear(in_units: int = 5, units: int = 3, **options) -> MyLinear:
    return with_whole_parameters(MyLinear(in_units, units, **options))


def formula(layer: MyLinear, x: Tensor) -> Tensor:
    return reference.linear_act(x, layer.weight, layer.bias, layer.activation)


def assert_equal(actual: Tensor, expected: Tensor, activation: str | None) -> None:
    """Output, or gradient of at most 4 rows; only an activation rounds.

    An output up to 1 is off by 4 units in the last place at most, which are twice eps; its
    derivative, up to twice as steep and with roundings of its own, by 6 eps.
    """
    atol = 0 if activation in (None, "relu") else 4 * 6 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ---- the constructor of MyLinear ---------------------------------------------------------


@pytest.mark.grid
@each_option
@each_dtype
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_constructor_makes_what_its_arguments_say(options, dtype, device):
    layer = MyLinear(5, 3, **options, device=device, dtype=dtype)
    assert (layer.in_units, layer.units, layer.activation) == (5, 3, options["activation"])
    assert layer.training
    names = ["weight", "bias"] if options["bias"] else ["weight"]
    assert [name for name, _ in layer.named_parameters()] == names
    assert list(layer.state_dict()) == names
    assert (layer.bias is None) is not options["bias"]
    shapes = [(5, 3), (3,)]
    for parameter, shape in zip(layer.parameters(), shapes, strict=False):
        assert type(parameter) is Parameter
        assert parameter.shape == shape
        assert parameter.is_contiguous()
        assert parameter.dtype == dtype
        assert parameter.device.type == device
        assert parameter.requires_grad
        assert parameter.is_leaf
        assert parameter.grad is None


@pytest.mark.grid
@each_option
@each_dtype
def test_output_is_the_formula(options, dtype):
    layer = whole_linear(dtype=dtype, **options)
    x = whole(40, 5, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_equal(y, formula(layer, x), options["activation"])
    never_below_0 = ("relu", "sigmoid", "softplus", "relu6", "hardsigmoid")
    assert bool((y < 0).any()) is (options["activation"] not in never_below_0)


def test_bias_and_activation_are_positional_device_and_dtype_are_not():
    layer = MyLinear(5, 3, False, None)
    assert layer.bias is None
    assert layer.activation is None
    with pytest.raises(TypeError, match="positional"):
        MyLinear(5, 3, False, None, "cpu")


def test_parameters_follow_the_default_device_and_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            layer = MyLinear(5, 3)
    finally:
        torch.set_default_dtype(before)
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.float64, "meta")}


@pytest.mark.parametrize("size", [np.int64(4), np.uint8(4), torch.tensor(4)], ids=repr)
def test_any_integer_type_is_a_size_and_becomes_an_int(size):
    for layer in (MyLinear(size, 3), MyLinear(3, size)):
        assert type(layer.in_units) is int
        assert type(layer.units) is int
        assert 4 in layer.weight.shape


@pytest.mark.parametrize(
    "size",
    [2.0, "3", None, True, [3], np.float64(2), np.True_, np.array([2, 3]), torch.tensor(2.5)],
    ids=repr,
)
def test_a_size_that_is_no_integer_is_a_type_error_that_names_it(size):
    with pytest.raises(TypeError, match="MyLinear: in_units must be an int"):
        MyLinear(size, 3)
    with pytest.raises(TypeError, match="MyLinear: units must be an int"):
        MyLinear(3, size)
    with pytest.raises(TypeError, match="MyLinear: units must be an int"):
        LazyMyLinear(size)


def test_a_negative_size_is_a_value_error_that_names_it():
    with pytest.raises(ValueError, match="MyLinear: in_units must not be negative; got -1"):
        MyLinear(-1, 3)
    for make in (lambda: MyLinear(3, -2), lambda: LazyMyLinear(-2)):
        with pytest.raises(ValueError, match="MyLinear: units must not be negative; got -2"):
            make()


@pytest.mark.parametrize(
    ("activation", "error"),
    [
        ("swish", ValueError),
        ("ReLU", ValueError),
        ("", ValueError),
        (1, TypeError),
        (True, TypeError),
        pytest.param(torch.relu, TypeError, id="torch.relu"),
        (nn.ReLU(), TypeError),
    ],
    ids=repr,
)
def test_an_unknown_activation_is_refused_by_name(activation, error):
    linear = nn.Linear(5, 3)
    for make in (
        lambda: MyLinear(5, 3, activation=activation),
        lambda: LazyMyLinear(3, activation=activation),
        lambda: MyLinear.from_linear(linear, activation=activation),
    ):
        with pytest.raises(error, match=r"MyLinear: activation must be .* or None; got "):
            make()


def test_a_dtype_that_cannot_require_gradients_is_refused_as_by_stock_modules():
    for make in (nn.Linear, MyLinear):
        with pytest.raises(RuntimeError, match="floating point and complex dtype"):
            make(5, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (MyLinear(5, 3), "MyLinear(in_units=5, units=3, bias=True, activation='relu')"),
        (MyLinear(5, 3, False, None), "MyLinear(in_units=5, units=3, bias=False, activation=None)"),
        (LazyMyLinear(3), "LazyMyLinear(in_units=0, units=3, bias=True, activation='relu')"),
        (CenteredLayer(), "CenteredLayer()"),
        (CenteredLayer(-1), "CenteredLayer(dim=-1)"),
        (CenteredLayer([0, 2]), "CenteredLayer(dim=(0, 2))"),
    ],
    ids=lambda value: "" if isinstance(value, nn.Module) else value,
)
def test_repr_reads_like_the_constructor(layer, text):
    assert repr(layer) == text


def test_a_bias_set_to_none_is_gone():
    layer = whole_linear()
    layer.bias = None
    x = whole(4, 5)
    assert torch.equal(layer(x), torch.relu(x @ layer.weight))
    assert "bias=False" in repr(layer)
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.grid
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)], ids=str)
@each_option
def test_zero_sizes_work_forward_and_backward(sizes, options):
    layer = whole_linear(*sizes, **options)
    x = whole(4, sizes[0]).requires_grad_()
    y = layer(x)
    assert y.shape == (4, sizes[1])
    assert_equal(y, formula(layer, x), options["activation"])
    y.sum().backward()
    twin = copy.deepcopy(layer)
    twin.zero_grad()
    z = x.detach().clone().requires_grad_()
    formula(twin, z).sum().backward()
    assert torch.equal(x.grad, z.grad)
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_equal(ours.grad, theirs.grad, options["activation"])
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, layer.weight)


# ---- drawing the parameters --------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_one_seed_gives_the_values_of_randn_weight_first(dtype, bias):
    torch.manual_seed(5)
    layer = MyLinear(20, 7, bias, dtype=dtype)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(layer.weight, torch.randn(20, 7, dtype=dtype))
    if bias:
        assert torch.equal(layer.bias, torch.randn(7, dtype=dtype))
    assert torch.equal(after, torch.get_rng_state())


def test_reset_parameters_draws_the_same_parameters_anew():
    layer = MyLinear(20, 7)
    weight, bias = layer.weight, layer.bias
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    twin = MyLinear(20, 7)
    assert layer.weight is weight
    assert layer.bias is bias
    assert torch.equal(weight, twin.weight)
    assert torch.equal(bias, twin.bias)
    assert weight.requires_grad
    assert weight.is_leaf


@pytest.mark.road("meta device")
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_skip_init_and_meta_construction_draw_nothing(device):
    before = torch.get_rng_state()
    layer = skip_init(MyLinear, 5, 3, device=device)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(layer) is MyLinear
    assert {p.device.type for p in layer.parameters()} == {device}
    assert [tuple(p.shape) for p in layer.parameters()] == [(5, 3), (3,)]


# ---- from and to nn.Linear ---------------------------------------------------------------

CONVERSIONS = {
    "from_linear": (nn.Linear, MyLinear.from_linear, MyLinear),
    "to_linear": (MyLinear, MyLinear.to_linear, nn.Linear),
}
each_conversion = pytest.mark.parametrize(
    ("source_type", "convert", "target_type"), CONVERSIONS.values(), ids=CONVERSIONS
)


@pytest.mark.grid
@each_conversion
@each_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_conversion_transposes_the_weight_and_keeps_the_rest(
    source_type, convert, target_type, dtype, bias
):
    source = with_whole_parameters(source_type(5, 3, bias=bias, dtype=dtype))
    target = convert(source)
    assert type(target) is target_type
    assert torch.equal(target.weight, source.weight.T)
    assert target.weight.is_contiguous()
    if bias:
        assert torch.equal(target.bias, source.bias)
    else:
        assert target.bias is None
    assert all(type(p) is Parameter and p.dtype == dtype for p in target.parameters())
    stock, ours = (source, target) if source_type is nn.Linear else (target, source)
    x = whole(4, 5, dtype=dtype)
    assert torch.equal(ours(x), torch.relu(stock(x)))


@pytest.mark.grid
@each_conversion
@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_conversion_keeps_requires_grad_and_training_mode(
    source_type, convert, target_type, trained, training
):
    source = source_type(5, 3).train(training)
    for name, parameter in source.named_parameters():
        parameter.requires_grad_(name in trained)
    target = convert(source)
    assert type(target) is target_type
    assert target.training is training
    assert tuple(n for n, p in target.named_parameters() if p.requires_grad) == trained


@each_conversion
def test_conversion_copies(source_type, convert, target_type):
    source = with_whole_parameters(source_type(5, 3))
    target = convert(source)
    before = copy.deepcopy(target.state_dict())
    with torch.no_grad():
        for p in source.parameters():
            p.add_(1)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name])
    assert isinstance(target, target_type)
    assert all(p.is_leaf and p.grad is None for p in target.parameters())


@each_conversion
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_conversion_keeps_the_device_and_draws_no_random_numbers(
    source_type, convert, target_type, device
):
    source = source_type(5, 3, device=device)
    before = torch.get_rng_state()
    target = convert(source)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.device.type for p in target.parameters()} == {device}
    assert target.weight.shape == source.weight.T.shape
    assert isinstance(target, target_type)


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")  # nn.Linear's own
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)], ids=str)
def test_conversion_of_zero_sizes(sizes):
    layer = MyLinear(*sizes)
    linear = layer.to_linear()
    assert (linear.in_features, linear.out_features) == sizes
    assert torch.equal(linear.bias, layer.bias)
    assert torch.equal(MyLinear.from_linear(linear).bias, layer.bias)


@each_option
def test_round_trip_through_a_stock_layer_changes_nothing(options):
    layer = MyLinear(5, 3, **options)
    again = MyLinear.from_linear(layer.to_linear(), activation=options["activation"])
    assert repr(again) == repr(layer)
    for name, value in layer.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_from_linear_takes_the_activation_and_subclasses_of_linear():
    class Named(nn.Linear):
        pass

    linear = with_whole_parameters(Named(5, 3))
    layer = MyLinear.from_linear(linear, activation=None)
    x = whole(4, 5)
    assert torch.equal(layer(x), linear(x))
    assert (layer(x) < 0).any()


@pytest.mark.parametrize(
    "other",
    [MyLinear(5, 3), nn.Conv1d(5, 3, 1), nn.Bilinear(5, 5, 3), CenteredLayer(), torch.eye(3), None],
    ids=lambda value: type(value).__name__,
)
def test_from_linear_refuses_whatever_is_no_linear(other):
    with pytest.raises(TypeError, match=f"linear must be an nn.Linear; got {type(other).__name__}"):
        MyLinear.from_linear(other)


def test_layers_without_sizes_yet_cannot_be_converted():
    with pytest.raises(ValueError, match="uninitialized"):
        MyLinear.from_linear(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="uninitialized"):
        LazyMyLinear(3).to_linear()


def test_from_linear_on_the_lazy_class_gives_what_the_lazy_class_becomes():
    linear = with_whole_parameters(nn.Linear(5, 3))
    layer = LazyMyLinear.from_linear(linear)
    assert type(layer) is MyLinear
    assert torch.equal(layer.weight, linear.weight.T)


# ---- LazyMyLinear ------------------------------------------------------------------------


@pytest.mark.grid
@each_option
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (0, 5)], ids=str)
def test_lazy_layer_becomes_the_layer_of_its_first_input(options, shape):
    torch.manual_seed(5)
    twin = MyLinear(5, 3, **options)
    lazy = LazyMyLinear(3, **options)
    assert lazy.has_uninitialized_params()
    assert all(is_lazy(p) for p in lazy.parameters())
    x = torch.rand(shape)
    torch.manual_seed(5)
    y = lazy(x)
    assert type(lazy) is MyLinear
    assert repr(lazy) == repr(twin)
    assert torch.equal(y, twin(x))
    assert [type(p) for p in lazy.parameters()] == [Parameter] * (1 + options["bias"])
    assert all(p.requires_grad for p in lazy.parameters())
    assert not lazy._forward_pre_hooks
    with pytest.raises(RuntimeError, match="in_units = 4"):
        lazy(torch.rand(2, 4))


def test_lazy_layer_takes_its_first_input_by_name():
    lazy = LazyMyLinear(3)
    assert lazy(input=torch.rand(2, 5)).shape == (2, 3)
    assert lazy.in_units == 5


@pytest.mark.grid
@each_dtype
@pytest.mark.parametrize(
    ("device", "make"),
    [
        ("cpu", LazyMyLinear),
        ("meta", LazyMyLinear),
        ("cpu", lambda units, **place: LazyMyLinear(units).to(**place)),
    ],
    ids=["cpu", "meta", "moved"],
)
def test_lazy_layer_takes_dtype_and_device(dtype, device, make):
    place = {"dtype": dtype, "device": device}
    lazy = make(3, **place)
    y = lazy(torch.ones(2, 5, **place))
    assert (y.dtype, y.device.type) == (dtype, device)
    assert {(p.dtype, p.device.type) for p in lazy.parameters()} == {(dtype, device)}


@pytest.mark.parametrize("make", [nn.LazyLinear, LazyMyLinear])
def test_lazy_parameters_have_no_shape_before_the_first_input(make):
    lazy = make(3)
    lazy.reset_parameters()
    for read in (lambda: lazy.weight.shape, lambda: lazy.weight + 1, lambda: lazy.weight.numel()):
        with pytest.raises((RuntimeError, ValueError), match="uninitialized parameter"):
            read()


def test_lazy_layers_in_a_sequential_train_after_a_dry_run():
    net = nn.Sequential(LazyMyLinear(8), CenteredLayer(), LazyMyLinear(1, activation=None))
    x = torch.rand(16, 5)
    net(x)
    assert [type(m) for m in net] == [MyLinear, CenteredLayer, MyLinear]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    before = net(x).square().mean()
    before.backward()
    optimizer.step()
    assert net(x).square().mean() < before


@pytest.mark.parametrize("bias", [True, False])
def test_lazy_layer_loads_a_state_before_its_first_input(bias):
    layer = whole_linear(bias=bias)
    lazy = LazyMyLinear(3, bias)
    assert lazy.load_state_dict(layer.state_dict()) == ([], [])
    assert not lazy.has_uninitialized_params()
    assert torch.equal(lazy.weight, layer.weight)
    x = whole(4, 5)
    assert torch.equal(lazy(x), layer(x))
    assert repr(lazy) == repr(layer)
    assert torch.equal(lazy.to_linear().weight, layer.weight.T)


@pytest.mark.road("state_dict and pickle")
def test_lazy_layer_saves_a_state_before_and_after_its_first_input():
    lazy = LazyMyLinear(3)
    state = lazy.state_dict()
    assert {name: type(value) for name, value in state.items()} == {
        "weight": UninitializedParameter,
        "bias": UninitializedParameter,
    }
    other = LazyMyLinear(3)
    other.load_state_dict(through_file(state, weights_only=False))
    assert other.has_uninitialized_params()
    lazy(whole(4, 5))
    other.load_state_dict(through_file(lazy.state_dict()))
    x = whole(2, 5)
    assert torch.equal(other(x), lazy(x))


def test_an_initialised_layer_refuses_the_state_of_a_lazy_one():
    for lazy, layer in ((nn.LazyLinear(3), nn.Linear(5, 3)), (LazyMyLinear(3), MyLinear(5, 3))):
        with pytest.raises(RuntimeError, match="uninitialized parameter"):
            layer.load_state_dict(lazy.state_dict())


@pytest.mark.parametrize("change", ["deepcopy", "pickle"])
def test_copies_of_a_lazy_layer_initialise_on_their_own(change):
    lazy = LazyMyLinear(3, activation=None)
    twin = copy.deepcopy(lazy) if change == "deepcopy" else pickle.loads(pickle.dumps(lazy))
    assert twin(torch.rand(2, 7)).shape == (2, 3)
    assert type(twin) is MyLinear
    assert twin.activation is None
    assert lazy.has_uninitialized_params()
    assert lazy(torch.rand(2, 5)).shape == (2, 3)
    assert (lazy.in_units, twin.in_units) == (5, 7)


# ---- CenteredLayer -----------------------------------------------------------------------

CENTER_DIMS = [
    (None, None),
    (0, 0),
    (-1, -1),
    (np.int64(1), 1),
    (torch.tensor(2), 2),
    ((), ()),
    ((0, 1), (0, 1)),
    ([0, -1], (0, -1)),
    ([np.int32(2), 1], (2, 1)),
    (range(2), (0, 1)),
    (torch.Size([1]), (1,)),
]


@pytest.mark.grid
@pytest.mark.parametrize(("dim", "kept"), CENTER_DIMS, ids=repr)
@each_dtype
def test_centered_layer_averages_over_its_dims(dim, kept, dtype):
    layer = CenteredLayer(dim)
    assert layer.dim == kept
    assert type(layer.dim) is type(kept)
    assert list(layer.parameters()) == []
    assert list(layer.state_dict()) == []
    # Sizes are powers of two and values multiples of 64, so that every mean is exact.
    x = 64 * whole(2, 4, 8, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, reference.center(x, kept))


def test_centered_layer_keeps_its_own_copy_of_dim():
    dims = [0, 1]
    layer = CenteredLayer(dims)
    dims.clear()
    assert layer.dim == (0, 1)


@pytest.mark.parametrize(
    "dim",
    [
        1.5,
        "0",
        "",
        b"\0",
        True,
        np.float64(1),
        np.True_,
        {0},
        pytest.param(object(), id="object"),
        [0.5],
        [None],
        [0, True],
        [[0]],
        np.array([0.5]),
        torch.tensor(0.5),
    ],
    ids=repr,
)
def test_centered_layer_refuses_what_is_no_dim(dim):
    with pytest.raises(TypeError, match="CenteredLayer: dim must be None, an int or a sequence"):
        CenteredLayer(dim)


@pytest.mark.parametrize(
    ("dim", "error"), [(3, IndexError), (-4, IndexError), ((0, 0), RuntimeError)], ids=str
)
def test_centered_layer_refuses_dims_that_the_input_has_not_as_mean_does(dim, error):
    x = torch.rand(2, 3, 4)
    for call in (CenteredLayer(dim), lambda t: reference.center(t, dim)):
        with pytest.raises(error):
            call(x)


# ---- copies and files --------------------------------------------------------------------


def through_file(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: through_file(module, weights_only=False),
}
MODULES = {
    "MyLinear": lambda: MyLinear(5, 4),
    "no_bias": lambda: MyLinear(5, 4, bias=False, activation=None),
    "float64": lambda: MyLinear(5, 4, dtype=torch.float64),
    "CenteredLayer": CenteredLayer,
    "CenteredLayer_dims": lambda: CenteredLayer([0, -1]),
    "Sequential": lambda: nn.Sequential(nn.Linear(5, 4), MyLinear(4, 5), CenteredLayer(1)),
}


@pytest.mark.grid
@pytest.mark.road("state_dict and pickle")
@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_copy_of_a_module_is_equal_and_independent(make, copier):
    module = make().eval()
    for p in list(module.parameters())[:1]:
        p.requires_grad_(False)
    twin = copier(module)
    assert type(twin) is type(module)
    assert repr(twin) == repr(module)
    assert not twin.training
    dtypes = [p.dtype for p in module.parameters()] or [torch.float32]
    x = torch.rand(2, 5, dtype=dtypes[0])
    y = module(x)
    assert torch.equal(twin(x), y)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert theirs.requires_grad is ours.requires_grad
        assert type(theirs) is Parameter
        with torch.no_grad():
            theirs.fill_(0)
    assert torch.equal(module(x), y)


@pytest.mark.road("state_dict and pickle")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
def test_state_goes_through_a_file_with_the_safe_loader(tmp_path, mmap, assign):
    net, twin = (nn.Sequential(MyLinear(5, 4), CenteredLayer(), MyLinear(4, 3)) for _ in range(2))
    path = tmp_path / "net.pt"
    torch.save(net.state_dict(), path)
    state = torch.load(path, weights_only=True, mmap=mmap)
    assert twin.load_state_dict(state, assign=assign) == ([], [])
    x = torch.rand(6, 5)
    y = twin(x)
    assert torch.equal(y, net(x))
    y.sum().backward()
    net(x).sum().backward()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(theirs.grad, ours.grad)


@pytest.mark.road("state_dict and pickle")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: s.update(weight=s["weight"].T),
            r"size mismatch for weight: .*\[3, 5\].*\[5, 3\]",
        ),
        (lambda s: s.update(bias=torch.zeros(4)), r"size mismatch for bias: "),
        (lambda s: s.pop("bias"), r'Missing key\(s\) in state_dict: "bias"'),
        (lambda s: s.update(scale=torch.ones(1)), r'Unexpected key\(s\) in state_dict: "scale"'),
    ],
    ids=["weight_of_a_stock_layer", "bias_of_another_length", "missing", "unexpected"],
)
def test_a_state_that_does_not_fit_is_refused_by_name(edit, message):
    layer = MyLinear(5, 3)
    state = layer.state_dict()
    edit(state)
    with pytest.raises(
        RuntimeError, match=rf"(?s)Error.* loading state_dict for MyLinear:.*{message}"
    ):
        layer.load_state_dict(state)


def test_a_lenient_load_reports_missing_and_unexpected_keys():
    layer = whole_linear()
    bias = layer.bias.detach().clone()
    state = {"weight": whole(5, 3), "scale": torch.ones(1)}
    assert layer.load_state_dict(state, strict=False) == (["bias"], ["scale"])
    assert torch.equal(layer.weight, state["weight"])
    assert torch.equal(layer.bias, bias)


def test_load_copies_into_the_dtype_and_assign_takes_the_dtype():
    state = whole_linear(dtype=torch.float64).state_dict()
    layer = MyLinear(5, 3)
    weight = layer.weight
    layer.load_state_dict(state)
    assert layer.weight is weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight.double(), state["weight"])
    layer.load_state_dict(state, assign=True)
    assert layer.weight.dtype == torch.float64
    assert layer.weight.data_ptr() == state["weight"].data_ptr()
    x = whole(4, 5, dtype=torch.float64)
    assert torch.equal(layer(x), formula(layer, x))


# ---- moves between dtypes and devices ----------------------------------------------------

MOVES = {
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to_like": (lambda m: m.to(torch.empty(1, dtype=torch.float64)), torch.float64),
    "half": (nn.Module.half, torch.float16),
    "double": (nn.Module.double, torch.float64),
    "bfloat16": (nn.Module.bfloat16, torch.bfloat16),
    "float": (lambda m: m.double().float(), torch.float32),
    "type": (lambda m: m.type(torch.float16), torch.float16),
}


@pytest.mark.parametrize(("move", "dtype"), MOVES.values(), ids=MOVES)
def test_moves_between_dtypes_keep_the_module_and_its_values(move, dtype):
    layer = whole_linear()
    before = layer.weight.detach().clone()
    assert move(layer) is layer
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert torch.equal(layer.weight, before.to(dtype))
    assert layer.weight.requires_grad
    x = whole(4, 5, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, formula(layer, x))
    with pytest.raises(RuntimeError, match="weight must have the dtype of input"):
        layer(x.to(torch.float32 if dtype != torch.float32 else torch.float64))


@pytest.mark.road("meta device")
def test_meta_module_is_emptied_onto_the_cpu_and_loaded():
    layer = whole_linear()
    away = copy.deepcopy(layer).to("meta")
    assert away.weight.is_meta
    assert away(torch.empty(2, 4, 5, device="meta")).shape == (2, 4, 3)
    back = away.to_empty(device="cpu")
    assert back is away
    assert {p.device.type for p in back.parameters()} == {"cpu"}
    back.load_state_dict(layer.state_dict())
    x = whole(4, 5)
    assert torch.equal(back(x), layer(x))
    with pytest.raises(NotImplementedError, match="meta"):
        MyLinear(5, 3, device="meta").to("cpu")


# ---- parametrisations, tying, functional calls -------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_a_parametrised_weight_is_used_trained_and_removed():
    layer = whole_linear()
    plain = copy.deepcopy(layer)
    x = whole(4, 5)
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert torch.equal(layer(x), plain(x))
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.copy_(plain.weight)
    expected = reference.linear_act(x, 2 * plain.weight, plain.bias)
    y = layer(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(original.grad, plain.weight.grad)
    assert list(layer.state_dict()) == ["bias", "parametrizations.weight.original"]
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer(x), expected)


def test_stock_weight_norm_applies():
    layer = whole_linear()
    plain = copy.deepcopy(layer)
    nn.utils.parametrizations.weight_norm(layer)
    x = whole(4, 5)
    layer(x).sum().backward()
    norms = layer.parametrizations.weight.original0
    assert norms.shape == (5, 1)
    assert norms.grad.any()
    # Each weight is normalised and scaled back: three roundings of its size.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(layer.weight, plain.weight, rtol=3 * eps, atol=0)


def test_tied_weights_count_once_and_add_their_gradients():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = whole_linear(4, 4)
            self.second = whole_linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    net = Tied()
    assert [name for name, _ in net.named_parameters()] == [
        "first.weight",
        "first.bias",
        "second.bias",
    ]
    assert list(net.state_dict()) == [
        "first.weight",
        "first.bias",
        "second.weight",
        "second.bias",
    ]
    for each in (net, copy.deepcopy(net)):
        x = whole(6, 4)
        each(x).sum().backward()
        weight = each.first.weight
        assert each.second.weight is weight
        twin = weight.detach().clone().requires_grad_()
        hidden = reference.linear_act(x, twin, each.first.bias.detach())
        reference.linear_act(hidden, twin, each.second.bias.detach()).sum().backward()
        assert twin.grad.any()
        assert torch.equal(weight.grad, twin.grad)


def test_functional_call_uses_the_parameters_given_to_it():
    layer = whole_linear()
    x = whole(4, 5)
    given = {"weight": whole(5, 3).requires_grad_(), "bias": whole(3).requires_grad_()}
    before = layer(x)
    y = functional_call(layer, given, (x,))
    expected = reference.linear_act(x, *given.values())
    assert torch.equal(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), given.values()),
        torch.autograd.grad(expected.sum(), given.values()),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(layer(x), before)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_train_and_eval_give_the_same_bits(make):
    module = make()
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    x = torch.rand(6, 5, dtype=dtype)
    trained = module(x)
    assert module.eval() is module
    assert not any(m.training for m in module.modules())
    assert torch.equal(module(x), trained)
    assert all(m.training for m in module.train().modules())


def test_freezing_and_zero_grad_work_as_on_any_module():
    layer = whole_linear()
    layer(whole(4, 5)).sum().backward()
    assert layer.weight.grad is not None
    layer.zero_grad()
    assert layer.weight.grad is None
    layer.requires_grad_(False)
    assert not layer(whole(4, 5)).requires_grad


# ---- hooks -------------------------------------------------------------------------------

HOOKED = {"MyLinear": lambda: whole_linear(4, 4), "CenteredLayer": CenteredLayer}
each_hooked = pytest.mark.parametrize("make", HOOKED.values(), ids=HOOKED)


@each_hooked
def test_forward_hooks_see_and_replace_inputs_and_outputs(make):
    layer = make()
    x = whole(2, 4)
    y, y_of_more = layer(x), layer(x + 1)
    seen = []

    def after(module, args, output):
        seen.append((module, *args, output))
        return output - 1

    with (
        layer.register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
        layer.register_forward_hook(after),
    ):
        assert torch.equal(layer(x), y_of_more - 1)
    ((module, given, output),) = seen
    assert module is layer
    assert torch.equal(given, x + 1)
    assert torch.equal(output, y_of_more)
    assert torch.equal(layer(x), y)


@each_hooked
def test_forward_hooks_get_keyword_arguments(make):
    layer = make()
    x = whole(2, 4)
    y_of_more = layer(x + 1)
    with layer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {"input": kwargs["input"] + 1}), with_kwargs=True
    ):
        assert torch.equal(layer(input=x), y_of_more)


@each_hooked
def test_full_backward_hooks_see_and_replace_gradients(make):
    layer = make()
    x, incoming = whole(4, 4).requires_grad_(), whole(4, 4)
    (expected,) = torch.autograd.grad(layer(x), x, 2 * incoming)
    seen = []

    def after(module, into, out):
        seen.append((module, *into, *out))
        return (-into[0],)

    with (
        layer.register_full_backward_pre_hook(lambda _, out: (2 * out[0],)),
        layer.register_full_backward_hook(after),
    ):
        (gradient,) = torch.autograd.grad(layer(x), x, incoming)
    ((module, into, out),) = seen
    assert module is layer
    assert expected.any()
    assert torch.equal(out, 2 * incoming)
    assert torch.equal(into, expected)
    assert torch.equal(gradient, -expected)


def doubled(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: 2 * call(*args, **kwargs)


def double_by_a_class(name: str) -> Callable[[MyLinear, pytest.MonkeyPatch], None]:
    return lambda _, patch: patch.setattr(MyLinear, name, doubled(getattr(MyLinear, name)))


def double_by_the_instance(name: str) -> Callable[[MyLinear, pytest.MonkeyPatch], None]:
    return lambda layer, _: setattr(layer, name, doubled(getattr(layer, name)))


def double_by_a_subclass(layer: MyLinear, _: pytest.MonkeyPatch) -> None:
    class Doubling(MyLinear):
        def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super()._call_impl(*args, **kwargs)  # type: ignore[misc]

    layer.__class__ = Doubling


def double_all_modules(_: MyLinear, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.Module, "__call__", doubled(nn.Module.__call__))


def double_by_a_global_hook(_: MyLinear, patch: pytest.MonkeyPatch) -> None:
    hooks = OrderedDict({0: lambda _, __, output: 2 * output})
    patch.setattr(nn.modules.module, "_global_forward_hooks", hooks)


def double_by_a_hook(layer: MyLinear, _: pytest.MonkeyPatch) -> None:
    layer.register_forward_hook(lambda _, __, output: 2 * output)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(double_by_a_hook, id="a hook"),
        pytest.param(double_by_a_global_hook, id="a hook on all modules"),
        *(
            pytest.param(how(name), id=f"{name} of its {place}")
            for place, how in (("class", double_by_a_class), ("own", double_by_the_instance))
            for name in ("forward", "_call_impl")
        ),
        pytest.param(
            lambda layer, _: setattr(layer, "_compiled_call_impl", doubled(layer.forward)),
            id="its compiled call",
        ),
        pytest.param(double_by_a_subclass, id="another class"),
        pytest.param(double_all_modules, id="__call__ of all modules"),
    ],
)
def test_a_call_does_what_was_changed_since_the_last(change, monkeypatch):
    layer, x = whole_linear(4, 4), whole(2, 4)
    plain = [layer(x) for _ in range(3)][-1]
    assert plain.any()
    change(layer, monkeypatch)
    for _ in range(3):
        assert torch.equal(layer(x), 2 * plain)
    monkeypatch.undo()


@pytest.mark.parametrize("make", [lambda layer: layer, FusedSequential], ids=["layer", "network"])
def test_a_call_without_an_input_names_it(make):
    layer, x = make(whole_linear(4, 4)), whole(2, 4)
    for _ in range(2):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
            layer()
        assert torch.equal(layer(input=x), layer(x))


def test_state_dict_hooks_fire_in_their_order():
    layer = whole_linear()
    fired = []
    layer.register_state_dict_pre_hook(lambda *_: fired.append("before save"))
    layer.register_state_dict_post_hook(
        lambda _, state, prefix, __: fired.append(f"after save {list(state)} {prefix!r}")
    )
    layer.register_load_state_dict_pre_hook(
        lambda _, state, prefix, *__: state.update({prefix + "bias": torch.ones(3)})
    )
    layer.register_load_state_dict_post_hook(lambda *_: fired.append("after load"))
    net = nn.Sequential(layer)
    net.load_state_dict(net.state_dict())
    assert fired == ["before save", "after save ['0.weight', '0.bias'] '0.'", "after load"]
    assert layer.bias.tolist() == [1.0, 1.0, 1.0]


# ---- threads and processes ---------------------------------------------------------------


def test_eight_threads_calling_one_module_give_the_same_bits():
    net = nn.Sequential(MyLinear(64, 256), CenteredLayer(), MyLinear(256, 10, activation=None))
    x = torch.rand(128, 64)
    parameters = list(net.parameters())

    def step() -> list[Tensor]:
        y = net(x)
        return [y, *torch.autograd.grad(y.square().sum(), parameters)]

    expected = step()
    start = threading.Barrier(8)

    def work(_: int) -> bool:
        start.wait()
        return all(
            torch.equal(ours, first)
            for _ in range(10)
            for ours, first in zip(step(), expected, strict=True)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


WORKERS = """
import sys

import torch
from torch.utils.data import DataLoader, Dataset

from mylayers import CenteredLayer, MyLinear


class Rows(Dataset):
    def __init__(self):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(MyLinear(64, 256), CenteredLayer(-1), MyLinear(256, 8))
        self.rows = torch.rand(12, 30, 64)

    def __len__(self):
        return len(self.rows)

    @torch.no_grad()
    def __getitem__(self, i):
        return self.net(self.rows[i])


if __name__ == "__main__":
    data = Rows()
    data.net(data.rows).sum().backward()  # on the parent's threads, before any worker starts
    loader = DataLoader(
        data, batch_size=3, num_workers=2, multiprocessing_context=sys.argv[1], timeout=60
    )
    from_workers = torch.cat(list(loader))
    assert torch.equal(from_workers, torch.stack([data[i] for i in range(12)]))
    assert torch.equal(from_workers[0], data[0])
    print(tuple(from_workers.shape))
"""


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.whole)])
def test_data_loader_workers_compute_the_parents_bits(method, tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, script, method],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(12, 30, 8)\n"
