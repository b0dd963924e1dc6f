"""What a comparison leaves behind: results.json, report.md, curves.png and report.html."""

import html
import io
import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lape.recipe import Recipe
from lape.study.numbers import Cell, other_table, table
from lape.study.report import accuracy_curves, markdown_table

FILES = ("results.json", "report.md", "curves.png")
PAGE = "report.html"  # with the explorer inside; left out when no model has a position


def cell_folder(folder: Path, recipe: Recipe) -> Path:
    """Where the result of one training lies."""
    model = recipe.model.replace("/", "_")
    return folder / "cells" / f"{model}.{recipe.pe}.{recipe.join_type}.seed{recipe.seed}"


def _write_text(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def write(folder: Path, results: dict[str, Any], cells: Sequence[Cell]) -> list[Path]:
    """Writes `FILES` and `PAGE` whole; returns what was written."""
    from lape.files.atomic import write_atomically

    panels: dict[str, dict[str, list[Any]]] = {}
    for cell in cells:
        panel = panels.setdefault(f"{cell.model}, {cell.pe}", {})
        panel.setdefault(cell.run.join, []).append(cell.run.history)
    picture = io.BytesIO()
    accuracy_curves(panels).savefig(picture, format="png", dpi=130)
    texts = {"results.json": json.dumps(results, indent=1), "report.md": "\n".join(_markdown(results))}
    for name, text in texts.items():
        write_atomically(folder / name, partial(_write_text, text + "\n"))
    write_atomically(folder / "curves.png", lambda file: _write_bytes(picture.getvalue(), file))
    files = [folder / name for name in FILES]
    page = _page(folder, results, cells, picture.getvalue())
    return files if page is None else [*files, page]


def _write_bytes(data: bytes, file: BinaryIO) -> None:
    file.write(data)


HOW_TO_READ = (
    "Accuracy on the test images in percent, mean ± standard deviation over the seeds. Compared are the values after "
    "the last epoch; the best epoch was chosen on the test images, so it flatters every row and is not compared. The "
    "difference is taken seed by seed; p is of Student's paired t-test."
)
NOT_TRAINED_HERE = "Not trained here: nothing says that budget, data and recipe were the same."


def _markdown(results: dict[str, Any]) -> Iterator[str]:
    yield f"# Comparison: {results['data']}\n"
    yield HOW_TO_READ + "\n"
    yield markdown_table(table(results)) + "\n"
    yield from (f"- {sentence}" for sentence in results["sentences"])
    yield "\n![Test accuracy by epoch](curves.png)\n"
    if results["others"]:
        yield f"## Other runs\n\n{NOT_TRAINED_HERE}\n\n{markdown_table(other_table(results))}\n"
    yield "## How it was run\n"
    yield from (f"- {line}" for line in _how(results))


def _how(results: dict[str, Any]) -> Iterator[str]:
    hardware, versions = results["hardware"], results["versions"]
    yield f"Recipe of all: {', '.join(f'{name}={value!r}' for name, value in results['recipe'].items())}"
    if results.get("rivals"):
        yield f"Rivals, as they are: {', '.join(results['rivals']['models'])}, {results['rivals']['model_kwargs']}"
    yield from (f"Left out: {m['model']}, {m['join']} with {m['pe']}: {m['why']}" for m in results["meaningless"])
    gpus = f", on {', '.join(results['gpus'])}" if results["gpus"] else ""
    yield f"Trainings: {results['workers']} at a time, one thread each{gpus}"
    yield f"Machine: {hardware['processor']}, {hardware['cores']} cores, {hardware['system']}"
    yield f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}"
    yield f"Commit: {results['commit'] or 'not a git checkout'}"
    yield f"Time: {sum(cell['seconds'] for cell in results['cells']):.0f} s of training. Every epoch: results.json"


def _page(folder: Path, results: dict[str, Any], cells: Sequence[Cell], picture: bytes) -> Path | None:
    """The report as HTML, the models of the first seed in the explorer below it."""
    from lape.look.explorer.explorer import explore
    from lape.position import KINDS

    shown: dict[str, Path] = {}
    several = len({cell.model for cell in cells}) > 1
    for cell in cells:
        name = f"{cell.run.join}, {cell.pe}" + (f", {cell.model}" if several else "")
        kind = KINDS[cell.pe]
        drawn = cell.run.drawable and (kind.is_table or kind.is_bias)
        if drawn and name not in shown and len(shown) < 6:
            recipe = Recipe(model=cell.model, pe=cell.pe, join_type=cell.run.join, seed=cell.run.seed)
            shown[name] = cell_folder(folder, recipe) / "model"
    if not shown:
        return None
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in results["sentences"])
    how = "".join(f"<li>{html.escape(line)}</li>" for line in _how(results))
    others = ""
    if results["others"]:
        others = f"<h2>Other runs</h2><p>{NOT_TRAINED_HERE}</p>{_html_table(other_table(results))}"
    image = f"data:image/png;base64,{b64encode(picture).decode()}"
    intro = (
        f'<div class="report"><p>{html.escape(HOW_TO_READ)}</p>{_html_table(table(results))}<ul>{said}</ul>'
        f'<figure><img alt="Test accuracy by epoch" src="{image}"><figcaption>Test accuracy by epoch: mean of the '
        f"seeds, band from the lowest to the highest.</figcaption></figure>{others}"
        f"<h2>How it was run</h2><ul>{how}</ul>"
        f"<h2>What position became</h2><p>The models of seed {cells[0].run.seed}"
        f"{', the first six' if len(shown) == 6 else ''}.</p></div>"
    )
    title = f"Comparison: {results['data']}"
    return explore(shown, folder / PAGE, title=title, intro=intro)


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plain_table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
