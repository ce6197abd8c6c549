"""What the processes of a job exchange; in a job of one process each function returns what it was given.

A global batch of B rows lies on W processes in blocks of B / W, rank after rank: row i is on rank i // (B / W).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["exchange_rows", "gather_rows", "mean_over_ranks", "rank", "world"]

#: Renamed after PyTorch 2.11.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def world() -> int:
    """W, the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, in [0, W)."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of every rank, (b, ...) to (W b, ...), in order of rank; without gradient."""
    if world() == 1:
        return rows
    gathered = rows.new_empty(world() * len(rows), *rows.shape[1:])
    _all_gather(gathered, rows.contiguous())
    return gathered


def exchange_rows(rows: Tensor, order: Tensor) -> Tensor:
    """Take this rank's share of a permuted global batch: rows ``order[rank b : (rank + 1) b]``, by one all-to-all.

    Args:
        rows: This rank's block of the batch, (b, ...).
        order: A permutation of the global batch, (W b,) int64, the same on every rank; on the CPU where W is above 1,
            since the sizes of what is sent follow from it.

    Returns:
        (b, ...).
    """
    if world() == 1:
        return rows[order]
    share = len(rows)
    wanted = order.view(world(), share)
    owner = wanted // share
    leaving = owner == rank()
    sent = leaving.sum(dim=1).tolist()
    received = owner[rank()].bincount(minlength=world()).tolist()
    source = (wanted % share)[leaving].to(rows.device, non_blocking=True)
    # What arrives is sorted by the rank it came from, and within one rank as it was wanted.
    place = owner[rank()].argsort(stable=True).to(rows.device, non_blocking=True)
    outgoing = rows[source].contiguous()
    incoming = torch.empty_like(outgoing[:1].expand(share, *rows.shape[1:]), memory_format=torch.contiguous_format)
    dist.all_to_all_single(incoming, outgoing, received, sent)
    return torch.empty_like(incoming).index_copy_(0, place, incoming)


def mean_over_ranks(tensors: list[Tensor]) -> None:
    """Replace floating-point tensors by their mean over the ranks, in place, with one all-reduce for each dtype."""
    if world() == 1:
        return
    for dtype in {tensor.dtype for tensor in tensors}:
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat)
        parts = flat.div_(world()).split([tensor.numel() for tensor in same])
        for tensor, part in zip(same, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
