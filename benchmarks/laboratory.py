"""What features keep of position, and accuracy over the image size: digits, with and without position, basic and LaPE.

    python benchmarks/laboratory.py --runs DIR [--seeds 0 1 ...]

Trains what is not in DIR yet, evaluates each model at other sizes, probes the models of the first seed, and writes
benchmarks/results/laboratory_digits.json, from which docs/laboratory.md has its table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lape.recipe import Recipe
from lape.study.compare import compare
from lape.study.numbers import Variant
from lape.study.options import CompareOptions

RESULTS = Path(__file__).parent / "results"
SIZES = ("6", "10", "12", "16", "8x12")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/laboratory"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    recipe = Recipe.from_yaml("digits", threads=1, num_workers=0, device="cpu")
    model, pe = recipe.model, recipe.pe
    rows = [
        Variant(model, "none", "basic"),
        Variant(model, pe, "basic"),
        Variant(model, pe, "basic", None, 1.0),
        Variant(model, pe, "LaPE"),
    ]
    asked = CompareOptions(
        output_dir=str(given.runs), seeds=tuple(given.seeds), workers=given.workers, sizes=SIZES, probe=256
    )
    found = compare(recipe, asked, rows).results
    sizes = {
        name: [[{"size": o["size"], "acc1": o["acc1"]} for o in outcomes] for outcomes in each]
        for name, each in found["sizes"].items()
    }
    kept = {key: found[key] for key in ("data", "recipe", "probe", "versions", "hardware", "commit")}
    about = {"made_by": "benchmarks/laboratory.py", "seeds": given.seeds, "epochs": recipe.epochs, "sizes": sizes}
    (RESULTS / "laboratory_digits.json").write_text(json.dumps({**about, **kept}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
