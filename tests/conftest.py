"""Plugins and fixtures that test files share."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from certificate import Certificate
from grids import mark_the_rest
from harness import ROOT, SUITES, eager_suite, made_limits, tiny_shape
from processes import Processes

# Before mylayers is imported, which reads it: products are ours on every machine. PyTorch's, where
# no machine was measured, have test_products.py.
os.environ.setdefault("MYLAYERS_PRODUCTS", "own")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Certificate(), "certificate")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_the_rest(items)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Every test draws the same numbers whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """The default dtype, so that another order of the same sums is no difference."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    group = Processes(request.param)
    yield group
    group.stop()


@pytest.fixture(scope="session")
def bench() -> SimpleNamespace:
    """The harness's modules; it is run from the repository's root, not installed."""
    sys.path.insert(0, str(ROOT))
    try:
        modules = (ROOT / "benchmarks").glob("*.py")
        names = [module.stem for module in modules if module.stem != "__init__"]
        return SimpleNamespace(
            **{name.strip("_"): importlib.import_module(f"benchmarks.{name}") for name in names}
        )
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def tiny_suites(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suites cut down to one tiny shape, no time spent beyond the fewest rounds."""
    for name in SUITES:
        shapes = (tiny_shape(bench, name),)
        tiny = dataclasses.replace(eager_suite(bench, name), shapes=shapes, quick=shapes)
        monkeypatch.setitem(bench.cases.SUITES, name, tiny)
    monkeypatch.setattr(bench.main, "SECONDS", 0.0)
    monkeypatch.setattr(bench.main, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(bench.limits, "measure", lambda threads: made_limits(bench, threads))
