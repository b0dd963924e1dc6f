"""Shared by all tests: tiny models on few threads, and where optional material lies."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny models: threads only cost

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
SHARED = Path(__file__).parents[2] / "shared"
"""Optional real images and checkpoints beside the checkout; a test that needs them skips without."""


NEEDS_HAND_OVER = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch cannot tell whether there are hooks on saved tensors: positions are not handed over",
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of optional material; skips the test where it does not exist."""
    if not SHARED.is_dir():
        pytest.skip("optional material is not beside this checkout")
    return SHARED
