"""One process on one core against two on two: weak and strong scaling of a training, and the gradients exchanged.

    python benchmarks/two_processes.py [--rounds 3]

`lape.train` of DeiT-Ti on the packaged digits at 64 pixels, one thread a process, each on a core of its own, by gloo
over the loopback. Strong: the same 128 images a step. Weak: 64 a process. Bytes are counted in the hook in which
DistributedDataParallel hands gradients over. Written: benchmarks/results/two_processes_cpu<cores>.json
"""

import argparse
import json
import os
import socket
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import lape
from lape.recipe import Recipe
from lape.train import loop
from lape.train.machine import environment

RESULTS = Path(__file__).parent / "results"
MODEL, SIDE, BATCH = "deit_tiny_patch16_224", 64, 64
RUNS = {"one, 64": (1, 64), "one, 128": (1, 128), "two, 64 each": (2, 64)}


class Counting(DistributedDataParallel):
    """Counts the bytes and the messages of gradients."""

    total: tuple[int, int] = (0, 0)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

        def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            Counting.total = (Counting.total[0] + bucket.buffer().nbytes, Counting.total[1] + 1)
            return allreduce_hook(dist.group.WORLD, bucket)

        self.register_comm_hook(None, hook)


def work(rank: int, size: int, batch: int, port: int, answers: Any) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    loop.DistributedDataParallel = Counting  # type: ignore[misc]
    settings = {"model": MODEL, "join_type": "LaPE", "input_size": SIDE, "batch_size": batch, "epochs": 1}
    settings |= {"aa": "none", "color_jitter": 0.0, "reprob": 0.0, "repeated_aug": False, "warmup_epochs": 0}
    recipe = Recipe(**settings, device="cpu", threads=1, num_workers=0, model_ema=False, dist_eval=True)
    line = loop.train(recipe, say=lambda _text: None).history[0]
    steps = 1438 // (size * batch) + 1  # and the one on nothing that comes first
    answers.put((line["images_per_second"], *(number / steps for number in Counting.total)))


def train(size: int, batch: int) -> tuple[float, float, float]:
    """Images a second of all; bytes and messages of gradients that a process hands over in a step."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (size, batch, port, answers), nprocs=size)
    return answers.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    load = os.getloadavg()
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in RUNS}
    for _ in range(given.rounds):
        for name, settings in RUNS.items():
            found[name].append(train(*settings))
            print(f"{name:14} {found[name][-1][0]:8.1f} images a second", flush=True)
    rates = {name: [one[0] for one in each] for name, each in found.items()}
    strong = [two / one for two, one in zip(rates["two, 64 each"], rates["one, 128"], strict=True)]
    weak = [two / one / 2 for two, one in zip(rates["two, 64 each"], rates["one, 64"], strict=True)]
    with torch.device("meta"):
        model = lape.create_model(MODEL, "LaPE", img_size=SIDE, num_classes=10)
    result = {
        "images_per_second": {name: statistics.median(each) for name, each in rates.items()},
        "strong_speed_up": {"median": statistics.median(strong), "all": strong},
        "weak_efficiency": {"median": statistics.median(weak), "all": weak},
        "bytes_a_step": found["two, 64 each"][0][1],
        "messages_a_step": found["two, 64 each"][0][2],
        "bytes_of_trained_parameters": sum(4 * p.numel() for p in model.parameters() if p.requires_grad),
        "config": {"model": MODEL, "pixels": SIDE, **vars(given)},
        "load_before": load,
        **environment(torch.device("cpu")),
    }
    path = RESULTS / f"two_processes_cpu{os.cpu_count()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
