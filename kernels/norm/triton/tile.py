"""Helpers shared by the passes: the affine map, the ReLU mask and rounding.

Forward and backward compute the affine map by the same operations, so that they agree on the sign of y.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["affine", "channel_numbers", "rectify", "rounded"]


@triton.jit
def affine(b_x, mean, scale, bias):
    """(x - mean) scale + bias. Subtracts first, which is exact for x near a large mean."""
    return tl.fma(b_x - mean[None, :], scale[None, :], bias[None, :])


@triton.jit
def rectify(b_value, b_y):
    """``b_value`` where y is above 0 or NaN, else 0. NaN passes through, as in PyTorch."""
    return tl.where(b_y <= 0, 0.0, b_value)


@triton.jit
def rounded(b_value, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """Round to ``DTYPE``, to nearest even. The interpreter truncates bfloat16, so with EMULATE it is rounded here."""
    if EMULATE and tl.bfloat16 == DTYPE:
        b_bits = b_value.to(tl.int32, bitcast=True)
        b_near = ((b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        b_value = tl.where(b_value == b_value, b_near, b_value)
    return b_value.to(DTYPE)


@triton.jit
def channel_numbers(p_mean, p_variance, p_weight, p_bias, o_channel, m_channel, group, C, eps):
    """Mean, 1 / sqrt(variance + eps), that times the weight, and bias of some channels of a group."""
    o_statistics = group * C + o_channel
    mean = tl.load(p_mean + o_statistics, m_channel, 0).to(tl.float32)
    rstd = tl.rsqrt(tl.load(p_variance + o_statistics, m_channel, 1).to(tl.float32) + eps)
    scale = rstd
    if p_weight is not None:
        scale = rstd * tl.load(p_weight + o_channel, m_channel, 0).to(tl.float32)
    bias = tl.zeros_like(mean)
    if p_bias is not None:
        bias = tl.load(p_bias + o_channel, m_channel, 0).to(tl.float32)
    return mean, rstd, scale, bias
