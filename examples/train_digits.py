"""Train on real handwritten digits, on compiled kernels: python examples/train_digits.py.

A network of ``MyLinear``, ``CenteredLayer`` and a stock ``nn.Linear`` learns the 1,797 digits
that ship inside scikit-learn, three ways, from the same start and on the same batches: the layers
as they are; stock modules in their places; the layers in a ``FusedSequential`` that is trained by
``training_step``, one call a batch. The parameters are saved and loaded by a second process, whose
outputs must be the same to the bit. Exits non-zero if it disagrees, if a held-out accuracy is under
96 %, or if the losses of the three differ by more than rounding.
"""

import argparse
import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

from mylayers import CenteredLayer, FusedSequential, MyLinear, training_step

SEED = 0
BATCH = 64
LEARNING_RATE = 0.1
MOMENTUM = 0.9
REQUIRED_ACCURACY = 0.96
ROUNDING = 1e-4  # that the losses of a batch may differ by, after all that came before it
LAYERS, STOCK, ONE_CALL = "the layers", "stock modules", "one call"
OUT = Path(__file__).resolve().parent.parent / "out"


class Digits(NamedTuple):
    """Pixels ``(rows, 64)`` from 0 to 1, and which digit each row shows."""

    pixels: Tensor
    labels: Tensor


class Epoch(NamedTuple):
    """What one pass over the training digits gave."""

    losses: list[float]
    seconds: float


# A network, its optimiser, pixels and labels: trains on these, and gives their loss.
Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], Tensor]


class Way(NamedTuple):
    """A network, and what trains it on one batch."""

    net: nn.Sequential
    step: Step


def load() -> tuple[Digits, Digits]:
    """The digits to train on and the fifth held out, the same ones on every call."""
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    held_out, train = order.tensor_split([len(order) // 5])
    pixels = pixels.float() / 16
    return Digits(pixels[train], labels[train]), Digits(pixels[held_out], labels[held_out])


def initialise(module: nn.Module) -> None:
    """For ``net.apply``: a scale that keeps the signal's size from layer to layer.

    ``kaiming_normal_`` reads the fan-in from dimension 1, where ``nn.Linear`` has it;
    ``MyLinear``'s weight is ``(in_units, units)``, so its transpose is passed, a view.
    """
    if isinstance(module, MyLinear):
        nn.init.kaiming_normal_(module.weight.T, nonlinearity="relu")
        nn.init.zeros_(module.bias)


def build() -> nn.Sequential:
    """The network, freshly initialised, the same values on every call."""
    torch.manual_seed(SEED)
    net = nn.Sequential(MyLinear(64, 128), CenteredLayer(), MyLinear(128, 64), nn.Linear(64, 10))
    net.apply(initialise)
    return net


class StockCentered(nn.Module):
    """What PyTorch has no module for, in the words of the notebook."""

    def forward(self, x: Tensor) -> Tensor:
        """``x - x.mean()``."""
        return x - x.mean()


def as_stock(net: nn.Sequential) -> nn.Sequential:
    """A copy of the network as it is now, made of stock modules."""
    modules: list[nn.Module] = []
    for module in net:
        if isinstance(module, MyLinear):
            modules += [module.to_linear(), nn.ReLU()]
        elif isinstance(module, CenteredLayer):
            modules.append(StockCentered())
        else:
            modules.append(copy.deepcopy(module))
    return nn.Sequential(*modules)


def four_lines(
    net: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor
) -> Tensor:
    """A step of training as anybody writes it."""
    optimizer.zero_grad()
    loss = F.cross_entropy(net(pixels), labels)
    loss.backward()
    optimizer.step()
    return loss


def one_call(
    net: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor
) -> Tensor:
    """The same."""
    return training_step(net, F.cross_entropy, optimizer, pixels, labels)


def make_ways() -> dict[str, Way]:
    """The same network and start, three ways."""
    return {
        LAYERS: Way(build(), four_lines),
        STOCK: Way(as_stock(build()), four_lines),
        ONE_CALL: Way(FusedSequential(*build()), one_call),
    }


def train(way: Way, digits: Digits, epochs: int) -> Iterator[Epoch]:
    """Train one epoch for each step of the iterator; the batches depend on ``SEED`` alone."""
    optimizer = torch.optim.SGD(way.net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        start, losses = time.perf_counter(), []
        for rows in torch.randperm(len(digits.labels), generator=generator).split(BATCH):
            loss = way.step(way.net, optimizer, digits.pixels[rows], digits.labels[rows])
            losses.append(loss.item())
        yield Epoch(losses, time.perf_counter() - start)


@torch.no_grad()
def accuracy(net: nn.Module, digits: Digits) -> float:
    """The share of digits that the network reads right."""
    return (net(digits.pixels).argmax(1) == digits.labels).float().mean().item()


@torch.no_grad()
def reload(state: Path, outputs: Path) -> None:
    """What the second process does: load the parameters, save the outputs."""
    _, held_out = load()
    net = build()
    for parameter in net.parameters():
        parameter.fill_(torch.nan)  # so that nothing but the file can give the right outputs
    net.load_state_dict(torch.load(state))
    torch.save(net.eval()(held_out.pixels), outputs)


@torch.no_grad()
def same_in_another_process(net: nn.Module, held_out: Digits, state: Path) -> bool:
    """Whether a new process that loads the parameters from a file gets the same bits."""
    torch.save(net.state_dict(), state)
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "outputs.pt")
        subprocess.run([sys.executable, __file__, "--reload", state, outputs], check=True)
        theirs = torch.load(outputs)
    ours = net.eval()(held_out.pixels)
    return torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def distances(a: list[Epoch], b: list[Epoch]) -> Tensor:
    """How far two runs lie apart in the loss of each batch."""
    return (losses(a) - losses(b)).abs()


def losses(run: list[Epoch]) -> Tensor:
    """Those of all batches, in their order."""
    return torch.tensor([epoch.losses for epoch in run], dtype=torch.float64).flatten()


def draw(path: Path, runs: dict[str, list[Epoch]]) -> None:
    """All loss curves, and their distance from the stock modules'."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    curves, apart = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for width, (name, run) in zip((5, 2.5, 0.8), runs.items(), strict=True):
        epochs = torch.arange(1, len(losses(run)) + 1) / len(run[0].losses)
        curves.semilogy(epochs, losses(run), label=name, linewidth=width, alpha=0.6)
        if name != STOCK:
            apart.semilogy(epochs, distances(run, runs[STOCK]), ".", markersize=3, label=name)
    curves.set(ylabel="training loss of each batch", title="1,797 handwritten digits")
    curves.legend()
    apart.set(xlabel="epoch", ylabel="|difference| from stock")
    figure.savefig(path, dpi=120)


def speed_ups(run: list[Epoch], stock: list[Epoch]) -> list[float]:
    """The quartiles, of epochs next to one another."""
    ratios = torch.tensor([b.seconds / a.seconds for a, b in zip(run, stock, strict=True)])
    return ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


def report(ways: dict[str, Way], runs: dict[str, list[Epoch]], held_out: Digits) -> Table:
    """All of them side by side."""
    table = Table(title="The same network, start and batches; an epoch each in turns")
    table.add_column("")
    for name in ways:
        table.add_column(name, justify="right")
    seconds = {name: torch.tensor([e.seconds for e in run]) for name, run in runs.items()}
    table.add_row("ms an epoch, median", *(f"{1e3 * s.median():.2f}" for s in seconds.values()))
    quartiles = [speed_ups(run, runs[STOCK]) for run in runs.values()]
    table.add_row("speed-up over stock, median", *(f"{median:.2f}" for _, median, _ in quartiles))
    table.add_row("quartiles", *(f"{low:.2f} to {high:.2f}" for low, _, high in quartiles))
    table.add_row("seconds in all", *(f"{s.sum():.2f}" for s in seconds.values()))
    table.add_row("loss of the last batch", *(f"{r[-1].losses[-1]:.3e}" for r in runs.values()))
    table.add_row(
        "held-out accuracy", *(f"{accuracy(way.net, held_out):.2%}" for way in ways.values())
    )
    return table


def progress_bar(console: Console) -> Progress:
    """A bar that moves between the epochs, with no thread of its own beside what is timed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
    )


def run(epochs: int, out: Path, console: Console) -> list[str]:
    """The whole example; returns what went wrong."""
    digits, held_out = load()
    out.mkdir(parents=True, exist_ok=True)
    problems = []

    ways = make_ways()
    console.print(ways[ONE_CALL].net)
    runs: dict[str, list[Epoch]] = {name: [] for name in ways}
    turns = zip(*(train(way, digits, epochs) for way in ways.values()), strict=True)
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=epochs)
        for turn in turns:
            for name, epoch in zip(ways, turn, strict=True):
                runs[name].append(epoch)
            loss = sum(turn[0].losses) / len(turn[0].losses)
            description = f"training, loss {loss:.1e}"
            progress.update(task, advance=1, description=description, refresh=True)
    console.print(report(ways, runs, held_out))

    for name, way in ways.items():
        if (right := accuracy(way.net, held_out)) < REQUIRED_ACCURACY:
            problems.append(f"{name}: held-out accuracy {right:.2%}, under {REQUIRED_ACCURACY:.0%}")
    apart = max(distances(run, runs[STOCK]).max().item() for run in runs.values())
    console.print(f"The losses of a batch lie {apart:.1e} apart at most.")
    if not apart <= ROUNDING:
        problems.append(f"the losses lie {apart:.1e} apart, more than {ROUNDING:.0e}")

    state = out / "digits.pt"
    if same_in_another_process(ways[LAYERS].net, held_out, state):
        console.print(
            f"Loaded from {state} in another process: outputs bit-identical.", markup=False
        )
    else:
        problems.append(f"another process that loaded {state} got different outputs")

    picture = out / "digits.png"
    draw(picture, runs)
    console.print(f"Loss curves: {picture}", markup=False)
    return problems


def count(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1; got {text!r}")
    return int(text)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=count, default=20, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="folder for picture and parameters; default: out/"
    )
    parser.add_argument("--reload", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reload:
        reload(*arguments.reload)
        return 0
    console = Console(soft_wrap=True)
    problems = run(arguments.epochs, arguments.out, console)
    for problem in problems:
        console.print(f"Failed: {problem}", style="bold red", markup=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
