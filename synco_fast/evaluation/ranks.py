"""The processes of a torchrun or Slurm job, as far as evaluations need them; everything works alone as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from synco_fast.runtime import distributed
from synco_fast.runtime.collectives import rank, world
from synco_fast.runtime.precision import resolve_device

__all__ = ["barrier", "joined", "lists_of_all_ranks", "rank", "sum_over_ranks", "world"]

#: Seconds that a process waits for the others: one may have a chunk of features more to extract.
_PATIENCE = 3600


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the job that this process was started in, if it was; yields the device of this process.

    Args:
        device: What the job runs on; a CUDA job gives each process the GPU of its local number.

    Raises:
        ConfigError: There are more processes on this machine than GPUs.
    """
    if dist.is_available() and dist.is_initialized():
        yield resolve_device(device.type)
        return
    with distributed.joined(distributed.Place.find(), device.type, timeout=_PATIENCE):
        yield resolve_device(device.type)


def barrier() -> None:
    """Wait for every process."""
    if world() > 1:
        dist.barrier()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every process's tensor, in place."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def lists_of_all_ranks(values: list[Any]) -> list[Any]:
    """Every process's list, one after the other in order of rank; lengths may differ."""
    if world() == 1:
        return values
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]
