"""Segmentation with LaPE: UperNet (transformers) on a DINOv2 backbone, converted by one line, beside the plain one.

    python examples/segmentation.py                                    # scenes of digits, a tiny backbone, on a CPU
    python examples/segmentation.py --size 56 84 --pretrained FOLDER   # DINOv2 weights in a folder on this machine

Both joins see the same scenes in the same order with the same seed, and start from the same weights. Prints and writes
loss, mean intersection over union (of the classes, background left out) and pixel accuracy on scenes that were not
trained on. One seed tells little; --seeds 3 tells more. Needs pip install 'lape[huggingface]'.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scenes import CLASSES, Scene, scenes
from torch import Tensor, nn

import lape
from lape.errors import LapeError
from lape.study.numbers import mean_std
from lape.train.machine import environment

WEIGHTS = torch.tensor([0.2] + [1.0] * 10)  # of the classes in the loss: most pixels are background


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    given = parse(arguments)
    size = (given.size[0], given.size[1])
    data = [scenes(split, count, size) for split, count in zip(("train", "val"), given.scenes, strict=True)]
    runs: dict[str, list[dict[str, Any]]] = {join: [] for join in given.joins}
    for seed in range(given.seeds):
        for join in given.joins:
            run = train(given, join, seed, *data)
            runs[join].append(run)
            print(
                f"seed {seed}, {join}: loss {run['loss'][0]:.3f} -> {run['loss'][-1]:.3f}, mIoU {run['miou']:.1f} %, "
                f"pixels {run['pixel_accuracy']:.1f} %, {run['seconds']:.0f} s",
                flush=True,
            )
    found = {
        "task": "segmentation",
        "data": f"{given.scenes[0]} + {given.scenes[1]} scenes of handwritten digits, {size[0]} x {size[1]} pixels",
        "config": {name: str(v) if isinstance(v, Path) else v for name, v in vars(given).items() if name != "output"},
        "joins": {join: {"miou": mean_std([r["miou"] for r in each]), "runs": each} for join, each in runs.items()},
        **environment(),
    }
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {given.output}")
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--joins", nargs="+", default=["basic", "LaPE"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=[48, 48], help="height and width of a scene, pixels")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4], help="whose feature maps the head reads")
    parser.add_argument("--width", type=int, default=96, help="of the backbone that starts from scratch")
    parser.add_argument("--pretrained", type=Path, help="folder of DINOv2 weights, as transformers saves them")
    parser.add_argument("--scenes", type=int, nargs=2, default=[512, 64], help="for training, for validation")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("segmentation.json"))
    return parser.parse_args(arguments)


def build(given: argparse.Namespace, join: str) -> nn.Module:
    """UperNet whose backbone, found by lape inside the whole model, is converted."""
    import transformers

    stages = [f"stage{layer}" for layer in given.layers]
    if given.pretrained is None:
        config = transformers.Dinov2Config(
            image_size=min(given.size),
            patch_size=4,
            hidden_size=given.width,
            num_hidden_layers=max(given.layers),
            num_attention_heads=max(1, given.width // 32),
            out_features=stages,
        )
    elif given.pretrained.is_dir():
        config = transformers.Dinov2Config.from_pretrained(given.pretrained, out_features=stages)
    else:
        raise LapeError(f"there is no folder {given.pretrained}: --pretrained names one on this machine")
    upernet = transformers.UperNetConfig(
        backbone_config=config, hidden_size=64, use_auxiliary_head=False, num_labels=len(CLASSES)
    )
    model = transformers.UperNetForSemanticSegmentation(upernet)
    if given.pretrained is not None:
        backbone = transformers.Dinov2Backbone.from_pretrained(given.pretrained, out_features=stages)
        model.backbone.load_state_dict(backbone.state_dict())
    return lape.apply_(model, join)


def train(
    given: argparse.Namespace, join: str, seed: int, training: list[Scene], validation: list[Scene]
) -> dict[str, Any]:
    """One run; returns its losses, step by step, and what it reached on the validation scenes."""
    torch.manual_seed(seed)
    model = build(given, join).train()
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "pos" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim <= 1 or "pos" in name]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    order = torch.Generator().manual_seed(seed)
    began, losses = time.monotonic(), []
    for step in range(given.steps):
        for group in optimizer.param_groups:  # up for a tenth of the steps, down to zero over the others
            group["lr"] = given.lr * min(1, 10 * (step + 1) / given.steps, (given.steps - step) / given.steps / 0.9)
        chosen = torch.randint(len(training), (given.batch_size,), generator=order).tolist()
        pixels_B3HW, mask_BHW = batch([training[i] for i in chosen])
        loss = F.cross_entropy(model(pixels_B3HW).logits, mask_BHW, WEIGHTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"seed": seed, "loss": losses, **measure(model, validation), "seconds": time.monotonic() - began}


def batch(chosen: list[Scene]) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) normalised pixels and (B, H, W) classes."""
    return torch.stack([s.pixels_3HW for s in chosen]).sub(0.5).div(0.5), torch.stack([s.mask_HW for s in chosen])


@torch.no_grad()
def measure(model: nn.Module, validation: list[Scene]) -> dict[str, Any]:
    """Intersection over union of each class over all pixels, in percent; its mean leaves the background out."""
    model.eval()
    confusion = torch.zeros(len(CLASSES), len(CLASSES))
    for first in range(0, len(validation), 16):
        pixels_B3HW, mask_BHW = batch(validation[first : first + 16])
        guess_BHW = model(pixels_B3HW).logits.argmax(1)
        pairs = mask_BHW.flatten() * len(CLASSES) + guess_BHW.flatten()
        confusion += pairs.bincount(minlength=len(CLASSES) ** 2).view_as(confusion)
    hit = confusion.diag()
    union = confusion.sum(0) + confusion.sum(1) - hit
    iou = 100 * hit / union.clamp(min=1)
    present = confusion.sum(1)[1:] > 0
    return {
        "miou": iou[1:][present].mean().item(),
        "pixel_accuracy": (100 * hit.sum() / confusion.sum()).item(),
        "iou": dict(zip(CLASSES, iou.tolist(), strict=True)),
    }


if __name__ == "__main__":
    main()
