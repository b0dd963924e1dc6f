"""Positions on a spectrogram and in a video: AST and ViViT of transformers, tiny, on data that is made here.

    python examples/sound_and_video.py sound      # tones that rise or fall: where in time and pitch they lie is all
    python examples/sound_and_video.py video      # a dot that moves to one of four sides

All ways see the same data with the same seed. `basic` at unit scale is the control: LN' gives a table unit scale from
the first step. transformers starts the tables of AST and ViViT at zero, which has no direction that LN' could keep,
so a new one is named. Prints and writes the accuracy on data that was not trained on, and how the positions of a
layer resemble each other along each axis of the grid: mean cosine similarity of patches that are one step apart in
frequency and time, or in frames, rows and columns. --pictures draws the maps of the last seed's models. Needs pip
install 'lape[huggingface,plot]'.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lape
from lape.look.figures import draw_together, visualize
from lape.look.options import DrawOptions
from lape.study.numbers import mean_std
from lape.train.machine import environment

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
AXES = {"sound": ("frequency", "time"), "video": ("frames", "rows", "columns")}
CLASSES = {"sound": 4, "video": 4}
WAYS: dict[str, dict[str, Any]] = {
    "basic": {"join": "basic"},
    "basic, unit scale": {"join": "basic", "std": 1.0},
    "LaPE": {"join": "LaPE"},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(AXES))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("sound_and_video.json"))
    parser.add_argument("--pictures", type=Path, help="a folder for figures of the positions")
    given = parser.parse_args(arguments)
    make, build = {"sound": (sounds, ast), "video": (videos, vivit)}[given.task]
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    models: dict[str, nn.Module] = {}
    for seed in range(given.seeds):
        for way, how in WAYS.items():
            torch.manual_seed(seed)
            models[way] = model = lape.apply_(build(), pe="learnable", **how)
            loss = train(model, make, given, seed)
            inputs, labels = make(256, torch.Generator().manual_seed(10_000 + seed))
            with torch.no_grad():
                right = model.eval()(inputs).logits.argmax(1) == labels
            alike = similarity_along_axes(model)
            runs[way].append({"accuracy": 100 * right.float().mean().item(), "loss": loss, "alike": alike})
            last = ", ".join(f"{axis} {each[-1]:+.2f}" for axis, each in zip(AXES[given.task], alike, strict=True))
            print(f"seed {seed}, {way}: {runs[way][-1]['accuracy']:.1f} %; neighbours in the last layer: {last}")
    found = {
        "config": {name: getattr(given, name) for name in ("task", "steps", "batch_size", "lr", "seeds")},
        "grid": list(lape.grid(model)),
        "ways": {
            way: {"accuracy": mean_std([r["accuracy"] for r in each]), "runs": each} for way, each in runs.items()
        },
        **environment(),
    }
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {given.output}")
    if given.pictures is not None:
        draw_together(models, given.pictures)
        for way, model in models.items():
            visualize(model, given.pictures, DrawOptions(model_name=way, dpi=150))
        print(f"drawn: {given.pictures}")
    return found


def ast() -> nn.Module:
    """8 x 8 patches of a spectrogram, 32 bands by 32 moments."""
    import transformers

    steps = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "num_mel_bins": 32, "max_length": 32}
    config = transformers.ASTConfig(**SMALL, **steps, num_labels=CLASSES["sound"])
    return transformers.ASTForAudioClassification(config)


def vivit() -> nn.Module:
    """4 x 4 x 4 tubelets of 8 frames of 16 x 16 pixels."""
    import transformers

    config = transformers.VivitConfig(
        **SMALL, image_size=16, num_frames=8, tubelet_size=[2, 4, 4], num_labels=CLASSES["video"]
    )
    return transformers.VivitForVideoClassification(config)


def sounds(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spectrograms (count, time, bands) of a tone that rises or falls in the first or second half, in noise."""
    labels = torch.randint(0, 4, (count,), generator=random)
    time = torch.arange(32)[None]
    start = torch.randint(4, 12, (count, 1), generator=random)
    moment = (time - 16 * (labels[:, None] // 2)).clamp(0, 15)
    pitch = torch.where(labels[:, None] % 2 == 0, start + moment, start + 15 - moment)
    playing = (time // 16) == labels[:, None] // 2
    sound = F.one_hot(pitch, 32).float() * playing[..., None]
    return 3 * sound + 0.5 * torch.randn(sound.shape, generator=random), labels


def videos(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Videos (count, 8, 3, 16, 16) of a square that moves up, down, left or right, in noise."""
    labels = torch.randint(0, 4, (count,), generator=random)
    step = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])[labels]
    place = torch.randint(5, 9, (count, 2), generator=random)
    at = place[:, None] + step[:, None] * (torch.arange(8) // 2)[None, :, None]  # (count, 8, 2)
    far = torch.arange(16)[None, None, :] - at[..., :1], torch.arange(16)[None, None, :] - at[..., 1:]
    square = ((far[0] >= 0) & (far[0] < 3))[..., :, None] & ((far[1] >= 0) & (far[1] < 3))[..., None, :]
    video = 2 * square[:, :, None].float().expand(-1, -1, 3, -1, -1)
    return video + 0.3 * torch.randn(video.shape, generator=random), labels


def train(model: nn.Module, make: Any, given: argparse.Namespace, seed: int) -> list[float]:
    """The mean loss of each twenty steps."""
    random, losses = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.05)
    model.train()
    for _ in range(given.steps):
        inputs, labels = make(given.batch_size, random)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [round(sum(part) / len(part), 4) for part in (losses[i : i + 20] for i in range(0, given.steps, 20))]


def similarity_along_axes(model: nn.Module) -> list[list[float]]:
    """For each axis of the grid and each layer: mean cosine similarity of patches one step apart along it."""
    grid, maps_Lnn = lape.grid(model), lape.correlation(model)
    place = torch.cartesian_prod(*map(torch.arange, grid))
    apart = (place[:, None] - place[None]).abs()
    found = []
    for axis in range(len(grid)):
        others = apart.sum(-1) - apart[..., axis]
        pairs = (apart[..., axis] == 1) & (others == 0)
        found.append(maps_Lnn[:, pairs].mean(1).tolist())
    return found


if __name__ == "__main__":
    main()
