"""Where a run happens: versions, hardware and the commit of the code."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from lape.train.distributed import World

PACKAGES = ("lape", "torch", "torchvision", "timm", "numpy", "pillow")


def describe_start(world: World) -> dict[str, Any]:
    """Time, command line, commit, versions and hardware of this start."""
    import torch

    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _code_commit(),
        "versions": versions(),
        "hardware": hardware(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    import torch

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version() or "none"),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run computes on."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    return {"device": str(device), "gpu": gpu, "gpus": gpus, "cpus": os.cpu_count(), "machine": platform.machine()}


def _code_commit() -> str | None:
    """The commit of the code that runs, `-dirty` where tracked files differ; None outside git."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if tracked.returncode:  # installed into an environment that happens to be inside a checkout
            return None
        done = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Versions, hardware and, in a checkout, the commit."""
    packages = ("lape", "torch", "timm", "numpy")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    hardware = {
        "processor": _processor(),
        "cores": len(_cores()),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {"versions": versions, "hardware": hardware, "commit": _commit()}


def _cores() -> Sequence[int]:
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else range(os.cpu_count() or 1)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to, marked when it was changed since; None elsewhere."""

    def git(*arguments: str) -> str | None:
        here = Path(__file__).parent
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit} with changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
