"""Plugins and fixtures that test files share."""

import pytest
from certificate import Certificate


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Certificate(), "certificate")


@pytest.fixture
def certificate(pytestconfig: pytest.Config) -> Certificate:
    return pytestconfig.pluginmanager.get_plugin("certificate")
