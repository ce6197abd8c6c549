from __future__ import annotations

import ast
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from synco_fast.kernels import FAMILIES, Negatives, negatives, synthetic_contrast


def test_published_counts():
    synco = Negatives.synco()
    assert [synco.count_of(family) for family in FAMILIES] == [256, 256, 256, 64, 64, 64]
    assert (synco.hard, synco.synthetic, synco.extrapolation) == (1024, 960, "released")
    assert (synco.sigma, synco.delta, synco.eta) == (0.01, 0.01, 0.01)
    assert [synco.range_of(family) for family in FAMILIES[:3]] == [(0.0, 0.5), (1.0, 1.5), (0.0, 1.0)]


def test_mochi_is_two_families_and_moco_none():
    mochi = Negatives.mochi(1024, 512, 256)
    assert {family.name: mochi.count_of(family) for family in mochi.active()} == {"interpolated": 256, "mixed": 512}
    assert Negatives.moco().synthetic == Negatives.moco().hard == 0


def test_counts_scale_with_the_queue():
    found = Negatives.synco(extrapolation="paper").scaled(4096 / 65536)
    assert [found.count_of(family) for family in FAMILIES] == [16, 16, 16, 4, 4, 4]
    assert (found.hard, found.extrapolation) == (64, "paper")
    assert Negatives.mochi().scaled(1 / 16, hard=100, mixed=7) == Negatives(hard=100, mixed=7, interpolated=16)
    assert Negatives.moco().scaled(0.25) == Negatives.moco()
    assert Negatives.synco().scaled(1) == Negatives.synco()
    for factor in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"factor: found (-1|nan|inf), expected a finite number from 0 up"):
            Negatives.synco().scaled(factor)
    with pytest.raises(ValueError, match="hard: found 0"):
        Negatives.synco().scaled(0.5, hard=0)


@pytest.mark.parametrize(
    ("count", "length", "hard", "scale", "temperature", "share"),
    [(32, 65536, 1024, 1, 0.2, 8), (512, 1024, 64, 1 / 16, 0.1, 78), (512, 1024, 512, 1 / 64, 0.2, 5)],
)
def test_the_share_of_the_softmax_that_docs_curves_states(count, length, hard, scale, temperature, share):
    """Weight of the synthetic negatives among all negatives in percent, for random unit rows."""
    generator = torch.Generator().manual_seed(0)
    q, queue = (normalize(torch.randn(rows, 128, generator=generator), dim=1) for rows in (count, length))
    chosen = Negatives.synco().scaled(scale, hard=hard)
    # With k = q the loss is log(1 + negatives / exp(1 / T)).
    weights = [
        torch.expm1(synthetic_contrast(q, q, queue, each, temperature=temperature, seed=0, step=0).loss.double())
        for each in (chosen, Negatives.moco())
    ]
    assert 100 * (1 - weights[1] / weights[0]).mean() == pytest.approx(share, abs=1)


def test_without_synthetic_keeps_the_hard_negatives():
    assert Negatives.synco().without_synthetic() == Negatives(hard=1024)


def test_family_numbers_are_the_papers():
    assert [(family.number, family.name) for family in FAMILIES] == [
        (1, "interpolated"),
        (2, "extrapolated"),
        (3, "mixed"),
        (4, "noisy"),
        (5, "perturbed"),
        (6, "adversarial"),
    ]


def test_fields_are_those_of_the_table_also_for_type_checkers():
    tree = ast.parse(Path(negatives.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    (shown,) = (node for node in block.body if isinstance(node, ast.ClassDef))
    stated = {
        field.target.id: ast.literal_eval(field.value) for field in shown.body if isinstance(field, ast.AnnAssign)
    }
    assert list(stated.items()) == [(field.name, field.default) for field in fields(Negatives)]


def test_a_name_that_no_family_has_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'mixd'"):
        Negatives.synco(mixd=3)


def test_each_family_has_a_title_of_one_line_and_a_number_of_its_own():
    assert all(family.title and "\n" not in family.title and len(family.title) < 90 for family in FAMILIES)
    assert len({family.number for family in FAMILIES}) == len(FAMILIES)


def test_hashable_and_frozen():
    assert len({Negatives.synco(), Negatives.synco(), Negatives.mochi()}) == 2
    with pytest.raises(FrozenInstanceError):
        Negatives.synco().hard = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"mixed": -1}, ValueError, "mixed: found -1, expected a whole number from 0 up"),
        ({"mixed": 1.5}, TypeError, "mixed: found 1.5, expected a whole number from 0 up"),
        ({"hard": True}, TypeError, "hard: found True, expected a whole number from 0 up"),
        ({"hard": 0}, ValueError, "hard: found 0, expected 1 or more, to make 960 synthetic negatives"),
        ({"extrapolation": "other"}, ValueError, "extrapolation: found 'other', expected 'released' or 'paper'"),
        ({"mixed_range": (1.0, 0.0)}, ValueError, r"mixed_range: found \(1.0, 0.0\), expected finite low <= high"),
        ({"mixed_range": (0.0, float("inf"))}, ValueError, r"mixed_range: found \(0.0, inf\), expected finite"),
        ({"eta": float("nan")}, ValueError, "eta: found nan, expected a finite number"),
    ],
)
def test_bad_descriptions(changes, error, line):
    with pytest.raises(error, match=f"^{line}"):
        replace(Negatives.synco(), **changes)
