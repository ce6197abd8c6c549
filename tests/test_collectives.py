import torch

from synco_fast.models.shuffle import key_order
from synco_fast.runtime.distributed import exchange_rows, gather_rows, mean_over_ranks, rank, world


def test_alone_nothing_is_exchanged():
    rows, order = torch.randn(6, 2), torch.randperm(6)
    assert (rank(), world()) == (0, 1)
    assert gather_rows(rows) is rows
    assert torch.equal(exchange_rows(rows, order), rows[order])
    before = rows.clone()
    mean_over_ranks([rows])
    assert torch.equal(rows, before)


def test_the_order_of_keys_is_a_permutation_of_seed_step_and_direction():
    order = key_order(64, seed=3, step=7)
    assert sorted(order.tolist()) == list(range(64))
    assert torch.equal(order, key_order(64, seed=3, step=torch.tensor(7)))
    others = [key_order(64, seed=4, step=7), key_order(64, seed=3, step=8), key_order(64, seed=3, step=7, direction=1)]
    assert not any(torch.equal(order, other) for other in others)


def test_every_place_is_as_likely_for_every_row():
    """Chi-squared of 4,000 orders of eight rows, against its 99.9th percentile at 49 degrees of freedom."""
    counts = torch.zeros(8, 8)
    for step in range(4000):
        counts[torch.arange(8), key_order(8, seed=0, step=step)] += 1
    assert float(((counts - 500) ** 2 / 500).sum()) < 85.4
