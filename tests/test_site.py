"""The documentation site and its notebooks. `mkdocs build --strict` itself is in the Makefile and the workflow."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))


NARROW = {"patch_size": 2, "embed_dim": 16, "depth": 6, "num_heads": 2}


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
    """All cells in one namespace, the trainings of two epochs of narrow models; the lines are those that are stored."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in cells(path, "code"):
        source = re.sub(r"^EPOCHS = \d+$", "EPOCHS = 2", "".join(cell["source"]), flags=re.MULTILINE)
        source = source.replace('Recipe.from_yaml("digits", ', f'Recipe.from_yaml("digits", model_kwargs={NARROW}, ')
        exec(compile(source, f"{path.name}:{cell['execution_count']}", "exec"), names)
        stored = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        printed = capsys.readouterr().out
        assert [without_numbers(line) for line in printed.splitlines()] == [
            without_numbers(line) for line in stored.splitlines()
        ]
    pyplot.close("all")


def without_numbers(line: str) -> str:
    return re.sub(r"[\d.,]+", "#", line)


# --- figures in sentences ---------------------------------------------------------------------------------------------

QUOTING = ("README.md", "docs/measured.md", "docs/small-data.md")
FIGURE = r"(?<![\w.])\d+\.\d+(?![\w.]*\w)"
INTERVAL = r"[+-][\d.]+ to [+-][\d.]+"
NO_RESULTS = {  # phrases with a figure that no run measured -> what it is
    "Python 3.11": "a version",
    "Apache-2.0": "a licence",
    "CC BY 4.0": "a licence",
    "deviation of 0.02": "timm's start of a table",
    "at 0.02": "timm's start of a table",
    "between 0.02 and 1": "timm's start of a table",
    "at 0.2": "ViT-Lite's start of a table",
    "is 0.707": "the root mean square of sines",
    "1.14 GiB": "100,000 · 3 · 64 · 64 bytes",
}


def sections(page: Path) -> dict[str, tuple[str, str]]:
    """Of each anchor of a page: the sentences, and what a script wrote."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles, bodies = re.findall(r"^#+ (.*)$", text, re.MULTILINE), re.split(r"^#+ .*$", text, flags=re.MULTILINE)[1:]
    parts = {}
    for title, body in zip(titles, bodies, strict=True):
        block = re.compile(r"<!-- (\w+): written by (.*?)<!-- end of \1 -->", re.DOTALL)
        written = "".join(match[2] for match in block.finditer(body))
        anchor = re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()))
        parts[anchor] = (re.sub(r"`[^`]*`", "", block.sub("\n\n", body)), written)
    return parts


def from_files() -> set[str]:
    """Figures that no table shows: how layers differ, and what others published, as the recipes have it."""
    layers = json.loads((ROOT / "benchmarks/results/worth_layers.json").read_text())
    changes = layers["change_of_cosine_from_layer_to_layer"]
    figures = {
        f"{layers['accuracy']:.1f}",
        f"{layers['first_to_last']:.2f}",
        f"{min(changes):.3f}",
        f"{max(changes):.3f}",
    }
    heads = " ".join(path.read_text() for path in (ROOT / "src/lape/recipes").glob("*_imagenet.yaml"))
    heads = re.sub(r"\s+#?\s*", " ", heads)
    for pattern in (r"top-1 ([\d.]+) % with LaPE[^,]*, ([\d.]+) %", r"measured ([\d.]+) (?:with )?and ([\d.]+)"):
        gaps = [float(ours) - float(basic) for ours, basic in re.findall(pattern, heads)]
        assert len(gaps) >= 6
        figures |= {f"{min(gaps):.1f}", f"{max(gaps):.1f}"}
    return figures


def is_in(figure: str, shown: set[str]) -> bool:
    """Whether it is one of them, or one of them rounded."""
    digits = len(figure.partition(".")[2])
    longer = (value for value in shown if len(value.partition(".")[2]) >= digits)
    return any(abs(float(value) - float(figure)) <= 0.5 * 10**-digits + 1e-9 for value in longer)


@pytest.mark.parametrize("name", QUOTING)
def test_figures_in_sentences_stand_in_the_tables_that_they_are_about(name):
    """In those of their section or of the sections that the paragraph links to; an interval only as a whole."""
    page, computed = ROOT / name, from_files()
    for anchor, (sentences, written) in sections(page).items():
        for paragraph in re.split(r"\n\s*\n|\n(?=- |\d+\. |\|)", sentences):
            links = re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", paragraph)
            tables = written + "".join(
                sections((page.parent / at).resolve() if at else page)[to][1] for at, to in links
            )
            intervals = set(re.findall(INTERVAL, tables))
            shown = set(re.findall(FIGURE, re.sub(rf"{INTERVAL}|± [\d.]+", "", tables))) | computed
            text = " ".join(re.sub(r"\]\([^)]*\)", "]", paragraph).split())
            for known in (*intervals, *NO_RESULTS):
                text = re.sub(rf"(?<![\w.]){re.escape(known)}(?![\w.]*\w)", "", text)
            wrong = [figure for figure in re.findall(FIGURE, text) if not is_in(figure, shown)]
            assert not wrong, f"{name}#{anchor}: {wrong} in {text[:100]!r}"


def test_every_exception_stands_in_a_sentence():
    everything = " ".join(sentences for page in QUOTING for sentences, _ in sections(ROOT / page).values())
    assert all(phrase in " ".join(everything.split()) for phrase in NO_RESULTS)
