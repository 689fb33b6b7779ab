"""Several threads on one network, while others change what it is planned from.

    python tests/stress.py --seconds 60

Threads call a ``FusedSequential``, in inference and in training steps; beside them others do all
that makes it plan anew and changes no value: hooks put on and taken off, ``train()`` and
``eval()``, children and parameters replaced by equal ones, ``optimize`` and ``restore``, calls
under a mode. So every result is that of one thread alone, whatever ran beside it; and under
.ci/sanitize nobody may read what another has freed, or write while another reads.
"""

import argparse
import threading
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mylayers
from mylayers import CenteredLayer, FusedSequential, MyLinear

ROWS, WIDTH = 64, 32  # a call that gives up the GIL
PAUSE = 0.01  # seconds after each change, or those that change would leave no time to call


def network(*last: nn.Module) -> FusedSequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for place in range(4):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh(), MyLinear(WIDTH, WIDTH, activation="tanh")]
        layers += [nn.Identity(), CenteredLayer(-1)] if place % 2 else []
    net = FusedSequential(*layers, nn.Linear(WIDTH, 8), *last)
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, MyLinear):
                layer.weight.div_(WIDTH**0.5)
    return net


class Stress:
    """One network, and the loops that run on it until they are told to stop.

    Attributes:
        done: turns of each loop.
        failures: what was raised or found wrong.
    """

    def __init__(self) -> None:
        self.net = network()
        self.model = nn.Module()
        self.model.inner = nn.Sequential(*network(nn.Dropout(0.0)))
        self.x, self.target = torch.randn(ROWS, WIDTH), torch.randn(ROWS, 8)
        with torch.no_grad():
            self.output, self.inner_output = self.net(self.x), self.model.inner(self.x)
        self.loss = nn.functional.mse_loss(self.output, self.target)
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self._stop = threading.Event()

    # ---- what calls --------------------------------------------------------------------

    def infer(self) -> None:
        with torch.no_grad():
            self.expect(self.net(self.x), self.output)

    def infer_recorded(self) -> None:
        output = self.net(self.x)
        self.expect(output, self.output)
        torch.autograd.grad(output.sum(), self.net[0].weight, allow_unused=True)

    def step(self) -> None:
        # In one thread: what backward adds to must not be taken away meanwhile, in PyTorch neither.
        self.net.zero_grad(set_to_none=True)
        loss = mylayers.forward_backward(self.net, nn.functional.mse_loss, self.x, self.target)
        self.expect(loss, self.loss)

    def infer_in_a_mode(self) -> None:
        with torch.no_grad(), torch.device("cpu"):
            self.expect(self.net(self.x), self.output)

    def infer_inner(self) -> None:
        with torch.no_grad():
            self.expect(self.model.inner(self.x), self.inner_output)

    # ---- what changes ------------------------------------------------------------------

    def hook(self) -> None:
        child = self.net[len(self.net) // 2]
        for register in (child.register_forward_hook, child.register_forward_pre_hook):
            handle = register(lambda *_: None)
            handle.remove()

    def switch(self) -> None:
        for module in (self.net, self.model):
            module.eval()
            module.train()

    def edit(self) -> None:
        old = self.net[0]
        new = nn.Linear(WIDTH, WIDTH)
        new.weight, new.bias = old.weight, old.bias
        self.net[0] = new
        last = self.net[len(self.net) - 1]
        last.weight = nn.Parameter(last.weight.detach().clone())

    def convert(self) -> None:
        mylayers.optimize(self.model)
        self.infer_inner()
        mylayers.restore(self.model)

    # ------------------------------------------------------------------------------------

    def expect(self, found: Tensor, expected: Tensor) -> None:
        # Not to the bit: a layer with a hook runs by itself, nn.Linear by PyTorch's own product.
        torch.testing.assert_close(found.detach(), expected)

    def loop(self, work: Callable[[], None], pause: float) -> None:
        try:
            while not self._stop.is_set():
                work()
                self.done[work.__name__] += 1
                time.sleep(pause)
        except Exception as error:
            self.failures.append(f"{work.__name__}: {type(error).__name__}: {error}")
            self._stop.set()

    def run(self, seconds: float) -> None:
        callers = [self.infer, self.infer, self.infer_recorded, self.step, self.infer_inner]
        changers = [self.infer_in_a_mode, self.hook, self.switch, self.edit, self.convert]
        threads = [
            threading.Thread(target=self.loop, args=(work, pause))
            for works, pause in ((callers, 0), (changers, PAUSE))
            for work in works
        ]
        for thread in threads:
            thread.start()
        self._stop.wait(seconds)
        self._stop.set()
        for thread in threads:
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    stress, begin = Stress(), time.monotonic()
    stress.run(given.seconds)
    turns = ", ".join(f"{count} {name}" for name, count in sorted(stress.done.items()))
    print(f"{turns}, {time.monotonic() - begin:.0f} s", flush=True)
    if stress.failures:
        raise SystemExit("\n".join(stress.failures))


if __name__ == "__main__":
    main()
