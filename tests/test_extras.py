"""What `pip install lape` alone can do, and the one line that says which extra is missing."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys
from importlib.machinery import PathFinder

hidden = sys.argv.pop(1).split(",")

class Others(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Others
"""
TIMM_BRINGS = {"torchvision", "pillow", "pyyaml"}  # itself, or by torchvision
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def packages(*extras: str) -> set[str]:
    """What extras ask for, by the names of packages."""
    return {line.split(">")[0] for extra in extras for line in EXTRAS[extra]}


def run(hidden: set[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new interpreter that cannot import some packages."""
    command = [sys.executable, "-c", WITHOUT + code, ",".join(sorted(hidden)), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


TINY = """
import timm, torch, lape

def tiny(join):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=32, num_classes=3)
    return lape.apply_(model, join=join).eval()
"""


@pytest.mark.slow
def test_four_packages_convert_look_save_and_fold(tmp_path):
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
def test_figures_need_plot_alone(tmp_path):
    """Of a model in memory, the explorer and the pictures."""
    code = """
from lape.look.figures import draw_together
model = tiny("LaPE")
assert lape.explore({"LaPE": model}, sys.argv[1] + "/page.html").stat().st_size > 0
assert draw_together({"LaPE": model, "basic": tiny("basic")}, sys.argv[1])
"""
    done = run(packages("train", "huggingface", "export") - packages("plot") - TIMM_BRINGS, TINY + code, str(tmp_path))
    assert done.returncode == 0, done.stderr


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
def test_calls_say_which_extra_is_missing(tmp_path):
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
def test_a_command_says_so_in_one_line_and_exits_with_2(package, extra, command, tmp_path):
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
