"""A million calls of each entry, whose memory must stay flat.

    python tests/soak.py --calls 1000000 [--only linear_act center]

Memory is what the process has of its own (RssAnon of /proc/self/status), read after a tenth of the
calls, when caches and the allocator have what they want, and at the end. A call that keeps one
object for ever, 32 bytes at least, makes 32 MB more of it; 1 MiB is what may come, and of fewer
calls half of what such a one would make. LeakSanitizer would not see it where Python still knows
the object.
"""

import argparse
import copy
import gc
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

import mylayers
from mylayers import CenteredLayer, FusedSequential, MyLinear, _explain, _watched, functional
from mylayers._extension import _C

Entry = Callable[[], object]
ops = torch.ops.mylayers


def memory() -> int:
    """The bytes that this process holds of its own."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no RssAnon")


def allowed(calls: int) -> int:
    """How many bytes more the process may hold after so many calls."""
    return min(1 << 20, 16 * calls)


def growth(entry: Entry, calls: int) -> int:
    """How many bytes more the process holds after these calls than after a tenth of them.

    Twice the lesser half: a leak grows in both, what is loaded or cached once in one of them.
    """

    def added(count: int) -> int:
        before = memory()
        for _ in range(count):
            entry()
        return memory() - before

    added(calls // 10)
    half = (calls - calls // 10) // 2
    return 2 * min(added(half), added(half))


def refused(call: Entry) -> Entry:
    """The call, whose exception is what is wanted."""

    def entry() -> None:
        try:
            call()
        except (RuntimeError, TypeError, ValueError, IndexError):
            return
        raise AssertionError("the call was not refused")

    return entry


class Iterating(FusedSequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())


class Written(nn.Module):
    """A forward of one's own: two regions, and what stands between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        x = x + 1
        return self.c(torch.tanh(self.b(x)))


class WrittenWhole(Written):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.relu(self.a(x)))


def entries() -> dict[str, Entry]:
    """Each way into the compiled half, on small tensors, for those calls are many."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8), torch.randn(8, 4), torch.randn(4)
    wide, wide_weight = torch.randn(40, 24), torch.randn(24, 24)  # gives up the GIL
    net = FusedSequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    parts = FusedSequential(nn.Linear(8, 4), nn.Softshrink(), nn.Linear(4, 2))
    iterating = Iterating(*net)
    layer, centered = MyLinear(8, 4), CenteredLayer(-1)
    target = torch.randn(2, 2)
    frozen, frozen_out, array = mylayers.freeze(net), torch.empty(2, 2), x.numpy()
    apart = torch.randn(2, 16)[:, ::2]
    of_means = mylayers.freeze(FusedSequential(nn.Linear(8, 4), CenteredLayer(-1)))
    parameters = [weight, bias, torch.randn(4, 4)]
    program = "linear+bias+tanh; center(-1); linear"
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    chain = [t.clone().requires_grad_() for t in (x, *parameters)]
    half = [t.bfloat16() for t in (x, weight, bias)]
    optimized = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    kept_weight = net[0].weight
    written, written_whole, written_anew = Written(), WrittenWhole(), Written()
    mylayers.optimize(written)
    mylayers.optimize(written_whole)

    def backward() -> None:
        torch.autograd.grad(functional.linear_act(*leaves).sum(), leaves)

    def center_backward() -> None:
        torch.autograd.grad(functional.center(leaves[0]).sum(), leaves[0])

    def sequential_backward() -> None:
        torch.autograd.grad(ops.sequential(chain[0], chain[1:], program).sum(), chain)

    def plan() -> None:
        FusedSequential(*net)(x)

    def mode() -> None:
        with torch.device("cpu"):
            net(x)

    def parameter() -> None:
        net[0].weight = nn.Parameter(kept_weight.detach())
        net(x)

    trained = [p.detach().clone().requires_grad_() for p in net.parameters()]
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizers = {
        cls: cls(trained, lr=1e-6)
        for cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad)
    }
    for optimizer in optimizers.values():
        mylayers.optimize(nn.ReLU(), optimizer)
        optimizer.step()
    sgd = optimizers[torch.optim.SGD]
    of_net = torch.optim.Adam(net.parameters(), lr=1e-6)
    criterion = nn.MSELoss()
    weighted, probabilities = nn.CrossEntropyLoss(torch.ones(2)), target.softmax(1)

    def zero_grad() -> None:
        for p in trained:
            p.grad = torch.ones_like(p)
        sgd.zero_grad()

    def step_refused() -> None:
        handle = sgd.register_step_pre_hook(lambda *_: None)
        sgd.step()
        handle.remove()

    def optimizer() -> None:
        made = torch.optim.SGD(trained, lr=1e-6)
        mylayers.optimize(nn.ReLU(), made)
        made.step()

    def watch() -> None:
        _C.watch_functions(_watched.BY_LAYERS, _watched.IN_TRAINING)
        _C.keep_frozen(mylayers.Frozen, mylayers.frozen._call_slowly)
        _C.watch_optimizers(_watched.IN_STEPS, _watched.HOOKS_ON_STEPS)

    def optimize_written() -> None:
        made = copy.copy(written_anew)
        mylayers.optimize(made)
        made(x)

    def optimize() -> None:
        mylayers.optimize(optimized)
        optimized(x)
        mylayers.restore(optimized)

    return {
        "linear_act": lambda: functional.linear_act(x, weight, bias),
        "linear_act, bfloat16": lambda: functional.linear_act(*half),
        "linear_act, without the GIL": lambda: functional.linear_act(wide, wide_weight),
        "linear_act, operator": lambda: ops.linear_act(x, weight, bias, "tanh"),
        "linear_act, refused": refused(lambda: functional.linear_act(x, bias)),
        "linear_act, backward": backward,
        "center": lambda: functional.center(x, (0, 1)),
        "center, operator": lambda: ops.center(x, [0]),
        "center, refused": refused(lambda: functional.center(x, "0")),
        "center, backward": center_backward,
        "sequential, operator": lambda: ops.sequential(x, parameters, program),
        "sequential, refused": refused(lambda: ops.sequential(x, parameters, "linea")),
        "sequential, backward": sequential_backward,
        "MyLinear": lambda: layer(x),
        "MyLinear, planned anew": lambda: copy.copy(layer)(x),
        "CenteredLayer": lambda: centered(x),
        "FusedSequential": lambda: net(x),
        "FusedSequential, in parts": lambda: parts(x),
        "FusedSequential, planned anew": plan,
        "FusedSequential, planned anew, children in a way of its own": lambda: Iterating(*net)(x),
        "FusedSequential, children in a way of its own": lambda: iterating(x),
        "FusedSequential, under a mode": mode,
        "FusedSequential, another parameter": parameter,
        "FusedSequential, refused": refused(lambda: net(bias)),
        "FusedSequential, copied": lambda: copy.deepcopy(net)(x),
        "FusedSequential, pickled": lambda: pickle.loads(pickle.dumps(net)),
        "a forward of one's own": lambda: written_whole(x),
        "a forward of one's own, in parts": lambda: written(x),
        "a forward of one's own, refused": refused(lambda: written(bias)),
        "a forward of one's own, planned anew": optimize_written,
        "Frozen": lambda: frozen(x),
        "Frozen, out": lambda: frozen(x, out=frozen_out),
        "Frozen, of NumPy": lambda: frozen(array),
        "Frozen, more than layers": lambda: of_means(array),
        "Frozen, of values apart": lambda: frozen(apart),
        "Frozen, refused": refused(lambda: frozen(bias)),
        "Frozen, refreshed": frozen.refresh,
        "Frozen, pickled": lambda: pickle.loads(pickle.dumps(frozen)),
        "freeze": lambda: mylayers.freeze(net),
        "forward_backward": lambda: mylayers.forward_backward(net, nn.MSELoss(), x, target),
        "forward_backward, refused": refused(
            lambda: mylayers.forward_backward(net, nn.MSELoss(), bias, target)
        ),
        "forward_backward, any loss": lambda: mylayers.forward_backward(
            net, lambda y, t: (y - t).square().mean(), x, target
        ),
        "forward_backward, any loss, refused": refused(
            lambda: mylayers.forward_backward(net, lambda y, t: y - t, x, target)
        ),
        "training_step, any loss": lambda: mylayers.training_step(
            net, weighted, of_net, x, probabilities
        ),
        "training_step": lambda: mylayers.training_step(net, criterion, of_net, x, target),
        "training_step, refused": refused(
            lambda: mylayers.training_step(net, criterion, of_net, bias, target)
        ),
        **{f"a step of {cls.__name__}": o.step for cls, o in optimizers.items()},
        "a step, planned anew": optimizer,
        "a step with a hook": step_refused,
        "zero_grad": zero_grad,
        "optimize and restore": optimize,
        "build_info": mylayers.build_info,
        "the plan of a product": lambda: _explain.plan(8, 64, 64),
        "the machines that plans are for": _C.machines,
        "how much is known": lambda: (
            _C.known_objects() + _C.known_optimizers() + _C.known_forwards()
        ),
        "what is watched": watch,
    }


# Those that make a network or a plan, half a millisecond and more: so many calls fewer.
SLOW = {
    "FusedSequential, planned anew": 20,
    "FusedSequential, copied": 20,
    "FusedSequential, pickled": 20,
    "a forward of one's own, planned anew": 200,
    "Frozen, refreshed": 20,
    "Frozen, pickled": 20,
    "freeze": 20,
    "optimize and restore": 20,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    torch.set_num_threads(1)
    grown = []
    for name, entry in entries().items():
        if given.only and name not in given.only:
            continue
        calls, begin = given.calls // SLOW.get(name, 1), time.monotonic()
        more = growth(entry, calls)
        seconds = time.monotonic() - begin
        print(f"| {name} | {calls:,} | {seconds:.0f} s | {more >> 10:+,} KiB |", flush=True)
        grown += [name] if more > allowed(calls) else []
    if grown:
        print(f"memory is not flat: {', '.join(grown)}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
