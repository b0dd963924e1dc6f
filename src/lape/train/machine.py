"""Where a run happens: versions, hardware and the commit of the code."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lape.train.distributed import World

PACKAGES = ("lape", "torch", "timm", "numpy")


def environment() -> dict[str, Any]:
    """Versions of Python and of the packages that decide numbers, hardware and, in a checkout, the commit."""
    hardware = {"processor": _processor(), "cores": _cores(), "system": f"{platform.system()} {platform.machine()}"}
    return {"versions": _versions(*PACKAGES), "hardware": hardware, "commit": _commit()}


def describe_start(world: World) -> dict[str, Any]:
    """Time, command line, commit, versions and hardware of this start."""
    import torch

    cuda = world.device.type == "cuda"
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "versions": {
            **_versions(*PACKAGES, "torchvision", "pillow"),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "none",
            "cudnn": str(torch.backends.cudnn.version() or "none"),
        },
        "hardware": {
            "device": str(world.device),
            "gpu": torch.cuda.get_device_name(world.device) if cuda else None,
            "gpus": torch.cuda.device_count() if cuda else 0,
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
        },
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _versions(*packages: str) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _commit() -> str | None:
    """The commit of the code that runs, `-dirty` where tracked files differ; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if tracked.returncode:  # installed into an environment that happens to be inside a checkout
            return None
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
        output = subprocess.run(describe, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return output.strip() or None
