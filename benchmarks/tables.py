"""Writes the tables of README.md and docs/ from the result files beside this script, between their markers.

python benchmarks/tables.py            write them
python benchmarks/tables.py --check    exit with 1 when a page says something else than the files
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demo() -> str:
    """Accuracy of `lape demo`."""
    path = RESULTS / "demo_digits_cpu2.json"
    found = json.loads(path.read_text())
    first, second = found["joins"]
    lines = [f"| epochs | seeds | {first} | {second} | difference |", "|---|---|---|---|---|"]
    for budget in found["budgets"]:
        cells = [spread(budget["accuracy"][join]) for join in (first, second)]
        lines.append(
            f"| {budget['epochs']} | {len(budget['seeds'])} | {' | '.join(cells)} | {spread(budget['gap'], '+')} |"
        )
    machine = found["hardware"]
    lines += [
        "",
        f"Percent of the 359 test images, after the last epoch, mean ± standard deviation over the seeds; "
        f"{machine['cores']} CPU cores, {found['seconds']:.0f} s in all, torch {found['versions']['torch']} "
        f"(`{path.relative_to(ROOT)}`). The gap is widest early and shrinks with a longer budget.",
    ]
    return "\n".join(lines)


def spread(value: dict, sign: str = "") -> str:
    mean = format(value["mean"], f"{sign}.1f")
    return mean if value["n"] < 2 else f"{mean} ± {value['std']:.1f}"


def folded() -> str:
    """Time of converted and folded models against the unconverted host."""
    lines = ["| model | what | host | basic | LaPE | LaPE folded |", "|---|---|---|---|---|---|"]
    files = sorted(RESULTS.glob("folded_*.json"))
    for path in files:
        found = json.loads(path.read_text())
        for kind in ("inference", "training"):
            for batch, rows in found[kind].items():
                cells = [f"{1e3 * rows['host']['median_s']:.1f} ms"]
                cells += [ratio(rows[name]) if name in rows else "-" for name in ("basic", "LaPE", "LaPE folded")]
                lines.append(f"| {found['config']['model']} | {kind}, batch {batch} | {' | '.join(cells)} |")
    machines = {f"{f['machine']['processor']}, {f['machine']['cores']} cores" for f in map(_read, files)}
    names = ", ".join(f"`{path.relative_to(ROOT)}`" for path in files)
    lines += [
        "",
        "Ratios to the host within a round, median [quartiles], rounds interleaved; "
        f"{'; '.join(sorted(machines))}; {names}.",
    ]
    return "\n".join(lines)


def warm_start() -> str:
    """Fine-tuning a pretrained model three ways."""
    files = sorted(RESULTS.glob("warm_start_*.json"))
    if not files:
        return "Not measured yet: `python benchmarks/warm_start.py` does it."
    lines = ["| data | way | before | after | after − unconverted |", "|---|---|---|---|---|"]
    for found in map(_read, files):
        for way, values in found["ways"].items():
            cells = [spread(values["before"]), spread(values["after"])]
            cells.append("-" if way == "unconverted" else spread(values["gap"], "+"))
            lines.append(f"| {found['data']} | {way} | {' | '.join(cells)} |")
    budgets = {
        f"{len(f['config']['seeds'])} seeds, {f['config']['pretraining']['epochs']} epochs before, "
        f"{f['config']['fine_tuning']['epochs']} of fine-tuning"
        for f in map(_read, files)
    }
    names = ", ".join(f"`{path.relative_to(ROOT)}`" for path in files)
    lines += [
        "",
        "Percent of the test images, mean ± standard deviation: before fine-tuning and after its last epoch; "
        f"{'; '.join(sorted(budgets))}; {names}.",
    ]
    return "\n".join(lines)


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def ratio(row: dict) -> str:
    low, high = row["ratio_quartiles"]
    return f"{row['ratio_median']:.3f} [{low:.3f}, {high:.3f}]"


def input_pipeline() -> str:
    """Speed of reading photographs, and what the fast way changes."""
    (path,) = RESULTS.glob("input_pipeline_*.json")
    found = _read(path)
    names = {"plain": "torchvision and Pillow", "exact": "`--decode exact`", "fast, 8 bit": "`--decode fast`"}
    lines = ["| images a second and core | " + " | ".join(names.values()) + " |", "|---|---|---|---|"]
    for kind, what in (("train", "training, 224, RandAugment"), ("eval", "evaluation, 256 to 224")):
        rows = found["speed"][kind]
        cells = [f"{rows['plain']['images_a_second_and_core']:.0f}"]
        for name in ("exact", "fast, 8 bit"):
            low, high = rows[name]["speed_quartiles"]
            cells.append(f"x {rows[name]['speed_median']:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    apart, said = found["distance"], found["agreement"]
    rows = found["speed"]
    finished = " and ".join(f"{rows[kind]['fast, finished']['speed_median']:.2f}" for kind in ("train", "eval"))
    lines += [
        "",
        f"{found['config']['images']} ImageNet photographs, processor time, ratios within a round, median [quartiles]; fast "
        f"batches leave the core as bytes and are normalised on the device; on the same core they are x {finished}. Fast "
        f"evaluation pixels differ by {apart['most_levels']:.0f} of 255 levels at most, "
        f"{100 * (1 - apart['part_of_pixels_that_differ']):.1f} % not at all; a small ViT trained on the photographs says the "
        f"same class of {said['top1_agree']} of {said['images']}, its logits differ by "
        f"{said['largest_logit_difference']:.1g} at most. {found['machine']['processor']} (`{path.relative_to(ROOT)}`).",
    ]
    return "\n".join(lines)


PAGES = {ROOT / "README.md": (demo, folded, input_pipeline), ROOT / "docs" / "converting.md": (warm_start,)}


def filled(page: Path) -> str:
    """The page with every marked table written anew."""
    text = page.read_text()
    for table in PAGES[page]:
        start, end = f"<!-- {table.__name__}: written by benchmarks/tables.py -->", f"<!-- end of {table.__name__} -->"
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.S)
        assert pattern.search(text), f"{page.name} has no {start} ... {end}"
        text = pattern.sub(lambda _, s=start, t=table, e=end: f"{s}\n{t()}\n{e}", text)
    return text


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(any(filled(page) != page.read_text() for page in PAGES))
    for page in PAGES:
        page.write_text(filled(page))
