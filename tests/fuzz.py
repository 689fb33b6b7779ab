"""Drawn calls against the reference: shapes, strides, dtypes, programs, threads.

    python tests/fuzz.py --cases 100000 --seed 1
    python tests/fuzz.py --case "{'kind': 'center', ...}"      one again, as a failure prints it

A case is a dictionary of plain values, from which its tensors follow. What it is held to: values
and gradients within the tolerances of tests/samples.py of the float64 reference; those of a chain
to the bits of its single layers, of which each is held to the reference given what came before it;
a training step in one call to the bits of the three lines that it stands for; no bit depends on the
other rows, on the number of threads, or on which gradients are asked for. Calls that make no sense
end in an exception. Under .ci/sanitize nothing may be read or written that is not ours, besides.
"""

import argparse
import ast
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import samples
import test_center
import test_linear_act
import test_norms
import torch
from chains import outputs_one_by_one, split
from hypothesis import strategies as st
from samples import (
    LAYOUTS,
    OF_INPUT,
    OF_OUTPUT,
    WITH_SETTINGS,
    Sample,
    activation_tolerance,
    assert_within,
    num_threads,
    outcome,
    same_bits,
)
from torch import Tensor, nn

import mylayers
from mylayers import FusedSequential, functional, reference
from mylayers.activations import find

ops = torch.ops.mylayers

Case = dict[str, Any]

DTYPES = {str(dtype)[6:]: dtype for dtype in samples.KERNEL_DTYPES}
# Multiply-adds of a case, the second for one case of fifty.
WORK, MUCH_WORK = 1 << 17, 1 << 21

# ---- what is drawn ---------------------------------------------------------------------

# Around tiles, vectors, panels and chunks, and anything between.
EDGES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65)
FAR = (127, 128, 129, 255, 256, 257, 258, 300, 511, 513, 1000, 1024, 1025, 1100)
# Each draw costs Hypothesis as much as a kernel: one of a list in which likely values stand more
# often, of strategies that are made once.
SIZES = [*range(10)] * 7 + [*EDGES] * 3 + [*range(71)]
size = st.sampled_from(SIZES)
any_size = st.sampled_from([*SIZES, *SIZES, *FAR])
layout = st.sampled_from(["contiguous"] * 5 + list(LAYOUTS))
layout_or_none = st.sampled_from([None] * 15 + ["contiguous"] * 5 + list(LAYOUTS))
ACTIVATIONS = (*reference.ACTIVATIONS, *WITH_SETTINGS)
activation = st.sampled_from((*ACTIVATIONS, None))
dtype = st.sampled_from(list(DTYPES))
threads = st.sampled_from([1, 2, 3])
first_row = st.integers(0, 20)
work = st.sampled_from([WORK] * 49 + [MUCH_WORK])
rank_of = {
    "linear_act": st.sampled_from([0, 1, 1, 1, 1, 2, 3]),
    "center": st.sampled_from([0, 1, 1, 2, 2, 2, 3, 4]),
    "sequential": st.sampled_from([1, 2, 2, 2, 3, 4]),
}


def flags(count: int) -> st.SearchStrategy[list[bool]]:
    """So many of them, in one draw."""
    return st.integers(0, 2**count - 1).map(lambda n: [bool(n >> i & 1) for i in range(count)])


def dims(rank: int, most: int) -> st.SearchStrategy[list[int]]:
    """Up to so many dimensions, none twice, some counted from the end."""
    each = st.integers(-rank, rank - 1)
    return st.lists(each, max_size=most, unique_by=lambda d: d % rank)


any_dim = {
    rank: st.none() | st.integers(-max(rank, 1), max(rank, 1) - 1) | dims(max(rank, 1), rank)
    for rank in range(5)
}


def fitted(sizes: list[int], budget: int) -> list[int]:
    """The sizes, the largest halved until their product is at most the budget."""
    sizes = list(sizes)
    while torch.Size([max(1, n) for n in sizes]).numel() > budget:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[largest] //= 2
    return sizes


@st.composite
def linear_act_cases(draw: st.DrawFn) -> Case:
    rank = draw(rank_of["linear_act"])
    sizes = [draw(any_size if n == 0 else size) for n in range(rank)]
    *lead, in_units, units = fitted([*sizes, draw(any_size), draw(any_size)], draw(work))
    return {
        "kind": "linear_act",
        "dtype": draw(dtype),
        "lead": lead,
        "in_units": in_units,
        "units": units,
        "activation": draw(activation),
        "layouts": [draw(layout), draw(layout), draw(layout_or_none), draw(layout)],
        "wanted": draw(flags(3)),
        "threads": draw(threads),
        "first_row": draw(first_row),
        "whole": draw(st.booleans()),
    }


@st.composite
def center_cases(draw: st.DrawFn) -> Case:
    rank = draw(rank_of["center"])
    shape = fitted([draw(any_size) for _ in range(rank)], draw(work))
    if rank and draw(st.integers(0, 19)) == 19:
        shape[draw(st.integers(0, rank - 1))] = draw(st.sampled_from([4099, 8193]))
        shape = fitted(shape, MUCH_WORK)
    return {
        "kind": "center",
        "dtype": draw(dtype),
        "shape": shape,
        "dim": draw(any_dim[rank]),
        "layouts": [draw(layout), draw(layout)],
        "threads": draw(threads),
    }


kind_of_step = st.sampled_from(
    ["linear", "linear_t"] * 3 + ["activation", "center", "layer_norm", "flatten"]
)
activation_step = st.sampled_from(ACTIVATIONS)
activation_of_output = st.sampled_from((*OF_OUTPUT, *WITH_SETTINGS, None))


@st.composite
def programs(draw: st.DrawFn, shape: list[int]) -> tuple[str, list[list[int]]]:
    """A program for an input of this shape, and its parameters' shapes."""
    shape, steps, parameters = list(shape), [], []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(kind_of_step)
        if kind.startswith("linear"):
            units, bias, act = draw(size), draw(st.booleans()), draw(activation_of_output)
            steps.append(kind + ("+bias" if bias else "") + (f"+{act}" if act else ""))
            parameters.append([units, shape[-1]] if kind == "linear_t" else [shape[-1], units])
            parameters += [[units]] if bias else []
            shape[-1] = units
        elif kind == "activation":
            steps.append(draw(activation_step))
        elif kind == "layer_norm":
            first = draw(st.integers(min(1, len(shape) - 1), len(shape) - 1))
            own = shape[first:]
            given = draw(st.integers(0, 2))
            steps.append(f"layer_norm({','.join(map(str, own))},1e-05)")
            steps[-1] += ("", "+weight", "+weight+bias")[given]
            parameters += [own] * given
        elif kind == "center":
            over = draw(dims(len(shape), 2))
            steps.append(f"center({','.join(map(str, over))})" if over else "center")
        else:
            first = draw(st.integers(0, len(shape) - 1))
            last = draw(st.integers(first, len(shape) - 1))
            joined = torch.Size(shape[first : last + 1]).numel()
            if joined > 1100:
                continue
            steps.append(f"flatten({first},{last})")
            shape[first : last + 1] = [joined]
    if not steps or steps[-1].startswith("flatten"):
        steps.append("tanh")
    return "; ".join(steps), parameters


@st.composite
def sequential_cases(draw: st.DrawFn) -> Case:
    rank = draw(rank_of["sequential"])
    shape = fitted([draw(any_size if n == 0 else size) for n in range(rank)], 1 << 12)
    program, parameters = draw(programs(shape))
    return {
        "kind": "sequential",
        "dtype": draw(dtype),
        "shape": shape,
        "program": program,
        "parameters": parameters,
        "layouts": [draw(layout) for _ in range(2 + len(parameters))],
        "wanted": draw(flags(1 + len(parameters))),
        "threads": draw(threads),
        "first_row": draw(first_row),
    }


LOSSES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "mse": nn.MSELoss,
    "mse, sum": lambda: nn.MSELoss(reduction="sum"),
    "smooth_l1": lambda: nn.SmoothL1Loss(beta=0.5),
    "huber": lambda: nn.HuberLoss(delta=0.7),
    "cross_entropy": nn.CrossEntropyLoss,
    "l1": nn.L1Loss,
    "l1, sum": lambda: nn.L1Loss(reduction="sum"),
    "bce, logits": nn.BCEWithLogitsLoss,
    "nll": lambda: nn.NLLLoss(ignore_index=0),
    "kl_div": lambda: nn.KLDivLoss(reduction="batchmean"),
    "kl_div, logs": lambda: nn.KLDivLoss(reduction="sum", log_target=True),
    # Those that are called.
    "cross_entropy, smoothed": lambda: nn.CrossEntropyLoss(label_smoothing=0.2),
    "soft_margin": nn.SoftMarginLoss,
    "a function": lambda: lambda y, t: ((y - t).abs() * y.exp()).sum(-1).square().mean(),
    "in place": lambda: lambda y, t: y.mul_(2).sub_(t).tanh().sum(),
}
OF_CLASSES = ("cross_entropy", "nll", "cross_entropy, smoothed")
OF_PROBABILITIES = ("bce, logits", "kl_div", "kl_div, logs")
loss_name = st.sampled_from(list(LOSSES))
BETWEEN: dict[str, Callable[[int], nn.Module]] = {
    "CenteredLayer": lambda _: mylayers.CenteredLayer(),
    "LayerNorm": nn.LayerNorm,
    **{
        cls.__name__: lambda _, cls=cls: cls()
        for cls in (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Identity)
    },
}
between = st.sampled_from(list(BETWEEN))


@st.composite
def training_cases(draw: st.DrawFn) -> Case:
    loss = draw(loss_name)
    units = [draw(st.integers(1, 70)) for _ in range(draw(st.integers(2, 5)))]
    lead = [draw(st.integers(1, 70))]
    if loss not in OF_CLASSES:
        lead += draw(st.lists(st.integers(1, 4), max_size=1))
    return {
        "kind": "training",
        "dtype": draw(st.sampled_from(["float32", "float64"])),
        "lead": lead,
        "units": units,
        "between": [draw(between) for _ in units[1:]],
        "ours": draw(flags(len(units) - 1)),
        "bias": draw(flags(len(units) - 1)),
        "frozen": [*(draw(st.integers(0, 5)) == 5 for _ in units[2:]), False],
        "loss": loss,
        "layouts": [draw(layout)],
        "threads": draw(threads),
    }


some_shape = st.lists(st.integers(0, 5), max_size=3)
some_dtype = st.sampled_from([*DTYPES, "int64", "complex64", "bool"])
some_operator = st.sampled_from(["linear_act", "center", "sequential", "module"])
some_activation = activation | st.just("swish") | st.integers(0, 2)
some_dim = (
    st.none()
    | st.integers(-4, 4)
    | st.lists(st.integers(-4, 4), max_size=3)
    | st.just("0")
    | st.just([0.5])
)
some_step = st.sampled_from(
    [
        "linear", "linear_t+bias", "tanh", "center", "center(0,-1)", "center(7)", "flatten(0,9)",
        "layer_norm(2,1e-05)", "layer_norm(3,2,0.1)+weight+bias",
    ]
)  # fmt: skip
# Not st.text, which makes a table of all of Unicode first.
some_program = st.lists(some_step, min_size=1, max_size=3).map("; ".join) | st.lists(
    st.sampled_from("linear_t+bias;()cfgu,-012 "), max_size=24
).map("".join)


@st.composite
def wrong_cases(draw: st.DrawFn) -> Case:
    """Arguments that do not go together, mostly."""
    return {
        "kind": "wrong",
        "operator": draw(some_operator),
        "tensors": [[draw(some_shape), draw(some_dtype)] for _ in range(draw(st.integers(1, 4)))],
        "activation": draw(some_activation),
        "dim": draw(some_dim),
        "program": draw(some_program),
        "requires_grad": draw(st.booleans()),
    }


CASES: dict[str, st.SearchStrategy[Case]] = {
    "linear_act": linear_act_cases(),
    "center": center_cases(),
    "sequential": sequential_cases(),
    "training": training_cases(),
    "wrong": wrong_cases(),
}
# Of each sort so many of a dozen.
any_case = st.sampled_from(
    ["linear_act"] * 4 + ["center"] * 2 + ["sequential"] * 4 + ["training", "wrong"]
).flatmap(CASES.__getitem__)


# ---- what it is held to ----------------------------------------------------------------


def drawn(case: Case, place: int, shape: list[int], divisor: float = 1.0) -> Tensor:
    """A tensor of the case, of the layout at this place."""
    values = samples.drawer(f"{case['kind']}{shape}{place}", DTYPES[case["dtype"]])
    chosen = LAYOUTS[case["layouts"][place] if shape else "contiguous"]
    return chosen(lambda *n: values(*n) / divisor, tuple(shape))


def gradients(output: Tensor, leaves: list[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """Of the leaves that require one; None for the others."""
    asked = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad(output, asked, grad, allow_unused=True) if asked else [])
    return [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]


def leaves(tensors: list[Tensor | None], wanted: list[bool]) -> list[Tensor | None]:
    return [
        None if t is None else t.detach().requires_grad_(want)
        for t, want in zip(tensors, wanted, strict=True)
    ]


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None], what: str) -> None:
    for place, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e is None or a is None:
            assert a is e, f"{what}, gradient {place}"
        else:
            assert same_bits(a, e), f"{what}, gradient {place}"


def check_linear_act(case: Case) -> None:
    shapes = [*case["lead"], case["in_units"]], [case["in_units"], case["units"]], [case["units"]]
    args = [
        None if case["layouts"][place] is None else drawn(case, place, shape)
        for place, shape in enumerate(shapes)
    ]
    act = case["activation"]
    sample = Sample("fuzz", tuple(args), {"activation": act})
    test_linear_act.check_forward(functional.linear_act, sample)
    test_linear_act.check_gradients(sample)

    all_wanted = leaves(args, [True] * 3)
    expected = functional.linear_act(*all_wanted, act)
    grad = drawn(case, 3, [*case["lead"], case["units"]])
    expected_grads = gradients(expected, all_wanted, grad)
    some_wanted = leaves(args, case["wanted"])
    with num_threads(case["threads"]):
        output = functional.linear_act(*some_wanted, act)
        grads = gradients(output, some_wanted, grad)
    assert same_bits(output, expected), "threads"
    due = [
        g if leaf is not None and leaf.requires_grad else None
        for g, leaf in zip(expected_grads, some_wanted, strict=True)
    ]
    assert_same(grads, due, "threads and gradients asked for")
    if case["lead"] and case["lead"][0]:
        first = case["first_row"] % case["lead"][0]
        rows = leaves([args[0][first:], *args[1:]], [True, False, False])
        output = functional.linear_act(*rows, act)
        assert same_bits(output, expected[first:]), "rows"
        (input_grad,) = torch.autograd.grad(output, rows[0], grad[first:])
        assert same_bits(input_grad, expected_grads[0][first:]), "rows of the gradient"


def check_center(case: Case) -> None:
    x, grad = drawn(case, 0, case["shape"]), drawn(case, 1, case["shape"])
    leaf = x.detach().requires_grad_()
    output = functional.center(leaf, case["dim"])
    (input_grad,) = torch.autograd.grad(output, leaf, grad)
    test_center.check_values(output.detach(), x, case["dim"])
    test_center.check_values(input_grad, grad, case["dim"])
    with num_threads(case["threads"]):
        assert same_bits(functional.center(x, case["dim"]), output), "threads"


def check_steps(x: Tensor, parameters: list[Tensor], program: str, outputs: list[Tensor]) -> None:
    """Each step's output is the reference's, given what came before it."""
    left, found = iter(parameters), iter(outputs)
    for step in program.split("; "):
        name, options = split(step)
        if name == "flatten":
            x = x.flatten(*map(int, options[0].split(",")))
            continue
        output = next(found)
        if name.startswith("linear"):
            weight = next(left)
            bias = next(left) if "bias" in options else None
            act = next((option for option in options if option != "bias"), None)
            args = samples.in_float64(x, weight.t() if name == "linear_t" else weight, bias)
            tolerance = test_linear_act.forward_tolerance(x.dtype, *args, act)
            assert_within(output, reference.linear_act(*args, act), tolerance)
        elif name == "center":
            dims = [int(d) for d in options[0].split(",")] if options else None
            test_center.check_values(output, x, dims)
        elif name == "layer_norm":
            own = [next(left) for _ in options[1:]]
            test_norms.check_values(output, x, [int(d) for d in options[0].split(",")[:-1]], own)
        else:
            exact = find(name).formula(x.double())
            # Either formula rounds what it takes an exponential of.
            tolerance = activation_tolerance(name, x.dtype, exact)
            result = torch.finfo(x.dtype)
            read = x.double().abs() if name in OF_INPUT else 0
            tolerance += result.eps * (exact.abs() + read + result.tiny)
            assert_within(output, exact, tolerance)
        x = output


def check_sequential(case: Case) -> None:
    program = case["program"]
    x = drawn(case, 0, case["shape"])
    parameters = [
        drawn(case, place, shape, max(1, shape[0]) ** 0.5)
        for place, shape in enumerate(case["parameters"], 2)
    ]
    outputs = ops.sequential_outputs(x, parameters, program)
    check_steps(x, parameters, program, outputs)

    made = leaves([x, *parameters], case["wanted"])
    one_by_one = outputs_one_by_one(made[0], made[1:], program)[-1]
    assert same_bits(outputs[-1], one_by_one), "outputs"
    grad = LAYOUTS[case["layouts"][1]](samples.drawer("g", x.dtype), tuple(one_by_one.shape))
    expected = gradients(one_by_one, made, grad) if one_by_one.requires_grad else []
    check_frozen(case, x, parameters, outputs[-1])
    with num_threads(case["threads"]):
        again = leaves([x, *parameters], case["wanted"])
        output = ops.sequential(again[0], again[1:], program)
        assert same_bits(output, one_by_one), "one operator"
        assert output.requires_grad == one_by_one.requires_grad
        if output.requires_grad:
            assert_same(gradients(output, again, grad), expected, "one operator")
    rows_alone = not re.search("center|flatten", program)
    if rows_alone and len(case["shape"]) > 1 and case["shape"][0]:
        first = case["first_row"] % case["shape"][0]
        assert same_bits(ops.sequential(x[first:], parameters, program), output[first:]), "rows"


def check_frozen(case: Case, x: Tensor, parameters: list[Tensor], expected: Tensor) -> None:
    """The same program and values, frozen: new memory, given memory, NumPy's."""
    if "linear" not in case["program"]:
        return
    frozen = mylayers.frozen.of_program(case["program"], parameters)
    out = torch.full_like(expected, torch.nan)
    with num_threads(case["threads"]):
        assert same_bits(frozen(x), expected), "frozen"
        assert same_bits(frozen(x, out=out), expected), "frozen, out"
        if x.dtype != torch.bfloat16 and not x.is_neg():
            array = frozen(x.numpy())
            assert same_bits(torch.from_numpy(array), expected), "frozen, of NumPy"


def check_training(case: Case) -> None:
    dtype, units = DTYPES[case["dtype"]], case["units"]
    torch.manual_seed(len(units))
    children: list[nn.Module] = []
    for place, (a, b) in enumerate(itertools.pairwise(units)):
        if case["ours"][place]:
            children.append(mylayers.MyLinear(a, b, bias=case["bias"][place]))
        else:
            children.append(nn.Linear(a, b, bias=case["bias"][place]))
        children.append(BETWEEN[case["between"][place]](b))
    net = FusedSequential(*children).to(dtype)
    for place, frozen in enumerate(case["frozen"]):
        for p in net[2 * place].parameters():
            p.requires_grad_(not frozen)
            p.data /= units[place] ** 0.5
    x = drawn(case, 0, [*case["lead"], units[0]])
    criterion = LOSSES[case["loss"]]()
    if case["loss"] in OF_CLASSES:
        generator = torch.Generator().manual_seed(1)
        target = torch.randint(0, units[-1], case["lead"], generator=generator)
    else:
        target = samples.drawer("target", dtype)(*case["lead"], units[-1])
        target = target.sigmoid() if case["loss"] in OF_PROBABILITIES else target
    trained = [p for p in net.parameters() if p.requires_grad]
    loss = criterion(nn.Sequential.__call__(net, x), target)
    try:
        expected = torch.autograd.grad(loss, trained)
    except RuntimeError:  # the loss has changed what backward reads
        assert case["loss"] == "in place"
        assert outcome(mylayers.forward_backward, net, criterion, x, target) is RuntimeError
        assert all(p.grad is None for p in trained), "half done"
        return
    with num_threads(case["threads"]):
        found = mylayers.forward_backward(net, criterion, x, target)
    assert same_bits(found, loss), "loss"
    assert_same([p.grad for p in trained], list(expected), "one call")


def check_wrong(case: Case) -> None:
    tensors = []
    for shape, name in case["tensors"]:
        t = torch.ones(shape, dtype=getattr(torch, name))
        if case["requires_grad"] and (t.is_floating_point() or t.is_complex()):
            t.requires_grad_()
        tensors.append(t)
    try:
        if case["operator"] == "linear_act":
            output = functional.linear_act(*[*tensors, None][:3], case["activation"])
        elif case["operator"] == "center":
            output = functional.center(tensors[0], case["dim"])
        elif case["operator"] == "sequential":
            output = ops.sequential(tensors[0], tensors[1:], case["program"])
        else:
            net = FusedSequential(nn.Linear(3, 2), nn.ReLU(), mylayers.MyLinear(2, 4))
            with torch.no_grad():
                for p, t in zip(net.parameters(), tensors[1:], strict=False):
                    p.set_(t.detach()) if p.dtype == t.dtype else None
            output = net(tensors[0])
        if output.requires_grad:
            output.sum().abs().backward()
    except (ArithmeticError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return
    assert isinstance(output, Tensor)


CHECKS: dict[str, Callable[[Case], None]] = {
    "linear_act": check_linear_act,
    "center": check_center,
    "sequential": check_sequential,
    "training": check_training,
    "wrong": check_wrong,
}


def check(case: Case) -> None:
    """Compute one case and hold it to all that is promised."""
    CHECKS[case["kind"]](case)


# ---- runs ------------------------------------------------------------------------------

CHUNK = 500  # cases of one run of Hypothesis, whose memory and time grow faster than their number


def run(cases: int, seed: int, last: Path | None = None) -> Counter[str]:
    """Check so many drawn cases; how many there were of each kind.

    Args:
        cases: how many; a few more may be checked.
        seed: other cases for another one.
        last: a file that always holds the case at work, for a process that a fault ends.
    """
    checked: Counter[str] = Counter()
    file = last.open("w") if last else None
    chunk = 0
    while (left := cases - checked.total()) > 0:

        @hypothesis.seed(seed * 1_000_003 + chunk)
        @hypothesis.settings(
            max_examples=min(left, CHUNK),
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        )
        @hypothesis.given(any_case)
        def one_chunk(case: Case) -> None:
            if file:
                file.seek(0)
                file.truncate()
                file.write(f"{case}\n")
                file.flush()
            check(case)
            checked[case["kind"]] += 1

        one_chunk()
        chunk += 1
    if file:
        file.close()
    return checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", type=Path, help="a file for the case at work")
    parser.add_argument("--case", type=ast.literal_eval, help="one case, as it was printed")
    given = parser.parse_args()
    if given.case is not None:
        check(given.case)
        return
    if mylayers.build_info()["products"] != "own":
        parser.error("no machine of this kind was measured: set MYLAYERS_PRODUCTS=own")
    begin = time.monotonic()
    checked = run(given.cases, given.seed, given.last)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(checked.items()))
    kernels = mylayers.build_info()["kernels"]
    seconds = time.monotonic() - begin
    print(f"{checked.total()} cases ({kinds}), {kernels} kernels, {seconds:.0f} s")


if __name__ == "__main__":
    main()
