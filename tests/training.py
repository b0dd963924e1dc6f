"""Tiny trainings for the tests: what they are made of, and how their results are compared."""

import json
from pathlib import Path

import pytest
import torch

from lape.recipe import Recipe
from lape.train.distributed import World
from lape.train.loop import train
from lape.train.state import LOG

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
TIMES = ("seconds", "data_seconds", "images_per_second", "peak_memory_mib")
ALONE = World(0, 1, torch.device("cpu"))


def tiny(**changes) -> Recipe:
    settings = {"model": "vit_tiny_patch16_224", "model_kwargs": KWARGS, "input_size": 16, "join_type": "LaPE"}
    settings |= {"aa": "none", "reprob": 0.0, "color_jitter": 0.0, "warmup_epochs": 0, "lr": 2e-3, "unscale_lr": True}
    settings |= {"device": "cpu", "num_workers": 0, "batch_size": 256, "epochs": 1}
    return Recipe(**{**settings, **changes})


def quiet(_text: str) -> None:
    pass


def read(path) -> dict:
    return torch.load(path, weights_only=True)


class Stop(Exception):
    """Ends a run after an epoch, as a kill at that moment would."""


def stop_after(epochs: int):
    def on_epoch(line: dict) -> None:
        if line["epoch"] + 1 == epochs:
            raise Stop

    return on_epoch


def run_until(epochs: int, recipe: Recipe) -> None:
    with pytest.raises(Stop):
        train(recipe, on_epoch=stop_after(epochs), say=quiet)


def same(found, wanted) -> bool:
    """Equal in every bit, through dicts and lists."""
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(same(a, b) for a, b in zip(found, wanted, strict=True))
    return found == wanted


def log_without_times(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
