"""EMA update of the key encoder: many tensors in one or two launches.

    k <- k + w (q - k),      w = 1 - m

A program updates one block of one tensor. Small tables on the device hold the addresses of the tensors, and the tensor
and block of each program. The update is memory-bound: it reads and writes each number of k once and reads each number
of q once. The weight w may be a tensor on the device, so that a captured CUDA graph can follow a momentum schedule.
PyTorch's own functions need three passes and a copy of the parameters for that.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from synco_fast.kernels.triton.config import interpreted

__all__ = ["BLOCK", "Plan", "addresses", "unserved", "update"]

BLOCK = 4096
#: Bytes that a thread loads at once. The host checks the alignment of addresses, since the compiler cannot.
_VECTOR = 16
_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _update(
    p_targets,
    p_sources,
    p_sizes,
    p_tensor,
    p_block,
    p_weight,
    weight,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    ON_DEVICE: tl.constexpr,
):
    """Grid (blocks of all tensors,). Addresses and sizes are (T,) int64; each program's tensor and block are int32."""
    if ON_DEVICE:
        weight = tl.load(p_weight).to(tl.float32)
    tensor = tl.load(p_tensor + tl.program_id(0))
    start = tl.load(p_block + tl.program_id(0)).to(tl.int64) * BLOCK
    size = tl.load(p_sizes + tensor)
    target = tl.load(p_targets + tensor).to(tl.pointer_type(DTYPE))
    source = tl.load(p_sources + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        target, source = tl.multiple_of(target, 16), tl.multiple_of(source, 16)
    o = start + tl.arange(0, BLOCK)
    # Subtract first: where q equals k, k stays exactly the same.
    if start + BLOCK <= size:
        k = tl.load(target + o).to(tl.float32)
        q = tl.load(source + o).to(tl.float32)
        tl.store(target + o, (k + weight * (q - k)).to(DTYPE))
    else:
        m_o = o < size
        k = tl.load(target + o, m_o, 0).to(tl.float32)
        q = tl.load(source + o, m_o, 0).to(tl.float32)
        tl.store(target + o, (k + weight * (q - k)).to(DTYPE), m_o)


class _Tables(NamedTuple):
    """Tables of one launch: address and size of each tensor, tensor and block of each program."""

    targets: Tensor
    sources: Tensor
    sizes: Tensor
    tensor: Tensor
    block: Tensor


class Plan:
    """Tables for one list of pairs of CUDA tensors of one dtype, valid while their addresses stay the same.

    Pairs whose two addresses are multiples of 16 bytes share one launch; the others share a second one.
    """

    def __init__(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """Build the tables and copy them to the device.

        Args:
            targets, sources: Lists of tensors, equal in number, shape, strides, dtype and device. Each tensor must be
                dense in memory.
        """
        self.key = addresses(targets, sources)
        self.dtype, self.device = targets[0].dtype, targets[0].device
        groups: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
        for pair in zip(targets, sources, strict=True):
            if pair[0].numel():
                groups[all(tensor.data_ptr() % _VECTOR == 0 for tensor in pair)].append(pair)
        #: Key: whether both addresses are aligned.
        self.tables = {aligned: self._tables(pairs) for aligned, pairs in groups.items() if pairs}

    def _tables(self, pairs: list[tuple[Tensor, Tensor]]) -> _Tables:
        counts = torch.tensor([-(-target.numel() // BLOCK) for target, _ in pairs])
        which = torch.repeat_interleave(torch.arange(len(pairs)), counts)
        first = counts.cumsum(0) - counts
        tables = (
            torch.tensor([target.data_ptr() for target, _ in pairs]),
            torch.tensor([source.data_ptr() for _, source in pairs]),
            torch.tensor([target.numel() for target, _ in pairs]),
            which.to(torch.int32),
            (torch.arange(len(which)) - first[which]).to(torch.int32),
        )
        return _Tables(*(table.to(self.device) for table in tables))


def addresses(targets: list[Tensor], sources: list[Tensor]) -> tuple[int, ...]:
    """The address and length of every tensor: a `Plan` is valid while these stay the same."""
    return tuple(number for tensor in (*targets, *sources) for number in (tensor.data_ptr(), tensor.numel()))


def unserved(target: Tensor, source: Tensor) -> str | None:
    """The reason why the kernel cannot take a pair of equal shape, dtype and device, or None if it can."""
    if target.dtype not in _TL:
        return f"a tensor has dtype {target.dtype}; the kernel takes float32, bfloat16 and float16"
    if not (target.is_cuda and torch.version.hip is None) and not interpreted():
        return f"a tensor is on {target.device.type}; the kernel runs on CUDA devices"
    if not _orders(target) & _orders(source):
        return "a tensor is not dense in memory, or its memory format differs from its counterpart's"
    return None


def _orders(tensor: Tensor) -> set[torch.memory_format]:
    """The memory formats in which the tensor is dense. Both if a dimension has size 1."""
    found = {torch.contiguous_format} if tensor.is_contiguous() else set()
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        found.add(torch.channels_last)
    return found


def update(plan: Plan, weight: float | Tensor) -> None:
    """Launch the update of a plan. The weight is 1 - m, a number or a 0-dimensional tensor on the device."""
    on_device = isinstance(weight, Tensor)
    for aligned, tables in plan.tables.items():
        # Triton launches on the current device and stream, which may differ from those of the tensors.
        with torch.cuda.device_of(tables.targets):
            _update[(len(tables.tensor),)](
                *tables,
                weight if on_device else None,
                0.0 if on_device else weight,
                DTYPE=_TL[plan.dtype],
                BLOCK=BLOCK,
                ALIGNED=aligned,
                ON_DEVICE=on_device,
            )
