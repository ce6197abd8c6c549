"""The momentum update of many tensors in one launch.

    k <- m k + (1 - m) q

A program takes one block of one tensor; which tensor and where comes from two small tables that live on the device, as
do the addresses of the tensors. Memory-bound: each byte is read and written once, and nothing is launched per tensor.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCK", "Plan", "update"]

BLOCK = 4096


@triton.jit
def _update(p_targets, p_sources, p_sizes, p_tensor, p_block, m, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (blocks of all tensors,). Addresses and sizes (T,) int64; tensor and block number of each program int32."""
    tensor = tl.load(p_tensor + tl.program_id(0))
    start = tl.load(p_block + tl.program_id(0)).to(tl.int64) * BLOCK
    o = start + tl.arange(0, BLOCK)
    m_o = o < tl.load(p_sizes + tensor)
    target = tl.load(p_targets + tensor).to(tl.pointer_type(DTYPE))
    source = tl.load(p_sources + tensor).to(tl.pointer_type(DTYPE))
    k = tl.load(target + o, m_o, 0).to(tl.float32)
    q = tl.load(source + o, m_o, 0).to(tl.float32)
    # The difference first: where q equals k, k stays exactly as it is.
    tl.store(target + o, (k + (1 - m) * (q - k)).to(DTYPE), m_o)


class Plan:
    """The tables for one list of pairs of contiguous CUDA tensors of one dtype; holds as long as their addresses do."""

    def __init__(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """Build the tables and copy them to the device.

        Args:
            targets, sources: Equal in number, shape, dtype and device, contiguous.
        """
        self.key = addresses(targets, sources)
        device = targets[0].device
        blocks = [-(-tensor.numel() // BLOCK) for tensor in targets]
        self.dtype = targets[0].dtype
        self.programs = sum(blocks)
        self.targets = torch.tensor([tensor.data_ptr() for tensor in targets], device=device)
        self.sources = torch.tensor([tensor.data_ptr() for tensor in sources], device=device)
        self.sizes = torch.tensor([tensor.numel() for tensor in targets], device=device)
        counts = torch.tensor(blocks)
        which = torch.repeat_interleave(torch.arange(len(blocks)), counts)
        first = counts.cumsum(0) - counts
        self.tensor = which.to(torch.int32).to(device)
        self.block = (torch.arange(self.programs) - first[which]).to(torch.int32).to(device)


def addresses(targets: list[Tensor], sources: list[Tensor]) -> tuple[int, ...]:
    """What a `Plan` depends on: where the tensors lie and how long they are."""
    return tuple(number for tensor in (*targets, *sources) for number in (tensor.data_ptr(), tensor.numel()))


def update(plan: Plan, m: float) -> None:
    """Launch the update that a plan describes."""
    if plan.programs:
        names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        tables = (plan.targets, plan.sources, plan.sizes, plan.tensor, plan.block)
        # Triton launches on the current device and its stream, which need not be those of the tensors.
        with torch.cuda.device_of(plan.targets):
            _update[(plan.programs,)](*tables, m, DTYPE=names[plan.dtype], BLOCK=BLOCK)
