"""Threads that call, train, copy, edit, hook, optimize and restore the same modules at once.

``python tests/threads.py [seconds [scenario ...]]``. It prints how often each thread came round,
and ends with 0 if every result was right and every exception one that PyTorch's own modules raise
there. What is freed while another thread computes with it ends the process otherwise, which
tests/test_threads.py sees from outside.
"""

import contextlib
import copy
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mylayers
from mylayers import FusedSequential, MyLinear, forward_backward

ROWS, UNITS, LAYERS = 1000, 96, 12


def layers() -> list[nn.Module]:
    """Twelve linear layers with activations, and what is fused in evaluation alone."""
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for _ in range(LAYERS):
        made += [nn.Linear(UNITS, UNITS), nn.Tanh()]
    return [*made, nn.Dropout(0.0)]


# What stock modules say: of a dictionary that changes meanwhile, of a tensor that is exchanged
# before its backward.
STOCKS_OWN = ("during iteration", "poisoned by swap_tensors")


class Stress:
    """Networks, the right results, and threads that find others."""

    def __init__(self) -> None:
        self.fused = FusedSequential(*layers())
        self.optimized = nn.Sequential(*layers())
        self.layer = MyLinear(UNITS, 512)
        self.x, self.target = torch.rand(ROWS, UNITS), torch.rand(ROWS, UNITS)
        with torch.no_grad():
            self.y, self.z = self.optimized(self.x), self.layer(self.x)
            self.loss = nn.functional.mse_loss(self.y, self.target)
        self.errors: list[str] = []
        self.rounds: dict[str, int] = {}
        self.stop = threading.Event()

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return self.fused, self.optimized

    def must_be(self, found: Any, expected: Tensor) -> None:
        assert type(found) is Tensor, type(found)
        assert found.shape == expected.shape, found.shape
        assert torch.allclose(found, expected, atol=1e-4), (found - expected).abs().max()

    # ---- who computes ----

    def infer(self) -> None:
        with torch.no_grad():
            for network in self.networks():
                self.must_be(network(self.x), self.y)

    def one_row(self, network: nn.Module) -> None:
        with torch.no_grad():
            self.must_be(network(self.x[:1]), self.y[:1])

    def infer_small(self) -> None:
        for network in self.networks():
            self.one_row(network)

    def watched(self) -> None:
        with torch.device("cpu"):
            self.one_row(self.fused)

    def train(self) -> None:
        for network in self.networks():
            criterion = nn.MSELoss()
            self.must_be(forward_backward(network, criterion, self.x, self.target), self.loss)

    def graph(self) -> None:
        output = self.fused(self.x)
        self.must_be(output.detach(), self.y)
        torch.autograd.grad(output.sum(), self.fused[0].weight, allow_unused=True)

    def alone(self) -> None:
        with torch.no_grad():
            self.must_be(self.layer(self.x), self.z)

    # ---- who changes what they compute with ----

    def hook(self) -> None:
        for network in self.networks():
            handle = network[3].register_forward_hook(lambda *_: None)
            self.one_row(network)
            handle.remove()
            self.one_row(network)

    def hook_all(self) -> None:
        register = nn.modules.module.register_module_forward_hook
        handle = register(lambda *_: None)
        time.sleep(0)
        handle.remove()

    def mode(self) -> None:
        for network in self.networks():
            network.eval()
            self.one_row(network)
            network.train()

    def rewrite(self) -> None:
        mylayers.optimize(self.optimized)
        time.sleep(0.001)
        mylayers.restore(self.optimized)

    def replace_children(self) -> None:
        for network in self.networks():
            for place in (0, 1, 4, 8):
                network[place] = copy.deepcopy(network[place])

    def replace_parameters(self) -> None:
        for layer in (self.fused[2], self.optimized[2]):
            layer.weight = nn.Parameter(layer.weight.detach().clone())
            layer.bias = nn.Parameter(layer.bias.detach().clone())

    def swap_tensors(self) -> None:
        # Of no layer whose parameters are replaced: PyTorch's detach reads what this exchanges.
        for layer in (self.fused[6], self.layer):
            with contextlib.suppress(RuntimeError):  # where a call holds one of them
                weight = layer.weight
                torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().clone()))

    def note(self) -> None:
        for module in (self.fused, self.fused[2], self.layer):
            module.note = object()
            time.sleep(0)
            del module.note

    def copy(self) -> None:
        with torch.no_grad():
            self.must_be(copy.copy(self.fused)(self.x), self.y)
            self.must_be(copy.deepcopy(self.optimized)(self.x), self.y)

    def come_and_go(self) -> None:
        """Networks, classes and losses that live for a moment, in cycles."""

        class Named(nn.Linear):
            pass

        network = FusedSequential(Named(UNITS, 8), nn.Tanh())
        network.itself = [network, Named]
        with torch.no_grad():
            network(self.x)
        forward_backward(network, nn.MSELoss(), self.x, torch.zeros(ROWS, 8))

    # ---- all at once ----

    def repeat(self, name: str) -> None:
        step: Callable[[], None] = getattr(self, name)
        while not self.stop.is_set():
            try:
                step()
            except Exception as e:
                if not any(words in str(e) for words in STOCKS_OWN):
                    self.errors.append(f"{name}: {type(e).__name__}: {e}")
                    self.stop.set()
            self.rounds[name] += 1

    def run(self, seconds: float, names: list[str]) -> int:
        self.rounds = dict.fromkeys(names, 0)
        threads = [threading.Thread(target=self.repeat, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        self.stop.wait(seconds)
        self.stop.set()
        for thread in threads:
            thread.join()
        print(*(f"{name} {count}" for name, count in self.rounds.items()), sep=", ", flush=True)
        for error in self.errors:
            print(error)
        return 1 if self.errors or not all(self.rounds.values()) else 0


# Threads that run beside each other: few, so that each gets far, and all.
CHANGING = [
    "hook",
    "hook_all",
    "mode",
    "rewrite",
    "replace_children",
    "replace_parameters",
    "swap_tensors",
    "note",
    "copy",
    "come_and_go",
]
SCENARIOS = {
    "inference": ["infer", "infer", "watched", "hook", "mode"],
    "training": ["train", "train", "watched", "hook", "mode"],
    "parameters": ["infer", "alone", "graph", "swap_tensors", "replace_parameters"],
    "everything": ["infer", "infer_small", "watched", "train", "graph", "alone", *CHANGING],
}


def main() -> int:
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    failed = 0
    for name in sys.argv[2:] or SCENARIOS:
        print(f"{name}: ", end="", flush=True)
        failed += Stress().run(seconds, SCENARIOS[name])
    return failed


if __name__ == "__main__":
    sys.exit(main())
