"""Makes `docs/gallery.md` and its pictures: models trained here, basic, share, LaPE-sharing and LaPE, in two kinds.

    python benchmarks/gallery.py                    # the packaged digits, some minutes on two cores
    python benchmarks/gallery.py --cifar FOLDER     # CIFAR-10 as FOLDER/train/<class>/* and FOLDER/val/<class>/* too

The trainings are those of `lape compare`; what is done in --runs is not trained again. For CIFAR-10 the first images of
each class are used, as many as --train-images and --val-images say: a budget for looking, not for accuracy.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image

import lape
from lape.look.figures import COSINE, Strip, curves, named_tokens, overview
from lape.look.measures import measure_all
from lape.look.similarity import cosine, raw_table, token_map
from lape.recipe import Recipe
from lape.study.compare import Study, cell_folder, compare
from lape.study.options import CompareOptions
from lape.study.report import markdown_table, rows_of_variants

JOINS = ("basic", "share", "LaPE-sharing", "LaPE")
PES = ("learnable", "2D_sin")
MOST = 300_000  # bytes of a picture
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10 images")
    parser.add_argument("--runs", type=Path, default=Path("runs/gallery"), help="where the trainings go")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each combination (digits; CIFAR-10: one)")
    parser.add_argument("--cifar-epochs", type=int, default=10)
    parser.add_argument("--train-images", type=int, default=250, help="of each class of CIFAR-10")
    parser.add_argument("--val-images", type=int, default=100, help="of each class of CIFAR-10")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()

    sets = [("digits", "Handwritten digits, 8 × 8 pixels", Recipe.from_yaml("digits"), tuple(range(given.seeds)))]
    if given.cifar:
        folder = subset(given.cifar, given.runs / "cifar-images", given.train_images, given.val_images)
        sets.append(("cifar10", "CIFAR-10, 32 × 32 pixels", cifar_recipe(folder, given.cifar_epochs), (0,)))
    pages = []
    for name, title, recipe, seeds in sets:
        folder, workers = str(given.runs / name), given.workers
        found = compare(recipe, CompareOptions(output_dir=folder, joins=JOINS, pes=PES, seeds=seeds, workers=workers))
        pages.append(section(name, title, recipe, found))
    text = "\n".join([INTRO, *pages])
    (ROOT / "docs" / "gallery.md").write_text(text, encoding="utf-8")


INTRO = """# Gallery

What position became in models trained by this project, layer by layer: cosine similarity of one patch with all others,
from -1 (blue) over 0 (white) to 1 (red). Made by

```
python benchmarks/gallery.py [--cifar FOLDER]
```

which trains the models (`lape compare`), draws them and writes this page. The accuracies say how far the models came in
this small budget; what the joins are worth, with the control that is missing here: [measured.md](measured.md).
"""


def cifar_recipe(folder: Path, epochs: int) -> Recipe:
    """A small Vision Transformer of 8 x 8 patches; mirrored images, no other augmentation."""
    return Recipe.from_yaml(
        "digits",
        data_path=str(folder),
        input_size=32,
        in_chans=3,
        mean=(0.491, 0.482, 0.447),
        std=(0.247, 0.243, 0.262),
        epochs=epochs,
        batch_size=64,
        model_kwargs={"patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 4},
    )


def subset(source: Path, target: Path, train: int, val: int) -> Path:
    """Copies the first images of each class, in the order of their names."""
    for split, count in (("train", train), ("val", val)):
        for folder in sorted(path for path in (source / split).iterdir() if path.is_dir()):
            (target / split / folder.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copyfile(image, target / split / folder.name / image.name)
    return target


def section(name: str, title: str, recipe: Recipe, found: Study) -> str:
    """The part of the page on one data set; draws its pictures."""
    results = found.results
    images = f"the first images of each class ({_count(recipe)})" if recipe.data_path else results["data"]
    lines = [f"## {title}\n"]
    lines.append(
        f"Data: {images}. Budget: {recipe.epochs} epochs, batch {recipe.batch_size}, "
        f"{recipe.model_kwargs['depth']} layers of width {recipe.model_kwargs['embed_dim']}; "
        f"{sum(c['seconds'] for c in results['cells']):.0f} s on the clock for {len(results['cells'])} models, each on "
        f"one thread. {results['hardware']['processor']}, {results['hardware']['cores']} cores. "
        f"Drawn: seed {results['cells'][0]['seed']}.\n"
    )
    lines.append(markdown_table([row[1:] for row in rows_of_variants(results)]) + "\n")
    lines += [f"- {sentence}" for sentence in results["sentences"]]
    lines.append("")
    for pe in PES:
        models = {join: lape.load(_folder(found, recipe, pe, join)) for join in JOINS}
        for place in ("centre", "corner"):
            _draw(f"{name}_{pe}_{place}", _maps(models, place, f"{title}, {pe}: patch in the {place}"))
        measured = {join: _measures(model) for join, model in models.items()}
        _draw(f"{name}_{pe}_measures", curves(f"{title}, {pe}", measured))
        lines.append(f"### {pe}\n")
        lines += [f"![{title}, {pe}, {p} patch](gallery/{name}_{pe}_{p}.png)\n" for p in ("centre", "corner")]
        lines.append(f"![{title}, {pe}, measures over depth](gallery/{name}_{pe}_measures.png)\n")
    return "\n".join(lines)


def _count(recipe: Recipe) -> str:
    counts = {s: sum(1 for _ in Path(recipe.data_path, s).glob("*/*")) for s in ("train", "val")}
    return f"{counts['train']} to train, {counts['val']} to test"


def _folder(found: Study, recipe: Recipe, pe: str, join: str) -> Path:
    seed = found.results["cells"][0]["seed"]
    return cell_folder(found.folder, recipe.replace(pe=pe, join_type=join, seed=seed)) / "model"


def _maps(models: dict, place: str, title: str):
    strips = []
    for join, model in models.items():
        grid, prefix = lape.grid(model), lape.num_prefix_tokens(model)
        token = named_tokens(grid)[place]
        maps = [cosine(raw_table(model)[prefix:]), *lape.correlation(model)]
        strips.append(Strip(join, [token_map(m, grid, token) for m in maps], grid, token))
    columns = ["table P", *(f"layer {layer}" for layer in range(len(strips[0].maps) - 1))]
    return overview(title, strips, columns, *COSINE)


def _measures(model):
    seen = lape.positions(model, view="seen").detach()[:, lape.num_prefix_tokens(model) :]
    return measure_all(lape.correlation(model), seen, lape.grid(model))


def _draw(name: str, figure) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    path = ROOT / "docs" / "gallery" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(file).convert("RGB").save(path, optimize=True)
    assert path.stat().st_size < MOST, f"{path} has {path.stat().st_size} bytes"


if __name__ == "__main__":
    main()
