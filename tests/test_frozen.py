"""mylayers.freeze: bits, arrays, refusals, refreshing, threads, copies."""

import copy
import gc
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from common import COPIES
from samples import KERNEL_DTYPES, num_threads, same_bits
from torch import nn

import mylayers
from mylayers import CenteredLayer, FusedSequential, MyLinear, freeze

numpy = pytest.importorskip("numpy")

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")

OWN = mylayers.build_info()["products"] == "own"
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 13, 31, 32, 33, 100, 257)


def policy(dtype=torch.float32):
    torch.manual_seed(0)
    children = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
    return FusedSequential(*children).to(dtype)


NETWORKS = {
    "policy": policy,
    "own layout": lambda: FusedSequential(
        MyLinear(17, 65), MyLinear(65, 3, activation="tanh"), MyLinear(3, 9, activation=None)
    ),
    "of odd sizes": lambda: FusedSequential(
        nn.Linear(5, 127), nn.ELU(), nn.Linear(127, 1, bias=False), nn.Sigmoid()
    ),
    "wide": lambda: FusedSequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 300)),
    "beyond level 2": lambda: FusedSequential(nn.Linear(700, 1100), nn.Linear(1100, 6)),
    "gelu": lambda: FusedSequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 40), nn.GELU()),
    "means": lambda: FusedSequential(nn.Linear(24, 40), CenteredLayer(-1), nn.Linear(40, 4)),
    "a mean over all": lambda: FusedSequential(CenteredLayer(), MyLinear(24, 8)),
    "flattened": lambda: FusedSequential(nn.Flatten(), nn.Linear(24, 8), nn.ReLU()),
    "activation first": lambda: FusedSequential(nn.Tanh(), nn.Linear(24, 8)),
    "a layer": lambda: MyLinear(24, 8),
    "no inputs": lambda: FusedSequential(nn.Linear(0, 8), nn.Linear(8, 0), nn.Linear(0, 3)),
}


def made(name, dtype=torch.float32):
    torch.manual_seed(1)
    network = NETWORKS[name]().to(dtype)
    for p in network.parameters():
        p.data /= max(1, p.shape[-1]) ** 0.5
    first = next(p for p in network.parameters() if p.dim() == 2)
    ours = isinstance(next(iter(network.children()), network), MyLinear) or "mean over" in name
    in_units = first.shape[0 if ours else 1]
    return network, in_units


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.grid
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_call_has_the_networks_own_bits(name, dtype, threads):
    network, in_units = made(name, dtype)
    frozen = freeze(network)
    with num_threads(threads), torch.no_grad():
        for rows in ROWS:
            x = torch.randn(rows, in_units).to(dtype)
            expected = network(x)
            assert same_bits(frozen(x), expected), rows
            out = torch.full_like(expected, math.nan)
            assert frozen(x, out=out) is out
            assert same_bits(out, expected), rows
            if dtype != torch.bfloat16:
                found = frozen(x.numpy())
                assert isinstance(found, numpy.ndarray)
                assert same_bits(torch.from_numpy(found), expected), rows


@pytest.mark.skipif(not OWN, reason="a row's bits depend on its batch where products are PyTorch's")
@pytest.mark.parametrize("name", ["policy", "own layout", "of odd sizes", "wide", "gelu"])
def test_a_rows_bits_do_not_depend_on_the_batch(name):
    network, in_units = made(name)
    frozen, x = freeze(network), torch.randn(300, in_units)
    whole = frozen(x)
    for rows in ROWS[1:]:
        assert same_bits(frozen(x[-rows:]), whole[-rows:])


@pytest.mark.parametrize("capability", ["default", pytest.param("avx2", marks=pytest.mark.whole)])
@pytest.mark.parametrize("products", [pytest.param("", marks=pytest.mark.whole), "own"])
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="it is lowered already")
def test_all_of_this_holds_with_the_kernels_of_lesser_processors(capability, products):
    code = "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main(sys.argv[1:]))"
    chosen = ("-k", "bits and not wide and not beyond", "-m", "", "-n0", "-q")
    chosen += ("-p", "no:cacheprovider", __file__)
    done = subprocess.run(
        [sys.executable, "-c", code, *chosen],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "MYLAYERS_PRODUCTS": products},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 1, 4), (2, 0, 3), (1, 5, 1)])
def test_any_number_of_leading_dimensions(lead):
    network, frozen = policy(), freeze(policy())
    x = torch.randn(*lead, 64)
    with torch.no_grad():
        assert same_bits(frozen(x), network(x))
        assert same_bits(torch.from_numpy(frozen(x.numpy())), network(x))


LAYOUTS = {
    "every second row": lambda x: x[::2],
    "columns of wider rows": lambda x: x[:, 3:67],
    "transposed": lambda x: x[:64, :64].t(),
    "every second value": lambda x: x[:, ::2],
    "one row again and again": lambda x: x[:1, :64].expand(5, 64),
    "blocks apart": lambda x: x[:30, :64].reshape(5, 6, 64)[:, :4],
    "permuted": lambda x: x[:30, :64].reshape(5, 6, 64).transpose(0, 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_strides(name):
    network, frozen = policy(), freeze(policy())
    x = LAYOUTS[name](torch.randn(64, 128))
    x = x[..., :64]
    with torch.no_grad():
        expected = network(x)
        assert same_bits(frozen(x), expected)
        assert same_bits(torch.from_numpy(frozen(x.numpy())), expected)
        out = numpy.empty(tuple(expected.shape), "float32")
        frozen(x, out=out)
        assert same_bits(torch.from_numpy(out), expected)


def test_arrays_of_numpy_that_tensors_cannot_be():
    network, frozen = policy(), freeze(policy())
    x = numpy.random.default_rng(0).standard_normal((6, 64), "float32")
    memory = bytearray(x.nbytes + 1)
    misaligned = numpy.frombuffer(memory, numpy.float32, x.size, offset=1).reshape(x.shape)
    misaligned[:] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    with torch.no_grad():
        expected = network(torch.from_numpy(x))
        for given in (x[::-1], misaligned, read_only, x.view(numpy.recarray), x[:, ::-1]):
            found = frozen(given)
            assert type(found) is numpy.ndarray
            assert same_bits(
                torch.from_numpy(found), network(torch.from_numpy(numpy.array(given, order="C")))
            )
        assert same_bits(torch.from_numpy(frozen(misaligned)), expected)


class Exporter:
    """An array of another library."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_any_object_with_dlpack_gives_a_tensor():
    network, frozen, x = policy(), freeze(policy()), torch.randn(3, 64)
    with torch.no_grad():
        found = frozen(Exporter(x))
        assert type(found) is torch.Tensor
        assert same_bits(found, network(x))
        out = numpy.empty((3, 8), "float32")
        assert frozen(Exporter(x), out=out) is out
        assert same_bits(torch.from_numpy(out), network(x))


def test_the_result_is_new_memory_without_a_graph():
    frozen, x = freeze(policy()), torch.randn(2, 64)
    first, second = frozen(x), frozen(x)
    assert first.data_ptr() != second.data_ptr()
    assert not first.requires_grad
    assert frozen(x, out=None) is not first


def test_to_write_a_result_counts_as_a_change_of_out():
    out = torch.empty(2, 8)
    before = out._version
    freeze(policy())(torch.randn(2, 64), out=out)
    assert out._version > before


def test_one_kind_may_be_read_and_the_other_written():
    network, frozen, x = policy(), freeze(policy()), torch.randn(2, 64)
    array, tensor = numpy.empty((2, 8), "float32"), torch.empty(2, 8)
    assert frozen(x, out=array) is array
    assert frozen(x.numpy(), out=tensor) is tensor
    with torch.no_grad():
        assert same_bits(torch.from_numpy(array), network(x))
        assert same_bits(tensor, network(x))


def test_any_mode_of_the_network_gives_what_evaluation_gives():
    network = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.9), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    assert network.training
    frozen = freeze(network)
    assert network.training
    mylayers.optimize(network.eval())
    with torch.no_grad():
        assert same_bits(frozen(x), network(x))


def test_containers_in_containers_are_one_call():
    inner = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
    network = nn.Sequential(inner, nn.Sequential(nn.Sequential(nn.Linear(16, 4))))
    frozen, x = freeze(network), torch.randn(5, 8)
    with torch.no_grad():
        assert same_bits(frozen(x), FusedSequential(inner[0], inner[1], network[1][0][0])(x))


@pytest.mark.grid
@pytest.mark.parametrize("context", ["autocast", "inference mode", "profiler", "deterministic"])
@pytest.mark.parametrize("name", ["policy", "means", "flattened"])
def test_what_a_thread_is_in_changes_no_bit(name, context):
    network, in_units = made(name)
    frozen, x = freeze(network), torch.randn(5, in_units)
    expected = frozen(x)
    contexts = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference mode": torch.inference_mode,
        "profiler": torch.profiler.profile,
    }
    if context == "deterministic":
        torch.use_deterministic_algorithms(True)
        try:
            assert same_bits(frozen(x), expected)
        finally:
            torch.use_deterministic_algorithms(False)
        return
    with contexts[context]():
        assert same_bits(frozen(x), expected)
        assert same_bits(frozen(x, out=torch.empty_like(expected)), expected)


# ---- immutable, until it is refreshed ----------------------------------------------------------


@pytest.mark.parametrize("change", ["in place", "another parameter", "data"])
def test_it_stays_what_it_was_until_it_is_refreshed(change):
    network, x = policy(), torch.randn(3, 64)
    frozen = freeze(network)
    before = frozen(x)
    with torch.no_grad():
        if change == "in place":
            for p in network.parameters():
                p.mul_(2)
        elif change == "data":
            network[0].bias.data = torch.ones(64)
        else:
            network[2].weight = nn.Parameter(torch.randn(64, 64))
        assert same_bits(frozen(x), before)
        assert not same_bits(network(x), before)
        assert frozen.refresh() is None
        assert same_bits(frozen(x), network(x))


def test_a_change_of_the_network_is_no_refreshing():
    network, x = policy(), torch.randn(3, 64)
    frozen = freeze(network)
    before = frozen(x)
    network.append(nn.Tanh())
    with pytest.raises(
        ValueError, match=r"network must still be 64 -> 64 relu, .*got 64 -> 64 relu"
    ):
        frozen.refresh()
    del network[5]
    network.double()
    with pytest.raises(ValueError, match=r"of float32; got .* of float64"):
        frozen.refresh()
    network.float()[0] = nn.Softshrink()
    with pytest.raises(TypeError, match="0, a Softshrink, cannot be frozen"):
        frozen.refresh()
    assert same_bits(frozen(x), before)


def test_it_does_not_keep_the_network_alive():
    network = policy()
    frozen, alive = freeze(network), weakref.ref(network)
    expected = frozen(torch.ones(64))
    del network
    gc.collect()
    assert alive() is None
    assert same_bits(frozen(torch.ones(64)), expected)
    with pytest.raises(RuntimeError, match=r"refresh: the network must be .* it is gone"):
        frozen.refresh()


def test_nothing_is_left_of_it():
    frozen = freeze(policy())
    alive = weakref.ref(frozen)
    del frozen
    gc.collect()
    assert alive() is None


# ---- copies ------------------------------------------------------------------------------------


@pytest.mark.grid
@pytest.mark.parametrize("name", ["policy", "own layout", "means"])
@pytest.mark.parametrize("how", [*COPIES, "copy"])
def test_copies_compute_the_same_and_know_no_network(how, name):
    network, in_units = made(name)
    frozen, x = freeze(network), torch.randn(9, in_units)
    again = {**COPIES, "copy": copy.copy}[how](frozen)
    assert type(again) is mylayers.Frozen
    assert same_bits(again(x), frozen(x))
    assert repr(again) == repr(frozen)
    with pytest.raises(RuntimeError, match="a copy knows none"):
        again.refresh()


def test_another_process_loads_it(tmp_path):
    frozen, x = freeze(policy()), torch.randn(9, 64)
    file = tmp_path / "frozen.pickle"
    file.write_bytes(pickle.dumps((frozen, x, frozen(x))))
    code = (
        "import pickle, sys, torch; f, x, y = pickle.load(open(sys.argv[1], 'rb')); "
        "assert torch.allclose(f(x), y, atol=1e-5); print(f)"
    )
    for capability in ("default", ""):  # another machine, as far as this one can be one
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        if not capability:
            del environment["ATEN_CPU_CAPABILITY"]
        done = subprocess.run(
            [sys.executable, "-c", code, str(file)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "8,840 values of float32" in done.stdout


# ---- what it says of itself --------------------------------------------------------------------


def test_its_repr_says_what_it_was_made_from_for_what_and_when():
    info = mylayers.build_info()
    tuned = re.escape(f" ({info['tuned_for']})") if info["tuned_for"] else ""
    shown = repr(freeze(policy()))
    assert re.fullmatch(
        r"Frozen\(FusedSequential: 64 -> 64 relu, 64 -> 64 relu, 64 -> 8; 8,840 values of float32 "
        rf"for {info['kernels']} kernels{tuned}, of "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d\)",
        shown,
    ), shown
    network, _ = made("means")
    assert "FusedSequential: 24 -> 40, center(-1,), 40 -> 4; " in repr(freeze(network))


MODULES_OWN = (
    *("train", "eval", "parameters", "named_parameters", "state_dict", "load_state_dict"),
    *("requires_grad_", "zero_grad", "to", "cuda", "double", "half", "register_forward_hook"),
    *("modules", "children", "compile", "forward", "training"),
)


@pytest.mark.parametrize("name", MODULES_OWN)
def test_what_a_module_has_is_a_clear_error(name):
    frozen = freeze(policy())
    if name == "training":
        with pytest.raises(AttributeError, match="Frozen has no training"):
            _ = frozen.training
        return
    with pytest.raises(AttributeError, match=f"Frozen has no {name}: it holds values"):
        getattr(frozen, name)
    assert not hasattr(frozen, name)


def test_it_is_no_module_and_holds_no_parameters():
    frozen = freeze(policy())
    assert not isinstance(frozen, nn.Module)
    holder = nn.Module()
    holder.policy = frozen
    assert list(holder.parameters()) == []
    with pytest.raises(AttributeError, match=r"Frozen has no whatever$"):
        _ = frozen.whatever


# ---- refusals ----------------------------------------------------------------------------------


class OwnForward(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    network[0].register_forward_hook(lambda *_: None)
    return network


def whole_hooked():
    network = nn.Sequential(nn.Linear(3, 4))
    network.register_forward_hook(lambda *_: None)
    return network


def parametrized():
    network = nn.Sequential(nn.ReLU(), nn.Linear(3, 4))
    nn.utils.parametrizations.weight_norm(network[1])
    return network


REFUSED = {
    "no module": (lambda: print, "freeze: network must be an nn.Module; got builtin_function"),
    "a layer without a kernel": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.GroupNorm(1, 4)), nn.Linear(4, 2)),
        r"freeze: 1\.0, a GroupNorm, cannot be frozen: GroupNorm has no fused kernel",
    ),
    "a module of one's own": (
        lambda: nn.Bilinear(2, 3, 4),
        "freeze: a Bilinear cannot be frozen: Bilinear has no fused kernel",
    ),
    "no layers": (
        nn.Sequential,
        "freeze: a Sequential cannot be frozen: it has no linear",
    ),
    "nothing linear": (
        lambda: FusedSequential(CenteredLayer(), nn.ReLU()),
        "freeze: a FusedSequential cannot be frozen: it has no linear layer",
    ),
    "a flatten at the end": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Flatten(0)),
        "freeze: 1, a Flatten, cannot be frozen: there is no layer to fuse it with",
    ),
    "a forward of its own": (
        lambda: nn.Sequential(OwnForward(nn.Linear(3, 4))),
        r"freeze: 0, a OwnForward, cannot be frozen: OwnForward overrides Sequential\.forward",
    ),
    "hooks": (hooked, "freeze: 0, a Linear, cannot be frozen: it has hooks"),
    "hooks on the whole": (whole_hooked, "freeze: a Sequential cannot be frozen: it has hooks"),
    "a computed weight": (
        parametrized,
        "freeze: 1, a Parametrized.*: its weight or bias is computed",
    ),
    "lazy": (lambda: mylayers.LazyMyLinear(3), "LazyMyLinear cannot be frozen"),
    "its input is changed": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4)),
        "freeze: 0, a ReLU, cannot be frozen: it works in place on what it is given",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_frozen_is_named_with_the_reason(name):
    make, message = REFUSED[name]
    with pytest.raises(TypeError, match=message):
        freeze(make())


def test_hooks_on_all_modules_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(TypeError, match="there are hooks on all modules"):
            freeze(policy())
    finally:
        handle.remove()


def emptied():
    network = policy()
    network[2].weight.data.untyped_storage().resize_(0)
    return network


UNFIT = {
    "another dtype": (
        lambda: policy(torch.float8_e5m2),
        "must be float32, .*; got Float8_e5m2",
    ),
    "two dtypes": (
        lambda: FusedSequential(nn.Linear(3, 4), nn.Linear(4, 2).double()),
        "freeze: weight must be .* like all others; got Double",
    ),
    "another device": (lambda: policy().to("meta"), "freeze: weight must be a dense tensor on cpu"),
    "sizes that do not fit": (
        lambda: FusedSequential(nn.Linear(3, 4), nn.Linear(5, 2)),
        "a linear layer must take the 4 values of the one before it; got one that takes 5",
    ),
    "no memory": (emptied, "freeze: weight must have the memory of its elements"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_parameters_that_do_not_fit_are_refused(name):
    make, message = UNFIT[name]
    with pytest.raises(RuntimeError, match=message):
        freeze(make())


class Foreign(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


X = torch.ones(2, 64)
ARRAY = numpy.ones((2, 64), "float32")
SHARED = torch.ones(200)
READ_ONLY = numpy.ones((2, 8), "float32")
READ_ONLY.flags.writeable = False
BAD = {
    "a list": (
        ([1.0] * 64,),
        {},
        TypeError,
        "input must be a torch.*array.*got list",
    ),
    "None": ((None,), {}, TypeError, "input must be a torch.*array.*got NoneType"),
    "no input": ((), {"out": None}, TypeError, "takes one positional argument"),
    "two inputs": ((X, X), {}, TypeError, "takes one positional argument"),
    "an unknown name": ((X,), {"into": X}, TypeError, "takes input and out=; got into="),
    "columns": ((torch.ones(2, 65),), {}, RuntimeError, r"must be \(\.\.\., 64\); got \(2, 65\)"),
    "a number": ((torch.tensor(1.0),), {}, RuntimeError, r"must be \(\.\.\., 64\); got \(\)"),
    "columns of an array": ((ARRAY[:, 1:],), {}, RuntimeError, r"\(\.\.\., 64\); got \(2, 63\)"),
    "dtype": ((X.double(),), {}, RuntimeError, "input must be float32, .*; got float64"),
    "dtype of an array": ((ARRAY.astype(int),), {}, RuntimeError, "must be float32.*got int64"),
    "byte order": ((ARRAY.astype(">f4"),), {}, RuntimeError, "input must be float32.*got"),
    "objects": ((ARRAY.astype(object),), {}, RuntimeError, "must be float32.*got object"),
    "device": ((X.to("meta"),), {}, RuntimeError, "must be a dense tensor on cpu; got .* meta"),
    "layout": ((X.to_sparse(),), {}, RuntimeError, "dense tensor on cpu; got torch.sparse_coo"),
    "a mask": ((numpy.ma.array(ARRAY),), {}, TypeError, "input must have no mask; got MaskedArray"),
    "a gradient": (
        (X.clone().requires_grad_(),),
        {},
        RuntimeError,
        "input must not require a gradient, which only the network itself has",
    ),
    "out as a list": (
        (X,),
        {"out": []},
        TypeError,
        "out must be a torch.*array; got list",
    ),
    "out's shape": (
        (X,),
        {"out": torch.empty(8)},
        RuntimeError,
        r"out must be \(2, 8\) for input \(2, 64\); got \(8,\)",
    ),
    "out's dtype": (
        (X,),
        {"out": torch.empty(2, 8, dtype=torch.float64)},
        RuntimeError,
        "out must be float32, as the values are; got float64",
    ),
    "out's device": ((X,), {"out": torch.empty(2, 8, device="meta")}, RuntimeError, "on cpu; got"),
    "out's strides": (
        (X,),
        {"out": torch.empty(8, 2).t()},
        RuntimeError,
        r"out must be contiguous; got strides \(4, 8\) in bytes",
    ),
    "out's gradient": (
        (X,),
        {"out": torch.empty(2, 8, requires_grad=True)},
        RuntimeError,
        "out must not require a gradient",
    ),
    "a read-only out": ((X,), {"out": READ_ONLY}, RuntimeError, "out must be writable"),
    "an out that is the input": (
        (SHARED[:128].view(2, 64),),
        {"out": SHARED[120:136].view(2, 8)},
        RuntimeError,
        "out must share no memory with input",
    ),
    "an out that is the array": (
        (SHARED[:128].view(2, 64).numpy(),),
        {"out": SHARED[:16].view(2, 8)},
        RuntimeError,
        "out must share no memory with input",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named_with_what_was_expected_and_what_came(name):
    arguments, named, error, message = BAD[name]
    frozen = freeze(policy())
    with pytest.raises(error, match="Frozen: .*" + message):
        frozen(*arguments, **named)


@pytest.mark.parametrize("name", ["means", "flattened"])
def test_so_are_those_of_a_program_that_is_more_than_layers(name):
    network, in_units = made(name)
    frozen, x = freeze(network), torch.ones(2, in_units)
    with pytest.raises(RuntimeError, match="in_units"):
        frozen(torch.ones(2, in_units + 1))
    with pytest.raises(RuntimeError, match=r"Frozen: out must be \[2, \d\] for input"):
        frozen(x, out=torch.empty(3, 8))
    with pytest.raises(RuntimeError, match="out must share no memory"):
        frozen(x, out=x[:, : frozen(x).shape[1]].reshape(-1).view(2, -1).set_(x.untyped_storage()))


def test_a_class_that_decides_what_operators_do_is_refused():
    with pytest.raises(TypeError, match=r"input must be a plain torch\.Tensor; got Foreign"):
        freeze(policy())(X.as_subclass(Foreign))


def test_a_class_that_only_has_a_name_is_a_tensor():
    class Named(torch.Tensor):
        pass

    found = freeze(policy())(X.as_subclass(Named))
    assert type(found) is torch.Tensor
    assert same_bits(found, freeze(policy())(X))


def test_a_gradient_may_be_left_out():
    frozen, x = freeze(policy()), X.clone().requires_grad_()
    with torch.no_grad():
        assert same_bits(frozen(x), frozen(X))
    with torch.inference_mode():
        assert same_bits(frozen(x), frozen(X))
    assert same_bits(frozen(x.detach()), frozen(X))


def test_transforms_and_tracers_are_refused():
    frozen = freeze(policy())
    with pytest.raises(RuntimeError, match=r"torch\.func must be given the network itself"):
        torch.func.vmap(frozen)(X)
    with pytest.raises(RuntimeError, match="a tracer must follow the network itself"):
        torch.jit.trace(lambda x: frozen(x), X)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="input must not require a gradient"),
    ):
        frozen(torch.autograd.forward_ad.make_dual(X, X))


def test_a_frozen_network_without_values_says_so():
    with pytest.raises(RuntimeError, match=r"has no values; make it by mylayers\.freeze"):
        mylayers.Frozen()(X)


# ---- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 64, 300])
def test_threads_call_it_while_another_refreshes_it(rows):
    network, x = policy(), torch.randn(rows, 64)
    frozen, allowed = freeze(network), []
    states = [{k: v.clone() * scale for k, v in network.state_dict().items()} for scale in (1, 2)]
    for state in states:
        network.load_state_dict(state)
        frozen.refresh()
        allowed.append(frozen(x))
    stop, errors, calls = threading.Event(), [], [0, 0, 0]

    def serve(place):
        out = torch.empty(rows, 8)
        while not stop.is_set():
            for found in (frozen(x), frozen(x, out=out), torch.from_numpy(frozen(x.numpy()))):
                if not any(same_bits(found, each) for each in allowed):
                    errors.append(found.clone())
                    stop.set()
            calls[place] += 1

    def refresh():
        for turn in range(200):
            network.load_state_dict(states[turn % 2])
            frozen.refresh()
        stop.set()

    threads = [threading.Thread(target=serve, args=(place,)) for place in range(3)]
    threads.append(threading.Thread(target=refresh))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(calls)
