from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from synco_fast.kernels import Negatives, rng
from synco_fast.kernels.triton.config import table
from synco_fast.kernels.triton.draws import DRAWN, draw
from synco_fast.kernels.triton.philox import normal, philox, pick


@triton.jit
def _draw(p_words, p_normal, seed, step, row, N: tl.constexpr):
    slot = tl.arange(0, N).to(tl.uint32)
    zero = slot * 0
    k0, k1 = seed.to(tl.uint32), step.to(tl.uint32)
    w0, w1, w2, w3 = philox(zero + row.to(tl.uint32), slot, zero + 4, zero + 9, k0, k1)
    e0, e1, e2, e3 = normal(w0, w1, w2, w3, SIGMA=1.0, DEVICE=False)
    o = tl.arange(0, N)
    tl.store(p_words + o * 4, w0.to(tl.int64))
    tl.store(p_words + o * 4 + 1, w1.to(tl.int64))
    tl.store(p_words + o * 4 + 2, w2.to(tl.int64))
    tl.store(p_words + o * 4 + 3, w3.to(tl.int64))
    tl.store(p_normal + o * 4, e0)
    tl.store(p_normal + o * 4 + 1, e1)
    tl.store(p_normal + o * 4 + 2, e2)
    tl.store(p_normal + o * 4 + 3, e3)


def test_words_are_equal_and_normal_numbers_nearly():
    for seed, step, row in ((0, 0, 0), (1, 2, 3), (2**32 - 1, 2**31 + 5, 2**32 - 1)):
        words, numbers = torch.zeros(256, 4, dtype=torch.int64), torch.zeros(256, 4)
        _draw[(1,)](words, numbers, seed, step, row, N=256)
        expected = rng.philox((row, torch.arange(256), 4, 9), (seed, step))
        assert torch.equal(words, torch.stack(expected, dim=1))
        exact = rng.normal(expected, torch.float64)
        torch.testing.assert_close(numbers.double(), exact, rtol=1e-6, atol=2e-6)


@triton.jit
def _normal(p_word, p_found, SIGMA: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    word = tl.load(p_word + o).to(tl.uint32)
    near, _, far, _ = normal(word, word * 0, word, word * 0, SIGMA=SIGMA, DEVICE=False)
    tl.store(p_found + o, near)
    tl.store(p_found + N + o, far)


@pytest.mark.parametrize("sigma", [0.01, -0.01])
def test_the_largest_and_smallest_normal_numbers_are_right(sigma):
    # The ends of u, and both sides of the limit beyond which a series stands for the logarithm.
    limit = 2**32 - 2**26
    words = torch.tensor([0, 511, 512, 2**32 - 1, 2**32 - 512, 2**32 - 513, limit - 512, limit + 511])
    found = torch.zeros(2, 8)
    _normal[(1,)](words, found, SIGMA=sigma, N=8)
    exact = sigma * rng.normal((words, words * 0, words, words * 0), torch.float64)
    torch.testing.assert_close(found.double(), exact[:, [0, 2]].T.contiguous(), rtol=1e-6, atol=2e-8)


@triton.jit
def _pick(p_word, p_more, p_found, size, N: tl.constexpr):
    o = tl.arange(0, N)
    word, more = tl.load(p_word + o).to(tl.uint32), tl.load(p_more + o).to(tl.uint32)
    tl.store(p_found + o, pick(word, more, size.to(tl.uint32) + word * 0))


def test_picks_are_equal_where_a_position_ends():
    for size in (3, 1000, 65537, 2**29):
        last = [position * 2**32 // size for position in range(1, 65)]
        word = torch.tensor([end + near for end in last for near in (-1, 0)]) % 2**32
        for more in (
            torch.zeros(128, dtype=torch.int64),
            torch.full((128,), 2**16 - 1),
            torch.randint(0, 2**16, (128,)),
        ):
            found = torch.full((128,), -1, dtype=torch.int32)
            _pick[(1,)](word, more, found, size, N=128)
            assert torch.equal(found.long(), rng.pick(word, more, size))


@triton.jit
def _slots(p_hard, p_drawn, size, row, seed, step, TABLE: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    part = tl.program_id(0)
    p_drawn += part * WIDTH * 8
    words = size.to(tl.uint32), row.to(tl.uint32), seed.to(tl.uint32), step.to(tl.uint32)
    draw(p_hard, p_drawn, words[0], words[1], words[2], words[3], part, TABLE, PARTS, WIDTH, 0)


def test_slots_are_drawn_with_all_48_bits():
    # With as many positions, no power of two, the 16 bits more decide some of the picks.
    size, parts, shares = 4_000_003, 4, {"interpolated": 2, "mixed": 4096}
    negatives = Negatives(hard=size, interpolated=5, mixed=16_383)
    width = sum(shares.values())
    drawn = torch.full((parts, DRAWN, width), torch.nan)
    index = torch.arange(size)
    _slots[(parts,)](index, drawn, size, 2**32 - 9, 3, 7, TABLE=table(negatives), PARTS=parts, WIDTH=width)
    numbers = drawn.view(parts, 2, width, 4).split(list(shares.values()), dim=2)
    expected = rng.draw(negatives, 1, 1, seed=3, step=7, first_row=2**32 - 9)
    for name, found in zip(shares, numbers, strict=True):
        positions = [exact[0] for exact in (expected[name].first, expected[name].second) if exact is not None]
        t = expected[name].coefficient[0]
        factors = (1 - t, t) if name == "interpolated" else (t, 1 - t)
        for key, exact, factor in zip(found.transpose(0, 1), positions, factors, strict=False):
            key = key.reshape(-1, 4)[: getattr(negatives, name)]
            assert torch.equal(key[:, 0].contiguous().view(torch.int32).long(), exact)
            torch.testing.assert_close(key[:, 1], factor, rtol=1e-6, atol=1e-7)
