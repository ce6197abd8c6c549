from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from synco_fast.kernels import FAMILIES, Negatives, draw
from synco_fast.kernels.rng import _MULTIPLIERS, _ROUNDS, largest_below, normal, philox, pick, uniform

SYNCO = Negatives.synco(64, interpolated=9, extrapolated=8, mixed=7, noisy=6, perturbed=5, adversarial=4)


# The known-answer vectors that Random123 ships for philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox(counter, key)) == expected
    on_tensors = philox(tuple(torch.full((2, 3), word) for word in counter), tuple(torch.tensor(word) for word in key))
    assert all((word == value).all() and word.shape == (2, 3) for word, value in zip(on_tensors, expected, strict=True))


def test_philox_broadcasts_to_one_shape_and_each_word_counts():
    rows, slots = torch.arange(5)[:, None], torch.arange(7)
    words = philox((rows, slots, 3, 0), (1, 2))
    assert all(word.shape == (5, 7) for word in words)
    for row, slot in ((0, 0), (4, 6), (2, 5)):
        single = philox((row, slot, 3, 0), (1, 2))
        assert [int(word[row, slot]) for word in words] == [int(word) for word in single]
    assert len(set(torch.stack(words).flatten().tolist())) == 4 * 35


def test_uniform_is_strictly_inside_and_exact_in_float32():
    ends = uniform(torch.tensor([0, 2**32 - 1]), torch.float32)
    assert ends.tolist() == [2.0**-24, 1 - 2.0**-24]
    word = torch.randint(0, 2**32, (1000,))
    assert (uniform(word, torch.float32).double() == uniform(word, torch.float64)).all()


def test_counter_layout_is_row_slot_family_lane():
    draws = draw(SYNCO, 3, 10, seed=11, step=13, first_row=5)
    for family in FAMILIES:
        words = philox((5 + 2, 3, family.number, 0), (11, 13))
        found = draws[family.name]
        assert int(found.first[2, 3]) == (int(words[1]) * 2**16 + (int(words[3]) >> 16)) * 64 >> 48
        if found.second is not None:
            assert int(found.second[2, 3]) == (int(words[2]) * 2**16 + int(words[3]) % 2**16) * 64 >> 48
        if found.coefficient is not None:
            low, high = SYNCO.range_of(family)
            expected = low + (high - low) * float(uniform(words[0], torch.float64))
            assert float(found.coefficient[2, 3]) == pytest.approx(expected, abs=1e-7)
    lanes = torch.cat([normal(philox((7, 3, 4, lane), (11, 13)), torch.float32).flatten() for lane in (1, 2, 3)])
    assert torch.equal(draws["noisy"].noise[2, 3], lanes[:10])


def test_draws_do_not_depend_on_how_rows_are_spread():
    whole = draw(SYNCO, 12, 20, seed=1, step=2, first_row=100)
    parts = [draw(SYNCO, 4, 20, seed=1, step=2, first_row=100 + begin) for begin in (0, 4, 8)]
    for name, drawn in whole.items():
        for field, value in zip(drawn._fields, drawn, strict=True):
            if value is not None:
                assert torch.equal(value, torch.cat([getattr(part[name], field) for part in parts]))


def test_draws_do_not_depend_on_other_families_or_counts():
    alone = draw(replace(SYNCO.without_synthetic(), mixed=3), 4, 8, seed=1, step=2)["mixed"]
    among = draw(SYNCO, 4, 8, seed=1, step=2)["mixed"]
    assert torch.equal(alone.coefficient, among.coefficient[:, :3])
    assert torch.equal(alone.second, among.second[:, :3])


@pytest.mark.parametrize("change", [{"seed": 9}, {"step": 9}, {"first_row": 64}])
def test_seed_step_and_row_each_change_everything(change):
    base = draw(SYNCO, 4, 8, **{"seed": 1, "step": 2})
    other = draw(SYNCO, 4, 8, **{"seed": 1, "step": 2} | change)
    assert not (base["interpolated"].coefficient == other["interpolated"].coefficient).any()
    assert not (base["noisy"].noise == other["noisy"].noise).any()


def test_step_may_stay_on_the_device():
    plain, tensor = (draw(SYNCO, 3, 6, seed=1, step=step) for step in (77, torch.tensor(77)))
    assert torch.equal(plain["noisy"].noise, tensor["noisy"].noise)
    assert torch.equal(plain["mixed"].first, tensor["mixed"].first)


def test_a_compiler_sees_no_product_of_an_index():
    """Inductor computes such a product as an index of 32 bits: on a GPU it does not compile, or it overflows."""
    graph = make_fx(lambda: draw(SYNCO, 3, 8, seed=1, step=2))().graph
    products = [node for node in graph.nodes if node.args[1:] in {(factor,) for factor in _MULTIPLIERS}]
    assert len(products) >= 2 * _ROUNDS
    assert {product.args[0].target.overloadpacket.__name__ for product in products} <= {"bitwise_and", "bitwise_and_"}


def test_picks_stay_below_what_is_available():
    available = torch.tensor([0, 1, 5, 64, 9999])
    first = draw(replace(SYNCO, mixed=500), 5, 4, seed=1, step=2, available=available)["mixed"].first
    assert (first.amax(dim=1) < available.clamp(1, 64)).all()
    assert first[0].eq(0).all()
    assert first[3].amax() > 50


def test_distributions():
    negatives = Negatives(hard=16, mixed=4000, noisy=50)
    draws = draw(negatives, 50, 80, seed=4, step=0)
    mixed, noise = draws["mixed"], draws["noisy"].noise
    n = mixed.first.numel()
    assert mixed.coefficient.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / n))
    assert mixed.coefficient.var().item() == pytest.approx(1 / 12, rel=0.02)
    shares = torch.bincount(mixed.first.flatten() * 16 + mixed.second.flatten(), minlength=256) / n
    assert (shares - 1 / 256).abs().max() < 5 * math.sqrt(1 / 256 / n), "n_i and n_j are uniform and independent"
    assert noise.mean().item() == pytest.approx(0, abs=5 / math.sqrt(noise.numel()))
    assert noise.var().item() == pytest.approx(1, rel=0.02)
    assert noise.pow(4).mean().item() == pytest.approx(3, rel=0.05)
    flat = noise.flatten(0, 1)
    correlation = flat.T @ flat / len(flat) - torch.eye(80)
    assert correlation.abs().max() < 6 / math.sqrt(len(flat))


def test_half_precision_is_the_float32_draw_rounded_once():
    for half in (torch.bfloat16, torch.float16):
        drawn = draw(SYNCO, 3, 6, seed=1, step=2, dtype=half)["noisy"].noise
        assert torch.equal(drawn, draw(SYNCO, 3, 6, seed=1, step=2)["noisy"].noise.to(half))


@pytest.mark.parametrize("size", [1, 3, 1024, 65537, 2**31 - 1, 2**31])
def test_picks_take_48_bits(size):
    # Beside random words those at which a position ends: there the 16 bits more decide.
    edges = [-(-position * 2**32 // size) - 1 for position in (1, 2, size // 2, size)]
    words = [word for word in (*edges, 0, 2**32 - 1, *torch.randint(0, 2**32, (50,)).tolist()) if 0 <= word < 2**32]
    for more in (0, 1, 2**15, 2**16 - 1):
        found = pick(torch.tensor(words), torch.tensor(more), size)
        assert found.tolist() == [(word * 2**16 + more) * size >> 48 for word in words]
        assert found.max() < size


def test_the_bits_more_matter():
    size = 1000
    word = torch.tensor([position * 2**32 // size for position in range(1, size) if position * 2**32 % size])
    low, high = (pick(word, torch.tensor(more), size) for more in (0, 2**16 - 1))
    assert torch.equal(low + 1, high)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 0.5), (1.0, 1.5), (0.0, 1.0), (-1.0, 0.0), (-2.0, -1.0), (-3.0, -1.1), (0.1, 0.3), (2.0, 2.0)],
)
def test_ranges_are_half_open_in_every_dtype(dtype, low, high):
    most = torch.tensor(largest_below(low, high, dtype), dtype=dtype)
    end = torch.tensor(high, dtype=dtype)
    if low == high:
        assert most == end
    elif high == 0:
        assert -1e-4 < most.item() < 0
        return
    else:
        assert most == torch.nextafter(end, torch.tensor(-torch.inf, dtype=dtype))
    # The word that rounds up to the end.
    number = low + (high - low) * uniform(torch.tensor(2**32 - 1), dtype if dtype.itemsize > 2 else torch.float32)
    assert number.to(dtype).clamp(max=most.item()) == most or dtype == torch.float64


def test_no_draw_reaches_the_end_of_its_range():
    for dtype in (torch.float32, torch.bfloat16):
        negatives = Negatives(hard=4, extrapolated=50000)
        found = draw(negatives, 4, 2, seed=1, step=2, dtype=dtype)["extrapolated"].coefficient
        assert found.min() >= 1
        assert found.max() < 1.5
    assert found.max() == largest_below(1.0, 1.5, torch.bfloat16)
