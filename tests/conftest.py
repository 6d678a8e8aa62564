"""Settings of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test and its fixtures draw is the same in each run: torch seeds itself anew in each process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def default_search_costs() -> Iterator[None]:
    """Tests choose the same engines on every machine, and leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNHEADS_SEARCH_COSTS", "default")
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The networks in the tests are tiny: with more threads they mostly wait for each other."""
    torch.set_num_threads(1)
