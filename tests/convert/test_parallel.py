"""Converted models under DDP (no search for unused parameters) and FSDP2: two processes on a CPU, against one."""

import json

import pytest
import timm
import torch
import torch.distributed as dist
from processes import run_together
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import lape

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
ENGINES = ("ddp", "fsdp2")
JOINS = (("LaPE", "own"), ("unshare", "own"), ("LaPE", "2D_RPE"))


def make(join: str, pe: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    return lape.apply_(model, join, None if pe == "own" else pe)


def wrapped(model: nn.Module, engine: str) -> nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def worst_difference(engine: str, join: str, pe: str) -> float:
    """Of a gradient of one process among several, from that of one alone, relative to its largest entry."""
    torch.manual_seed(7)
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    plain, model = make(join, pe), make(join, pe)
    cross_entropy(plain(x), y).backward()
    together = wrapped(model, engine)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    for _ in range(2):  # the second step would meet what the first one left
        together.zero_grad()
        cross_entropy(together(x[mine]), y[mine]).backward()
    worst = 0.0
    for expected, parameter in zip(plain.parameters(), model.parameters(), strict=True):
        if expected.grad is not None:
            got = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            worst = max(worst, ((got - expected.grad).abs().max() / expected.grad.abs().max().clamp(min=1e-3)).item())
    return worst


def compare_all(folder: str) -> None:
    dist.init_process_group("gloo")
    worst = {str((engine, *join)): worst_difference(engine, *join) for engine in ENGINES for join in JOINS}
    with open(f"{folder}/{dist.get_rank()}.json", "w") as file:
        json.dump(worst, file)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("parallel")
    run_together(2, compare_all, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("join", "pe"), JOINS)
def test_two_processes_have_the_gradients_of_one(differences, engine, join, pe):
    for worst in differences:
        assert worst[str((engine, join, pe))] <= 1e-5
