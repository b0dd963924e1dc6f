"""What others rely on: public names, a lean import, and a README that is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lape

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lape"

PUBLIC = """
Anatomy CheckpointError DataError Description Host LapeError Layout UnsupportedModelError apply_ correlation
create_model describe explore fold_ grid hosts last_position load load_reference_state_dict num_prefix_tokens
position_bias positions push_to_hub read_checkpoint register_host remove_ save to_reference_state_dict
""".split()


def test_public_names_are_frozen():
    assert sorted(lape.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(lape, name).__doc__, f"{name} has no docstring"


def test_import_is_lean():
    heavy = "timm torchvision transformers matplotlib plotly pydantic cyclopts PIL yaml rich pandas scipy".split()
    code = f"import sys, lape; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_idea_is_short_and_knows_no_host():
    text = (SOURCE / "norm.py").read_text()
    assert len(text.splitlines()) <= 100
    assert not re.search(r"timm|transformers|torchvision", text)


def test_no_forward_of_a_host_is_copied():
    for path in SOURCE.rglob("*.py"):
        if path.parent.name != "models":  # those are our own
            assert not re.search(r"self\.(attn|mlp)\(", path.read_text()), path


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_paths_named_in_pages_exist(page):
    text = (ROOT / page).read_text()
    named = set(
        re.findall(r"`((?:src|tests|docs|recipes|benchmarks|\.ci)/[\w./-]+|[\w.-]+\.(?:py|md|toml|yaml|cff))`", text)
    )
    named |= set(re.findall(r"\]\(([^)#:]+)\)", text))
    assert named
    written_by_runs = {"report.md"}
    missing = [path for path in named - written_by_runs if not (ROOT / path).exists()]
    assert not missing


def test_pages_link_to_existing_files_only_in_their_images():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_nothing_of_this_machine_is_in_the_repository():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(^|[^\w.-])/(work|farm|root)/")
    for name in tracked.stdout.split():
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".yaml", ".toml", ".json", ".txt", ".cff"}
            and path.exists()
            and ".ci" not in name
        ):
            assert not pattern.search(path.read_text()), name


def test_tables_of_the_readme_equal_the_result_files():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr or "run: python benchmarks/tables.py"
