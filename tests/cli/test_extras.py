"""What `pip install lape` alone can do, and the one line that says which extra is missing."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT = """
import json, os, sys
from importlib.machinery import PathFinder

hidden = json.loads(sys.argv[1])

class Others(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Others
import timm  # and torch, once; nothing of lape

for line in sys.stdin:
    hidden, code, arguments, streams = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
    sys.exit()
"""
TIMM_BRINGS = {"torchvision", "pillow", "pyyaml"}  # itself, or by torchvision
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def packages(*extras: str) -> set[str]:
    """What extras ask for, by the names of packages."""
    return {line.split(">")[0] for extra in extras for line in EXTRAS[extra]}


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """run(hidden, code, *arguments): Python code where some packages cannot be imported.

    Each in a fork of one new interpreter, in which nothing but what all of them may have is imported.
    """
    never = sorted(packages("train", "plot", "huggingface", "export") - TIMM_BRINGS)
    command = [sys.executable, "-c", WITHOUT, json.dumps(never)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def ask(hidden: set[str], code: str, *arguments: str) -> Done:
            assert server.stdin is not None
            assert server.stdout is not None
            streams = [tmp_path_factory.mktemp("streams") / name for name in ("out", "err")]
            print(json.dumps([sorted(hidden), code, arguments, list(map(str, streams))]), file=server.stdin, flush=True)
            return Done(int(server.stdout.readline()), *(path.read_text() for path in streams))

        yield ask


TINY = """
import sys, timm, torch, lape

def tiny(join):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=32, num_classes=3)
    return lape.apply_(model, join=join).eval()
"""


@pytest.mark.slow
def test_four_packages_convert_look_save_and_fold(run, tmp_path):
    code = """
for join in ("basic", "share", "LaPE"):
    model = tiny(join)
    lape.save(model, sys.argv[1])
    loaded = lape.load(sys.argv[1]).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert lape.positions(loaded).shape == (2, 5, 32) and lape.correlation(loaded).shape == (2, 4, 4)
    lape.describe(loaded)
    folded = lape.fold_(loaded)
    assert torch.allclose(folded(images), model(images), atol=1e-5)
    lape.save(folded, sys.argv[1])
    lape.load(sys.argv[1])
    lape.remove_(model)
print("done")
"""
    hidden = packages("train", "plot", "huggingface", "export") - TIMM_BRINGS
    done = run(hidden, TINY + code, str(tmp_path))
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.slow
def test_figures_need_plot_alone(run, tmp_path):
    """Of a model in memory, the explorer and the pictures; pyplot and a display are left alone."""
    code = """
from lape.look.figures import visualize
from lape.look.options import DrawOptions
model = tiny("LaPE")
assert lape.explore({"LaPE": model}, sys.argv[1] + "/page.html").stat().st_size > 0
visualize(model, sys.argv[1], DrawOptions(model_name="m", layers=(0,), dpi=40))
assert "matplotlib.pyplot" not in sys.modules
"""
    done = run(packages("train", "huggingface", "export") - packages("plot") - TIMM_BRINGS, TINY + code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / "m" / f"overview.{kind}").exists() for kind in ("pdf", "png", "svg"))


CALLS = {
    "matplotlib": ("plot", "from lape.look.explorer.page import colours; colours()"),
    "scipy": ("plot", "from lape.look import similarity as s; s.monotonicity(lape.correlation(tiny('LaPE')), (2, 2))"),
    "onnx": (
        "export",
        "from lape.files import export as e; "
        "e.export(tiny('LaPE'), sys.argv[1], images_BCHW=torch.randn(2, 3, 32, 32), formats=('onnx',))",
    ),
    "pydantic": ("train", "from lape.recipe import Recipe"),
    "transformers": (
        "huggingface",
        "from lape.convert import apply as a; a.build('transformers', 'ViTModel', {}, 'LaPE', None)",
    ),
}


@pytest.mark.slow
def test_calls_say_which_extra_is_missing(run, tmp_path):
    code = """
import json
for call in json.loads(sys.argv[2]):
    try:
        exec(call)
    except lape.LapeError as error:
        print(error)
"""
    calls = json.dumps([call for _, call in CALLS.values()])
    done = run(set(CALLS), TINY + code, str(tmp_path), calls)
    lines = [line for line in done.stdout.splitlines() if "is not installed" in line]
    assert len(lines) == len(CALLS), done.stderr
    for line, (package, (extra, _)) in zip(lines, CALLS.items(), strict=True):
        assert line.startswith(f"{package} is not installed: pip install 'lape[{extra}]'")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("cyclopts", "train", "lape --help"),
        ("pydantic", "train", "main.py --help"),
        ("cyclopts", "train", "similarity_visualize.py --help"),
        ("matplotlib", "plot", "lape visualize nothing.pth --save-dir DIR"),
        ("matplotlib", "plot", "lape demo --output-dir DIR"),
        ("pyarrow", "data", "lape check-data PARQUET"),
    ],
)
def test_a_command_says_so_in_one_line_and_exits_with_2(run, package, extra, command, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"")
    script, *arguments = (
        command.replace("DIR", str(tmp_path / "new")).replace("PARQUET", str(tmp_path / "data")).split()
    )
    start = "run_module('lape'" if script == "lape" else f"run_path({str(ROOT / script)!r}"
    done = run({package}, f"import runpy\nrunpy.{start}, run_name='__main__')", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {package} is not installed: pip install 'lape[{extra}]'\n"
    assert not (tmp_path / "new").exists()
