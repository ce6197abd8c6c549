"""The processes of a torchrun job, as far as evaluations need them; everything works alone as well."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["barrier", "joined", "lists_of_all_ranks", "rank", "sum_over_ranks", "world"]


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the job that torchrun started, if it did; yields the device of this process.

    Args:
        device: What the job runs on; a CUDA job gives each process the GPU of its local number.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


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
