"""Peak memory of this process, on a CPU or a CUDA device."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

__all__ = ["peak_memory", "reset_peak_memory"]


def peak_memory(device: torch.device) -> int:
    """Bytes: on a CUDA device what PyTorch had allocated at most, on a CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) << 10
    # In bytes on macOS, the other system that PyTorch is built for with this module.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_memory(device: torch.device) -> int:
    """Begin a new peak at what is held now, and return that in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        # Linux lets a process lower its own high-water mark to what it holds now.
        clear.write_text("5")
    return peak_memory(device)
