"""Mean and variance of each group and channel: partial statistics of row ranges, combined by a second kernel.

A program keeps the mean and the sum of squared differences M for each position of its tile, and updates both with every
tile (Welford, Technometrics 4(3), 1962). Parts A of n_A values are combined as (Chan, Golub and LeVeque, 1983)

    mean = sum_A n_A mean_A / n,      M = sum_A M_A + n_A (mean_A - mean)^2

No digits are lost if the mean is far larger than the standard deviation: each position subtracts its first value, and
the mean of a part is stored as two float32 numbers, high and low. The order is fixed, so every run gives the same bits.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["finish_statistics", "partial_statistics"]


@triton.jit(do_not_specialize=["count", "tiles", "splits"])
def partial_statistics(
    p_x,
    p_mean,
    p_rest,
    p_squares,
    p_tracked,
    C,
    count,
    tiles,
    splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Grid (blocks of C, splits, G). Writes partial statistics, (G, splits, C) each: mean (high and low) and M.

    Also increases the int64 batch counter.
    """
    split, group = tl.program_id(1), tl.program_id(2)
    o_channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < C
    begin = split * tiles * BLOCK_ROWS
    end = tl.minimum(begin + tiles * BLOCK_ROWS, count)
    first = (tl.program_id(0) == 0) & (split == 0) & (tl.program_id(2) == 0)
    if p_tracked is not None:
        # The others must not read what this one writes.
        tl.store(p_tracked, tl.load(p_tracked, first, 0) + 1, first)
    b_mean = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    b_squares = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    # One 64-bit offset for a tile, 32-bit offsets within it.
    o_tile = tl.arange(0, BLOCK_ROWS)[:, None] * C + o_channel[None, :]
    m_first = (begin + tl.arange(0, BLOCK_ROWS) < end)[:, None] & m_channel[None, :]
    base = (group.to(tl.int64) * count + begin) * C
    b_origin = tl.load(p_x + base + o_tile, m_first, 0).to(tl.float32)
    for tile in range(1, tiles):
        row = begin + tile * BLOCK_ROWS
        m_x = (row + tl.arange(0, BLOCK_ROWS) < end)[:, None] & m_channel[None, :]
        base = (group.to(tl.int64) * count + row) * C
        b_x = tl.load(p_x + base + o_tile, m_x, 0).to(tl.float32)
        share = 1.0 / (tile + 1)
        b_difference = tl.where(m_x, b_x - b_origin - b_mean, 0.0)
        b_mean += b_difference * share
        b_squares += b_difference * (b_difference * (1.0 - share))
    o_slot = begin + tl.arange(0, BLOCK_ROWS)
    slots = (tl.maximum(end - o_slot + BLOCK_ROWS - 1, 0) // BLOCK_ROWS).to(tl.float32)
    weight = slots / (end - begin).to(tl.float32)
    mean = tl.sum((b_origin + b_mean) * weight[:, None], axis=0)
    b_apart = b_origin - mean[None, :] + b_mean
    rest = tl.sum(b_apart * weight[:, None], axis=0)
    b_apart -= rest[None, :]
    squares = tl.sum(b_squares + slots[:, None] * b_apart * b_apart, axis=0)
    o_share = (group * splits + split) * C + o_channel
    tl.store(p_mean + o_share, mean, m_channel)
    tl.store(p_rest + o_share, rest, m_channel)
    tl.store(p_squares + o_share, squares, m_channel)


@triton.jit(do_not_specialize=["G", "count", "rows", "splits"])
def finish_statistics(
    p_share_mean,
    p_share_rest,
    p_share_squares,
    p_mean,
    p_variance,
    p_running_mean,
    p_running_var,
    p_tracked,
    C,
    G,
    count,
    rows,
    splits,
    momentum,
    CUMULATIVE: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid (blocks of C,). Writes mean and biased variance, (G, C), and updates the running statistics, (C,)."""
    o_channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < C
    sum_mean = tl.zeros([CHANNELS], tl.float32)
    sum_variance = tl.zeros([CHANNELS], tl.float32)
    for first_group in range(0, G, GROUPS):
        o_group = first_group + tl.arange(0, GROUPS)
        m_out = (o_group < G)[:, None] & m_channel[None, :]
        o_first = o_group[:, None] * splits * C + o_channel[None, :]
        b_origin = tl.load(p_share_mean + o_first, m_out, 0)
        b_mean = tl.zeros([GROUPS, CHANNELS], tl.float32)
        b_squares = tl.zeros([GROUPS, CHANNELS], tl.float32)
        done = tl.full([], 0, tl.int32)
        for first in range(0, splits, SPLITS):
            o_split = first + tl.arange(0, SPLITS)
            values = tl.minimum(tl.maximum(count - tl.minimum(o_split, splits) * rows, 0), rows)
            seen = tl.minimum(tl.minimum(first + SPLITS, splits) * rows, count)
            part = (seen - done).to(tl.float32)
            o_share = (o_group[:, None] * splits + o_split[None, :])[:, :, None] * C
            m_share = ((o_group < G)[:, None] & (o_split < splits)[None, :])[:, :, None] & m_channel[None, None, :]
            o_share = o_share + o_channel[None, None, :]
            b_one = tl.load(p_share_mean + o_share, m_share, 0) - b_origin[:, None, :]
            b_one = tl.where(m_share, b_one + tl.load(p_share_rest + o_share, m_share, 0), 0.0)
            b_values = values.to(tl.float32)[None, :, None]
            b_part = tl.sum(b_one * (b_values / part), axis=1)
            b_part += tl.sum((b_one - b_part[:, None, :]) * (b_values / part), axis=1)
            b_apart = tl.where(m_share, b_one - b_part[:, None, :], 0.0)
            b_inside = tl.load(p_share_squares + o_share, m_share, 0)
            b_part_squares = tl.sum(b_inside + b_values * b_apart * b_apart, axis=1)
            b_step = b_part - b_mean
            share = part / seen.to(tl.float32)
            b_mean += b_step * share
            b_squares += b_part_squares + b_step * (b_step * (done.to(tl.float32) * share))
            done = seen
        b_mean += b_origin
        b_variance = b_squares / count.to(tl.float32)
        o_out = o_group[:, None] * C + o_channel[None, :]
        tl.store(p_mean + o_out, b_mean, m_out)
        tl.store(p_variance + o_out, b_variance, m_out)
        sum_mean += tl.sum(tl.where(m_out, b_mean, 0.0), axis=0)
        sum_variance += tl.sum(tl.where(m_out, b_variance, 0.0), axis=0)
    if p_running_mean is not None:
        if CUMULATIVE:
            momentum = 1.0 / tl.load(p_tracked).to(tl.float32)
        unbiased = sum_variance / G * (count.to(tl.float32) / (count - 1).to(tl.float32))
        old_mean = tl.load(p_running_mean + o_channel, m_channel, 0).to(tl.float32)
        old_variance = tl.load(p_running_var + o_channel, m_channel, 0).to(tl.float32)
        new_mean = old_mean + momentum * (sum_mean / G - old_mean)
        new_variance = old_variance + momentum * (unbiased - old_variance)
        tl.store(p_running_mean + o_channel, new_mean.to(p_running_mean.dtype.element_ty), m_channel)
        tl.store(p_running_var + o_channel, new_variance.to(p_running_var.dtype.element_ty), m_channel)
