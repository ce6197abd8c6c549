"""The elementwise pass: y = relu((x - mean) rstd w + b + r), rounded once."""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.norm.triton.tile import affine, channel_numbers, rectify, rounded

__all__ = ["normalise"]


@triton.jit(do_not_specialize=["count", "columns"])
def normalise(
    p_x,
    p_mean,
    p_variance,
    p_weight,
    p_bias,
    p_residual,
    p_y,
    C,
    count,
    columns,
    eps,
    RELU: tl.constexpr,
    EMULATE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Grid (blocks of C times blocks of rows, 1, G), where C varies fastest. Weight, bias and residual may be None."""
    program, group = tl.program_id(0), tl.program_id(2)
    o_channel = program % columns * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < C
    mean, _, scale, bias = channel_numbers(p_mean, p_variance, p_weight, p_bias, o_channel, m_channel, group, C, eps)
    o_tile = tl.arange(0, BLOCK_ROWS)[:, None] * C + o_channel[None, :]
    for tile in range(TILES):
        row = (program // columns * TILES + tile) * BLOCK_ROWS
        m_x = (row + tl.arange(0, BLOCK_ROWS) < count)[:, None] & m_channel[None, :]
        base = (group.to(tl.int64) * count + row) * C
        b_y = affine(tl.load(p_x + base + o_tile, m_x, 0).to(tl.float32), mean, scale, bias)
        if p_residual is not None:
            b_y += tl.load(p_residual + base + o_tile, m_x, 0).to(tl.float32)
        if RELU:
            b_y = rectify(b_y, b_y)
        tl.store(p_y + base + o_tile, rounded(b_y, p_y.dtype.element_ty, EMULATE), m_x)
