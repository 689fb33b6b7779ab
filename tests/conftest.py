"""Plugins and fixtures that test files share."""

import os
from collections.abc import Iterator

import pytest
from certificate import Certificate
from processes import Processes

# Before mylayers is imported, which reads it: products are ours on every machine. PyTorch's, where
# no machine was measured, have test_products.py.
os.environ.setdefault("MYLAYERS_PRODUCTS", "own")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Certificate(), "certificate")


@pytest.fixture(scope="session")
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    group = Processes(request.param)
    yield group
    group.stop()
