"""Settings of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


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
