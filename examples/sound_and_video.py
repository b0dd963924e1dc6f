"""Positions on a spectrogram and in a video: AST and ViViT of transformers, tiny, on data that is made here.

    python examples/sound_and_video.py sound      # tones that rise or fall: where in time and pitch they lie is all
    python examples/sound_and_video.py video      # a dot that moves to one of four sides

Both joins see the same data with the same seed. Prints and writes the accuracy on data that was not trained on, and how
the positions of a layer resemble each other along each axis of the grid: mean cosine similarity of patches that are one
step apart in frequency and time, or in frames, rows and columns. Needs pip install 'lape[huggingface]'.
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
from lape.study.numbers import mean_std
from lape.train.machine import environment

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
AXES = {"sound": ("frequency", "time"), "video": ("frames", "rows", "columns")}
CLASSES = {"sound": 4, "video": 4}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(AXES))
    parser.add_argument("--joins", nargs="+", default=["basic", "LaPE"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("sound_and_video.json"))
    given = parser.parse_args(arguments)
    make, build = {"sound": (sounds, ast), "video": (videos, vivit)}[given.task]
    runs: dict[str, list[dict[str, Any]]] = {join: [] for join in given.joins}
    for seed in range(given.seeds):
        for join in given.joins:
            torch.manual_seed(seed)
            model = lape.apply_(build(), join)
            loss = train(model, make, given, seed)
            inputs, labels = make(256, torch.Generator().manual_seed(10_000 + seed))
            with torch.no_grad():
                right = model.eval()(inputs).logits.argmax(1) == labels
            alike = similarity_along_axes(model)
            runs[join].append({"accuracy": 100 * right.float().mean().item(), "loss": loss, "alike": alike})
            last = ", ".join(f"{axis} {each[-1]:+.2f}" for axis, each in zip(AXES[given.task], alike, strict=True))
            print(f"seed {seed}, {join}: {runs[join][-1]['accuracy']:.1f} %; neighbours in the last layer: {last}")
    found = {
        "task": given.task,
        "grid": list(lape.grid(model)),
        "joins": {j: {"accuracy": mean_std([r["accuracy"] for r in each]), "runs": each} for j, each in runs.items()},
        **environment(),
    }
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {given.output}")
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
    """The loss of each step."""
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
    return losses


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
