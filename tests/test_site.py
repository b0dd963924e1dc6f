"""The documentation site and its notebooks. `mkdocs build --strict` itself is in the Makefile and the workflow."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))


def cells(path: Path, kind: str) -> list[dict]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_every_page_is_in_the_menu_once_and_every_entry_is_a_page():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    entries = re.findall(r": ([\w/-]+\.(?:md|ipynb))$", menu, re.MULTILINE)
    assert sorted(entries) == sorted(str(path.relative_to(DOCS)) for path in (*DOCS.glob("*.md"), *NOTEBOOKS))


def test_every_public_name_is_in_the_reference():
    import lape

    described = set(re.findall(r"^::: lape\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert described == set(lape.__all__)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_their_outputs_and_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert not re.search(r"/(?:work|tmp|root|home|usr|opt)/|Traceback|\"stderr\"", text)
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert any(cell["outputs"] for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch, capsys):
    """All cells in one namespace, the trainings of two epochs; what is printed has the lines of the stored output."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in cells(path, "code"):
        source = re.sub(r"^EPOCHS = \d+$", "EPOCHS = 2", "".join(cell["source"]), flags=re.MULTILINE)
        exec(compile(source, f"{path.name}:{cell['execution_count']}", "exec"), names)
        stored = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        printed = capsys.readouterr().out
        assert [without_numbers(line) for line in printed.splitlines()] == [
            without_numbers(line) for line in stored.splitlines()
        ]
    pyplot.close("all")


def without_numbers(line: str) -> str:
    return re.sub(r"[\d.,]+", "#", line)
