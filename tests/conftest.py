"""Shared by all tests: tiny models on few threads, and where optional material lies."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny models: threads only cost

SHARED = Path(__file__).parents[2] / "shared"
"""Optional real images and checkpoints beside the checkout; a test that needs them skips without."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of optional material; skips the test where it does not exist."""
    if not SHARED.is_dir():
        pytest.skip("optional material is not beside this checkout")
    return SHARED
