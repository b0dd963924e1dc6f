"""Shared by all tests: tiny models on few threads, and where optional material lies."""

from collections import Counter
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

torch.set_num_threads(1)  # tiny models: threads only cost

SHARED = Path(__file__).parents[2] / "shared"
"""Optional real images and checkpoints beside the checkout; a test that needs them skips without."""


FIRST = (
    *"convert train trust_files explorer documented ends newcomer on_gpu plot hosts_timm models resume extras".split(),
    *"demo stays export device_data hosts_wide examples hosts hosts_stages sweep saved_folders numbers".split(),
    *"compare cli benchmark stored t2t ceit rivals faults hosts_shuffled original turned pixels property".split(),
)
"""Files that take longest: workers that have several of them left at the end would wait for each other."""

EACH = 11
"""Of the cases of a matrix, every eleventh is not slow: a prime, so that all rows and columns are met."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # of xdist: by the number of tests, which says little of their time
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several processes and a browser are slow, and so are most cases of a matrix."""
    place = {f"test_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    places: Counter[str] = Counter()
    for item in items:
        name = item.nodeid.partition("[")[0]
        in_matrix = item.get_closest_marker("matrix") is not None
        alone = item.get_closest_marker("distributed") or item.get_closest_marker("browser")
        if alone or (in_matrix and places[name] % EACH):
            item.add_marker("slow")
        places[name] += in_matrix


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of optional material; skips the test where it does not exist."""
    if not SHARED.is_dir():
        pytest.skip("optional material is not beside this checkout")
    return SHARED


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Drawing takes most of the time: empty files for tests of names and numbers, but for kinds that a test adds."""
    from matplotlib.figure import Figure

    draw, drawn = Figure.savefig, set[str]()

    def draft(figure: Figure, file: BinaryIO, *, format: str, **options: object) -> None:
        draw(figure, file, format=format, **options) if format in drawn else file.write(b"draft")

    monkeypatch.setattr(Figure, "savefig", draft)
    return drawn
