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


def table_2() -> str:
    """The paper's Table 2 beside what was measured here."""
    published = json.loads((RESULTS.parent / "published.json").read_text())
    lines = ["| data | model | basic | LaPE | LaPE − basic |", "|---|---|---|---|---|"]
    for data, name in (("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100")):
        for model, row in published[data].items():
            gap = row["LaPE"] - row["basic"]
            lines.append(f"| {name} | {model} | {row['basic']:.3f} | {row['LaPE']:.3f} | {gap:+.3f} |")
    lines += ["", f"Published: {published['source']}.", ""]
    files = sorted(RESULTS.glob("cifar10_matrix_*.json"))
    if not files:
        lines.append("Not measured here yet: `python benchmarks/cifar_matrix.py` does it.")
    for path in files:
        lines += [*measured_matrix(path), ""]
    return "\n".join(lines).rstrip()


def claims() -> str:
    """The gain of LaPE over basic on CIFAR-10: the paper's, and each run's here."""
    published = json.loads((RESULTS.parent / "published.json").read_text())["cifar10"]
    lines = ["| CIFAR-10 | model | basic | LaPE | LaPE − basic | p |", "|---|---|---|---|---|---|"]
    for model, row in published.items():
        gap = row["LaPE"] - row["basic"]
        cells = ["paper, 300 epochs, 5 seeds", model, f"{row['basic']:.2f}", f"{row['LaPE']:.2f}", f"{gap:+.2f}", ""]
        lines.append(f"| {' | '.join(cells)} |")
    for path in sorted(RESULTS.glob("cifar10_matrix_*.json")):
        found = json.loads(path.read_text())
        final = {(v["model"], v["join"]): v for v in found["variants"]}
        for model in dict.fromkeys(v["model"] for v in found["variants"]):
            basic, lape = final[model, "basic"], final[model, "LaPE"]
            what = f"here, {found['recipe']['epochs']} epochs, {len(lape['seeds'])} seeds"
            cells = [what, f"`{model}`", spread(basic["final"]), spread(lape["final"]), spread(lape["difference"], "+")]
            lines.append(f"| {' | '.join([*cells, p_value(lape['difference'])])} |")
    lines += ["", "What was run and how, all joins, and their ranking: [docs/measured.md](docs/measured.md)."]
    return "\n".join(lines)


def p_value(gap: dict | None) -> str:
    if gap is None or gap["p"] is None:
        return ""
    return "< 0.001" if gap["p"] < 0.001 else f"{gap['p']:.3f}"


def measured_matrix(path: Path) -> list[str]:
    """One run of benchmarks/cifar_matrix.py: accuracies, ranking, and how it was run."""
    found = json.loads(path.read_text())
    lines = ["| model | join | seeds | last epoch | − basic | p |", "|---|---|---|---|---|---|"]
    for v in found["variants"]:
        gap = v["difference"]
        p = p_value(gap)
        cells = [
            v["model"],
            v["join"],
            str(len(v["seeds"])),
            spread(v["final"]),
            "" if gap is None else spread(gap, "+"),
        ]
        lines.append(f"| {' | '.join([*cells, p])} |")
    recipe, machine = found["recipe"], found["hardware"]
    hours = sum(cell["seconds"] for cell in found["cells"]) / 3600
    on = ", ".join(found["gpus"]) or f"{machine['processor']}, {machine['cores']} cores, no GPU"
    lines += [
        "",
        f"Measured here: {found['data']}, {recipe['epochs']} epochs, batch {recipe['batch_size']}; percent of the test "
        "images after the last epoch, mean ± standard deviation over the seeds, paired t-test seed by seed; "
        f"{on}; {hours:.1f} hours of training in all, {found['workers']} at a time, beside other work. "
        f"`{found['command']}`, `{path.relative_to(ROOT)}`.",
        "",
        "| join | mean rank | first | pairs of model and seed | − basic over all of them | p |",
        "|---|---|---|---|---|---|",
    ]
    for entry in found["ranking"]:
        gap = entry["difference"]
        p = p_value(gap)
        cells = [entry["join"], f"{entry['mean_rank']:.1f}", str(entry["first"]), str(entry["pairs"])]
        lines.append(f"| {' | '.join([*cells, '' if gap is None else spread(gap, '+'), p])} |")
    return lines


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def ratio(row: dict) -> str:
    low, high = row["ratio_quartiles"]
    return f"{row['ratio_median']:.3f} [{low:.3f}, {high:.3f}]"


PAGES = {
    ROOT / "README.md": (demo, claims, folded),
    ROOT / "docs" / "converting.md": (warm_start,),
    ROOT / "docs" / "measured.md": (table_2,),
}


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
