"""What is LaPE worth? Each study trains its rows with their controls and writes results/worth_<study>.json.

    python benchmarks/worth.py digits                      # starts of P, and what stands in the place of LN' (Table 8)
    python benchmarks/worth.py sinusoids                   # frozen tables, where scale is no excuse
    python benchmarks/worth.py cifar --cifar FOLDER        # 5,000 images, 10 epochs: ViT-Lite, CVT and CCT of 4 layers
    python benchmarks/worth.py cifar-full --cifar FOLDER   # 50,000 images, 20 epochs: ViT-Lite of 4 layers
    python benchmarks/worth.py cifar-paper --cifar FOLDER  # the paper's models, all images, 310 epochs: a GPU

FOLDER holds CIFAR-10 as train/<class>/* and val/<class>/*. A study that was killed goes on by the same command;
`--workers` trainings run side by side, one thread each. `--finished` trains nothing: it reports on the rows that
the first seed has, and the seeds that have all of these, wherever they were trained (`--trained-on` says where).
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gallery import subset

from lape.names import TABLE8_NAMES
from lape.recipe import Recipe
from lape.study.compare import cell_folder, compare
from lape.study.numbers import Variant
from lape.study.options import CompareOptions

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
Row = tuple[str, str | None, float | None]
"""Join, norm of position, start of the table."""

SCALES: tuple[Row, ...] = (("basic", None, 0.2), ("basic", None, 0.5), ("LaPE", None, 1.0))
MAIN: tuple[Row, ...] = (
    *(("basic", None, None), ("basic", None, 1.0)),
    *(("beside", None, None), ("beside", None, 1.0)),
    *(("LaPE-sharing", None, None), ("LaPE", None, None)),
)
TABLE_8: tuple[Row, ...] = tuple(
    ("LaPE", norm, std) for norm in TABLE8_NAMES if norm not in ("none", "layernorm") for std in (None, 1.0)
)  # "none" is `beside`
MPVG: Row = ("MPVG", None, None)
PAPER = ("vit_lite_7_4_32", "cvt_7_4_32", "cct_7_3x1_32")
FROZEN: tuple[Row, ...] = (
    *MAIN,
    ("LaPE-sharing", "norm", None),
    ("LaPE", "norm", None),
)


@dataclass(frozen=True)
class Part:
    """One comparison of a study: the same budget for its rows."""

    name: str
    recipe: Recipe
    rows: tuple[Row, ...]
    models: tuple[str, ...]
    seeds: int
    pe: str = "learnable"


def digits(epochs: int) -> Recipe:
    return Recipe.from_yaml("digits").replace(epochs=epochs, warmup_epochs=2)


def cifar(folder: Path, epochs: int, warmup: int, on_device: bool) -> Recipe:
    recipe = Recipe.from_yaml("cifar10_matrix_cpu", data_path=str(folder), epochs=epochs)
    return recipe.replace(warmup_epochs=warmup, amp="bf16", data_on_device=on_device)


def parts_of(study: str, given: argparse.Namespace) -> list[Part]:
    one = (digits(1).model,)
    if study == "digits":
        every = (*MAIN, *SCALES, *TABLE_8)
        return [Part(f"{n} epochs", digits(n), rows, one, 5) for n, rows in ((20, every), (60, every), (200, MAIN))]
    if study == "sinusoids":
        return [Part(f"{n} epochs", digits(n), FROZEN, one, 5, "2D_sin") for n in (20, 60)]
    if given.cifar is None:
        raise SystemExit("--cifar FOLDER is needed: CIFAR-10 as train/<class>/* and val/<class>/*")
    if study == "cifar-full":
        rows = tuple(row for row in MAIN if row != ("beside", None, None))
        return [Part("20 epochs", cifar(given.cifar, 20, 3, given.on_device), rows, ("vit_lite_4_4_32",), 2)]
    if study == "cifar-paper":
        recipe = Recipe.from_yaml("vit_lite_cifar10", data_path=str(given.cifar))
        return [Part("310 epochs", recipe.replace(data_on_device=given.on_device), (*MAIN, MPVG), PAPER, 5)]
    images = given.runs / "images"
    recipe = cifar(images if images.exists() else subset(given.cifar, images, 500, 200), 10, 2, given.on_device)
    models = ("vit_lite_4_4_32", "cvt_4_4_32", "cct_4_3x2_32")
    return [Part("10 epochs", recipe, (*MAIN, ("share", None, None), MPVG), models, 5)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("digits", "sinusoids", "cifar", "cifar-full", "cifar-paper"))
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10 images")
    parser.add_argument("--runs", type=Path, default=Path("runs/worth"), help="where the trainings go")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--on-device", action="store_true", help="CIFAR-10 on the device: the same recipe, other draws")
    parser.add_argument("--finished", action="store_true", help="train nothing, report on what is done")
    parser.add_argument("--trained-on", help="the machine of the trainings, where it is not this one")
    parser.add_argument("--data", help="what the data are called in the results (default: their path and counts)")
    parser.add_argument("--commit", help="where this is no git checkout")
    parser.add_argument("--budgets", type=int, nargs="+", help="those epochs only")
    given = parser.parse_args()

    parts = [run(part, given) for part in parts_of(given.study, given) if not_left_out(part, given)]
    found = parts[0]["results"]
    hardware = found["hardware"]
    about = {
        "data": given.data or found["data"],
        "versions": found["versions"],
        "commit": found["commit"] or given.commit,
    }
    about["trained_on"] = (
        given.trained_on or ", ".join(found["gpus"]) or f"{hardware['processor']}, {hardware['cores']} cores"
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"worth_{given.study.replace('-', '_')}.json"
    flags = " --cifar FOLDER" if "cifar" in given.study else ""
    command = f"python benchmarks/worth.py {given.study}{flags}"
    results = {"command": command, "parts": [kept(part) for part in parts], **about}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


def not_left_out(part: Part, given: argparse.Namespace) -> bool:
    return given.budgets is None or part.recipe.epochs in given.budgets


def run(part: Part, given: argparse.Namespace) -> dict[str, Any]:
    folder = given.runs / f"{given.study} {part.name}".replace(" ", "-")
    recipe = part.recipe.replace(device=given.device)
    rows = [Variant(model, part.pe, join, norm, std) for model in part.models for join, norm, std in part.rows]
    seeds: Sequence[int] = range(part.seeds)
    if given.finished:
        done = {(row, seed): is_done(folder, row.recipe(recipe).replace(seed=seed)) for row in rows for seed in seeds}
        rows = [row for row in rows if done[row, 0]]
        seeds = [seed for seed in seeds if all(done[row, seed] for row in rows)]
    options = CompareOptions(output_dir=str(folder), seeds=tuple(seeds), workers=given.workers)
    return {"name": part.name, "results": compare(recipe, options, rows).results}


def is_done(folder: Path, recipe: Recipe) -> bool:
    return (cell_folder(folder, recipe) / "result.json").exists()


def kept(part: dict[str, Any]) -> dict[str, Any]:
    """What a result file holds of a comparison: no path of a machine, and of each training its accuracies."""
    found = part["results"]
    recipe = {name: value for name, value in found["recipe"].items() if name != "data_path"}
    names = ("model", "pe", "join", "pe_norm", "pe_std", "seed", "accuracy", "best", "seconds")
    cells = [{name: cell[name] for name in names} for cell in found["cells"]]
    chosen = {key: found[key] for key in ("variants", "differences", "meaningless", "sentences")}
    return {"name": part["name"], "recipe": recipe, **chosen, "cells": cells}


if __name__ == "__main__":
    main()
