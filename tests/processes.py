"""Tests that run in several real processes, which talk through gloo.

``@in_processes(2, 3)`` runs the body of a test in every process of a group of two, then of three.
Starting processes is what costs (they import torch), so a group serves one test after another; it
is replaced when one fails, as its processes may then be waiting for each other. Groups of more than
two are left to ``pytest -m whole``.
"""

import functools
import inspect
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

TEST_SECONDS = 60  # for one test, the start of its processes included
PEER_SECONDS = 20  # after which a collective whose peers do not come raises


class Processes:
    """A group of processes, started by the first test."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._running: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name, "store"))
        spawn = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            here, there = spawn.Pipe()
            process = spawn.Process(
                target=_serve, args=(there, store, rank, self.world), daemon=True
            )
            process.start()
            there.close()
            self._running.append((process, here))

    def run(self, test: Callable[..., None], arguments: dict[str, Any]) -> None:
        """Run ``test.body`` in every process; fail with what went wrong in any."""
        deadline = time.monotonic() + TEST_SECONDS
        if not self._running:
            self._start()
        for _, connection in self._running:
            connection.send((test, arguments))
        failures = []
        for rank, (process, connection) in enumerate(self._running):
            try:
                if connection.poll(max(0.0, deadline - time.monotonic())):
                    failure = connection.recv()
                else:
                    failure = f"has not ended within {TEST_SECONDS} s\n"
            except EOFError:
                process.join()
                failure = f"died with exit code {process.exitcode}\n"
            if failure is not None:
                failures.append(f"process {rank} of {self.world}: {failure}")
        if failures:
            self.stop()
            pytest.fail("\n".join(failures), pytrace=False)

    def stop(self) -> None:
        """Stop the processes; the next test starts new ones."""
        for process, connection in self._running:
            connection.close()
            process.terminate()
            process.join()
        self._running.clear()
        if self._folder is not None:
            self._folder.cleanup()


def _serve(connection: Connection, store: str, rank: int, world: int) -> None:
    """What a process of a group does: one test after another."""
    # Tests arrive by the names that pytest gives their files, seen from the root.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # torch.compile's own, on first use.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PEER_SECONDS),
    )
    while True:
        try:
            test, arguments = connection.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            test.body(**arguments)
            dist.barrier()
            connection.send(None)
        except BaseException:
            connection.send(traceback.format_exc())


def in_processes(*worlds: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the test's body runs in each process of a group, once for each size of it."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def test(processes: Processes, **arguments: Any) -> None:
            processes.run(test, arguments)

        test.body = body  # type: ignore[attr-defined]
        signature = inspect.signature(body)
        processes = inspect.Parameter("processes", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[processes, *signature.parameters.values()]
        )
        sizes = [
            pytest.param(world, id=f"{world} processes", marks=[pytest.mark.whole] * (world > 2))
            for world in worlds
        ]
        return pytest.mark.parametrize("processes", sizes, indirect=True)(test)

    return decorate
