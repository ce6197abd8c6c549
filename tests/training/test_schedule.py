from itertools import pairwise

import pytest

from synco_fast.training.schedule import key_momentum, learning_rate


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


def test_the_key_encoder_slows_down_along_a_cosine():
    values = [key_momentum(step, base=0.99, steps=10, schedule="cosine") for step in range(11)]
    assert values[0] == pytest.approx(0.99)
    assert values[5] == pytest.approx(0.995)
    assert values[10] == 1
    assert all(a < b for a, b in pairwise(values))
    assert {key_momentum(step, base=0.9, steps=10) for step in range(10)} == {0.9}
