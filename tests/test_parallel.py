"""Converted models under DDP (no search for unused parameters) and FSDP2: two processes on a CPU, against one."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DRIVER = textwrap.dedent(
    """
    import sys
    import torch, torch.distributed as dist
    import torch.multiprocessing as mp
    import timm, lape
    from torch.nn.parallel import DistributedDataParallel

    TINY = dict(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5)

    def make(join, pe):
        torch.manual_seed(0)
        model = lape.apply_(timm.create_model("vit_tiny_patch16_224", **TINY), join, pe)
        return model

    def run(rank, size, store, engine, join, pe):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        torch.manual_seed(7)
        x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
        plain = make(join, pe)
        torch.nn.functional.cross_entropy(plain(x), y).backward()
        model = make(join, pe)
        if engine == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (size,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        mine = slice(rank, None, size)
        for _ in range(2):  # the second step would meet what the first one left
            wrapped.zero_grad()
            torch.nn.functional.cross_entropy(wrapped(x[mine]), y[mine]).backward()
        for (name, expected), (_, parameter) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            if expected.grad is None:
                continue
            gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            worst = (gradient - expected.grad).abs().max()
            assert worst <= 1e-5 * expected.grad.abs().max().clamp(min=1e-3), (name, worst)
        dist.barrier()
        dist.destroy_process_group()

    if __name__ == "__main__":
        store, engine, join, pe = sys.argv[1:]
        mp.spawn(run, (2, store, engine, join, None if pe == "own" else pe), nprocs=2)
    """
)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("join", "pe"), [("LaPE", "own"), ("unshare", "own"), ("LaPE", "2D_RPE")])
def test_two_processes_have_the_gradients_of_one(engine, join, pe, tmp_path: Path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    command = [sys.executable, str(driver), str(tmp_path / "store"), engine, join, pe]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
