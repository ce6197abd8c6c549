"""The environment of a measurement: versions, device, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from synco_fast.data.workers import machine_cores
from synco_fast.version import __version__

__all__ = ["describe_environment"]

_PACKAGES = ("torch", "torchvision", "triton", "timm", "numpy", "pillow", "nvidia-dali-cuda130")


def describe_environment(device: torch.device | None = None) -> dict[str, str | int]:
    """Versions of the packages that affect results and speed, the device, and the source tree's commit, if any.

    Args:
        device: What was measured; by default the current GPU if there is one, else the CPU.
    """
    found: dict[str, str | int] = {"synco-fast": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(device) if on_gpu else _processor()
    found["cores"] = machine_cores()
    found["threads"] = torch.get_num_threads()
    if commit := _commit():
        found["commit"] = commit
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, with ``+`` if files differ from it; None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        run = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return run[0].stdout.strip() + ("+" if run[1].stdout.strip() else "")
