"""Writes the tables of README.md and docs/ from the result files beside this script, between their markers.

python benchmarks/tables.py            write them
python benchmarks/tables.py --check    exit with 1 when a page says something else than the files
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def worth() -> str:
    """The joins and their control in every study: means, and the difference of LaPE to each control."""
    columns, notes = [], []
    for study, what in WORTH.items():
        found = _read(RESULTS / f"worth_{study}.json")
        for part in found["parts"]:
            for model in dict.fromkeys(v["model"] for v in part["variants"]):
                rows = {(v["join"], v["pe_norm"], v["pe_std"]): v for v in part["variants"] if v["model"] == model}
                seeds = max(v["final"]["n"] for v in rows.values())
                name = f"{what}{SHORT.get(model, '')}, {part['name']}, {seeds} seed{'' if seeds == 1 else 's'}"
                columns.append((name, [spread(rows[row]["final"]) if row in rows else "" for row in OVERVIEW]))
    head = "| trained on | " + " | ".join(OVERVIEW.values()) + " |"
    lines = [
        head,
        "|---" * (len(OVERVIEW) + 1) + "|",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in columns),
    ]
    files = ", ".join(f"`benchmarks/results/worth_{study}.json`" for study in WORTH)
    notes.append(
        "Percent of the test images after the last epoch, mean ± standard deviation; learnable tables but where "
        f"it says sinusoids. {files}; what the differences are due to: "
        "[docs/measured.md](docs/measured.md)."
    )
    return "\n".join([*lines, "", *notes])


WORTH = {
    "digits": "digits",
    "sinusoids": "digits, frozen sinusoids",
    "cifar": "CIFAR-10, 5,000 images, ",
    "cifar_full": "CIFAR-10, 50,000 images, ",
}
SHORT = {"vit_lite_4_4_32": "ViT-Lite", "cvt_4_4_32": "CVT", "cct_4_3x2_32": "CCT"}
OVERVIEW = {
    ("basic", None, None): "basic",
    ("basic", None, 1.0): "basic, P at unit scale",
    ("beside", None, 1.0): "beside, P at unit scale (no LN′)",
    ("LaPE-sharing", None, None): "LaPE-sharing",
    ("LaPE", None, None): "LaPE",
}


def study(name: str) -> str:
    """A study whole: accuracies by budget, and every difference with its cause, interval and corrected p."""
    found = _read(RESULTS / f"worth_{name}.json")
    lines = []
    for part in found["parts"]:
        several = len({v["model"] for v in part["variants"]}) > 1
        lines += [f"**{part['name']}**", ""]
        lines += ["| " + ("model | " if several else "") + "join | seeds | last epoch |", "|---" * (3 + several) + "|"]
        for v in part["variants"]:
            model = f"{SHORT.get(v['model'], v['model'])} | " if several else ""
            lines.append(f"| {model}{v['label']} | {v['final']['n']} | {spread(v['final'])} |")
        chief = [d for d in part["differences"] if {d["of"], d["against"]} <= CHIEF]
        others = [d for d in part["differences"] if d not in chief]
        lines += ["", *differences(chief, several), ""]
        if others:
            lines += ['<details markdown="1">', f"<summary>{len(others)} more differences</summary>", ""]
            lines += [*differences(others, several), "", "</details>", ""]
    recipe = found["parts"][0]["recipe"]
    lines.append(
        f"{found['data']}; batch {recipe['batch_size']}; {found['trained_on']}; torch {found['versions']['torch']}. "
        "p: paired t-test seed by seed, corrected by Holm within a budget. "
        f"`{found['command']}`, `benchmarks/results/worth_{name}.json`."
    )
    return "\n".join(lines)


CHIEF = {"basic", "basic, P at std 1", "beside", "beside, P at std 1", "LaPE-sharing", "LaPE"}


def differences(rows: list[dict], several: bool) -> list[str]:
    """Lines of a table of differences; `several`: of more than one model."""
    lines = ["| " + ("model | " if several else "") + "join | against | due to | points | 95 % interval | p |"]
    lines.append("|---" * (6 + several) + "|")
    for d in rows:
        model = f"{SHORT.get(d['model'], d['model'])} | " if several else ""
        interval = "" if d["interval"] is None else "{:+.1f} to {:+.1f}".format(*d["interval"])
        p = "" if d["p_holm"] is None else "< 0.001" if d["p_holm"] < 0.001 else f"{d['p_holm']:.3f}"
        lines.append(f"| {model}{d['of']} | {d['against']} | {d['cause']} | {d['mean']:+.1f} | {interval} | {p} |")
    return lines


def study_of_digits() -> str:
    """Starts of P, and what stands in the place of LN'."""
    return study("digits")


def study_of_sinusoids() -> str:
    """Frozen tables."""
    return study("sinusoids")


def study_of_cifar() -> str:
    """5,000 images."""
    return study("cifar")


def study_of_cifar_full() -> str:
    """50,000 images."""
    return study("cifar_full")


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
    """The paper's Table 2."""
    published = json.loads((RESULTS.parent / "published.json").read_text())
    lines = ["| data | model | basic | LaPE | LaPE − basic |", "|---|---|---|---|---|"]
    for data, name in (("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100")):
        for model, row in published[data].items():
            gap = row["LaPE"] - row["basic"]
            lines.append(f"| {name} | {model} | {row['basic']:.3f} | {row['LaPE']:.3f} | {gap:+.3f} |")
    lines += ["", f"Published: {published['source']}.", ""]
    return "\n".join(lines).rstrip()


def joins() -> str:
    """LaPE and folded LaPE beside basic, in each runtime."""
    files = sorted(RESULTS.glob("joins_*.json"))
    if not files:
        return "Not measured yet: `python benchmarks/joins.py` does it."
    lines = ["| model | how | what | basic | LaPE | LaPE folded |", "|---|---|---|---|---|---|"]
    for found in map(_read, files):
        for way, result in found.items():
            variants = result["variants"]
            for part in ("latency", "inference", "training"):
                if part not in variants["basic"]:
                    continue
                basic = variants["basic"][part]
                cells = [f"{1e3 * basic['seconds']:.2f} ms"]
                cells += [interval(variants[name].get(part), "ratio") for name in ("LaPE", "LaPE folded")]
                lines.append(f"| {_model(found)} | {way} | {part}, batch {basic['batch']} | {' | '.join(cells)} |")
            if "training" in variants["basic"]:
                memory = [variants[name]["training"] for name in ("basic", "LaPE")]
                cells = [f"{memory[0]['peak_bytes'] / 1e6:.1f} MB", f"{memory[1]['memory_ratio']:.4f}", "-"]
                lines.append(f"| {_model(found)} | {way} | peak memory of training | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Ratios to basic, {HOW}; {_machines(files, several=True)}"])


def variants() -> str:
    """Parameters, MACs and speed of joins and of the same ViT of other libraries."""
    files = sorted(RESULTS.glob("bench_*.json"))
    if not files:
        return "Not measured yet: `lape bench ... --json benchmarks/results/bench_NAME.json` does it."
    head = ("model", "variant", "parameters", "MACs", "inference", "images/s", "training", "images/s", "peak MB")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for found in map(_read, files):
        amp = "" if found["settings"]["amp"] == "none" else f", {found['settings']['amp']}"
        for name, row in found["variants"].items():
            cells = [f"{found['settings']['model']}{amp}", name, f"{row['parameters']:,}", f"{row['macs'] / 1e9:.3f} G"]
            for part in ("inference", "training"):
                speed = f"{row[part]['images_per_second']:.1f}" if part in row else "-"
                cells += [interval(row.get(part), "ratio"), speed]
            memory = f"{row['training']['peak_bytes'] / 1e6:.1f}" if "training" in row else "-"
            lines.append(f"| {' | '.join([*cells, memory])} |")
    return "\n".join([*lines, "", f"Time as a ratio to the first variant, {HOW}; {_machines(files)}"])


def original_style() -> str:
    """Training steps against the equations written out."""
    files = sorted(RESULTS.glob("original_style_*.json"))
    if not files:
        return "Not measured yet: `python benchmarks/original_style.py` does it."
    lines = ["| model | training step | time | times as fast | share of matmul |", "|---|---|---|---|---|"]
    for found in map(_read, files):
        settings = found["settings"]
        for name, row in found["variants"].items():
            share = f"{100 * row['share_of_matmul_rate']:.0f} %"
            cells = [f"{settings['model']}, batch {settings['batch_size']}", name, f"{1e3 * row['seconds']:.1f} ms"]
            lines.append(f"| {' | '.join([*cells, interval(row, 'speed_up'), share])} |")
    differences = ", ".join(f"{_read(path)['largest_difference']:.1e}" for path in files)
    return "\n".join(
        [
            *lines,
            "",
            f"Speed-up over the first row, {HOW}. Share of the rate that torch.matmul reached in that precision in the "
            f"same run. Largest difference of the logits beforehand, relative: {differences}; {_machines(files)}",
        ]
    )


def chain_cost() -> str:
    """What the chain of position norms costs as models grow."""
    files = sorted(RESULTS.glob("chain_cost_*.json"))
    if not files:
        return "Not measured yet: `python benchmarks/chain_cost.py` does it."
    lines = ["| layers | width | pixels | norms of P | chain | forward of one image | LaPE / basic |", "|---" * 7 + "|"]
    for found in map(_read, files):
        for row in found["sizes"]:
            times = row["times"]
            cells = [str(row[key]) for key in ("layers", "width", "pixels", "norms_of_positions")]
            cells += [f"{1e3 * times[name]['seconds']:.2f} ms" for name in ("positions", "basic")]
            lines.append(f"| {' | '.join([*cells, interval(times['LaPE'], 'ratio')])} |")
    return "\n".join([*lines, "", f"Unfolded and eager, {HOW}; {_machines(files)}"])


HOW = "median [95 % bootstrap interval] over interleaved rounds"


def interval(row: dict | None, name: str) -> str:
    if row is None:
        return "-"
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"


def _model(found: dict) -> str:
    return next((result["settings"]["model"] for result in found.values() if "settings" in result), "-")


def _machines(files: list[Path], several: bool = False) -> str:
    """Hardware and versions of these files, and their names."""
    named = []
    for path in files:
        found = _read(path) if not several else next((r for r in _read(path).values() if "hardware" in r), {})
        hardware, versions = found.get("hardware", {}), found.get("versions", {})
        where = hardware.get("gpu") or f"{hardware.get('processor')}, {hardware.get('threads')} threads"
        named.append(f"{where}, torch {versions.get('torch')} (`{path.relative_to(ROOT)}`)")
    return "; ".join(named) + "."


def dense() -> str:
    """What the two examples of dense tasks found."""
    lines = ["| task | measure | seeds | basic | LaPE |", "|---|---|---|---|---|"]
    files = sorted(RESULTS.glob("dense_*.json"))
    names = {"miou": "mIoU", "ap50": "AP50", "recall50": "boxes found"}
    for found in map(_read, files):
        for key, name in names.items():
            if key in found["joins"]["basic"]:
                cells = [spread(found["joins"][join][key]) for join in ("basic", "LaPE")]
                what = f"{found['task']}, {found['config']['steps']} steps"
                lines.append(f"| {what} | {name}, % | {found['config']['seeds']} | {' | '.join(cells)} |")
    where = ", ".join(f"`{path.relative_to(ROOT)}`" for path in files)
    return "\n".join([*lines, "", f"Mean ± standard deviation: with so few seeds no difference to rely on. {where}."])


def sound_and_video() -> str:
    """What examples/sound_and_video.py found."""
    lines = ["| data | way | accuracy | neighbours in the last layer |", "|---|---|---|---|"]
    files = sorted(RESULTS.glob("sound_and_video_*.json"))
    for found in map(_read, files):
        axes = ("frequency", "time") if found["config"]["task"] == "sound" else ("frames", "rows", "columns")
        for way, values in found["ways"].items():
            last = [[layers[-1] for layers in run["alike"]] for run in values["runs"]]
            means = [sum(each) / len(each) for each in zip(*last, strict=True)]
            alike = ", ".join(f"{axis} {mean:.2f}" for axis, mean in zip(axes, means, strict=True))
            lines.append(f"| {found['config']['task']} | {way} | {spread(values['accuracy'])} | {alike} |")
    config, names = _read(files[0])["config"], ", ".join(f"`{path.relative_to(ROOT)}`" for path in files)
    lines += [
        "",
        f"Percent of 256 made examples, mean ± standard deviation of {config['seeds']} seeds, {config['steps']} steps; "
        f"cosine similarity of positions one step apart, mean of the seeds; {names}.",
    ]
    return "\n".join(lines)


def device_path() -> str:
    """Images a second of the PIL path and of the path on the device."""
    files = [*sorted(RESULTS.glob("device_path_*.json")), *sorted(RESULTS.glob("on_gpu_data_*.json"))]
    lines = ["| on | data and recipe | PIL path, images/s | on the device | times as many |", "|---|---|---|---|---|"]
    notes = []
    for path in files:
        found = _read(path)
        found |= found.get("results", {})  # as benchmarks/on_gpu.py writes it
        where = path.stem.removeprefix("device_path_").removeprefix("on_gpu_data_")
        for name, row in found["rows"].items():
            low, high = row["ratio_range"]
            cells = [f"{row[way]['images_per_second']:,.0f}" for way in ("pil", "device")]
            lines.append(
                f"| {where} | {name} | {' | '.join(cells)} | {row['ratio_median']:.2f} [{low:.2f}, {high:.2f}] |"
            )
        config = found["config"]
        cores = f"{found['hardware']['processor']}, {found['hardware']['cores']} cores"
        notes.append(
            f"{where}: {found['gpu'] + ' beside ' if found['gpu'] else ''}{cores}, {config['num_workers']} loader "
            f"processes, batch {config['batch_size']}, {config['rounds']} rounds (`{path.relative_to(ROOT)}`)"
        )
    return "\n".join([*lines, "", f"Median [lowest, highest] of interleaved rounds. {'; '.join(notes)}."])


def trained_on_gpu() -> str:
    """Test accuracy of the arms that benchmarks/on_gpu.py trained, seed by seed."""
    path = RESULTS / "on_gpu_training_h200.json"
    found = _read(path)
    arms = dict.fromkeys(result["arm"] for result in found["results"])
    epochs = (2, 4, found["recipe"]["epochs"])
    at = {
        arm: {e: [r["history"][e - 1]["test_acc1"] for r in found["results"] if r["arm"] == arm] for e in epochs}
        for arm in arms
    }
    head = ["", *(f"after {e} epochs" for e in epochs), "mean", *(f"− {arm}" for arm in list(arms)[:2])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for place, arm in enumerate(arms):
        last = at[arm][epochs[-1]]
        cells = [*(", ".join(f"{value:.2f}" for value in at[arm][e]) for e in epochs), f"{statistics.fmean(last):.3f}"]
        for other in list(arms)[:2]:
            gaps = [a - b for a, b in zip(last, at[other][epochs[-1]], strict=True)]
            each = ", ".join(f"{gap:+.2f}" for gap in gaps)
            cells.append(f"{statistics.fmean(gaps):+.3f} ({each})" if other in list(arms)[:place] else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    seeds = [r["seed"] for r in found["results"] if r["arm"] == next(iter(arms))]
    starts = {arm: min(r["table_std_at_start"] for r in found["results"] if r["arm"] == arm) for arm in list(arms)[:2]}
    gpu, model = found["hardware"]["gpu"].partition(",")[0], found["recipe"]["model"]
    lines += [
        "",
        f"Percent of the test images, seeds {' and '.join(map(str, seeds))}; {found['data']}, {model}, {gpu}, torch "
        f"{found['versions']['torch']}. Standard deviation of the table at the start: "
        f"{', '.join(f'{std:.2f} ({arm})' for arm, std in starts.items())}. "
        f"`python benchmarks/on_gpu.py --out FOLDER --cifar FOLDER`, `{path.relative_to(ROOT)}`.",
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
        f"{found['config']['images']} ImageNet photographs, processor time, ratios within a round, median [quartiles]; "
        f"fast batches leave the core as bytes and are normalised on the device; on the same core x {finished}. "
        f"Fast evaluation pixels differ by {apart['most_levels']:.0f} of 255 levels at most, "
        f"{100 * (1 - apart['part_of_pixels_that_differ']):.1f} % not at all; a small ViT trained on the photographs "
        f"says the same class of {said['top1_agree']} of {said['images']}, its logits differ by "
        f"{said['largest_logit_difference']:.1g} at most. {found['machine']['processor']}, {found['machine']['cores']} "
        f"cores, other work running (`{path.relative_to(ROOT)}`).",
    ]
    return "\n".join(lines)


def stored() -> str:
    """Speed of reading photographs from larger files, beside the folder's."""
    (path,) = RESULTS.glob("stored_*.json")
    found = _read(path)
    names = {"plain": "folder", "arrow": "arrow", "tar": "tar", "parquet": "parquet, groups of 100 rows"}
    lines = ["| images a second and core | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 1) + "|"]
    kinds = {
        "reading": "reading the bytes, shuffled",
        "train": "training, 224, RandAugment, shuffled",
        "eval": "evaluation, 256 to 224, in order",
    }
    for kind, what in kinds.items():
        rows = found["speed"][kind]
        cells = [f"{rows['plain']['images_a_second_and_core']:,.0f}"]
        for name in list(names)[1:]:
            low, high = rows[name]["speed_quartiles"]
            cells.append(f"x {rows[name]['speed_median']:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    lines += [
        "",
        "ImageNet photographs, each several times in the larger files, which lie in memory; processor time, ratios "
        "within a round, median [quartiles]. Parquet of up to 1 GiB is held in memory, no groups are read then. A "
        f"tar file is indexed in {1e6 * found['index_seconds_an_image']:.0f} µs an image, shards of 1 GiB and more on "
        f"all cores. {found['machine']['processor']}, {found['machine']['cores']} cores, other work running "
        f"(`{path.relative_to(ROOT)}`).",
    ]
    return "\n".join(lines)


def attack() -> str:
    """What the last run of benchmarks/attack.py counted."""
    path = sorted(RESULTS.glob("attack_*.json"))[-1]
    found = json.loads(path.read_text())
    lines = ["| attack | on | outcomes |", "|---|---|---|"]
    for title, counts in found["results"].items():
        lines += [
            f"| {title} | {what} | {', '.join(f'{number} {name}' for name, number in count.items())} |"
            for what, count in counts.items()
        ]
    lines += ["", f"{found['wrong']} wrong (in capitals), {found['seconds']} s (`{path.relative_to(ROOT)}`)."]
    return "\n".join(lines)


def attention() -> str:
    """Plain attention beside torch's fused one, on a CPU."""
    found = _read(next(RESULTS.glob("attention_*.json")))
    lines = ["| model | precision | training step | inference |", "|---|---|---|---|"]
    for row in found["rows"]:
        cells = (
            "{:.2f} [{:.2f}, {:.2f}]".format(row[k]["median"], *row[k]["quartiles"]) for k in ("training", "inference")
        )
        lines.append(f"| {row['shape']} | {row['precision']} | {' | '.join(cells)} |")
    hardware = found["machine"]["hardware"]
    lines += [
        "",
        f"Processor time of plain attention as a ratio to fused, median [quartiles] of {found['rounds']} rounds, "
        f"{found['threads']} thread, beside other work; {hardware['processor']}, "
        f"torch {found['machine']['versions']['torch']}; "
        "`benchmarks/results/attention_cpu1.json`.",
    ]
    return "\n".join(lines)


def laboratory() -> str:
    """Every rival under one recipe: accuracy, other sizes, and what the features keep; and what a sweep costs."""
    paths = [path for study in ("digits", "cifar") if (path := RESULTS / f"laboratory_{study}.json").exists()]
    texts = []
    for path in paths:
        found = _read(path)
        texts += [_rivals(part) for part in found["parts"]]
        where = f", trained on {found['trained_on']}" if found.get("trained_on") else ""
        texts.append(f"`benchmarks/results/{path.name}`, by `{found['made_by']}`{where}.")
    return "\n\n".join([*texts, _cost_of_sweep()])


def _rivals(found: dict) -> str:
    first = next(iter(found["conditions"].values()))
    sizes = ["×".join(e["name"].split("x")) + " px" for e in first if e["kind"] == "size"]
    measures = {"row": "row, R²", "column": "column, R²", "share": "share", "rank": "rank", "shift": "shift"}
    lines = ["| | parameters | accuracy, % | LaPE ahead by | 95 % interval | p |", "|---" * 6 + "|"]
    more = [f"| | {' | '.join([*sizes, *measures.values()])} |", "|---" * (len(sizes) + len(measures) + 1) + "|"]
    for name, accuracies in found["accuracies"].items():
        cells = [f"{found['parameters'][name]:,}", _mean(accuracies), *_lead(found["lape_ahead_of"].get(name))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        probed = found["probe"][name]
        at = [f"{entry['acc1']:.1f}" for entry in found["conditions"][name] if entry["kind"] == "size"]
        for measure in measures:
            cell = f"{probed['plain'][measure][-1]:.2f}"
            at.append(f"{cell} ({probed['without'][measure][-1]:.2f})" if measure in probed["without"] else cell)
        more.append(f"| {name} | {' | '.join(at)} |")
    images = next(iter(found["probe"].values()))["images"]
    side, seeds = found["recipe"]["input_size"], ", ".join(map(str, found["seeds"]))
    return "\n".join(
        [
            f"{found['data']}, {found['epochs']} epochs at {side} pixels, seeds {seeds}.",
            "",
            *lines,
            "",
            "Parameters: those of position that learn; accuracy after the last epoch, mean ± standard deviation; "
            "differences seed by seed, p of the paired t-test, corrected for their number (Holm). Below, the same "
            f"models: mean accuracy in percent at other sizes, and the features of seed "
            f"{found['seeds'][0]} on {images} test images, last depth, in brackets without the position subspace:",
            "",
            *more,
        ]
    )


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _lead(gap: dict | None) -> list[str]:
    if gap is None:
        return ["", "", ""]
    if gap["interval"] is None:
        return [f"{gap['mean']:+.1f}", "one seed", ""]
    p = "< 0.001" if gap["p_holm"] < 0.001 else f"{gap['p_holm']:.3f}"
    return [f"{gap['mean']:+.1f}", "{:+.1f} to {:+.1f}".format(*gap["interval"]), p]


def gpu_ratios() -> str:
    """Time of DeiT-Ti on a GPU, as ratios to timm's model."""
    path = RESULTS / "on_gpu_ratios_h200.json"
    content = _read(path)
    names = ("LaPE", "LaPE folded", "written out")
    lines = [f"| what | how | timm | {' | '.join(names)} |", "|---|---|---|---|---|---|"]
    for what, table in sorted(content["results"].items(), key=lambda item: item[1]["mode"]):
        for way, rows in table["ways"].items():
            cells = [f"{1e3 * rows['timm']['seconds']['median']:.3f} ms"]
            cells += [_spread(rows[name]["to_timm"]) if name in rows else "-" for name in names]
            lines.append(f"| {what} | {'CUDA graph' if way == 'graph' else way} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{_of_gpu(content)}; `{path.relative_to(ROOT)}`."])


def gpu_throughput() -> str:
    """Images a second on a GPU: basic and LaPE, and what LaPE costs in time and memory."""
    path = RESULTS / "on_gpu_throughput_h200.json"
    content = _read(path)
    lines = ["| model | what | how | basic | share | LaPE | share | time | memory |", "|---" * 9 + "|"]
    for model, table in content["results"].items():
        shown = {("inference", 1024): "eager compiled", ("training", 256): "eager compiled"}
        rows = [row for row in table["rows"] if row["way"] in shown.get((row["mode"], row["batch"]), "")]
        for row in sorted(rows, key=lambda row: (row["mode"], row["way"] != "eager")):
            cells = [f"{model} | {row['mode']}, batch {row['batch']} | {row['way']}"]
            for join in ("basic", "LaPE"):
                cells += [f"{row[join]['images_per_second']:,.0f} | {row[join]['share_of_matmul_rate']:.1%}"]
            cells += [_spread(row["LaPE"]["to_basic"]), f"{row['peak_ratio']:.4f}"]
            lines.append(f"| {' | '.join(cells).replace('%', ' %')} |")
    rates = [f"{t['matmul_flops_per_second']['best'] / 1e12:.0f}" for t in content["results"].values()]
    note = f"`torch.matmul` reached {', '.join(rates[:-1])} and {rates[-1]} TFLOP/s at best"
    return "\n".join([*lines, "", f"{_of_gpu(content)}; {note}; `{path.relative_to(ROOT)}`, with other batches."])


def gpu_steps() -> str:
    """What it is worth that a training step does not wait for its device."""
    path = RESULTS / "on_gpu_steps_h200.json"
    content = _read(path)
    found, recipe = content["results"]["images_per_second"], content["results"]["recipe"]
    pairs = list(zip(found["as it is"], found["waiting"], strict=True))
    gains = sorted(mine / waiting for mine, waiting in pairs)
    speeds = [f"{statistics.median(each):,.0f}" for each in zip(*pairs, strict=True)]
    return (
        f"`lape train` ({recipe['model']}, CIFAR-10 on the device, {recipe['amp']}, batch {recipe['batch_size']}), "
        f"images a second, median of {len(pairs)} epochs each in turn: {speeds[0]} as it is, {speeds[1]} when the "
        f"device is waited for after every step; within a pair {statistics.median(gains):.2f} "
        f"[{gains[0]:.2f}, {gains[-1]:.2f}] times as many. {_of_gpu(content)}; `{path.relative_to(ROOT)}`."
    )


def _spread(found: dict) -> str:
    return f"{found['median']:.3f} [{found['min']:.3f}, {found['max']:.3f}]"


def _of_gpu(content: dict) -> str:
    hardware, versions = content["hardware"], content["versions"]
    gpu = hardware["gpu"].split(",")[0]
    return f"{gpu} beside {hardware['cores']} cores, torch {versions['torch']}, lape {versions['lape']}"


def _cost_of_sweep() -> str:
    found = _read(RESULTS / "laboratory_cost.json")
    hardware, seconds = found["hardware"], found["processor_seconds"]
    return (
        f"**Cost.** `lape eval CHECKPOINT --sizes {' '.join(found['sizes'])}` of a DeiT-Ti for 96 pixels on "
        f"{found['images']:,} CIFAR images takes {seconds:.0f} s of one core, {seconds / 2:.0f} s of two "
        f"({hardware['processor']}, processor time; `benchmarks/results/laboratory_cost.json`, by "
        f"`{found['made_by']}`)."
    )


PAGES = {
    ROOT / "docs" / "trust.md": (attack,),
    ROOT / "README.md": (worth,),
    ROOT / "docs" / "converting.md": (warm_start, sound_and_video),
    ROOT / "docs" / "measured.md": (
        table_2,
        study_of_digits,
        study_of_sinusoids,
        study_of_cifar,
        study_of_cifar_full,
    ),
    ROOT / "docs" / "small-data.md": (device_path, trained_on_gpu),
    ROOT / "docs" / "dense.md": (dense,),
    ROOT / "docs" / "performance.md": (
        joins,
        variants,
        original_style,
        chain_cost,
        folded,
        input_pipeline,
        stored,
        attention,
        gpu_ratios,
        gpu_throughput,
        gpu_steps,
    ),
    ROOT / "docs" / "laboratory.md": (laboratory,),
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
