"""The built wheel in an environment of its own, outside the repository: what the quick start says, word for word."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import write_folder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
SMALLER = {  # beginning of a command -> flags that make it small
    "lape demo": "--seeds 1 --epochs 1 --long-seeds 0 --workers 1",
    "lape train": "--input-size 32 --batch-size 4 --epochs 1 --num-workers 0 --device cpu "
    "--model-kwargs depth=2 embed_dim=32 num_heads=2 patch_size=8",
}
MORE = """
lape visualize O/best_checkpoint.pth --html position.html
lape recipes
lape hosts
lape version
lape completion bash
"""
IN_TURN = """
import contextlib, io, json, sys
from lape.cli.app import app, run

printed = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        printed.append((run(app, words), text.getvalue()))
print(json.dumps(printed))
"""  # one process: a start takes longer than most of these commands


def blocks(language: str) -> str:
    return "".join(re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; what it depends on is borrowed from the one that runs the tests."""
    pytest.importorskip("hatchling")
    home = tmp_path_factory.mktemp("newcomer")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", home, ROOT], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
    (site,) = (home / "venv").glob("lib/python*/site-packages")
    (wheel,) = home.glob("lape-*.whl")
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--prefix", home / "venv", "--ignore-installed", wheel], check=True
    )
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    script = home / "venv" / "bin" / "lape"
    script.write_text(re.sub(r"\A#!.*", f"#!{home / 'venv' / 'bin' / 'python'}", script.read_text()))
    return script.parent


@pytest.mark.slow
def test_the_quick_start_works_from_the_wheel(bin_folder: Path, tmp_path: Path) -> None:
    photo = next(write_folder(tmp_path / "D", train=4).rglob("*.png")).relative_to(tmp_path)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ |= {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-2000:]}"
        return done.stdout

    where = run("python", "-c", "import lape; print(lape.__file__)")
    assert where.startswith(str(bin_folder.parent)), "the wheel, not the repository"
    run("python", "-c", blocks("python"))
    commands = [line for line in (blocks("") + MORE).splitlines() if line.startswith("lape ")]
    assert len(commands) > 10
    lines = []
    for command in commands:
        small = next((flags for start, flags in SMALLER.items() if command.startswith(start)), "")
        lines.append([str(photo) if word == "IMAGE..." else word for word in f"{command} {small}".split()])
    assert run(*lines[0]).strip(), "the script that pip installs"
    printed = json.loads(run("python", "-c", IN_TURN, json.dumps([words[1:] for words in lines[1:]])))
    for words, (code, text) in zip(lines[1:], printed, strict=True):
        assert (code, bool(text.strip())) == (0, True), words
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"D", "O", "exported", "lape-demo", "my-model", "pictures", "position.html"}
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        "folder",
        "model.pt2",
        "model.onnx",
        "export.json",
    }
