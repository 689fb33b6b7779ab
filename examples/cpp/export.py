"""Export a network for run_network: python examples/cpp/export.py NETWORK.pt2 ROWS.txt.

Writes the network, compiled by AOTInductor for any number of rows, and three rows of inputs;
prints what Python computes from them, as run_network will.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from mylayers import CenteredLayer, FusedSequential, MyLinear


def build() -> nn.Module:
    """A network to export; a trained one is exported in the same way."""
    torch.manual_seed(0)
    return nn.Sequential(
        MyLinear(64, 32, activation="tanh"),
        CenteredLayer(dim=1),
        FusedSequential(nn.Linear(32, 16), nn.ReLU(), CenteredLayer(), MyLinear(16, 12)),
        nn.Linear(12, 10),
    ).eval()


def as_text(rows: Tensor) -> str:
    """A line for each row, with all digits that a float32 has."""
    return "".join(" ".join(f"{value:.9g}" for value in row) + "\n" for row in rows.tolist())


def main() -> None:
    """Export, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", type=Path)
    parser.add_argument("rows", type=Path)
    arguments = parser.parse_args()
    net, rows = build(), torch.randn(3, 64)
    with torch.no_grad():
        program = torch.export.export(net, (rows,), dynamic_shapes=({0: torch.export.Dim("rows")},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(arguments.network))
        arguments.rows.write_text(as_text(rows))
        print(as_text(net(rows)), end="")


if __name__ == "__main__":
    main()
