"""Networks that take seconds to make, each made once."""

from __future__ import annotations

import pytest

from tests.deploy.precision.networks import Network, of_the_demo, ruined


@pytest.fixture(scope="session")
def network() -> Network:
    """The demo's, calibrated, without equalized channels, so that what is planted stays."""
    return of_the_demo()


@pytest.fixture(scope="session")
def sensitive(network: Network) -> Network:
    """The same function, with one block that INT8 ruins."""
    return ruined(network)
