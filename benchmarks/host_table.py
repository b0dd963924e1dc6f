"""Writes docs/hosts.md and docs/hosts-others.md: what was converted, and what was refused with the reason.

    python benchmarks/host_table.py        # about a minute on two cores; models without memory (meta device)

Every architecture of timm's transformer modules, and every vision model of transformers and every transformer of
torchvision, is created as its library makes it and given to `lape.apply_(model)`; one without a position of its own is
tried again with pe="learnable". The same rows are written as JSON, with the versions used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

import lape
from lape.host.base import without_values

ROOT = Path(__file__).parents[1]
OTHERS = "models of transformers and torchvision"
MODULES = (
    "vision_transformer deit vision_transformer_hybrid vitamin beit cait eva vision_transformer_relpos naflexvit "
    "vision_transformer_sam swin_transformer swin_transformer_v2 swin_transformer_v2_cr volo xcit crossvit mobilevit "
    "pit qwen3_vit"
).split()
TASKS = (  # transformers' own lists of vision models, by what they do
    "IMAGE IMAGE_CLASSIFICATION BACKBONE MASKED_IMAGE_MODELING SEMANTIC_SEGMENTATION INSTANCE_SEGMENTATION "
    "UNIVERSAL_SEGMENTATION OBJECT_DETECTION ZERO_SHOT_OBJECT_DETECTION DEPTH_ESTIMATION "
    "ZERO_SHOT_IMAGE_CLASSIFICATION MASK_GENERATION IMAGE_TO_IMAGE KEYPOINT_DETECTION VIDEO_CLASSIFICATION"
).split()


@dataclass(frozen=True)
class Row:
    """What became of one architecture."""

    module: str
    name: str
    status: Literal["converted", "converted with pe='learnable'", "refused", "not created"]
    text: str  # what was done, or the reason
    host: str = ""
    blocks: int = 0
    grid: tuple[int, ...] | None = None
    prefix_tokens: int = 0


GIVEN = {"swin_b": (56, 56), "swin_s": (56, 56), "swin_t": (56, 56)}  # grids that a user names, for 224 x 224 pixels
NEEDED: dict[str, dict[str, Any]] = {  # without which a library's default configuration is no model
    "BeitForSemanticSegmentation": {"out_indices": [3, 5, 7, 11]},
    "Sapiens2ForSemanticSegmentation": {
        "head_config": {"upsample_out_channels": [64], "upsample_kernel_sizes": [4], "conv_out_channels": [64]}
        | {"conv_kernel_sizes": [1]}
    },
}


def examine(module: str, name: str, create: Callable[[str], nn.Module] = timm.create_model) -> Row:
    """Creates the architecture on the meta device and converts it."""
    with without_values(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's, on deprecated names
        model = create(name)
    pe, status = None, "converted"
    try:
        try:
            lape.apply_(model, "LaPE", grid=GIVEN.get(name))
        except lape.UnsupportedModelError:
            raise
        except lape.LapeError:
            pe, status = "learnable", "converted with pe='learnable'"
            lape.apply_(model, "LaPE", pe, grid=GIVEN.get(name))
    except lape.LapeError as error:
        return Row(module, name, "refused", _reason(error))
    done = lape.describe(model)
    assert done.joined == done.blocks, name
    assert not done.input_addition, name
    stages = lape.convert.converted.conversion_of(model).anatomy.stages
    bare = done.prefix_tokens - done.positioned_prefix_tokens
    plural = "" if done.prefix_tokens == 1 else "s"
    prefix = f"{done.prefix_tokens} prefix token{plural}{f' ({bare} without a position)' if bare else ''}"
    text = f"{done.joined} blocks, grid {' x '.join(map(str, done.grid))}, {prefix}"
    text += f" (named: grid={done.grid})" if name in GIVEN else ""
    text += f", {len(stages)} stages" if stages else ""
    text += f", {done.beside} kept" if done.beside else ""
    text += ", on its relative position bias (pe='learnable': a table beside it)" if done.pe == "2D_RPE" else ""
    return Row(module, name, status, text, done.host, done.joined, done.grid, done.prefix_tokens)  # type: ignore[arg-type]


def _first_sentence(error: Exception) -> str:
    text = re.sub(r"'?https?://\S+", "", " ".join(str(error).split()))
    return re.split(r"(?<=[a-z.])\. |: `pip|, specifying", text)[0][:160]


def _reason(error: Exception) -> str:
    """The message without its advice and the model's own name, which are the same for all."""
    text = str(error).split("; timm blocks that can be converted")[0].split("; supported are")[0]
    text = re.sub(r"^\S+ is not a supported model$", "no model inside is supported", text)
    return re.sub(r"^\S+ is not a supported model: ", "", text)


def others() -> list[Row]:
    """The vision models of transformers with their default configuration, and torchvision's transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torchvision.models
    import transformers
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()

    def create(name: str) -> nn.Module:
        cls = getattr(transformers, name)
        model: nn.Module = cls(cls.config_class(**NEEDED.get(name, {})))
        return model

    def row(module: str, name: str, create: Callable[[str], nn.Module]) -> Row:
        try:
            with without_values(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = create(name)
        except (ImportError, OSError, TypeError, ValueError, RuntimeError) as error:  # the library's own
            return Row(module, name, "not created", _first_sentence(error))
        return examine(module, name, lambda _: model)

    mapped = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in TASKS]
    entries = [entry for mapping in mapped for entry in mapping.values()]
    names = [name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)]
    rows = [row("transformers", name, create) for name in dict.fromkeys(names)]
    images = torchvision.models.list_models(torchvision.models, include=["vit*", "swin*", "maxvit*"])
    for name in [*images, *torchvision.models.list_models(include=["mvit*"])]:
        rows.append(row("torchvision", name, torchvision.models.get_model))
    return rows


def page(rows: list[Row], versions: dict[str, str], title: str = "timm architectures") -> str:
    """The Markdown page: totals, then one table a module with equal results in one line."""
    total = Counter(row.status for row in rows)
    lines = [
        f"# Which {title} can be converted",
        "",
        "Written by `benchmarks/host_table.py`; do not edit. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        f"{len(rows)} architectures: " + ", ".join(f"{count} {status}" for status, count in total.items()) + ".",
        "",
        "*converted*: `lape.apply_(model)` works as it is. *converted with pe='learnable'*: the model has no position",
        "table of its own; name a kind, `lape.apply_(model, pe='learnable')`. *refused*: the reason is given.",
    ]
    if "not created" in total:
        lines.append("*not created*: the library could not, with its own defaults, what is installed and no network.")
    for module in dict.fromkeys(row.module for row in rows):
        groups: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if row.module == module:
                groups.setdefault((row.status, row.text), []).append(row.name)
        lines += ["", f"## {module}", "", "| architectures | status | what was done, or why not |", "|---|---|---|"]
        lines += [
            f"| {', '.join(f'`{name}`' for name in names)} | {status} | {text} |"
            for (status, text), names in sorted(groups.items())
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="holds docs/ and benchmarks/results/")
    parser.add_argument("--modules", nargs="*", default=MODULES, choices=MODULES)
    given = parser.parse_args()
    rows = [examine(module, name) for module in given.modules for name in timm.list_models(module=module)]
    versions = {
        "timm": timm.__version__,
        "torch": torch.__version__,
        "lape": lape.__version__,
        "Python": platform.python_version(),
    }
    (given.output_dir / "docs").mkdir(parents=True, exist_ok=True)
    (given.output_dir / "docs" / "hosts.md").write_text(page(rows, versions))
    results = given.output_dir / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    payload = {"versions": versions, "architectures": [asdict(row) for row in rows]}
    (results / "hosts_timm.json").write_text(json.dumps(payload, indent=1) + "\n")
    print(Counter((row.status) for row in rows))

    import torchvision
    import transformers

    rows = others()
    versions = {"transformers": transformers.__version__, "torchvision": torchvision.__version__, **versions}
    (given.output_dir / "docs" / "hosts-others.md").write_text(page(rows, versions, OTHERS))
    payload = {"versions": versions, "architectures": [asdict(row) for row in rows]}
    (results / "hosts_others.json").write_text(json.dumps(payload, indent=1) + "\n")
    print(Counter((row.status) for row in rows))


if __name__ == "__main__":
    main()
