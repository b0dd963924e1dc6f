"""The model of costs: its arithmetic, checked by hand, and that the page says what it computes."""

import copy
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lape

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scale_model.py"
spec = importlib.util.spec_from_file_location("scale_model", SCRIPT)
assert spec is not None
assert spec.loader is not None
scale = importlib.util.module_from_spec(spec)
sys.modules["scale_model"] = scale  # dataclasses look their module up
spec.loader.exec_module(scale)

GIVEN = scale.Assumptions(cores=10, least_step=0.01, inside=1e9, between=1e8, disk=1e9)
PARTS = scale.Parts(1_000_000, 16_000_000, 500.0, 200.0)


@pytest.mark.slow
def test_page_is_what_the_command_writes():
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "run: python benchmarks/scale_model.py"


def test_one_gpu_by_hand():
    found = scale.cost(PARTS, 1024.0, 1, GIVEN)  # a step is one second
    assert (found.loader, found.compute, found.all_reduce) == (1024 / 5000, 1.0, 0.0)
    assert found.evaluation == 100_000 / 2000
    assert found.checkpoint == pytest.approx(0.02)
    assert found.hours == pytest.approx(300 * (1251 + 50 + 0.02) / 3600)
    assert found.limit == "compute"


def test_eight_gpus_by_hand():
    found = scale.cost(PARTS, 1024.0, 8, GIVEN)
    assert found.compute == 1 / 8
    assert found.all_reduce == pytest.approx(2 * 7 / 8 * 4e6 / 1e9)
    assert scale.cost(PARTS, 1024.0, 16, GIVEN).all_reduce == pytest.approx(2 * 15 / 16 * 4e6 / 1e8)


@pytest.mark.parametrize(
    ("change", "rate", "gpus", "limit"),
    [
        ({"cores": 1}, 1024.0, 1, "loader"),
        ({"cores": 1}, 700.0, 1, "loader"),  # the GPU's part of a step is longer than the wait, and hidden behind it
        ({"least_step": 1.0}, 1024.0, 8, "launch"),
        ({"inside": 1e7}, 1024.0, 8, "all-reduce"),
        ({"cores": 4, "least_step": 0.0}, 1e6, 64, "evaluation"),
    ],
)
def test_the_limit_is_named(change, rate, gpus, limit):
    found = scale.cost(PARTS, rate, gpus, replace(GIVEN, between=1e12, **change))
    assert found.limit == limit
    assert limit in scale.ADVICE


def test_shared_evaluation_shrinks_with_the_processes():
    alone, shared = (scale.cost(PARTS, 1024.0, 8, replace(GIVEN, dist_eval=value)) for value in (False, True))
    assert shared.evaluation == pytest.approx(alone.evaluation / 8)
    assert shared.hours < alone.hours


def test_bytes_of_a_checkpoint_are_those_of_the_state(tmp_path):
    name = "deit_tiny_patch16_224"
    model = lape.create_model(name, "LaPE")
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.save([model.state_dict(), copy.deepcopy(model.state_dict()), optimizer.state_dict()], tmp_path / "all.pth")
    assert scale.measured("exact")[name].checkpoint_bytes == pytest.approx(
        (tmp_path / "all.pth").stat().st_size, rel=0.01
    )
