"""DistributedDataParallel around the trainable modules, set up so that a CUDA graph can capture its all-reduce."""

from __future__ import annotations

from contextlib import nullcontext
from inspect import signature

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from synco_fast.runtime.distributed import sum_over_ranks, world

__all__ = ["DDP_GRAPH_WARMUP", "on_all_processes", "works_on_all"]

#: Eager steps before a capture: PyTorch requires eleven with DDP, which first builds its buckets and times itself.
DDP_GRAPH_WARMUP = 11

#: `RunningStatistics.average` averages them where they are read. The argument was renamed after PyTorch 2.11.
_LEAVE_BUFFERS = {
    next(
        name
        for name in ("forward_sync_buffers", "broadcast_buffers")
        if name in signature(DistributedDataParallel.__init__).parameters
    ): False
}


def on_all_processes(module: nn.Module, device: torch.device, *, processes: int, micro_batches: int = 1) -> nn.Module:
    """Wrap a module so that its gradient is averaged over the processes; unchanged for one process.

    Args:
        module: On ``device``.
        device: The device.
        processes: W; the process group must be initialised.
        micro_batches: Backward passes per step.
    """
    if processes == 1:
        return module
    cuda = device.type == "cuda"
    # DDP's backward hooks belong to the stream on which DDP is constructed. For a capture that must not be the default
    # stream. Every process would warn of that in its first step.
    if cuda:
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    with torch.cuda.stream(torch.cuda.Stream(device)) if cuda else nullcontext():
        return DistributedDataParallel(
            module,
            device_ids=[device.index] if cuda else None,
            **_LEAVE_BUFFERS,  # type: ignore[arg-type]
            gradient_as_bucket_view=True,
            static_graph=micro_batches == 1,
        )


def works_on_all(works: bool, device: torch.device) -> bool:
    """Whether something worked on all processes; waits for them. NCCL must replay a collective on all or on none."""
    if world() == 1:
        return works
    return int(sum_over_ranks(torch.tensor(int(works), device=device))) == world()
