"""How the kernels are launched: what they serve, their tiles and the spread over programs, from shapes and dtypes."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
from torch import Tensor

__all__ = ["Shape", "interpreted", "shape_of", "unserved"]

#: Numbers of a tile: 16 for each thread of eight warps, so that no kernel needs local memory.
TILE = 4096
#: Channels of a tile: 64 make a full line of the L2 cache in 16 bits.
CHANNELS = 64
#: Programs of a reduction: four for each multiprocessor of an H100. Fixed, so that the bits are the same everywhere.
PROGRAMS = 512
#: Tiles that a program of an elementwise pass handles, to load the numbers of a channel once for all of them.
TILES = 4
#: Shares of a channel that are added up at once, of all groups together.
SHARES = 256
#: Channels of a program that adds shares up: a sector of the L2 cache.
SHARED_CHANNELS = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unserved(x: Tensor) -> str | None:
    """Why the kernels do not serve x, (B, C, H, W); None where they do."""
    if x.dtype not in _DTYPES:
        return f"x has dtype {x.dtype}; the kernels take float32, bfloat16 and float16"
    if not x.numel():
        return f"x is empty, {tuple(x.shape)}"
    if x.shape[0] * x.shape[2] * x.shape[3] >= 1 << 30:
        return f"x has {x.shape[0] * x.shape[2] * x.shape[3]} values a channel; the kernels take fewer than {1 << 30}"
    if max(PROGRAMS, x.shape[0]) * x.shape[1] >= 1 << 31:
        return f"x has {x.shape[0]} images of {x.shape[1]} channels; the kernels take fewer than {1 << 31} in all"
    if interpreted():
        return None
    if not x.is_cuda or torch.version.hip:
        return f"x is on {x.device.type}; the kernels run on CUDA devices"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the device is older than compute capability 8.0"
    return None


class Shape(NamedTuple):
    """A tensor (B, C, H, W) as a matrix of rows, one a place of an image, and how programs share it.

    Attributes:
        channels: C, columns.
        values: n, rows of a group.
        groups: G.
        block_rows, block_channels: Of a tile.
        tiles: Tiles that a program of a reduction goes through.
        splits: Programs that share a group's rows in a reduction.
        chunks: Programs that share a group's rows in an elementwise pass.
        at_once: Groups whose shares are added up at once.
    """

    channels: int
    values: int
    groups: int
    block_rows: int
    block_channels: int
    tiles: int
    splits: int
    chunks: int
    at_once: int

    @property
    def columns(self) -> int:
        """Blocks of channels."""
        return -(-self.channels // self.block_channels)

    @property
    def rows(self) -> int:
        """Rows of a split."""
        return self.tiles * self.block_rows


def shape_of(x: Tensor, groups: int) -> Shape:
    """How the kernels see x, (B, C, H, W), in so many groups."""
    channels = x.shape[1]
    count = x.numel() // (channels * groups)
    block_channels = min(CHANNELS, max(16, triton.next_power_of_2(channels)))
    block_rows = TILE // block_channels
    tiles = triton.cdiv(count, block_rows)
    wanted = max(1, PROGRAMS // (groups * triton.cdiv(channels, block_channels)))
    each = triton.cdiv(tiles, wanted)
    at_once = min(SHARES, triton.next_power_of_2(groups))
    return Shape(
        channels,
        count,
        groups,
        block_rows,
        block_channels,
        each,
        triton.cdiv(tiles, each),
        triton.cdiv(tiles, TILES),
        at_once,
    )
