"""Train on real handwritten digits, on compiled kernels: python examples/train_digits.py.

A network of ``MyLinear``, ``CenteredLayer`` and a stock ``nn.Linear`` learns the 1,797 digits
that ship inside scikit-learn. Its parameters are saved and loaded by a second process, whose
outputs must be the same to the bit. Then it runs against the same network of stock modules,
from the same start, on the same batches. Exits non-zero if the held-out accuracy is under
96 % or the second process disagrees.
"""

import argparse
import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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

from mylayers import CenteredLayer, MyLinear

SEED = 0
BATCH = 64
LEARNING_RATE = 0.1
MOMENTUM = 0.9
REQUIRED_ACCURACY = 0.96
OUT = Path(__file__).resolve().parent.parent / "out"


class Digits(NamedTuple):
    """Pixels ``(rows, 64)`` from 0 to 1, and which digit each row shows."""

    pixels: Tensor
    labels: Tensor


class Epoch(NamedTuple):
    """What one pass over the training digits gave."""

    losses: list[float]
    seconds: float


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


def train(net: nn.Module, digits: Digits, epochs: int) -> Iterator[Epoch]:
    """Train one epoch for each step of the iterator; the batches depend on ``SEED`` alone."""
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        start, losses = time.perf_counter(), []
        for rows in torch.randperm(len(digits.labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(digits.pixels[rows]), digits.labels[rows])
            loss.backward()
            optimizer.step()
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


@torch.no_grad()
def parameter_distance(net: nn.Sequential, stock: nn.Sequential) -> float:
    """The largest difference between two parameters that correspond."""
    pairs = zip(as_stock(net).parameters(), stock.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def draw(path: Path, ours: list[Epoch], stock: list[Epoch]) -> None:
    """Both loss curves, and the distance between them."""
    a, b = (torch.tensor([epoch.losses for epoch in run]).flatten() for run in (ours, stock))
    epochs = torch.arange(1, len(a) + 1) / len(ours[0].losses)
    figure = Figure(figsize=(8, 6), layout="constrained")
    curves, distance = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    curves.semilogy(epochs, a, label="mylayers", linewidth=3, alpha=0.4)
    curves.semilogy(epochs, b, label="stock modules", linewidth=0.8)
    curves.set(ylabel="training loss of each batch", title="1,797 handwritten digits")
    curves.legend()
    distance.semilogy(epochs, (a - b).abs(), ".", color="tab:gray", markersize=3)
    distance.set(xlabel="epoch", ylabel="|difference|")
    figure.savefig(path, dpi=120)


def report(
    ours: list[Epoch], stock: list[Epoch], net: nn.Sequential, twin: nn.Sequential, data: Digits
) -> Table:
    """Both networks side by side."""
    quarters = torch.tensor([0.25, 0.5, 0.75])
    low, ratio, high = (
        torch.tensor([b.seconds / a.seconds for a, b in zip(ours, stock, strict=True)])
        .quantile(quarters)
        .tolist()
    )
    table = Table(title="The same network, start and batches; an epoch each in turns")
    for column in ("", "mylayers", "stock modules", "stock / mylayers"):
        table.add_column(column, justify="right" if column else "left")

    def row(name: str, a: float, b: float, form: str, comparison: str = "") -> None:
        table.add_row(name, format(a, form), format(b, form), comparison)

    def milliseconds(run: list[Epoch]) -> float:
        return torch.tensor([1e3 * epoch.seconds for epoch in run]).quantile(0.5).item()

    spread = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
    row("ms an epoch, median", milliseconds(ours), milliseconds(stock), ".2f", spread)
    row("seconds in all", *(sum(epoch.seconds for epoch in run) for run in (ours, stock)), ".2f")
    row("loss of the last batch", ours[-1].losses[-1], stock[-1].losses[-1], ".3e")
    row("held-out accuracy", accuracy(net, data), accuracy(twin, data), ".2%")
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

    net = build()
    console.print(net)
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=epochs)
        for epoch in train(net, digits, epochs):
            loss = sum(epoch.losses) / len(epoch.losses)
            description = f"training, loss {loss:.1e}"
            progress.update(task, advance=1, description=description, refresh=True)

    right = accuracy(net, held_out)
    console.print(
        f"Accuracy: {accuracy(net, digits):.2%} of the {len(digits.labels)} digits trained on, "
        f"{right:.2%} of the {len(held_out.labels)} held out."
    )
    if right < REQUIRED_ACCURACY:
        problems.append(f"held-out accuracy {right:.2%} is under {REQUIRED_ACCURACY:.0%}")

    state = out / "digits.pt"
    if same_in_another_process(net, held_out, state):
        console.print(
            f"Loaded from {state} in another process: outputs bit-identical.", markup=False
        )
    else:
        problems.append(f"another process that loaded {state} got different outputs")

    net = build()
    twin = as_stock(net)
    ours, stock = [], []
    with progress_bar(console) as progress:
        pairs = zip(train(net, digits, epochs), train(twin, digits, epochs), strict=True)
        for a, b in progress.track(pairs, total=epochs, description="against stock modules"):
            ours.append(a)
            stock.append(b)
    console.print(report(ours, stock, net, twin, held_out))
    apart = max(
        abs(x - y)
        for a, b in zip(ours, stock, strict=True)
        for x, y in zip(a.losses, b.losses, strict=True)
    )
    console.print(
        f"The two trajectories lie apart by {apart:.1e} at most in the loss of a batch, and "
        f"end {parameter_distance(net, twin):.1e} apart at most in a parameter."
    )
    picture = out / "digits.png"
    draw(picture, ours, stock)
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
