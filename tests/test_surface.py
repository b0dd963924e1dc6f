"""What others rely on: public names, a lean import, and a README that is true."""

import dataclasses
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from cyclopts import App

import lape
from lape.cli.app import app, original
from lape.data.augment import EvalTransform
from lape.files.export import ExportResult
from lape.study.compare import Study
from lape.study.sweep import Outcome
from lape.train.evaluate import Metrics, Prediction
from lape.train.loop import TrainResult

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lape"

PUBLIC = """
Anatomy Checkpoint CheckpointError DataError Description Features Host LapeError Layout Suggestion UnsupportedModelError
apply_ correlation create_model debias_ describe explore fold_ grid hosts last_position load load_reference_state_dict
num_prefix_tokens position_bias positions probe push_to_hub read_checkpoint register_host remove_ save suggest_host
to_reference_state_dict
""".split()


def test_public_names_are_frozen():
    assert sorted(lape.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(lape, name).__doc__, f"{name} has no docstring"


def test_fields_of_what_users_get_are_documented_where_help_shows_them():
    results = (TrainResult, Metrics, Prediction, ExportResult, Outcome, Study, EvalTransform)
    for cls in (*(getattr(lape, name) for name in PUBLIC), *results):
        for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
            assert re.search(rf"\b{field.name}\b", cls.__doc__), f"{cls.__name__}.{field.name}"


def test_import_is_lean():
    heavy = "timm torchvision transformers matplotlib plotly pydantic cyclopts PIL yaml rich pandas scipy".split()
    code = f"import sys, lape; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_idea_is_short_and_knows_no_host():
    text = (SOURCE / "core/norm.py").read_text()
    assert len(text.splitlines()) <= 100
    assert not re.search(r"timm|transformers|torchvision", text)


def test_no_forward_of_a_host_is_copied():
    for path in SOURCE.rglob("*.py"):
        if path.parent.name != "models":  # those are our own
            assert not re.search(r"self\.(attn|mlp)\(", path.read_text()), path


PAGES = ["README.md", "CONTRIBUTING.md"]
WRITTEN = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
WRITTEN_BY_RUNS = {"report.md", "results.json", "run.json", "log.txt"}


OF_OTHERS = {  # torchrun's, ruff's, pytest's, mypy's, docker's, of similarity_visualize.py and of scale_model.py
    *("--nproc-per-node", "--master-port", "--use-env", "--check", "--ckpt-path", "--dist", "--strict"),
    *(
        "--local-addr",
        "--max-restarts",
        "--nnodes",
        "--standalone",
        "--build-arg",
        "--gpus",
        "--rm",
        "--shm-size",
        "--user",
    ),
    *("--rdzv-backend", "--rdzv-conf", "--rdzv-endpoint", "--rdzv-id", "--help", "--cores"),
}


def subcommands() -> list[App]:
    return [app[name] for name in app if not name.startswith("-")]


def flags_of(command: App) -> set[str]:
    arguments = command.assemble_argument_collection(default_parameter=app.default_parameter)
    return {name for argument in arguments for name in argument.names}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_paths_named_in_pages_exist(page):
    quoted = set(re.findall(r"`([^`\s]+)`", text_of(page)))
    folders = r"(?:src|tests|docs|recipes|benchmarks|examples|\.ci|\.github)/[\w./-]*"
    named = {path for path in quoted if re.fullmatch(rf"{folders}|[\w.-]+\.(?:py|md|toml|yaml|json|cff|txt)", path)}
    named |= set(re.findall(r"\]\(([^)#:]+)\)", text_of(page)))
    assert named
    missing = [path for path in named - WRITTEN_BY_RUNS if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_commands_named_in_pages_exist(page):
    """Commands of `lape`, extras of the package, targets of make, and scripts."""
    text = text_of(page)
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([\w-]+)", text)) <= targets
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    for names in re.findall(r"pip install (?:-e )?'[\w.]+\[([\w,]+)\]'", text):
        assert set(names.split(",")) <= set(extras)
    for script in re.findall(r"(?:python|torchrun|nproc_per_node=\d) ([\w./]+\.py)", text):
        assert (ROOT / script).exists(), script
    for words in re.findall(r"(?:`|bin/)lape ((?:[a-z-]+ \| )*[a-z-]+[^`\n]*)", text):
        for name in words.replace("|", " ").split()[: words.count("|") + 1]:
            assert name.startswith("--") or name in app, f"lape {name}"


@pytest.mark.parametrize("page", [*PAGES, "SECURITY.md", "CHANGELOG.md", *WRITTEN])
def test_flags_named_in_pages_exist(page):
    """Of `lape`, of the scripts beside it, or of another program."""
    scripts = "".join(path.read_text() for name in ("benchmarks", "examples") for path in (ROOT / name).glob("*.py"))
    known = set().union(*map(flags_of, (original, *subcommands()))) | set(re.findall(r"\"(--[a-z][\w-]*)\"", scripts))
    text = re.sub(r"<iframe.*?>", "", text_of(page), flags=re.DOTALL)
    named = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert not named - known - OF_OTHERS


@pytest.mark.parametrize("page", ["README.md", *WRITTEN])
def test_links_of_pages_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", text_of(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor and path.name != "api.md":  # whose headings are made of names
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles], anchor


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {lape.__version__}\n" in text_of("CITATION.cff")
    assert re.search(r"^## (\S+)", text_of("CHANGELOG.md"), re.MULTILINE)[1] == lape.__version__
    assert app.version == lape.__version__


def test_constraints_name_every_direct_dependency_once():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    direct = {line.split(">")[0] for line in lines if not line.startswith("lape[")}
    pinned = [line.split("==")[0] for line in text_of("constraints.txt").splitlines() if not line.startswith("#")]
    assert sorted(pinned) == sorted(direct)


def test_hooks_and_the_makefile_run_the_linters_of_ci():
    def linters(file: str, start: str) -> set[str]:
        found = re.findall(rf"{start}((?:ruff|mypy)\b[^>&\n]*)", text_of(file).replace('"', ""))
        return {line.replace("--force-exclude", "").rstrip(" .") for line in found}

    hooks, gate = linters(".pre-commit-config.yaml", r"entry: \.venv/bin/"), linters(".ci/run", r"\$venv/bin/")
    assert linters("Makefile", r"\$\(BIN\)/") == hooks == gate == {"ruff check", "ruff format --check", "mypy"}
    settings = tomllib.loads(text_of("pyproject.toml"))["tool"]["pytest"]["ini_options"]
    markers = {line.partition(":")[0] for line in settings["markers"]}
    assert all(f"`{marker}`" in text_of("CONTRIBUTING.md") for marker in markers)


def test_tables_of_the_readme_equal_the_result_files():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr or "run: python benchmarks/tables.py"
