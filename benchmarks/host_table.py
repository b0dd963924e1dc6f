"""Writes docs/hosts.md: every architecture of timm's transformer modules, converted or refused with the reason.

    python benchmarks/host_table.py        # about a minute on two cores; models without memory (meta device)

Each architecture is created as `timm.create_model(name)` makes it and given to `lape.apply_(model)`; one without a
position table of its own is tried again with pe="learnable". The same rows are written as JSON, with the versions used.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import timm
import torch

import lape

ROOT = Path(__file__).parents[1]
MODULES = (
    "vision_transformer deit vision_transformer_hybrid vitamin beit cait eva vision_transformer_relpos naflexvit "
    "vision_transformer_sam swin_transformer volo xcit crossvit mobilevit pit qwen3_vit"
).split()


@dataclass(frozen=True)
class Row:
    """What became of one architecture."""

    module: str
    name: str
    status: Literal["converted", "converted with pe='learnable'", "refused"]
    text: str  # what was done, or the reason
    host: str = ""
    blocks: int = 0
    grid: tuple[int, int] | None = None
    prefix_tokens: int = 0


def examine(module: str, name: str) -> Row:
    """Creates the architecture on the meta device and converts it."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's, on deprecated names
        model = timm.create_model(name)
    pe, status = None, "converted"
    try:
        try:
            lape.apply_(model, "LaPE")
        except lape.UnsupportedModelError:
            raise
        except lape.LapeError:
            pe, status = "learnable", "converted with pe='learnable'"
            lape.apply_(model, "LaPE", pe)
    except lape.LapeError as error:
        return Row(module, name, "refused", _reason(error))
    done = lape.describe(model)
    assert done.joined == done.blocks, name
    assert not done.input_addition, name
    bare = done.prefix_tokens - done.positioned_prefix_tokens
    plural = "" if done.prefix_tokens == 1 else "s"
    prefix = f"{done.prefix_tokens} prefix token{plural}{f' ({bare} without a position)' if bare else ''}"
    text = f"{done.joined} blocks, grid {done.grid[0]} x {done.grid[1]}, {prefix}"
    text += f", {done.beside} kept" if done.beside else ""
    return Row(module, name, status, text, done.host, done.joined, done.grid, done.prefix_tokens)  # type: ignore[arg-type]


def _reason(error: Exception) -> str:
    """The message without its advice, which is the same for all."""
    return str(error).split("; timm blocks that can be converted")[0].split("; supported:")[0]


def page(rows: list[Row], versions: dict[str, str]) -> str:
    """The Markdown page: totals, then one table a module with equal results in one line."""
    total = Counter(row.status for row in rows)
    lines = [
        "# Which timm architectures can be converted",
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


if __name__ == "__main__":
    main()
