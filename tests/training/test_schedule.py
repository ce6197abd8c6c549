from itertools import pairwise

import pytest

from synco_fast.training.schedule import learning_rate


def test_half_a_cosine():
    rates = [learning_rate(step, peak=2.0, steps=100) for step in range(101)]
    assert rates[0] == 2.0
    assert rates[50] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(rates))


def test_warm_up_rises_to_the_peak():
    rates = [learning_rate(step, peak=1.0, steps=20, warmup=5) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert max(rates) == 1.0


def test_constant():
    assert {learning_rate(step, peak=0.3, steps=9, schedule="constant") for step in range(9)} == {0.3}
