"""A command loads what it needs: packages that take long to import are absent where nothing of them is used."""

import subprocess
import sys

import pytest
import torch
from training import quiet, tiny

from lape.train.loop import train
from lape.train.state import CHECKPOINT

PICTURES = ("matplotlib", "plotly")
SERVICES = ("tensorboard", "torch.utils.tensorboard", "wandb", "trackio")
OTHERS = ("transformers", "pandas", "scipy", "sklearn", "onnx", "onnxscript", "onnxruntime", "IPython", "torchcodec")
CODE = """
import sys
from lape.cli.app import app, run
try:
    code = run(app, sys.argv[2:])
except SystemExit as stop:
    code = stop.code
found = [name for name in sys.argv[1].split(",") if name in sys.modules]
print(f"\\ncode {code} loaded {found}")
"""


def loaded(names: tuple[str, ...], *command: str) -> str:
    """What a command in a fresh interpreter left loaded of some modules, and how it ended."""
    done = subprocess.run([sys.executable, "-c", CODE, ",".join(names), *command], capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    train(tiny(output_dir=str(folder)), say=quiet)
    return str(folder / CHECKPOINT)


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["eval", "--help"], ["train", "--nonsense", "1"]])
def test_help_and_mistakes_need_no_torch(command):
    found = loaded(("torch", "timm", "torchvision", "numpy", "PIL", *PICTURES, *SERVICES, *OTHERS), *command)
    assert found.endswith("loaded []"), found


@pytest.mark.slow
def test_evaluation_loads_no_training_and_no_pictures(checkpoint):
    names = (
        "lape.train.loop",
        "lape.look.figures",
        "lape.data.fast",
        "timm.optim",
        "timm.scheduler",
        *PICTURES,
        *SERVICES,
        *OTHERS,
    )
    assert loaded(names, "eval", checkpoint, "--device", "cpu") == "code 0 loaded []"


@pytest.mark.slow
def test_training_without_files_loads_no_board():
    arguments = ["train", "--recipe", "digits", "--epochs", "1", "--device", "cpu", "--batch-size", "512"]
    arguments += ["--model-kwargs", "depth=1", "embed_dim=16", "patch_size=4", "num_heads=2"]
    names = ("lape.look.figures", "lape.train.evaluate", *PICTURES, *SERVICES, *OTHERS)
    assert loaded(names, *arguments) == "code 0 loaded ['lape.train.evaluate']"  # the last: that the list can be hit
