"""On an NVIDIA GPU: the formula in bf16 and fp16, fused attention, torch.compile, one NCCL process, folding, the hosts
of the core tests, the data path there, and what happens when its memory does not suffice.

Skipped without one. `benchmarks/on_gpu.py` runs this file first.
"""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import MEANINGFUL, shake_position, written_out
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import HOSTS, TINY
from zoo import make as make_host

import lape
from lape.data.loaders import train_loader
from lape.data.open import load_data
from lape.recipe import Recipe
from lape.train.loop import train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # torch.compile's advice
]


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

    flags = f"--recipe digits --output-dir {tmp_path} --device cuda --join-type LaPE --num-workers 0 --warmup-epochs 0"
    for epochs in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "-m", "lape", "train"]
        command += [*flags.split(), "--epochs", epochs, "--resume", "auto", "--amp", "bf16"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]


def test_the_data_path_on_the_gpu_trains():
    recipe = Recipe.from_yaml("digits", epochs=2, data_on_device=True, device="cuda", join_type="LaPE")
    assert train(recipe, say=lambda _text: None).accuracy > 15


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_gives_on_the_gpu_what_it_gives_on_the_cpu(host):
    model = lape.apply_(make_host(host), "LaPE")
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        expected = model(x)
        got = model.cuda()(x.cuda()).cpu()
        assert (got - expected).abs().max() <= 2e-3 * expected.abs().max()
        removed, original = lape.remove_(model)(x.cuda()).cpu(), make_host(host)(x)
        assert (removed - original).abs().max() <= 2e-3 * original.abs().max()


@pytest.mark.parametrize("name", ["vit_lite_4_4_32", "cvt_4_4_32", "cct_4_3x2_32"])
@pytest.mark.parametrize("join", ["LaPE", "share", "PVG"])
def test_small_models_learn_on_the_gpu_as_on_the_cpu(name, join):
    if join == "PVG" and name.startswith("vit"):
        pytest.skip("PVG is for models that pool their patches")
    torch.manual_seed(0)
    model = lape.create_model(name, join, num_classes=5)
    shake_position(model)
    there = copy.deepcopy(model).cuda()
    x, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    F.cross_entropy(model.eval()(x), target).backward()
    with torch.backends.cudnn.flags(allow_tf32=False):  # CCT's max-pool picks other pixels of sums that are rounded
        F.cross_entropy(there.eval()(x.cuda()), target.cuda()).backward()
    for (key, ours), theirs in zip(there.named_parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad.cpu() - theirs.grad).abs().max() <= 1e-2 * theirs.grad.abs().max() + 1e-6, key


def test_what_reads_a_model_reads_it_on_the_gpu(tmp_path):
    model = make()
    expected = lape.positions(model), lape.correlation(model), str(lape.describe(model))
    model = model.cuda()
    found = lape.positions(model), lape.correlation(model), str(lape.describe(model))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)
    assert found[2] == expected[2]
    model = lape.create_model("vit_tiny_patch16_224", "LaPE", **TINY).cuda().eval()
    x = torch.randn(2, 3, 16, 16)
    lape.save(model, tmp_path / "kept")
    with torch.no_grad():
        assert (lape.load(tmp_path / "kept").eval()(x) - model(x.cuda()).cpu()).abs().max() <= 2e-3


def write_images(root, count: int, side: int = 32):
    import numpy as np
    from PIL import Image

    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side // 4, side // 4, 3)).astype(np.uint8)
        for split in ("train", "val"):
            folder = root / split / str(number % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "original", "none"])
def test_images_are_augmented_on_the_gpu_as_on_the_cpu(aa, tmp_path):
    """The draws are the same; float32 sums of other order move a few pixels by one of 255 levels."""
    recipe = Recipe(
        data_path=str(write_images(tmp_path, 128)), input_size=32, batch_size=64, aa=aa, data_on_device=True,
        repeated_aug=False, num_workers=0, scale=(0.3, 1.0), remode="const", color_jitter=0.3,
    )  # fmt: skip
    for epoch in range(3):
        batches = []
        for device in ("cpu", "cuda"):
            data = load_data(recipe, device=device)
            batches.append([(x.cpu(), y.cpu()) for x, y in train_loader(data.train, recipe, epoch=epoch)])
        for (ours, labels), (theirs, expected) in zip(*batches, strict=True):
            assert labels.equal(expected)
            levels = ((ours - theirs) * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255).abs()
            # a step behind (equalize, posterize, a blend) may make more of one level
            assert (levels > 1.5).float().mean() < 2e-3
            assert (levels > 0.5).float().mean() < 2e-2


@pytest.mark.parametrize("flags", [{"compile": True, "amp": "bf16"}, {"grad_checkpointing": True, "amp": "fp16"}])
def test_training_with_less_time_or_memory(flags):
    recipe = Recipe.from_yaml("digits", epochs=2, device="cuda", join_type="LaPE", data_on_device=True, **flags)
    assert train(recipe, say=lambda _text: None).accuracy > 15


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("flags", [{}, {"amp": "fp16", "clip_grad": 1.0, "mixup": 0.8}, {"data_on_device": True}])
def test_no_step_waits_for_the_gpu(monkeypatch, flags):
    import lape.train.loop as loop

    def without_waiting(function):
        def call(*args):
            torch.cuda.set_sync_debug_mode("error" if calls else "default")  # the first step sets things up
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                calls.append(function)

        return call

    calls: list[object] = []
    for name in ("_launch_update", "_add_gradients"):
        monkeypatch.setattr(loop, name, without_waiting(getattr(loop, name)))
    monkeypatch.setattr(loop, "training_loss", on_third_call(loop.training_loss, float("nan")))
    recipe = Recipe.from_yaml("digits", epochs=1, device="cuda", join_type="LaPE", **flags)
    result = train(recipe, say=lambda _text: None)
    assert result.history[0]["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())


def on_third_call(function, factor: float):
    calls = []

    def call(*args):
        calls.append(function)
        return function(*args) * (factor if len(calls) == 3 else 1)

    return call


def test_too_little_memory_is_one_line(tmp_path):
    recipe = Recipe.from_yaml("digits", epochs=1, device="cuda", join_type="LaPE", batch_size=1024)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(5e-4)
    try:
        with pytest.raises(lape.LapeError, match=r"out of memory .* a smaller --batch-size"):
            train(recipe, say=lambda _text: None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
