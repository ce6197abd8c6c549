import torch

from synco_fast.data.seeding import derive_seed


def test_every_word_counts_and_so_does_their_order():
    seeds = {derive_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_torch_tells_derived_seeds_apart():
    draws = {torch.rand((), generator=torch.Generator().manual_seed(derive_seed(seed, 0))).item() for seed in range(64)}
    assert len(draws) == 64
