"""What learns, in DDP where there are several processes, made as a CUDA graph that holds its exchange needs it."""

from __future__ import annotations

from contextlib import nullcontext
from inspect import signature

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from synco_fast.runtime.distributed import sum_over_ranks, world

__all__ = ["DDP_GRAPH_WARMUP", "on_all_processes", "works_on_all"]

#: Eager steps before one is captured: PyTorch asks for eleven of DDP's, which builds its buckets and times itself.
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
    """The module with its gradient averaged over the processes; the very module where there is one process.

    Args:
        module: On ``device``.
        device: Where it computes.
        processes: W, their number, whose process group is initialized.
        micro_batches: Backward passes a step.
    """
    if processes == 1:
        return module
    cuda = device.type == "cuda"
    # What DDP keeps of the backward pass belongs to the stream that it is made on, which must not be the default one
    # where a step is captured.
    with torch.cuda.stream(torch.cuda.Stream(device)) if cuda else nullcontext():
        return DistributedDataParallel(
            module,
            device_ids=[device.index] if cuda else None,
            **_LEAVE_BUFFERS,  # type: ignore[arg-type]
            gradient_as_bucket_view=True,
            static_graph=micro_batches == 1,
        )


def works_on_all(works: bool, device: torch.device) -> bool:
    """Whether something worked on all processes; waits for them. NCCL replays a collective on all or on none."""
    if world() == 1:
        return works
    return int(sum_over_ranks(torch.tensor(int(works), device=device))) == world()
