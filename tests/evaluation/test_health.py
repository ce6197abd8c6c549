import math

import pytest
import torch
from torch.nn.functional import normalize

from synco_fast.evaluation.health import (
    age_gap,
    alignment,
    best_window,
    class_share,
    contraction,
    rankme,
    rows_for_health,
    uniformity,
)
from synco_fast.kernels import FAMILIES, Negatives
from synco_fast.kernels.reference import contrast
from synco_fast.runtime.errors import ConfigError


def noise(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_alignment_by_hand():
    first = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    second = torch.tensor([[0.0, 2.0], [0.0, 5.0]])
    assert alignment(first, first * 4) == pytest.approx(0)
    # A right angle has distance sqrt(2), equal directions 0.
    assert alignment(first, second) == pytest.approx((2 + 0) / 2)
    assert alignment(first, second, power=1) == pytest.approx(math.sqrt(2) / 2)


def test_alignment_is_the_cosine_in_other_words():
    one, other = noise(50, 16), noise(50, 16, seed=1)
    cosine = float((normalize(one.double(), dim=1) * normalize(other.double(), dim=1)).sum(1).mean())
    assert alignment(one, other) == pytest.approx(2 - 2 * cosine)


def test_uniformity_by_hand():
    same = torch.ones(5, 3)
    assert uniformity(same) == pytest.approx(0, abs=1e-9)
    assert uniformity(same * 0) == pytest.approx(0, abs=1e-9), "a dead network spreads nothing"
    # Four corners of a square: of the three others, two at squared distance 2 and one at 4.
    square = torch.tensor([[1.0, 0], [0, 2], [-3, 0], [0, -1]])
    expected = math.log((2 * math.exp(-2 * 2) + math.exp(-2 * 4)) / 3)
    assert uniformity(square) == pytest.approx(expected)
    assert uniformity(square, scale=1) == pytest.approx(math.log((2 * math.exp(-2) + math.exp(-4)) / 3))


def test_uniformity_over_blocks_is_that_of_all_pairs():
    rows = noise(1500, 6)
    unit = normalize(rows.double(), dim=1)
    expected = float(torch.exp(-2 * torch.nn.functional.pdist(unit).square()).mean().log())
    assert uniformity(rows) == pytest.approx(expected, rel=1e-9)


def test_uniformity_falls_as_features_spread():
    near = noise(200, 32) + 5
    assert uniformity(noise(200, 32)) < uniformity(near) < 0
    assert uniformity(noise(400, 4096)) == pytest.approx(-4, abs=0.05), "independent directions are at right angles"


def test_rankme_counts_equal_directions():
    basis = torch.linalg.qr(noise(64, 32))[0]
    assert rankme(basis) == pytest.approx(32, rel=1e-4)
    assert rankme(basis[:, :1] @ noise(1, 32)) == pytest.approx(1, abs=1e-3)
    flat = torch.zeros(10, 8)
    flat[:, :3] = torch.linalg.qr(noise(10, 3))[0]
    assert rankme(flat) == pytest.approx(3, rel=1e-4)


def test_rankme_does_not_change_with_scale_rotation_or_order():
    rows = noise(100, 12) * torch.logspace(0, -2, 12)
    turned = rows @ torch.linalg.qr(noise(12, 12, seed=3))[0]
    for other in (rows * 50, turned, rows.flip(0)):
        assert rankme(other) == pytest.approx(rankme(rows), rel=1e-4)
    assert 1 < rankme(rows) < 12


def test_rankme_of_nothing_but_zeros_is_one():
    assert rankme(torch.zeros(4, 3)) == 1


def test_rankme_names_what_is_not_finite():
    with pytest.raises(ConfigError, match="rankme: found a feature that is not finite"):
        rankme(torch.tensor([[1.0, float("nan")]]))


def test_class_share_by_hand():
    queries = torch.tensor([0, 1])
    hard = torch.tensor([[0, 0, 2, 1], [1, 0, -1, -1]])
    assert class_share(queries, hard) == pytest.approx(3 / 6)
    assert math.isnan(class_share(queries, torch.full((2, 3), -1)))


def test_the_age_gap_follows_the_pointer():
    queries = normalize(noise(5, 3), dim=1)
    queue = normalize(noise(8, 3, seed=1), dim=1)
    for pointer in range(8):
        newest, oldest = queue[[(pointer - 1) % 8, (pointer - 2) % 8]], queue[[pointer, (pointer + 1) % 8]]
        expected = (queries @ newest.T).mean() - (queries @ oldest.T).mean()
        assert float(age_gap(queries, queue, pointer, 2)) == pytest.approx(float(expected), abs=1e-6)
        assert torch.equal(age_gap(queries, queue, torch.tensor(pointer), 2), age_gap(queries, queue, pointer, 2))


def test_a_drifting_encoder_shows_in_the_age_gap():
    drift = torch.linspace(0, 3, 64)[:, None] * torch.eye(16)[0]
    still = noise(64, 16, seed=2)
    queries = normalize(noise(32, 16) + 3 * torch.eye(16)[0], dim=1)
    assert abs(float(age_gap(queries, normalize(still, dim=1), 0, 16))) < 0.1
    assert float(age_gap(queries, normalize(still + drift, dim=1), 0, 16)) > 0.3
    with pytest.raises(ConfigError, match="age_gap: found a count of 33, expected 1 to 32"):
        age_gap(queries, still, 0, 33)


def test_a_subset_takes_from_everywhere():
    rows = torch.arange(1000.0)[:, None]
    found = rows_for_health(rows, 10)[:, 0].tolist()
    assert found == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]
    assert torch.equal(rows_for_health(rows[:3], 10), rows[:3])


@pytest.mark.parametrize(
    ("keys", "scale", "hard", "temperature", "expected"),
    [(65536, 1, 1024, 0.2, 0.08), (1024, 1 / 16, 64, 0.1, 0.80), (1024, 1 / 64, 512, 0.2, 0.05)],
)
def test_how_much_weight_synthetic_negatives_have(keys, scale, hard, temperature, expected):
    """The shares that docs/curves.md states, of exp(similarity / T) over all negatives of random unit vectors."""
    q, k = (normalize(noise(32, 128, seed=seed), dim=1) for seed in (0, 1))
    queue = normalize(noise(keys, 128, seed=2), dim=1)
    counts = {family.name: round(getattr(Negatives.synco(), family.name) * scale) for family in FAMILIES}
    # exp(loss) - 1 is the negatives' weight over the positive's.
    weights = [
        contrast(q, k, queue, negatives, temperature=temperature, seed=0, step=0).loss.exp() - 1
        for negatives in (Negatives.moco(), Negatives(hard=hard, **counts))
    ]
    assert float((1 - weights[0] / weights[1]).mean()) == pytest.approx(expected, abs=0.02)


HEALTHY = [0.05, 0.1, 0.2, 0.3, 0.35, 0.4, 0.42, 0.45, 0.47, 0.5, 0.51, 0.52]
NEAR = [0.3, 0.25, 0.2, 0.2, 0.25, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]


def test_a_contracting_run_is_told_apart():
    falling = [0.05, 0.15, 0.28, 0.27, 0.2, 0.1, 0.06, 0.05, 0.04, 0.03, 0.03, 0.03]
    rising = [0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.85, 0.88, 0.9, 0.9, 0.9, 0.9]
    said = contraction(falling, rising, window=3)
    assert said is not None
    assert "from 25% to 3%" in said
    assert contraction(HEALTHY, NEAR, window=3) is None
    assert contraction(falling, NEAR, window=3) is None, "harder negatives alone are no contraction"
    assert contraction(HEALTHY, rising, window=3) is None, "near negatives that are still told apart are none either"


#: Epoch means of two runs in bench/records/demo/sweeps.md: top-1 against the queue and positive similarity.
CONTRACTED = (
    [0.063, 0.179, 0.233, 0.227, 0.209, 0.171, 0.127, 0.098, 0.095, 0.099, 0.12, 0.122, 0.094, 0.077, 0.06],
    [0.61, 0.44, 0.48, 0.46, 0.41, 0.41, 0.45, 0.56, 0.66, 0.68, 0.67, 0.68, 0.74, 0.81, 0.86],
)
LEARNED = (
    [0.041, 0.028, 0.038, 0.04, 0.036, 0.038, 0.039, 0.039, 0.044, 0.03, 0.033, 0.029],
    [0.61, 0.03, 0.05, 0.19, 0.33, 0.45, 0.53, 0.58, 0.63, 0.65, 0.69, 0.7],
)


def test_recorded_runs_are_told_apart():
    assert "from 20% to 9%" in (contraction(*CONTRACTED) or "")
    assert contraction(*LEARNED) is None


@pytest.mark.parametrize("window", [1, 5])
def test_the_best_window_is_kept_up_figure_by_figure(window):
    values = [float(value) for value in torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(window))]
    best = None
    for count in range(1, len(values) + 1):
        means = [sum(values[at : at + window]) / window for at in range(count - 2 * window + 1)]
        best = best_window(values[:count], window, best)
        assert best == (means.index(max(means)) if means else None)


def test_a_short_run_is_not_judged():
    assert contraction([0.5] * 3 + [0.0] * 2, [0.0] * 3 + [1.0] * 2, window=3) is None
    with pytest.raises(ConfigError, match="found 2 and 1 figures"):
        contraction([0.1, 0.2], [0.1])


@pytest.mark.parametrize("measure", [uniformity, rankme])
def test_what_cannot_be_measured_is_named(measure):
    with pytest.raises(ConfigError, match="expected \\(n, F\\) with n of"):
        measure(torch.empty(0, 4))
    with pytest.raises(ConfigError, match="found features of shape"):
        measure(torch.ones(3))


def test_pairs_must_be_pairs():
    with pytest.raises(ConfigError, match="expected two equal"):
        alignment(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ConfigError, match="expected \\(B,\\) and \\(B, N\\)"):
        class_share(torch.zeros(2), torch.zeros(3, 2))
