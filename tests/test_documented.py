"""Every command and every block of Python in README, CONTRIBUTING and docs runs as it stands there, at a small size.

What is not run is named in `NOT_RUN` with the reason; a block of another kind fails until it runs or is listed.
"""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from pictures import write_cifar, write_folder
from torch.distributed.launch import parse_args as parse_launch
from torch.distributed.run import parse_args as parse_torchrun
from torchvision.datasets import CIFAR10
from training import quiet, tiny

import lape
from lape.cli.app import app, run
from lape.data import sets
from lape.host import base
from lape.train.loop import train
from lape.train.state import CHECKPOINT

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
RUNNABLE = ("lape", "python", "torchrun")
ALONE = ("lape demo", "lape train", "lape hosts")  # elsewhere a bare `lape eval` names the command and is none

NOT_RUN = {  # beginning of a command -> why
    "python3 -m venv": "builds an environment: .ci/run does it",
    "pip install": "needs a package index: .ci/run does it",
    "pytest": "is what runs here",
    "make ": "is the suite, the linters, or written in the Makefile: test_surface.py looks for each target there",
    "lape export --no-fold": "a flag in a sentence",
    "lape compare --preset rivals": "trains fourteen models: test_fixed_position.py and test_sweep.py have its parts",
    "python benchmarks/tables.py": "writes these pages: test_surface.py runs it with --check",
}
MEASURES = "benchmarks/"  # minutes to days of measuring: their flags are parsed and nothing is measured


class Snippet(NamedTuple):
    page: str
    line: int
    language: str  # python or shell
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets() -> Iterator[Snippet]:
    """Fenced blocks, indented blocks that begin with a program, and inline code that does and stood in no block."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Snippet(page, text.count("\n", 0, match.start()) + 1, match[1] or "shell", match[2])
        prose = re.sub(r"^```.*?^```$", lambda match: "\n" * match[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
        for match in re.finditer(rf"(?<=\n\n) {{4}}(?:{'|'.join(RUNNABLE)}) .*\n(?: {{4}}.*\n)*", prose):
            yield Snippet(page, prose.count("\n", 0, match.start()) + 1, "shell", match[0])
        for match in re.finditer(rf"`((?:{'|'.join(RUNNABLE)}) [^`]+)`", prose):
            whole = len(match[1].split()) > 2 or match[1] in ALONE or not match[1].startswith("lape")
            if whole and match[1] not in text.replace(match[0], ""):
                yield Snippet(page, prose.count("\n", 0, match.start()) + 1, "shell", match[1])


SNIPPETS = list(snippets())
PYTHON = [snippet for snippet in SNIPPETS if snippet.language == "python"]


def commands_of(snippet: Snippet) -> list[str]:
    lines = snippet.text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.partition("  #")[0].split("&&")]
    return [" ".join(part.split()).removeprefix(".venv/bin/") for part in parts if part.strip()]


def reason(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


def test_every_snippet_runs_here_or_is_listed():
    assert {snippet.language for snippet in SNIPPETS} == {"python", "shell"}
    everything = [command for snippet in SNIPPETS if snippet.language == "shell" for command in commands_of(snippet)]
    for command in everything:
        assert command.split()[0] in RUNNABLE or reason(command), f"neither run nor listed: {command}"
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in everything), f"no page says {start}"
    for old in (*SMALLER, *CHANGES):
        assert any(command.startswith(old) or f" {old}" in f" {command}" for command in everything), old
    for part in GIVEN:
        assert any(part in snippet.text for snippet in PYTHON), part


# --- commands ---------------------------------------------------------------------------------------------------------

SIZE = "--input-size 32 --batch-size 4 --epochs 1 --num-workers 0 --device cpu"
NARROW = "depth=2 embed_dim=32 num_heads=2 patch_size=8"
DEIT = "--model deit_tiny_patch16_224"
DIGITS = "depth=2 embed_dim=16 num_heads=2 patch_size=2"
KEPT = "depth=2 embed_dim=16 num_heads=2 patch_size=4"  # of the checkpoint that the fixture trains
SMALLER = {  # beginning of a command -> flags that make it small
    "lape demo": "--seeds 1 --epochs 1 --long-seeds 0 --workers 1",
    "lape train --finetune": f"{SIZE} --input-size 16 --batch-size 512 {DEIT} --model-kwargs {KEPT}",
    "lape train --data-path": f"{SIZE} --model-kwargs {NARROW}",
    "lape train --model": f"{SIZE} --batch-size 512 --model-kwargs {NARROW}",
    "lape train --recipe": f"{SIZE} --schedule-epochs 1 --model-kwargs depth=1 embed_dim=32 num_heads=2",
    "lape train": f"{SIZE} --batch-size 512 --model-kwargs {KEPT}",
    "lape eval": "--device cpu",
    "lape predict": "--device cpu",
    "lape compare --output-dir": f"--epochs 1 --batch-size 512 --workers 1 --device cpu --model-kwargs {DIGITS}",
    "lape compare --recipe digits": f"--epochs 1 --batch-size 512 --model-kwargs {DIGITS}",
    "lape compare --recipe R.yaml": "--workers 1",
    "lape export": "--formats folder torch",
    "lape bench": "--image-size 32 --rounds 3 --batch-size 1 --threads 1 --device cpu --model-kwargs depth=1",
    "python main.py --eval": "--num-workers 0 --device cpu",
    "python main.py": f"{SIZE} --batch-size 512 --model-kwargs {NARROW}",
    "python -m torch.distributed.launch": f"{SIZE} --model-kwargs {NARROW}",
    "torchrun --nproc": f"{SIZE} --batch-size 512 --model-kwargs {NARROW}",
    "torchrun": f"{SIZE} --model-kwargs {NARROW}",
    "python examples/": "--steps 1 --batch-size 2 --scenes 2 2",
}
CHANGES = {  # a piece of a command -> what stands in its place
    "--recipe ...": "--recipe deit_tiny_imagenet",
    "...": "",
    "[--cifar FOLDER]": "--cifar FOLDER",
    "--global-batch 1024": "--global-batch 4",
    "--batch-size 256": "",
    "--seeds 0 1 2 3": "--seeds 0",
    "--seeds 0 1 2": "--seeds 0",
    "--workers 8": "--workers 1",
    "--device cuda": "--device cpu",
    "init_values=1e-5": f"init_values=1e-5 {NARROW}",
    "--layers 2 3 4 5 6 7 8": "--layers 1",
    "--sizes 96 128 160 224 320 224x320": "--sizes 16 24 16x24",
    "--sizes 32 48 64 64x96 80 96": "--sizes 16 24",
    "--sizes 96 128": "--sizes 16 24",
    "--corruptions all": "--corruptions all --severities 1",
    "--layers 2": "--layers 1",
    "--rival-kwargs": f"--rival-kwargs {NARROW}",
}


@pytest.fixture(scope="module")
def fewer_digits() -> Iterator[None]:
    """Half of those that train, a quarter of those that evaluate."""
    every = {"train": 2, "val": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "digits", lambda split, whole=sets.digits: tuple(a[:: every[split]] for a in whole(split)))
        patch.setattr(sets, "_STILL", {})
        yield


@pytest.fixture(scope="module")
def material(fewer_digits, tmp_path_factory) -> dict[str, str]:
    """What the placeholders of the pages stand for."""
    home = tmp_path_factory.mktemp("documented")
    images = write_folder(home / "images", train=4)
    checkpoint = train(tiny(join_type="basic", output_dir=str(home / "run")), say=quiet) and home / "run" / CHECKPOINT
    recipe = home / "recipe.yaml"
    recipe.write_text(
        "input_size: 32\nepochs: 1\nbatch_size: 4\ndevice: cpu\naa: none\nreprob: 0\nmixup: 0\ncutmix: 0\n"
    )
    photo = str(next(images.rglob("*.png")))
    same = {"CHECKPOINT": checkpoint, "C": checkpoint, "CHECKPOINT...": checkpoint, "R.yaml": recipe}
    same |= dict.fromkeys(("T2T_BASIC", "T2T_LAPE", "DEIT_BASIC", "DEIT_LAPE", "MODEL..."), checkpoint)
    same |= {"IMAGE...": photo, "PHOTO...": photo, "D": images, "M": "vit_tiny_patch16_224"}
    return {name: str(value) for name, value in same.items()}


def made_small(command: str) -> str:
    flags = next((more for start, more in SMALLER.items() if command.startswith(start)), "")
    for old, new in CHANGES.items():
        command = re.sub(rf"(?<!\S){re.escape(old)}(?!\S)", new, command)
    return f"{command} {flags}"


def start(script: Path, arguments: list[str], monkeypatch) -> None:
    """Runs a script of the repository as `python` does, in this process."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(str(script.parent))
    code: object = None
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert not code


def parse_only(parser: argparse.ArgumentParser, parse=argparse.ArgumentParser.parse_args) -> None:
    parse(parser)
    raise SystemExit


def call(words: list[str], monkeypatch) -> None:
    """One command; a launcher's own flags are parsed, and of its processes there is this one."""
    program, *rest = words
    if program == "lape":
        assert run(app, rest) == 0
        return
    if "main.py" in rest and rest[0] != "main.py":
        parse_launch(rest[2:]) if rest[0] == "-m" else parse_torchrun(rest)
        rest = rest[rest.index("main.py") :]
    if rest[0].startswith(MEASURES):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    start(ROOT / rest[0], rest[1:], monkeypatch)


DEMOS: set[str] = set()


@pytest.mark.slow
@pytest.mark.parametrize("snippet", [one for one in SNIPPETS if one.language == "shell"], ids=str)
@pytest.mark.usefixtures("drafts")
def test_the_commands_run(snippet, material, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(material)
    for command in commands_of(snippet):
        if reason(command) or command in DEMOS:
            continue
        if command.startswith("lape demo"):  # the longest, and several pages begin with it
            DEMOS.add(command)
        if "--data-set CIFAR" in command:
            given["D"] = str(write_cifar(tmp_path, CIFAR10, monkeypatch).parent)
        words = [given.get(word, word) for word in shlex.split(made_small(command))]
        call([str(ROOT / word) if word.startswith("recipes/") else word for word in words], monkeypatch)


# --- Python -----------------------------------------------------------------------------------------------------------

GIVEN = {  # part of a block -> what its page takes for given there
    'lape.apply_(model, "LaPE", warm_start=True)': "model = timm.create_model('vit_tiny_patch16_224', img_size=32)",
    "lape.register_host(OwnViT": """
class Attend(torch.nn.Module):
    num_heads = 2
    def __init__(self):
        super().__init__()
        self.value = torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.value(x)
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.attend = torch.nn.LayerNorm(8), Attend()
    def forward(self, x):
        return x + self.attend(self.before(x))
class OwnViT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.where = torch.nn.Parameter(torch.zeros(1, 17, 8))
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))
    def forward(self, tokens):
        x = tokens + self.where
        for layer in self.layers:
            x = layer(x)
        return x
""",
    "model.save_pretrained(": "model = lape.apply_(transformers.ViTForImageClassification(config))",
}


@pytest.mark.slow
@pytest.mark.parametrize("page", dict.fromkeys(snippet.page for snippet in PYTHON))
def test_the_python_runs_and_gives_what_its_comments_say(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_HOSTS", dict(base._HOSTS))  # one block registers a host
    names = {"lape": lape, "timm": timm, "torch": torch}
    for snippet in (one for one in PYTHON if one.page == page):
        exec("".join(given for part, given in GIVEN.items() if part in snippet.text), names)
        exec(compile(snippet.text, str(snippet), "exec"), names)
        out = capsys.readouterr().out
        for code, comment in re.findall(r"^(\S.*?)\s+# (.*)$", snippet.text, re.MULTILINE):
            shapes = re.findall(r"\(\d+(?:, \d+)+\)", comment)
            if code.startswith("print("):
                assert all(shape in out for shape in shapes)
                assert (comment.partition(", ...")[0] if ", ..." in comment else "") in out
            elif shapes:
                assert [str(tuple(eval(code, names).shape))] == shapes
