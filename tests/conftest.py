"""Settings of the whole suite."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The networks in the tests are tiny: with more threads they mostly wait for each other."""
    torch.set_num_threads(1)
