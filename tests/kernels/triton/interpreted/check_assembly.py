"""What the kernels compute on a device alone: their inline assembly, by `tests.support.ptx`."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from synco_fast.kernels import Negatives, rng
from synco_fast.kernels.triton import config, contrast_and_gradient, launch, philox
from tests.support.ptx import interpreted
from tests.support.ptx_machine.arithmetic import COSINE_ERROR, LOG2_ERROR

SIGMA = 0.01
#: Both ends of a word, of its upper 23 bits and of half a turn; both sides of the limit of the series.
LIMIT = 2**32 - 2**26
EXTREMES = [0, 1, 511, 512, 2**31 - 512, 2**31 - 1, 2**31, 2**31 + 512, 2**30, 3 << 30, LIMIT - 512, LIMIT - 1, LIMIT]
EXTREMES += [LIMIT + 511, LIMIT + 512, 2**32 - 1024, 2**32 - 513, 2**32 - 512, 2**32 - 1]
WORDS = torch.cat((torch.tensor(EXTREMES), torch.randint(2**32, (1024 - len(EXTREMES),), dtype=torch.int64)))
ERRORS = pytest.mark.parametrize("error", [-1, 0, 1])


@triton.jit
def _parts(p_word, p_cosine, p_sine, p_distance, SIGMA: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    word = tl.load(p_word + o).to(tl.uint32)
    cosine, sine = philox._turned(word, True)
    tl.store(p_cosine + o, cosine)
    tl.store(p_sine + o, sine)
    tl.store(p_distance + o, philox._distance(word, SIGMA, True))


@ERRORS
def test_parts_of_a_normal_number_are_as_exact_as_the_special_function_unit(error):
    cosine, sine, distance = torch.full((3, 1024), math.nan)
    with interpreted(error) as ran:
        _parts[(1,)](WORDS, cosine, sine, distance, SIGMA=SIGMA, N=1024)
    assert len(ran) == 3
    u = rng.uniform(WORDS, torch.float64)
    # The angle is off by up to 2^-21.6, where no multiplication is fused with an addition.
    allowed = 2**-21.4 + abs(error) * COSINE_ERROR
    angle = 2 * math.pi * u - math.pi
    assert (cosine.double() - angle.cos()).abs().max() <= allowed
    assert (sine.double() - angle.sin()).abs().max() <= allowed
    exact = (-2 * u.log()).sqrt()
    # An error of the logarithm becomes one of the root, whose slope is 1 / (2 root). The series has none.
    of_log = LOG2_ERROR * (-u.log2()).clamp(min=1) * math.log(2) / exact
    allowed = 2**-21 + torch.where(1 - u < 1 / 64, 0, abs(error) * of_log)
    assert ((distance.double() / SIGMA - exact).abs() <= allowed).all()
    assert distance[0] == pytest.approx(SIGMA * math.sqrt(48 * math.log(2)), rel=1e-6), "the smallest uniform, 2^-24"
    assert distance.min() == distance[len(EXTREMES) - 1] > 0, "the largest one"


@triton.jit
def _normal(p_words, p_found, SIGMA: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    w0, w1 = tl.load(p_words + o).to(tl.uint32), tl.load(p_words + N + o).to(tl.uint32)
    w2, w3 = tl.load(p_words + 2 * N + o).to(tl.uint32), tl.load(p_words + 3 * N + o).to(tl.uint32)
    numbers = philox.normal(w0, w1, w2, w3, SIGMA=SIGMA, DEVICE=True)
    for number in tl.static_range(0, 4):
        tl.store(p_found + 4 * o + number, numbers[number])


@ERRORS
def test_normal_numbers_of_a_device_are_the_references(error):
    # All pairs of extreme words, in both halves.
    pairs = torch.cartesian_prod(torch.tensor(EXTREMES), torch.tensor(EXTREMES)).T
    words = torch.cat((pairs, pairs.flip(1)))
    words = torch.cat((words, torch.randint(2**32, (4, 512 - words.shape[1]), dtype=torch.int64)), dim=1).contiguous()
    found = torch.full((512, 4), math.nan)
    with interpreted(error):
        _normal[(1,)](words, found, SIGMA=SIGMA, N=512)
    exact = SIGMA * rng.normal(tuple(words), torch.float64)
    assert found.isfinite().all()
    assert (found.double() - exact).abs().max() <= SIGMA * 2**-17
    # The sign of every number that is not within rounding of an axis.
    assert torch.equal(found.sign(), torch.where(exact.abs() > SIGMA * 2**-17, exact.sign().float(), found.sign()))


def test_the_loss_by_the_forms_of_a_device(make, monkeypatch):
    negatives = Negatives(hard=20, noisy=5, sigma=0.05)
    inputs = make(1, 130, 16).guarded()
    monkeypatch.setattr(config, "SAMPLES", (65,))
    # A margin of the size of TF32's, so that some similarities are recomputed.
    form = replace(config.form_of(torch.float32, 16, 0, False), margin=2.0**-8)
    monkeypatch.setattr(launch, "form_of", lambda *_: form)
    settings = {"temperature": 0.2, "seed": 3, "step": 7}
    expected = contrast_and_gradient(*inputs, negatives, **settings)
    assert not expected.fallback.any()
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with interpreted() as ran:
        found = contrast_and_gradient(*inputs, negatives, **settings)
    assert {text.split()[0] for text in ran} == {"{", "sin.approx.ftz.f32", "cos.approx.ftz.f32", "lg2.approx.ftz.f32"}
    for name in ("hard", "rank", "queue_rank", "fallback", "positive"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("loss", "gradient", "synthetic"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6, equal_nan=True)
