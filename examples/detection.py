"""Detection with LaPE: Faster R-CNN (torchvision) on a timm Vision Transformer, converted, beside a plain one.

    python examples/detection.py                                     # scenes of digits, a tiny backbone, on a CPU
    python examples/detection.py --size 96 128 --pretrained FILE     # weights of --model in a file on this machine

The backbone gives one map at the stride of its patches, `forward_intermediates` at the chosen layers for any height and
width; a simple feature pyramid (ViTDet: Li et al., 2022) makes a finer and a coarser one of it. Both joins see the same
scenes in the same order with the same seed and start from the same weights. Prints and writes loss, average precision
at an intersection over union of 0.5 (mean over classes) and the share of boxes that were found, on scenes that were
not trained on. One seed tells little; --seeds 3 tells more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import timm
import torch
from scenes import CLASSES, Scene, scenes
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou

import lape
from lape.errors import LapeError
from lape.study.numbers import mean_std
from lape.train.machine import environment


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
                f"seed {seed}, {join}: loss {run['loss'][0]:.3f} -> {run['loss'][-1]:.3f}, AP50 {run['ap50']:.1f} %, "
                f"found {run['recall50']:.1f} %, {run['seconds']:.0f} s",
                flush=True,
            )
    found = {
        "task": "detection",
        "data": f"{given.scenes[0]} + {given.scenes[1]} scenes of handwritten digits, {size[0]} x {size[1]} pixels",
        "config": {name: str(v) if isinstance(v, Path) else v for name, v in vars(given).items() if name != "output"},
        "joins": {
            join: {
                "ap50": mean_std([r["ap50"] for r in each]),
                "recall50": mean_std([r["recall50"] for r in each]),
                "runs": each,
            }
            for join, each in runs.items()
        },
        **environment(),
    }
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {given.output}")
    return found


class Backbone(nn.Module):
    """A converted timm Vision Transformer as a feature pyramid of three maps: half, one and two strides of a patch."""

    out_channels = 64

    def __init__(self, vit: nn.Module, layers: list[int]):
        super().__init__()
        depth = len(vit.blocks)
        self.vit, self.layers = vit, [layer % depth for layer in layers]
        width, channels = vit.embed_dim, self.out_channels
        self.same = nn.Sequential(nn.Conv2d(width, channels, 1), nn.GroupNorm(1, channels))
        self.finer = nn.Sequential(nn.ConvTranspose2d(width, channels, 2, stride=2), nn.GroupNorm(1, channels))
        self.coarser = nn.MaxPool2d(2)

    def forward(self, pixels_B3HW: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.vit.forward_intermediates(pixels_B3HW, indices=self.layers, norm=True, intermediates_only=True)
        map_BDhw = torch.stack(maps).sum(0)
        same = self.same(map_BDhw)
        return OrderedDict([("fine", self.finer(map_BDhw)), ("same", same), ("coarse", self.coarser(same))])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--joins", nargs="+", default=["basic", "LaPE"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=2, default=[64, 64], help="height and width of a scene, pixels")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm name of the backbone")
    parser.add_argument("--layers", type=int, nargs="+", default=[-2, -1], help="whose feature maps are read, added up")
    parser.add_argument("--pretrained", type=Path, help="file with weights of --model, for its own width and depth")
    parser.add_argument("--scenes", type=int, nargs=2, default=[512, 64], help="for training, for validation")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("detection.json"))
    return parser.parse_args(arguments)


def build(given: argparse.Namespace, join: str) -> FasterRCNN:
    """Faster R-CNN whose backbone takes any multiple of the patch and is converted."""
    settings: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True, "global_pool": ""}
    if given.pretrained is None:  # a small one, from scratch
        settings |= {"img_size": tuple(given.size), "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
    elif given.pretrained.is_file():
        settings |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(given.pretrained)}}
    else:
        raise LapeError(f"there is no file {given.pretrained}: --pretrained names one on this machine")
    vit = lape.apply_(timm.create_model(given.model, **settings), join)
    small = min(given.size)
    names = ["fine", "same", "coarse"]
    return FasterRCNN(
        Backbone(vit, given.layers),
        num_classes=len(CLASSES),
        min_size=small,
        max_size=max(given.size),
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        rpn_anchor_generator=AnchorGenerator(
            sizes=((small // 6,), (small // 4,), (small // 2,)), aspect_ratios=((0.5, 0.8, 1.2),) * 3
        ),
        box_roi_pool=MultiScaleRoIAlign(names, output_size=5, sampling_ratio=2),
        rpn_pre_nms_top_n_train=300,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=64,
        box_detections_per_img=20,
    )


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
        chosen = [training[i] for i in torch.randint(len(training), (given.batch_size,), generator=order).tolist()]
        targets = [{"boxes": scene.boxes_k4, "labels": scene.labels_k} for scene in chosen]
        loss = torch.stack(list(model([scene.pixels_3HW for scene in chosen], targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return {"seed": seed, "loss": losses, **measure(model, validation), "seconds": time.monotonic() - began}


@torch.no_grad()
def measure(model: nn.Module, validation: list[Scene]) -> dict[str, Any]:
    """AP50 and recall in percent. A detection is right when its class is and its IoU with an object, which no better
    detection has taken, is at least 0.5."""
    model.eval()
    outcomes: dict[int, list[tuple[float, bool]]] = {label: [] for label in range(1, len(CLASSES))}
    objects = dict.fromkeys(outcomes, 0)
    for first in range(0, len(validation), 16):
        chosen = validation[first : first + 16]
        for scene, found in zip(chosen, model([scene.pixels_3HW for scene in chosen]), strict=True):
            iou = box_iou(found["boxes"], scene.boxes_k4)
            taken: set[int] = set()
            for label in scene.labels_k.tolist():
                objects[label] += 1
            for i in found["scores"].argsort(descending=True).tolist():
                label = int(found["labels"][i])
                fits = [(iou[i, k].item(), k) for k in (scene.labels_k == label).nonzero()[:, 0].tolist()]
                best = max((fit for fit in fits if fit[1] not in taken), default=(0.0, -1))
                right = best[0] >= 0.5
                taken |= {best[1]} if right else set()
                outcomes[label].append((found["scores"][i].item(), right))
    there = [label for label, count in objects.items() if count]
    precisions = [average_precision(outcomes[label], objects[label]) for label in there]
    hits = sum(right for label in there for _, right in outcomes[label])
    return {
        "ap50": 100 * sum(precisions) / len(precisions),
        "recall50": 100 * hits / sum(objects.values()),
        "objects": sum(objects.values()),
    }


def average_precision(outcomes: list[tuple[float, bool]], objects: int) -> float:
    """The area under precision over recall, precision made monotonous, of (score, right) detections."""
    if not outcomes:
        return 0.0
    right = torch.tensor([r for _, r in sorted(outcomes, key=lambda one: -one[0])], dtype=torch.float64)
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    best_from_here = precision.flip(0).cummax(0).values.flip(0)
    return (best_from_here * right).sum().item() / objects


if __name__ == "__main__":
    main()
