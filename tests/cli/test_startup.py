"""A command loads what it needs: packages that take long to import are absent where nothing of them is used."""

import json
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
import json, sys
from lape.cli.app import app, run
for one in json.loads(sys.argv[1]):
    names, *tokens = one
    try:
        code = run(app, tokens)
    except SystemExit as stop:
        code = stop.code
    print(f"\\ncode {code} loaded {[name for name in names if name in sys.modules]}")
"""


def loaded(*commands: tuple[tuple[str, ...], list[str]]) -> list[str]:
    """What commands in a fresh interpreter, one after the other, left loaded of some modules, and how each ended."""
    tokens = json.dumps([[names, *command] for names, command in commands])
    done = subprocess.run([sys.executable, "-c", CODE, tokens], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if line.startswith("code ")] or [done.stderr]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    train(tiny(output_dir=str(folder)), say=quiet)
    return str(folder / CHECKPOINT)


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["eval", "--help"], ["train", "--nonsense", "1"]])
def test_help_and_mistakes_need_no_torch(command):
    (found,) = loaded((("torch", "timm", "torchvision", "numpy", "PIL", *PICTURES, *SERVICES, *OTHERS), command))
    assert found.endswith("loaded []"), found


@pytest.mark.slow
def test_evaluation_loads_no_training_and_neither_loads_pictures_or_boards(checkpoint):
    unused = ("lape.look.figures", *PICTURES, *SERVICES, *OTHERS)
    training = ("lape.train.loop", "lape.data.fast", "timm.optim", "timm.scheduler")
    arguments = ["train", "--recipe", "digits", "--epochs", "1", "--device", "cpu", "--batch-size", "512"]
    arguments += ["--model-kwargs", "depth=1", "embed_dim=16", "patch_size=4", "num_heads=2"]
    evaluated, trained = loaded(
        ((*training, *unused), ["eval", checkpoint, "--device", "cpu"]), (("lape.train.loop", *unused), arguments)
    )
    assert evaluated == "code 0 loaded []"
    assert trained == "code 0 loaded ['lape.train.loop']"  # that the list can be hit
