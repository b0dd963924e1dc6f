"""Where a run happens: versions, hardware and the commit of the code."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lape.data.processes import processors
from lape.names import VERSION
from lape.train.distributed import World

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


def describe_start(world: World) -> dict[str, Any]:
    """Time, command line, commit, versions and hardware of this start."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **environment(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, hardware (`device` and its GPU as well, where it is given) and, in a checkout, the commit."""
    hardware = {
        "processor": _processor(),
        "cores": processors(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device is not None:
        on_gpu = device.type == "cuda"
        hardware |= {
            "device": str(device),
            "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
            "gpus": torch.cuda.device_count() if on_gpu else 0,
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
        }
    return {"versions": versions(), "hardware": hardware, "commit": commit()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    numbers = {"python": platform.python_version(), "lape": VERSION}  # of the code that runs, whatever is installed
    for name in PACKAGES:
        try:
            numbers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            numbers[name] = "not installed"
    return numbers | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version() or "none"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def commit() -> str | None:
    """The commit of the code that runs, `-dirty` where a file under version control differs; None outside git."""

    def git(*arguments: str) -> str | None:
        try:
            process = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return process.stdout.strip() if process.returncode == 0 else None

    if git("ls-files", "--error-unmatch", __file__) is None:  # installed inside a checkout of something else
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*") or None
