"""Train in several processes: torchrun --nproc-per-node 2 examples/train_distributed.py [--fsdp].

The network of train_digits.py, under ``DistributedDataParallel`` or, with --fsdp, FSDP2
(``fully_shard``). Each process has a part of every batch, and ``CenteredLayer`` the mean of the
whole of it, so the network learns what it learns in one process: process 0 trains that one too,
and compares. Exits non-zero if the loss of a batch or a parameter lies further apart than rounding
explains.
"""

import argparse
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)
from torch.nn.parallel import DistributedDataParallel
from train_digits import (
    BATCH,
    LEARNING_RATE,
    MOMENTUM,
    SEED,
    Digits,
    Way,
    accuracy,
    build,
    count,
    four_lines,
    load,
    progress_bar,
    train,
)

from mylayers.distributed import convert_sync_centered

# In float64, where sums in another order lie 1e-16 apart and training lets that grow.
TOLERANCE = 1e-12


def parallel(fsdp: bool) -> nn.Module:
    """The network, centering over all processes."""
    net = convert_sync_centered(build().double())
    if not fsdp:
        return DistributedDataParallel(net)
    for layer in net:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer)
    return fully_shard(net)


def train_together(net: nn.Module, digits: Digits, epochs: int) -> Iterator[Tensor]:
    """Train one epoch for each step; yields the losses of its batches, the same in all processes.

    The batches are those of ``train``, and each process takes its part of them.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(digits.labels), generator=generator).split(BATCH):
            mine = rows.tensor_split(processes)[rank]
            optimizer.zero_grad()
            output = net(digits.pixels[mine])
            # Parts are uneven where processes do not divide the batch, and gradients are averaged
            # over processes: so weighted, that is the gradient of the batch's mean loss.
            loss = F.cross_entropy(output, digits.labels[mine], reduction="sum")
            loss = loss * processes / len(rows)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach() / processes)
        total = torch.stack(losses)
        dist.all_reduce(total)
        yield total


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, which FSDP2 shards."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def run(epochs: int, fsdp: bool, console: Console) -> bool:
    """The whole example; whether the processes learnt what one learns."""
    digits, held_out = (Digits(part.pixels.double(), part.labels) for part in load())
    net = parallel(fsdp)
    console.print(net)
    with progress_bar(console) as progress:
        task = progress.add_task(f"training in {dist.get_world_size()} processes", total=epochs)
        ours = []
        for losses in train_together(net, digits, epochs):
            ours.append(losses)
            progress.update(task, advance=1, refresh=True)
    # Work of all processes, each with all of the digits held out: their mean is the same.
    right = accuracy(net, held_out)
    parameters = [whole(parameter) for parameter in net.parameters()]
    if dist.get_rank() != 0:
        return True

    alone = build().double()
    with progress_bar(console) as progress:
        task = progress.add_task("training in one process", total=epochs)
        theirs = []
        for epoch in train(Way(alone, four_lines), digits, epochs):
            theirs.append(torch.tensor(epoch.losses, dtype=torch.float64))
            progress.update(task, advance=1, refresh=True)
    of_losses = (torch.cat(ours) - torch.cat(theirs)).abs().max().item()
    of_parameters = max(
        (a - b).abs().max().item() for a, b in zip(parameters, alone.parameters(), strict=True)
    )
    console.print(
        f"Accuracy: {right:.2%} of the {len(held_out.labels)} digits held out.\n"
        f"Largest difference from one process: {of_losses:.1e} in the loss of a batch, "
        f"{of_parameters:.1e} in a parameter; rounding explains {TOLERANCE:.0e}."
    )
    same = max(of_losses, of_parameters) <= TOLERANCE  # False for NaN
    if not same:
        console.print("Failed: not the result of one process", style="bold red")
    return same


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=count, default=20, help="default: %(default)s")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 " + __file__)
    dist.init_process_group("gloo")
    console = Console(soft_wrap=True, quiet=dist.get_rank() != 0)
    same = run(arguments.epochs, arguments.fsdp, console)
    # A process that ends takes its connections with it, which others may still read from.
    dist.barrier()
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    status = main()
    # Caches of FSDP2's hold the process group, so gloo's threads outlive destroy_process_group, and
    # one that gives back a tensor while the interpreter ends aborts the process
    # (pytorch/pytorch#117762). Nothing waits for them: a barrier itself holds the work before it.
    # So this process ends without ending the interpreter first.
    sys.stdout.flush()
    os._exit(status)
