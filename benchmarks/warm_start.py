"""Fine-tuning a pretrained model three ways with the same budget: unconverted, LaPE with a warm start, LaPE cold.

    python benchmarks/warm_start.py                    # the packaged digits, 3 seeds; some 3 minutes on two cores
    python benchmarks/warm_start.py --cifar FOLDER     # CIFAR-10 as FOLDER/train/<class>/*, FOLDER/val/<class>/*

Each seed pretrains a small Vision Transformer whose table is added to its input (join basic), then fine-tunes it three
times on the same images with the same recipe; only join and `--warm-start` differ. `before` is the accuracy of the
model that fine-tuning begins with: a warm start has that of the pretrained one, by construction. Accuracies are those
after the last epoch, none is chosen on the test images. Writes benchmarks/results/warm_start_<data>_cpu<cores>.json,
from which `benchmarks/tables.py` writes the table in docs/converting.md. `gates` in it are those at the end: they open
at the pace of the learning rate, so that in a short fine-tuning a warm start stays close to the unconverted model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gallery import cifar_recipe, subset

import lape
from lape.data.loaders import eval_loader
from lape.data.open import load_data
from lape.recipe import Recipe
from lape.study.numbers import mean_std
from lape.train.evaluate import evaluate
from lape.train.loop import train
from lape.train.machine import environment
from lape.train.start import build_model
from lape.train.state import CHECKPOINT

ROOT = Path(__file__).parents[1]
WAYS: dict[str, dict[str, Any]] = {
    "unconverted": {"join_type": "basic"},
    "LaPE, warm start": {"join_type": "LaPE", "warm_start": True},
    "LaPE, cold": {"join_type": "LaPE"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10 images, instead of the digits")
    parser.add_argument("--train-images", type=int, default=250, help="of each class of CIFAR-10")
    parser.add_argument("--val-images", type=int, default=100, help="of each class of CIFAR-10")
    parser.add_argument("--runs", type=Path, default=Path("runs/warm_start"), help="where the trainings go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-epochs", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=20, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=1e-3, help="of fine-tuning")
    parser.add_argument("--workers", type=int, default=2, help="seeds side by side, one thread each")
    parser.add_argument("--output", type=Path, help="the file to write (default: in benchmarks/results)")
    given = parser.parse_args()

    data, name, recipe = "packaged digits", "digits", Recipe.from_yaml("digits", threads=1, device="cpu")
    if given.cifar:
        folder = subset(given.cifar, given.runs / "cifar-images", given.train_images, given.val_images)
        data = f"CIFAR-10, {given.train_images} + {given.val_images} images of each class"
        name, recipe = "cifar10", cifar_recipe(folder, given.pretrain_epochs).replace(threads=1, device="cpu")
    recipe = recipe.replace(join_type="basic", epochs=given.pretrain_epochs)
    short = {"epochs": given.epochs, "lr": given.lr, "warmup_epochs": min(1, given.epochs - 1)}
    began = time.monotonic()
    jobs = [(recipe.replace(seed=seed), short, given.runs / f"{name}-{seed}") for seed in range(given.seeds)]
    with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn")) as pool:
        seeds = list(pool.map(one_seed, jobs))
    found = {
        "what": "top-1 of the test images after fine-tuning, percent; the same pretrained model and budget for all",
        "data": data,
        "config": {
            "pretraining": recipe.model_dump(mode="json", exclude_unset=True),
            "fine_tuning": short,
            "ways": WAYS,
            "seeds": list(range(given.seeds)),
        },
        "pretrained": {"each": [s["pretrained"] for s in seeds], **mean_std([s["pretrained"] for s in seeds])},
        "ways": {way: summary([s[way] for s in seeds], [s["unconverted"] for s in seeds]) for way in WAYS},
        "seconds": round(time.monotonic() - began, 1),
        **environment(),
    }
    found["config"]["pretraining"].pop("data_path", None)  # a place on one machine
    output = given.output or ROOT / "benchmarks" / "results" / f"warm_start_{name}_cpu{found['hardware']['cores']}.json"
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{output}: {found['seconds']} s")
    for way, values in found["ways"].items():
        print(f"{way:18} before {values['before']['mean']:5.1f}  after {values['after']['mean']:5.1f}")


def one_seed(job: tuple[Recipe, dict[str, Any], Path]) -> dict[str, Any]:
    """Pretrains, then fine-tunes each way."""
    recipe, short, folder = job
    pretrained = folder / "pretrained" / CHECKPOINT
    done = train(recipe.replace(output_dir=str(pretrained.parent), resume="auto"), say=quiet)
    found: dict[str, Any] = {"pretrained": done.accuracy}
    for way, changes in WAYS.items():
        tuned = recipe.replace(**short, **changes, finetune=str(pretrained))
        before = accuracy(tuned)
        result = train(tuned, say=quiet)
        found[way] = {"before": before, "after": [line["test_acc1"] for line in result.history]}
        found[way]["gates"] = [
            p.item() for n, p in lape.to_reference_state_dict(result.model).items() if n.endswith("pe_gate")
        ]
        print(f"seed {recipe.seed}: {way}: {before:.1f} -> {result.accuracy:.1f} %", flush=True)
    return found


def accuracy(recipe: Recipe) -> float:
    """Of the model that fine-tuning begins with."""
    data = load_data(recipe, train=False)
    model = build_model(recipe, len(data.classes), quiet)
    return evaluate(model, eval_loader(data.val, recipe), torch.device("cpu")).acc1


def summary(seeds: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over the seeds of one way: before, by epoch, after, and after less the unconverted one's."""
    after, gaps = [s["after"][-1] for s in seeds], []
    for s, other in zip(seeds, baseline, strict=True):
        gaps.append(s["after"][-1] - other["after"][-1])
    return {
        "before": mean_std([s["before"] for s in seeds]),
        "by_epoch": [mean_std(values) for values in zip(*(s["after"] for s in seeds), strict=True)],
        "after": {**mean_std(after), "each": after},
        "gap": {**mean_std(gaps), "each": gaps},
        "gates": [s["gates"] for s in seeds],
    }


def quiet(_text: str) -> None:
    pass


if __name__ == "__main__":
    main()
