"""Plugins and fixtures that test files share."""

from collections.abc import Iterator

import pytest
from certificate import Certificate
from processes import Processes


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Certificate(), "certificate")


@pytest.fixture
def certificate(pytestconfig: pytest.Config) -> Certificate:
    return pytestconfig.pluginmanager.get_plugin("certificate")


@pytest.fixture(scope="session")
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    group = Processes(request.param)
    yield group
    group.stop()
