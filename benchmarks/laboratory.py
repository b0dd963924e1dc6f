"""What position does in a model: every rival under one recipe, at other sizes, and in the features.

    python benchmarks/laboratory.py digits                   # 20 epochs: 14 rows, a training takes 20 s of one core
    python benchmarks/laboratory.py cifar --cifar FOLDER     # 5,000 images, 50 epochs: 8 minutes of one core
    python benchmarks/laboratory.py cost --cifar FOLDER      # a sweep of 6 sizes on 2,000 images, DeiT-Ti up to 96 px

FOLDER holds CIFAR-10 as train/<class>/* and val/<class>/*. A study trains the preset `rivals` with each of `--seeds`,
evaluates each model at other sizes, probes those of the first seed, and writes results/laboratory_<study>.json, from
which docs/laboratory.md has its tables. What was killed goes on by the same command; `--finished` trains nothing and
reports on the rows that the first seed has, and again on those that have all of `--seeds`, wherever they were trained.
`--trainings` ends behind the trainings: where a GPU trains, and something else measures.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gallery import subset
from worth import is_done

import lape
from lape.recipe import Recipe
from lape.study.compare import RIVAL_POSITIONS, compare
from lape.study.numbers import Run, Variant, difference, holm
from lape.study.options import CompareOptions
from lape.train.machine import environment

RESULTS = Path(__file__).parent / "results"
SIZES = {"digits": ("6", "10", "12", "16", "8x12"), "cifar": ("24", "40", "48", "64", "32x48")}
PROBED = 256
COST_SIZES = ("32", "48", "64", "64x96", "80", "96")


def recipe_of(study: str, images: Path | None) -> Recipe:
    if study == "digits":
        return Recipe.from_yaml("digits", threads=1, num_workers=0, device="cpu")
    small = {"patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 4}
    recipe = Recipe.from_yaml("cifar10_matrix_cpu", data_path=str(images), device="auto", data_on_device=True)
    return recipe.replace(epochs=50, warmup_epochs=5, model="vit_tiny_patch16_224", amp="bf16", model_kwargs=small)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("digits", "cifar", "cost"))
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10 images")
    parser.add_argument("--runs", type=Path, default=Path("runs/laboratory"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--finished", action="store_true", help="train nothing, report on what is done")
    parser.add_argument("--trainings", action="store_true", help="only train")
    parser.add_argument("--trained-on", help="the machine of the trainings, where it is not this one")
    given = parser.parse_args()
    images = None
    if given.study != "digits":
        if given.cifar is None:
            raise SystemExit("--cifar FOLDER is needed: CIFAR-10 as train/<class>/* and val/<class>/*")
        images = given.runs / "images"
        images = images if images.exists() else subset(given.cifar, images, 500, 200)
    found = cost(images, given.runs) if given.study == "cost" else study(given, recipe_of(given.study, images))
    path = RESULTS / f"laboratory_{given.study}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(path)


def study(given: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    folder, every = given.runs / given.study, [Variant(recipe.model, *row) for row in RIVAL_POSITIONS]
    if given.trainings:
        asked = {"seeds": tuple(given.seeds), "workers": given.workers}
        raise SystemExit(not compare(recipe, CompareOptions(output_dir=str(folder), **asked), every).files)
    grids = [(every, given.seeds)]
    if given.finished:
        seeds_of = {
            row: [seed for seed in given.seeds if is_done(folder, row.recipe(recipe).replace(seed=seed))]
            for row in every
        }
        whole = [row for row in every if seeds_of[row] == given.seeds]
        first = [row for row in every if given.seeds[0] in seeds_of[row]]
        grids = [(rows, seeds) for rows, seeds in ((whole, given.seeds), (first, given.seeds[:1])) if rows]
        grids = grids[:1] if whole == first else grids
    folder_flag = " --cifar FOLDER" if recipe.data_path else ""
    return {
        "made_by": f"python benchmarks/laboratory.py {given.study}{folder_flag}",
        "trained_on": given.trained_on,
        "parts": [part(folder, recipe, rows, seeds, given.workers) for rows, seeds in grids],
    }


def part(folder: Path, recipe: Recipe, rows: list[Variant], seeds: list[int], workers: int) -> dict[str, Any]:
    """Of rows that all have these seeds."""
    asked = {"seeds": tuple(seeds), "workers": workers, "sizes": SIZES[folder.name], "probe": PROBED}
    found = compare(recipe, CompareOptions(output_dir=str(folder), **asked), rows).results
    runs = [Run(**cell) for cell in found["cells"]]
    ours = Variant(recipe.model, "learnable", "LaPE")
    leads = {f"{row.label}, {row.pe}": difference(runs, ours, row, recipe.epochs) for row in rows if row != ours}
    gaps = {name: gap for name, gap in leads.items() if gap is not None}
    for gap, p in zip(gaps.values(), holm([gap["p"] for gap in gaps.values()]), strict=True):
        gap["p_holm"] = p
    kept = {key: found[key] for key in ("conditions", "probe", "versions", "hardware", "commit")}
    images = "CIFAR-10 as JPEG files, 5,000 to train and 2,000 to test" if recipe.data_path else found["data"]
    return {
        "data": images,
        "recipe": {name: value for name, value in found["recipe"].items() if name != "data_path"},
        "seeds": seeds,
        "epochs": recipe.epochs,
        "parameters": {f"{v.label}, {v.pe}": parameters(folder, v, seeds[0]) for v in rows},
        "accuracies": {f"{v.label}, {v.pe}": [run.accuracy for run in runs if run.variant == v] for v in rows},
        "lape_ahead_of": gaps,
        **kept,
    }


def parameters(folder: Path, row: Variant, seed: int) -> int:
    """Of position, in the model of a row."""
    norm, std = (f".{row.pe_norm}" if row.pe_norm else ""), ("" if row.pe_std is None else f".std{row.pe_std:g}")
    model = lape.load(folder / "cells" / f"{row.model}.{row.pe}.{row.join}{norm}{std}.seed{seed}" / "model")
    return lape.describe(model).position_parameters


def cost(images: Path, runs: Path) -> dict[str, Any]:
    """What `lape eval --sizes` of a DeiT-Ti that was made for 96 px costs on 2,000 images, in processor time."""
    sizes = {"img_size": 96, "num_classes": 10}
    model = lape.create_model("deit_tiny_patch16_224", join="LaPE", **sizes)
    folder = lape.save(model, runs / "deit_tiny")
    words = [*("--data-path", str(images), "--device", "cpu", "--num-workers", "0"), "--sizes", *COST_SIZES]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "lape", "eval", str(folder), *words], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "made_by": "python benchmarks/laboratory.py cost --cifar FOLDER",
        "model": {"name": "deit_tiny_patch16_224", "join": "LaPE", **sizes, "weights": "untrained"},
        "sizes": COST_SIZES,
        "images": sum(1 for _ in (images / "val").glob("*/*")),
        "processor_seconds": seconds,
        "clock_seconds": time.perf_counter() - began,
        **environment(),
    }


if __name__ == "__main__":
    main()
