"""Tests in turn: every case has its day, also in a test that has its own, and all processes have the same day."""

from __future__ import annotations

import os

import pytest

from tests.support import rotation


@pytest.fixture
def on(monkeypatch):
    monkeypatch.delenv("SYNCO_FAST_ALL", raising=False)
    return lambda day: monkeypatch.setenv("SYNCO_FAST_DAY", str(day))


@pytest.mark.parametrize(("cases", "count"), [(3, 1), (6, 2), (7, 2), (2, 1)])
def test_every_case_has_its_day_also_inside_a_test_in_turn(on, cases, count):
    plain, nested = set(), set()
    for day in range(737000, 737100):
        on(day)
        plain |= set(rotation.todays(range(cases), count))
        waits = rotation.in_turn(1, 3).args[0]
        if not waits:
            on(rotation.day() // 3)
            nested |= set(rotation.todays(range(cases), count))
    assert plain == nested == set(range(cases))


def test_the_day_is_kept_for_every_process(monkeypatch):
    assert int(os.environ["SYNCO_FAST_DAY"]) == rotation.day(), "the tests themselves run on a kept day"
    monkeypatch.delenv("SYNCO_FAST_DAY")
    today = rotation.day()
    rotation.keep_the_day()
    assert today <= int(os.environ["SYNCO_FAST_DAY"]) <= today + 1
    monkeypatch.setenv("SYNCO_FAST_DAY", "700000")
    rotation.keep_the_day()
    assert rotation.day() == 700000, "a worker keeps the day that it was given"
