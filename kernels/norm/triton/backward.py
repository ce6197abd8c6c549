"""Backward pass: two sums for each group and channel, then one elementwise pass.

z is the gradient of y where y > 0 and 0 elsewhere. Means are over the n values of a channel in a group:

    db = sum z,   dw = sum z (x - mean) rstd,   dr = z
    dx = w rstd (z - mean z - (x - mean) rstd^2 mean(z (x - mean)))

Without a residual, the ReLU mask is recomputed from x by exactly the operations of the forward pass. With a residual,
it is read from y, which the next layer saves in any case. Then z is written as dr, and the second pass reads it.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.norm.triton.tile import affine, channel_numbers, rectify, rounded

__all__ = ["finish_sums", "of_input", "partial_sums"]


@triton.jit(do_not_specialize=["count", "tiles", "splits"])
def partial_sums(
    p_gradient,
    p_x,
    p_y,
    p_mean,
    p_variance,
    p_weight,
    p_bias,
    p_masked,
    p_sum,
    p_product,
    C,
    count,
    tiles,
    splits,
    eps,
    RECOMPUTE: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Grid (blocks of C, splits, G). Writes the partial sums of z and of z (x - mean), (G, splits, C) float32.

    With ``p_y`` the mask is read from it, and z is written to ``p_masked``. With ``RECOMPUTE`` the mask is recomputed
    from x.
    """
    split, group = tl.program_id(1), tl.program_id(2)
    o_channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < C
    mean, _, scale, bias = channel_numbers(p_mean, p_variance, p_weight, p_bias, o_channel, m_channel, group, C, eps)
    b_sum = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    b_product = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    o_tile = tl.arange(0, BLOCK_ROWS)[:, None] * C + o_channel[None, :]
    for tile in range(tiles):
        row = (split * tiles + tile) * BLOCK_ROWS
        m_x = (row + tl.arange(0, BLOCK_ROWS) < count)[:, None] & m_channel[None, :]
        base = (group.to(tl.int64) * count + row) * C
        b_z = tl.load(p_gradient + base + o_tile, m_x, 0).to(tl.float32)
        b_x = tl.load(p_x + base + o_tile, m_x, 0).to(tl.float32)
        if RECOMPUTE:
            b_y = rounded(affine(b_x, mean, scale, bias), p_x.dtype.element_ty, EMULATE)
            b_z = rectify(b_z, b_y.to(tl.float32))
        if p_y is not None:
            b_z = rectify(b_z, tl.load(p_y + base + o_tile, m_x, 0).to(tl.float32))
            tl.store(p_masked + base + o_tile, b_z.to(p_masked.dtype.element_ty), m_x)
        b_sum += b_z
        b_product += b_z * (b_x - mean[None, :])
    o_share = (group * splits + split) * C + o_channel
    tl.store(p_sum + o_share, tl.sum(b_sum, axis=0), m_channel)
    tl.store(p_product + o_share, tl.sum(b_product, axis=0), m_channel)


@triton.jit(do_not_specialize=["G", "count", "splits"])
def finish_sums(
    p_share_sum,
    p_share_product,
    p_mean,
    p_variance,
    p_weight,
    p_constant,
    p_slope,
    p_of_weight,
    p_of_bias,
    C,
    G,
    count,
    splits,
    eps,
    TRAINING: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid (blocks of C,). Writes dw and db, (C,), and in training mean z and rstd^2 mean(z (x - mean)), (G, C)."""
    o_channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    of_weight = tl.zeros([CHANNELS], tl.float32)
    of_bias = tl.zeros([CHANNELS], tl.float32)
    for first_group in range(0, G, GROUPS):
        o_group = first_group + tl.arange(0, GROUPS)
        m_out = (o_group < G)[:, None] & m_channel[None, :]
        o_out = o_group[:, None] * C + o_channel[None, :]
        b_rstd = tl.rsqrt(tl.load(p_variance + o_out, m_out, 1).to(tl.float32) + eps)
        b_sum = tl.zeros([GROUPS, CHANNELS], tl.float32)
        b_product = tl.zeros([GROUPS, CHANNELS], tl.float32)
        for first in range(0, splits, SPLITS):
            o_split = first + tl.arange(0, SPLITS)
            o_share = (o_group[:, None] * splits + o_split[None, :])[:, :, None] * C
            m_share = ((o_group < G)[:, None] & (o_split < splits)[None, :])[:, :, None] & m_channel[None, None, :]
            b_sum += tl.sum(tl.load(p_share_sum + o_share + o_channel[None, None, :], m_share, 0), axis=1)
            b_product += tl.sum(tl.load(p_share_product + o_share + o_channel[None, None, :], m_share, 0), axis=1)
        of_bias += tl.sum(tl.where(m_out, b_sum, 0.0), axis=0)
        of_weight += tl.sum(tl.where(m_out, b_product * b_rstd, 0.0), axis=0)
        if TRAINING:
            values = count.to(tl.float32)
            tl.store(p_constant + o_out, b_sum / values, m_out)
            tl.store(p_slope + o_out, b_product / values * (b_rstd * b_rstd), m_out)
    tl.store(p_of_weight + o_channel, of_weight, m_channel)
    tl.store(p_of_bias + o_channel, of_bias, m_channel)


@triton.jit(do_not_specialize=["count", "columns"])
def of_input(
    p_gradient,
    p_x,
    p_mean,
    p_variance,
    p_weight,
    p_bias,
    p_constant,
    p_slope,
    p_of_x,
    C,
    count,
    columns,
    eps,
    RECOMPUTE: tl.constexpr,
    TRAINING: tl.constexpr,
    EMULATE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Grid (blocks of C times blocks of rows, 1, G), where C varies fastest. Writes dx.

    ``p_gradient`` is z, or the gradient of y with ``RECOMPUTE``.
    """
    program, group = tl.program_id(0), tl.program_id(2)
    o_channel = program % columns * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < C
    mean, _, scale, bias = channel_numbers(p_mean, p_variance, p_weight, p_bias, o_channel, m_channel, group, C, eps)
    if TRAINING:
        constant = tl.load(p_constant + group * C + o_channel, m_channel, 0)
        slope = tl.load(p_slope + group * C + o_channel, m_channel, 0)
    o_tile = tl.arange(0, BLOCK_ROWS)[:, None] * C + o_channel[None, :]
    for tile in range(TILES):
        row = (program // columns * TILES + tile) * BLOCK_ROWS
        m_x = (row + tl.arange(0, BLOCK_ROWS) < count)[:, None] & m_channel[None, :]
        base = (group.to(tl.int64) * count + row) * C
        b_z = tl.load(p_gradient + base + o_tile, m_x, 0).to(tl.float32)
        if RECOMPUTE or TRAINING:
            b_x = tl.load(p_x + base + o_tile, m_x, 0).to(tl.float32)
        if RECOMPUTE:
            b_y = rounded(affine(b_x, mean, scale, bias), p_x.dtype.element_ty, EMULATE)
            b_z = rectify(b_z, b_y.to(tl.float32))
        if TRAINING:
            b_z = b_z - constant[None, :] - (b_x - mean[None, :]) * slope[None, :]
        tl.store(p_of_x + base + o_tile, rounded(b_z * scale[None, :], p_of_x.dtype.element_ty, EMULATE), m_x)
