from __future__ import annotations

import itertools
import math
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from synco_fast.bench.stages import index_and_similarity
from synco_fast.kernels import Negatives
from synco_fast.kernels.reference import hard_negatives
from synco_fast.kernels.triton import config, launch
from synco_fast.kernels.triton.order import ordered
from synco_fast.kernels.triton.select import _cut
from tests.support.rotation import todays

K = 600
#: Cases a day: fewer where they are compiled.
MANY = 3 if "SYNCO_FAST_CAPABILITY" in os.environ else 8


def chosen(monkeypatch, inputs, hard: int, **ids):
    """Q^N as the kernels find it, and how many rows took the slow path."""
    seen = {}
    original = launch.full_select

    def watched(*arguments):
        seen["slow"] = int(arguments[5].sum())
        original(*arguments)
        seen["index"], seen["value"] = index_and_similarity(arguments[7])

    monkeypatch.setattr(launch, "full_select", watched)
    launch.contrast_and_gradient(*inputs, Negatives(hard=hard), temperature=0.2, seed=1, step=1, **ids)
    monkeypatch.setattr(launch, "full_select", original)
    return seen["value"], seen["index"], seen["slow"]


def flip(inputs, remainder):
    """Every second key as far away as can be: a sample at a stride of 2 sees either only these or none of them."""
    far = torch.arange(K)[:, None] % 2 == remainder
    return inputs._replace(queue=torch.where(far, -inputs.q[:1], inputs.queue))


WORST = {
    "ordinary": lambda inputs: inputs,
    "all equal": lambda inputs: inputs._replace(queue=inputs.queue[:1].expand(K, -1).contiguous()),
    "two values": lambda inputs: inputs._replace(queue=inputs.queue[:2].repeat(K // 2, 1)),
    "all hard ones in one split": lambda inputs: inputs._replace(
        queue=torch.cat((inputs.queue[:500] * 0, inputs.queue[:100]))
    ),
    "sample sees only the hard": lambda inputs: flip(inputs, 1),
    "sample sees only the easy": lambda inputs: flip(inputs, 0),
    "zero rows": lambda inputs: inputs._replace(queue=inputs.queue * (torch.arange(K)[:, None] % 97 == 0)),
}


@pytest.mark.parametrize(("case", "hard"), todays(list(itertools.product(WORST, [1, 63, K])), MANY))
def test_selection_is_exact(make, monkeypatch, case, hard):
    monkeypatch.setattr(config, "SAMPLES", (300,))
    inputs = WORST[case](make(2, K, 16))
    values, index, slow = chosen(monkeypatch, inputs, hard)
    expected, order = hard_negatives(inputs.q @ inputs.queue.T, hard)
    assert torch.equal(values, expected)
    assert torch.equal(index, order)
    if hard == K or case == "all equal":
        assert slow == 2
    if case == "ordinary" and hard < K:
        assert slow == 0


def test_nan_of_either_sign_is_chosen_before_all_others(make, monkeypatch):
    monkeypatch.setattr(config, "SAMPLES", (300,))
    inputs = make(2, K, 16)
    # Not where the sample looks: the threshold is a number, and the fast path serves.
    inputs.queue[17] = torch.nan
    inputs.queue[301] = -torch.tensor(torch.nan)
    _, index, slow = chosen(monkeypatch, inputs, 63)
    assert torch.equal(index, hard_negatives(inputs.q @ inputs.queue.T, 63)[1])
    assert (index == 17).any(dim=1).all()
    assert (index == 301).any(dim=1).all()
    assert slow == 0


def test_nan_is_a_candidate_once_where_several_programs_split_the_columns(make, monkeypatch):
    monkeypatch.setattr(config, "SAMPLES", (65,))
    inputs = make(1, 130, 192)
    assert config.form_of(torch.float32, 192, 0, False).chunk < 192
    # The same lane finds the most similar key first.
    inputs.queue[16:18] = torch.stack((inputs.q[0], inputs.q[0] * torch.nan))
    _, index, slow = chosen(monkeypatch, inputs, 9)
    assert torch.equal(index, hard_negatives(inputs.q @ inputs.queue.T, 9)[1])
    assert slow == 0


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_ties_at_the_boundary(make, monkeypatch, shift):
    # 40 keys are equal, and N cuts through them, ends with them, or takes one more.
    inputs = make(1, K, 16)
    similarity = (inputs.q @ inputs.queue.T)[0]
    order = similarity.argsort(descending=True, stable=True)
    inputs.queue[order[20:60]] = inputs.queue[order[20]].clone()
    values, index, _ = chosen(monkeypatch, inputs, 60 + shift)
    expected, exact = hard_negatives(inputs.q @ inputs.queue.T, 60 + shift)
    assert torch.equal(index, exact)
    assert torch.equal(values, expected)


def test_more_candidates_than_room(make, monkeypatch):
    inputs = make(2, K, 16)
    monkeypatch.setattr(config, "capacity_of", lambda stride, wanted: 64)
    _, index, slow = chosen(monkeypatch, inputs, 63)
    assert slow == 2
    assert torch.equal(index, hard_negatives(inputs.q @ inputs.queue.T, 63)[1])


@pytest.mark.parametrize("segment", [None, 4])
def test_candidates_spread_unevenly_over_the_splits(make, monkeypatch, segment):
    # The queue in the order of its similarity to row 0, whose candidates fill the first splits: they are brought
    # together where the segments hold them, and selected on the slow path where they do not.
    monkeypatch.setattr(config, "SAMPLES", (300,))
    inputs = make(2, K, 16)
    order = (inputs.q @ inputs.queue.T)[0].argsort(descending=True)
    inputs = inputs._replace(queue=inputs.queue[order])
    if segment:
        original = launch.segments_of
        monkeypatch.setattr(launch, "segments_of", lambda *arguments: (original(*arguments)[0], segment))
    values, index, slow = chosen(monkeypatch, inputs, 63)
    expected, exact = hard_negatives(inputs.q @ inputs.queue.T, 63)
    assert torch.equal(index, exact)
    assert torch.equal(values, expected)
    assert slow >= 1 if segment else slow == 0


@pytest.mark.parametrize(("case", "hard", "expected"), [("ordinary", 63, [0, 0]), ("all equal", 63, [1, 1])])
def test_rows_of_the_slow_path_are_reported(make, monkeypatch, case, hard, expected):
    monkeypatch.setattr(config, "SAMPLES", (300,))
    inputs = WORST[case](make(2, K, 16))
    settings = {"temperature": 0.2, "seed": 1, "step": 1}
    assert launch.contrast_and_gradient(*inputs, Negatives(hard=hard), **settings).fallback.tolist() == expected
    # Where nothing is estimated, nothing failed.
    for negatives in (Negatives(hard=K), Negatives()):
        assert launch.contrast_and_gradient(*inputs, negatives, **settings).fallback.tolist() == [0, 0]


@pytest.fixture
def rounding(monkeypatch):
    """Put an error of up to a bound into what the scan found, which reorders the keys around the N-th."""
    rounded = []

    def patch(error, every, rank, margin):
        class Rounding:
            def __getitem__(self, grid):
                def launch(*arguments, **options):
                    found = arguments[2]
                    bits = (found >> 32).to(torch.int32)
                    off = bits.view(torch.float32) + (torch.rand(found.shape) * 2 - 1) * error
                    found.copy_((off.view(torch.int32).long() << 32) | (found & 0xFFFFFFFF))
                    rounded.append(1)
                    select[grid](*arguments, **options)

                return launch

        select, form_of = launch.select, launch.form_of
        form = replace(form_of(torch.float32, 16, 0, False), margin=margin, every=every)
        monkeypatch.setattr(launch, "select", Rounding())
        monkeypatch.setattr(launch, "form_of", lambda *arguments: form)
        monkeypatch.setattr(config, "stride_and_rank", lambda length, hard, size: (1, rank))
        return rounded

    return patch


@pytest.mark.parametrize(("error", "every"), [(2.0**-9, True), (2.0**-9, False), (2.0**-16, False)])
def test_similarities_of_few_bits_are_settled_in_float32(make, monkeypatch, rounding, error, every):
    inputs = make(3, K, 16)
    rounded = rounding(error, every, rank=250, margin=2 * error)
    values, index, slow = chosen(monkeypatch, inputs, 63)
    assert rounded == [1]
    assert slow == 0
    expected, exact = hard_negatives(inputs.q @ inputs.queue.T, 63)
    assert torch.equal(index, exact)
    if every:
        assert torch.equal(values, expected)
    else:
        torch.testing.assert_close(values, expected, rtol=0, atol=error)


def test_a_margin_that_reaches_the_threshold_takes_the_slow_path(make, monkeypatch, rounding):
    inputs = make(1, 130, 16)
    rounding(2.0**-5, False, rank=36, margin=2.0**-4)
    _, index, slow = chosen(monkeypatch, inputs, 32)
    assert slow == 1
    assert torch.equal(index, hard_negatives(inputs.q @ inputs.queue.T, 32)[1])


def test_an_infinite_margin_leaves_no_place_of_the_selection_unwritten(make, monkeypatch, rounding):
    # Four keys are not masked, so that all are candidates, and the two largest similarities are infinite.
    inputs = make(1, 130, 16)
    inputs.queue[41:43] = math.inf * inputs.q[0].sign()
    rounding(0, False, rank=36, margin=2.0**-9)
    ids = {"image_ids": torch.tensor([5]), "queue_ids": torch.full((130,), 5)}
    ids["queue_ids"][40:44] = 7
    _, index, slow = chosen(monkeypatch, inputs, 1, **ids)
    assert slow == 0
    assert index.tolist() == [[41]]


def test_the_margin_grows_with_the_length_of_the_rows(make, monkeypatch, rounding):
    inputs = make(1, 130, 16)
    inputs = inputs._replace(q=4 * inputs.q, k=4 * inputs.k)
    # Off by far more than the margin of unit rows, and by less than half of that of rows 4 long, whose q.k is 13.4.
    assert (inputs.q * inputs.k).sum() > 13
    rounding(0.75, False, rank=120, margin=0.12)
    _, index, slow = chosen(monkeypatch, inputs, 32)
    assert slow == 0
    assert torch.equal(index, hard_negatives(inputs.q @ inputs.queue.T, 32)[1])


@triton.jit
def _search(p_similarity, p_threshold, p_order, p_found, needed, N: tl.constexpr):
    """Integers of the candidates above a threshold, in one list, and `_cut` of them with the bounds of `select`."""
    o = tl.arange(0, N)
    similarity, threshold = tl.load(p_similarity + o), tl.load(p_threshold)
    kept = ~(similarity <= threshold)
    b_order = tl.where(kept, ordered(similarity), -(2**31))
    last, reached = _cut(b_order, needed, ordered(threshold), tl.max(b_order), tl.sum(kept.to(tl.int32)), False)
    tl.store(p_order + o, b_order)
    tl.store(p_found, last)
    tl.store(p_found + 1, reached)


def spread(numbers, scale=1e-6):
    return numbers + scale * np.random.default_rng(1).random(len(numbers))


#: Numbers on which interpolation, or a step in integers or in float32, may fail or converge slowly.
NASTY = {
    "all equal": lambda random, n: np.full(n, 0.25),
    "two values": lambda random, n: np.where(np.arange(n) % 2, 0.25, 0.5),
    "few values": lambda random, n: random.integers(0, 5, n) / 8,
    "most equal": lambda random, n: np.where(random.random(n) < 0.9, 0.5, random.random(n)),
    "two clusters": lambda random, n: spread(np.where(random.random(n) < 0.3, 0.5, -0.5)),
    "one outlier": lambda random, n: np.where(np.arange(n) == n // 2, 3e38, random.random(n)),
    "infinity": lambda random, n: np.where(np.arange(n) % 7 == 0, np.inf, random.random(n)),
    "minus infinity": lambda random, n: np.where(np.arange(n) % 7 == 0, -np.inf, random.random(n)),
    "nan": lambda random, n: np.where(np.arange(n) % 7 == 0, np.nan, random.random(n)),
    "all nan": lambda random, n: np.full(n, np.nan),
    "subnormal": lambda random, n: random.random(n) * 1e-42,
    "zeros of both signs": lambda random, n: np.where(random.random(n) < 0.5, 0.0, -0.0),
    "zeros among numbers": lambda random, n: np.where(random.random(n) < 0.5, 0.0, random.normal(size=n)),
    "powers of two": lambda random, n: np.ldexp(1.0, -random.integers(0, 140, n)),
    "both signs of all sizes": lambda random, n: np.ldexp(random.normal(size=n), -random.integers(0, 140, n)),
    "whole range": lambda random, n: np.ldexp(random.normal(size=n), random.integers(-120, 120, n)),
    "gaps that grow": lambda random, n: np.exp(-np.exp(random.uniform(-5, 4, n))),
}


@pytest.mark.parametrize("case", todays(list(NASTY), 5))
def test_the_search_is_exact_and_ends_on_any_numbers(monkeypatch, case):
    steps = []
    module = sys.modules[_cut.fn.__module__]
    of_select = module._log2
    monkeypatch.setattr(module, "_log2", lambda x: steps.append(1) or of_select(x))
    similarity = torch.from_numpy(NASTY[case](np.random.default_rng(0), 256)).float()
    for threshold in (-math.inf, -4.0, 0.1):
        total = int((~(similarity <= threshold)).sum())
        for needed in sorted({1, 2, 100, total // 2, total - 1, total} & set(range(1, total + 1))):
            order, found = torch.full((256,), -7, dtype=torch.int32), torch.full((2,), -7, dtype=torch.int32)
            steps.clear()
            _search[(1,)](similarity, torch.tensor(threshold), order, found, needed, N=256)
            # Two logarithms come before the first step.
            assert len(steps) - 2 <= 48
            last, reached = found.tolist()
            assert reached == (order >= last).sum() >= needed
            assert reached == needed or last == order.sort(descending=True).values[needed - 1]
