"""On an NVIDIA GPU: the formula in bf16 and fp16, fused attention, torch.compile, one NCCL process, and folding.

Skipped without one. `benchmarks/on_gpu.py` runs this file first.
"""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import MEANINGFUL, shake_position, written_out
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import TINY

import lape

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def host() -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


def make(join: str = "LaPE", pe: str = "learnable") -> torch.nn.Module:
    model = lape.apply_(host(), join, pe)
    shake_position(model)
    return model


@pytest.mark.parametrize(("join", "pe"), MEANINGFUL)
def test_the_gpu_computes_the_formula(join, pe):
    model, x = make(join, pe), torch.randn(4, 3, 16, 16)
    expected = written_out(model, host(), x, join, pe)
    model, x = model.cuda(), x.cuda()
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                for got in (model(x), lape.fold_(copy.deepcopy(model))(x)):
                    assert (got.float().cpu() - expected).abs().max() <= tolerance * expected.abs().max(), dtype


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def test_every_kernel_of_attention_gives_the_same(backend):
    model, x = make().cuda().bfloat16(), torch.randn(4, 3, 16, 16, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH):
            expected = model(x)
        with sdpa_kernel(backend):
            got = model(x)
    assert (got - expected).abs().max() <= 5e-2 * expected.abs().max()


@pytest.mark.parametrize(("join", "pe"), [("LaPE", "learnable"), ("LaPE", "2D_RPE"), ("share", "2D_sin")])
def test_compiled_is_eager_and_learns(join, pe):
    eager = make(join, pe).cuda().train()
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, fullgraph=True)
    x, target = torch.randn(4, 3, 16, 16, device="cuda"), torch.tensor([0, 1, 2, 3], device="cuda")
    F.cross_entropy(eager(x), target).backward()
    F.cross_entropy(step(x), target).backward()
    for (name, ours), theirs in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).abs().max() <= 1e-2 * theirs.grad.abs().max() + 1e-6, name


def test_cuda_graphs_replay_a_folded_model():
    model = lape.fold_(make()).cuda()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    fast = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            got = fast(x).clone()
        assert (got - model(x)).abs().max() <= 1e-3


def test_one_process_over_nccl_trains_and_resumes(tmp_path):
    import json
    import subprocess
    import sys

    flags = f"--output-dir {tmp_path} --device cuda --join-type LaPE --num-workers 0 --batch-size 256 --warmup-epochs 0"
    for epochs in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "-m", "lape", "train"]
        command += [*flags.split(), "--epochs", epochs, "--resume", "auto", "--amp", "bf16"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]


def test_the_data_path_on_the_gpu_trains():
    from lape.recipe import Recipe
    from lape.train.loop import train

    recipe = Recipe.from_yaml("digits", epochs=2, data_on_device=True, device="cuda", join_type="LaPE")
    assert train(recipe, say=lambda _text: None).accuracy > 15
