"""Roofline of the loss: its floating-point operations and bytes, divided by the measured rates of the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from synco_fast.bench.timing import seconds_of

__all__ = ["Ceilings", "floor_seconds", "loss_bytes", "loss_flops", "measure_ceilings", "selection_floor"]


class Ceilings(NamedTuple):
    """The best measured rates of a device.

    Attributes:
        flops: Floating-point operations per second of a large matrix product. In float32 on a GPU a product may be made
            of three half-precision ones, as the kernels make it: then a third of their rate, if that is more.
        bytes: Bytes read and written per second by a large copy.
    """

    flops: float
    bytes: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure both rates, each the best of several runs, on random numbers (zeros can run faster than real data).

    Args:
        device: Device to measure.
        dtype: Dtype of the matrix product. float32 follows PyTorch's settings: TF32 only if it is on.
    """
    source = torch.randn((1024 if device.type == "cuda" else 128) << 18, device=device)
    target = torch.empty_like(source)
    copy = min(seconds_of(lambda: target.copy_(source), device, repeats=10))
    return Ceilings(flops=_product_rate(device, dtype), bytes=2 * source.nbytes / copy)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of numbers of the dtype, by the fastest way there is; see `Ceilings`."""
    rate = _measured_rate(device, dtype)
    if device.type == "cuda" and dtype == torch.float32:
        rate = max(rate, *(_measured_rate(device, half) / 3 for half in (torch.float16, torch.bfloat16)))
    return rate


def _measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(seconds_of(lambda: torch.mm(one, other), device, repeats=10))


def loss_flops(rows: int, length: int, dim: int) -> int:
    """Operations of the products that every exact loss needs: q times the queue, and softmax times the queue."""
    return 4 * rows * length * dim


def loss_bytes(rows: int, length: int, dim: int, itemsize: int) -> int:
    """Bytes of the queue, read once, and of q, k and the gradient."""
    return (length + 3 * rows) * dim * itemsize


def floor_seconds(rows: int, length: int, dim: int, itemsize: int, ceilings: Ceilings) -> float:
    """The least time for the loss: the longer of its operations and its bytes, each at the measured rate.

    Args:
        rows, length, dim: B, K, D.
        itemsize: Bytes of a number of q and the queue.
        ceilings: See `measure_ceilings`.
    """
    arithmetic = loss_flops(rows, length, dim) / ceilings.flops
    return max(arithmetic, loss_bytes(rows, length, dim, itemsize) / ceilings.bytes)


def selection_floor(rows: int, length: int, dim: int, itemsize: int, ceilings: Ceilings, *, product: bool) -> float:
    """The least time for the N largest similarities of each row.

    Args:
        rows, length, dim: B, K, D.
        itemsize: Bytes of a number.
        ceilings: See `measure_ceilings`.
        product: Whether it starts from q and the queue. Otherwise it reads the similarities once.
    """
    if not product:
        return rows * length * itemsize / ceilings.bytes
    arithmetic = 2 * rows * length * dim / ceilings.flops
    return max(arithmetic, (length + rows) * dim * itemsize / ceilings.bytes)
