"""Launch configuration of the batch norm kernels: supported inputs, tiles and grids, from shapes and dtypes."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from synco_fast.kernels.sizes import cdiv, next_power_of_2

__all__ = ["Shape", "interpreted", "shape_of", "unserved"]

#: Numbers of a tile: 16 for each thread of eight warps, so that no kernel spills registers.
TILE = 4096
#: Channels of a tile: 64 numbers of 16 bits fill a line of the L2 cache.
CHANNELS = 64
#: Programs of a reduction: four for each multiprocessor of an H100. Fixed, so that every GPU gives the same bits.
PROGRAMS = 512
#: Tiles for each program of an elementwise pass, which loads the numbers of a channel once for all of them.
TILES = 4
#: Partial sums of a channel that are added at a time, over all groups.
SHARES = 256
#: Channels of a program that adds partial sums: a sector of the L2 cache.
SHARED_CHANNELS = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """True if the kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unserved(x: Tensor) -> str | None:
    """The reason why the kernels cannot take x, (B, C, H, W), or None if they can."""
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
    """A tensor (B, C, H, W) as a matrix with one row for each pixel, and its division among programs.

    Attributes:
        channels: C, the columns.
        values: n, the rows of a group.
        groups: G.
        block_rows, block_channels: Tile size.
        tiles: Tiles for each program of a reduction.
        splits: Programs that split a group's rows in a reduction.
        chunks: Programs that split a group's rows in an elementwise pass.
        at_once: Groups whose partial sums are added at a time.
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
        """Number of channel blocks."""
        return -(-self.channels // self.block_channels)

    @property
    def rows(self) -> int:
        """Rows of a split."""
        return self.tiles * self.block_rows


def shape_of(x: Tensor, groups: int) -> Shape:
    """The `Shape` of x, (B, C, H, W), with this number of groups."""
    channels = x.shape[1]
    count = x.numel() // (channels * groups)
    block_channels = min(CHANNELS, max(16, next_power_of_2(channels)))
    block_rows = TILE // block_channels
    tiles = cdiv(count, block_rows)
    wanted = max(1, PROGRAMS // (groups * cdiv(channels, block_channels)))
    each = cdiv(tiles, wanted)
    at_once = min(SHARES, next_power_of_2(groups))
    return Shape(
        channels,
        count,
        groups,
        block_rows,
        block_channels,
        each,
        cdiv(tiles, each),
        cdiv(tiles, TILES),
        at_once,
    )
