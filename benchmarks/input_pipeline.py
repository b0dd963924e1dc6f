"""Images a second and core of the training and evaluation pipelines, beside the plain one, on whole photographs.

    python benchmarks/input_pipeline.py --data FOLDER [--rounds 30] [--images 64] [--agreement]

FOLDER holds <class>/*.JPEG. Plain is what everybody writes: torchvision's ImageFolder, its Pillow loader, DeiT's
transform (timm's; the resize to 256 and crop to 224 in evaluation), default_collate. Beside it `--decode exact` and
`--decode fast` as the training loop gets them, the latter twice: 8-bit batches as they leave a loader process for the
device, and finished there, the device being the same processor core.

Each round runs every variant once, in turn, on the same images, with the same seeds; ratios are taken within a round.
Time is that of the processor (`time.process_time`), one thread: what else runs on the machine shifts it little.
`--agreement` trains a small ViT on the photographs and compares what it says of exact and fast images.
Written: benchmarks/results/input_pipeline_cpu<cores>.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import PIL
import timm
import torch
import torchvision
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder

import lape
from lape.data.augment import eval_transform, train_transform
from lape.data.fast import read_levels
from lape.data.images import load_image
from lape.data.loaders import Samples, _collate, eval_loader
from lape.data.open import Data, load_data
from lape.recipe import Recipe
from lape.train.evaluate import evaluate
from lape.train.loop import train

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
AIMS = {"train": 1.45, "eval": 2.3}
Variant = Callable[[list[int]], torch.Tensor]


def variants(root: Path) -> dict[str, dict[str, Variant]]:
    """The pipelines by kind, the plain one first: a function from indices to a batch each."""
    kinds: dict[str, dict[str, Variant]] = {}
    for kind in ("train", "eval"):
        recipe = Recipe(data_path=str(root), eval_crop_ratio=0.875, batch_size=2, device="cpu")
        plain = ImageFolder(str(root / "val"))
        plain.transform = train_transform(recipe) if kind == "train" else eval_transform(recipe).build()
        data = {decode: load_data(recipe.replace(decode=decode), train=kind == "train") for decode in ("exact", "fast")}
        exact, fast = (Samples(_of(one, kind), (0, 0) if kind == "train" else None) for one in data.values())

        def run_plain(indices: list[int], plain: ImageFolder = plain) -> torch.Tensor:
            return default_collate([plain[index] for index in indices])[0]

        def run_exact(indices: list[int], exact: Samples = exact) -> torch.Tensor:
            return _collate(exact.__getitems__([(index, 0) for index in indices]))[0]

        def run_bytes(indices: list[int], fast: Samples = fast) -> torch.Tensor:
            return _collate(fast.__getitems__([(index, 0) for index in indices]))[0][0]

        def run_fast(indices: list[int], fast: Samples = fast) -> torch.Tensor:
            (levels, patches), _ = _collate(fast.__getitems__([(index, 0) for index in indices]))
            return fast.dataset.finish(levels, patches, CPU)

        kinds[kind] = {"plain": run_plain, "exact": run_exact, "fast, 8 bit": run_bytes, "fast, finished": run_fast}
    paths = [path for path, _ in ImageFolder(str(root / "val")).samples]

    def decode_pillow(indices: list[int]) -> None:
        for index in indices:
            load_image(paths[index])

    def decode_torchvision(indices: list[int]) -> None:
        for index in indices:
            read_levels(paths[index], 3, load_image)

    kinds["decoding"] = {"plain": decode_pillow, "fast": decode_torchvision}
    return kinds


def _of(data: Data, kind: str) -> torch.utils.data.Dataset:
    return data.train if kind == "train" else data.val


def measure(runs: dict[str, Variant], n: int, rounds: int, images: int) -> dict[str, dict]:
    """Milliseconds an image of each, and its speed as a multiple of the plain one's: median and quartiles."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(-1, rounds):  # the first warms up
        indices = [(number * images + i) % n for i in range(images)]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            random.seed(number)
            np.random.seed(number % 2**32)
            torch.manual_seed(number)
            start = time.process_time()
            runs[name](indices)
            if number >= 0:
                spent[name].append((time.process_time() - start) / images)
    rows = {}
    for name in names:
        ratios = [plain / mine for plain, mine in zip(spent["plain"], spent[name], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        seconds = statistics.median(spent[name])
        rows[name] = {
            "cpu_ms_an_image": 1e3 * seconds,
            "images_a_second_and_core": 1 / seconds,
            "speed_median": statistics.median(ratios),
            "speed_quartiles": [low, high],
        }
    return rows


def agreement(root: Path, epochs: int) -> dict:
    """What a small ViT that was trained on the photographs says of them, read exactly and fast."""
    recipe = Recipe(
        data_path=str(root),
        model="vit_tiny_patch16_224",
        model_kwargs={"embed_dim": 96, "depth": 3, "num_heads": 3},
        join_type="LaPE",
        epochs=epochs,
        batch_size=20,
        lr=1e-3,
        unscale_lr=True,
        warmup_epochs=1,
        drop_path=0.0,
        model_ema=False,
        repeated_aug=False,
        aa="none",
        color_jitter=0.0,
        reprob=0.0,
        mixup=0.0,
        cutmix=0.0,
        smoothing=0.0,
        eval_crop_ratio=0.875,
        device="cpu",
        threads=1,
        num_workers=0,
    )
    model = train(recipe, say=lambda _: None).model.eval()
    logits, metrics = [], []
    for decode in ("exact", "fast"):
        chosen = recipe.replace(decode=decode)
        data = load_data(chosen, train=False)
        with torch.no_grad():
            logits.append(torch.cat([model(images) for images, _ in eval_loader(data.val, chosen)]))
        metrics.append(evaluate(model, eval_loader(data.val, chosen), CPU))
    exact, fast = logits
    top = exact.topk(2).values
    return {
        "model": "ViT of 3 blocks, width 96, trained on these photographs",
        "epochs": epochs,
        "images": len(exact),
        "top1_agree": int((exact.argmax(1) == fast.argmax(1)).sum()),
        "top1_exact": metrics[0].acc1,
        "top1_fast": metrics[1].acc1,
        "loss_exact": metrics[0].loss,
        "loss_fast": metrics[1].loss,
        "largest_logit_difference": (exact - fast).abs().max().item(),
        "mean_logit_difference": (exact - fast).abs().mean().item(),
        "median_distance_of_best_two_logits": (top[:, 0] - top[:, 1]).median().item(),
    }


def distance(root: Path) -> dict:
    """How far fast evaluation pixels are from exact ones, in levels of 255."""
    recipe = Recipe(data_path=str(root), eval_crop_ratio=0.875, mean=(0.0,) * 3, std=(1.0,) * 3)
    exact, fast = (load_data(recipe.replace(decode=decode), train=False).val for decode in ("exact", "fast"))
    apart = [((a - b).abs() * 255).round() for (a, _), (b, _) in zip(exact, fast, strict=True)]
    square = statistics.mean(one.square().mean().item() for one in apart)
    return {
        "most_levels": max(one.max().item() for one in apart),
        "mean_levels": statistics.mean(one.mean().item() for one in apart),
        "part_of_pixels_that_differ": statistics.mean((one > 0).float().mean().item() for one in apart),
        "psnr_db": 10 * float(np.log10(255**2 / square)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--agreement", action="store_true")
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for split in ("train", "val"):
            (root / split).symlink_to(Path(arguments.data).resolve())
        n = len(ImageFolder(str(root / "val")))
        load = os.getloadavg()
        kinds = {
            kind: measure(runs, n, arguments.rounds, min(arguments.images, n)) for kind, runs in variants(root).items()
        }
        result = {
            "speed": kinds,
            "aims": AIMS,
            "distance": distance(root),
            "agreement": agreement(root, arguments.epochs) if arguments.agreement else None,
        }
    result["config"] = {"images": n, "batch": arguments.images, "rounds": arguments.rounds, "input_size": 224}
    result["machine"] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_before": load,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "lape": lape.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"input_pipeline_cpu{os.cpu_count()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for kind, rows in kinds.items():
        for name, row in rows.items():
            low, high = row["speed_quartiles"]
            print(
                f"{kind:9} {name:15} {row['cpu_ms_an_image']:6.3f} ms {row['images_a_second_and_core']:6.0f} images/s "
                f"x {row['speed_median']:.3f} [{low:.3f}, {high:.3f}]"
            )
    print(json.dumps({name: result[name] for name in ("distance", "agreement")}, indent=1))
    for kind, aim in AIMS.items():
        reached = kinds[kind]["fast, 8 bit"]["speed_median"]
        print(f"{kind}: {reached:.2f} of the plain pipeline, aim {aim}: {'reached' if reached >= aim else 'MISSED'}")
    if any(kinds[kind]["fast, 8 bit"]["speed_median"] < aim for kind, aim in AIMS.items()):
        sys.exit(1)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
