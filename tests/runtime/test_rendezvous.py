"""Ranks find each other in a store in which an earlier start of the job has left its keys."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from synco_fast.runtime.errors import LostProcessError
from synco_fast.runtime.rendezvous import agree_on_prefix


def starting(store: dist.Store, ranks: list[int], world: int, timeout: float) -> list[str]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        found = list(pool.map(lambda rank: agree_on_prefix(store, rank, world, timeout), ranks))
    assert all(refusals == {} for _, refusals in found)
    return [prefix for prefix, _ in found]


def test_every_start_gets_a_prefix_of_its_own():
    store = dist.HashStore()
    first = starting(store, [0, 1, 2], 3, 20)
    second = starting(store, [2, 1, 0], 3, 20)
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]


def test_a_start_that_nobody_finished_is_no_obstacle():
    """Rank 2 came, and died with the others before rank 0 did."""
    store = dist.HashStore()
    with pytest.raises(LostProcessError, match=r"rank 2 found no rank 0 within 0\.01 s, expected all 3 processes"):
        agree_on_prefix(store, 2, 3, 0.01)
    with pytest.raises(LostProcessError, match=r"rank 0 found no rank 1, 2 within 0\.1 s, expected all 3 processes"):
        agree_on_prefix(store, 0, 3, 0.1)
    assert len(set(starting(store, [0, 1, 2], 3, 20))) == 1


def test_every_rank_hears_who_cannot_start():
    store, reasons = dist.HashStore(), [None, "b: found no folder", None, "c: found no folder"]
    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda rank: agree_on_prefix(store, rank, 4, 20, reasons[rank]), range(4)))
        assert [refusals for _, refusals in found] == [{1: reasons[1], 3: reasons[3]}] * 4
    assert len(set(starting(store, [0, 1, 2, 3], 4, 20))) == 1, "a later start knows nothing of it"
