"""Table 2 of the paper again: ViT-Lite, CVT and CCT on CIFAR-10, joins side by side by `lape compare`.

    python benchmarks/cifar_matrix.py --cifar FOLDER           # small published sizes, some images, two CPU cores
    python benchmarks/cifar_matrix.py --cifar FOLDER --full    # the paper's models, all images, 310 epochs: a GPU

FOLDER holds CIFAR-10 as train/<class>/* and val/<class>/*. A run that was killed goes on by the same command. Writes
`results/cifar10_matrix_<size>_<hardware>.json`: accuracies by seed, differences to `basic` with a paired test, and the
ranking of the joins over all models.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gallery import subset

from lape.recipe import Recipe
from lape.study.compare import compare
from lape.study.numbers import mean_std, paired_t

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
JOINS = ("basic", "share", "LaPE-sharing", "LaPE", "MPVG")
SMALL = ("vit_lite_4_4_32", "cvt_4_4_32", "cct_4_3x2_32")
PAPER = ("vit_lite_7_4_32", "cvt_7_4_32", "cct_7_3x1_32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder of CIFAR-10 images")
    parser.add_argument("--images", type=Path, help="the part of it that is used, where it is there already")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar_matrix"), help="where the trainings go")
    parser.add_argument("--full", action="store_true", help="the paper's models, all images, 310 epochs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10, help="of the small size")
    parser.add_argument("--train-images", type=int, default=500, help="of each class, small size")
    parser.add_argument("--val-images", type=int, default=200, help="of each class, small size")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()

    if given.full:
        recipe = Recipe.from_yaml(ROOT / "recipes" / "vit_lite_cifar10.yaml", data_path=str(given.cifar))
        recipe, models, what = recipe.replace(data_on_device=True), PAPER, "full"
    else:
        images = given.images or subset(given.cifar, given.runs / "images", given.train_images, given.val_images)
        recipe = Recipe.from_yaml(
            ROOT / "recipes" / "cifar10_matrix_cpu.yaml",
            data_path=str(images),
            epochs=given.epochs,
            warmup_epochs=min(2, given.epochs - 1),
            amp="bf16",
        )
        models, what = SMALL, "small"
    found = compare(recipe, given.runs, joins=JOINS, models=models, seeds=given.seeds, workers=given.workers).results
    RESULTS.mkdir(exist_ok=True)
    where = f"cuda_{found['gpus'][0]}" if found["gpus"] else f"cpu{found['hardware']['cores']}"
    path = RESULTS / f"cifar10_matrix_{what}_{where.replace(' ', '-')}.json"
    flags = f"--seeds {' '.join(map(str, given.seeds))}" + (" --full" if given.full else f" --epochs {given.epochs}")
    path.write_text(
        json.dumps(kept(found, f"python benchmarks/cifar_matrix.py --cifar FOLDER {flags}"), indent=1) + "\n"
    )
    print(path)


def kept(found: dict[str, Any], command: str) -> dict[str, Any]:
    """What a result file holds: no path of a machine, and of each training its accuracies and its time."""
    recipe = {name: value for name, value in found["recipe"].items() if name != "data_path"}
    cells = [{key: c[key] for key in ("model", "join", "seed", "accuracy", "best", "seconds")} for c in found["cells"]]
    about = {key: found[key] for key in ("baseline", "workers", "gpus", "versions", "hardware", "commit")}
    data = "CIFAR-10 as JPEG files, quality about 75 (" + found["data"].partition(" (")[2]
    counts = {"command": command, "data": data, "recipe": recipe, "variants": found["variants"]}
    return {**counts, "ranking": ranking(cells), "sentences": found["sentences"], "cells": cells, **about}


def ranking(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each join over all (model, seed) that it was trained for: its rank among the joins there, its gap to basic."""
    score = {(c["model"], c["seed"], c["join"]): c["accuracy"] for c in cells}
    pairs = sorted({(c["model"], c["seed"]) for c in cells})
    entries = []
    for join in dict.fromkeys(c["join"] for c in cells):
        mine = [pair for pair in pairs if (*pair, join) in score and (*pair, "basic") in score]
        gaps = [score[*pair, join] - score[*pair, "basic"] for pair in mine]
        ranks = [1 + sum(score.get((*pair, other), -1.0) > score[*pair, join] for other in JOINS) for pair in mine]
        entry: dict[str, Any] = {"join": join, "pairs": len(mine), "mean_rank": statistics.fmean(ranks)}
        entry |= {"first": ranks.count(1), "difference": None if join == "basic" else mean_std(gaps) | paired_t(gaps)}
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry["mean_rank"])


if __name__ == "__main__":
    main()
