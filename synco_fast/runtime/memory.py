"""Memory of a device, and a check before large allocations."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from synco_fast.runtime.errors import ConfigError

__all__ = ["check_memory", "memory_of"]

#: Files with the memory limit of a container, by version of Linux's control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of(device: torch.device) -> int:
    """Total bytes of memory of a device; on a CPU at most the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _LIMITS:
        try:
            found = min(found, int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # there is none
            continue
    return found


def check_memory(needed: int, device: torch.device, found: str) -> None:
    """Refuse what does not fit into memory.

    Args:
        needed: The least number of bytes.
        device: The device.
        found: Key and value, as the start of the message.

    Raises:
        ConfigError: The device has less.
    """
    there = memory_of(device)
    if needed > there:
        where = "GPU" if device.type == "cuda" else "machine"
        raise ConfigError(
            f"{found}, which takes {_gib(needed)} or more, expected up to {_gib(there)}, all the {where} has"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
