"""Average precision of VOC: the devkit's rule for difficult objects, and both of its averages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synco_fast.evaluation.detection import precision
from synco_fast.evaluation.detection.precision import VOC_LEVELS, VocPrecision

OBJECT, DIFFICULT, APART = [40.0, 40, 60, 60], [0.0, 0, 30, 30], [70.0, 70, 80, 80]


def objects(boxes, scores=None, labels=None, difficult=None):
    found = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels or [1] * len(boxes)).long()}
    if scores is not None:
        return found | {"scores": torch.tensor(scores)}
    return found | {"difficult": torch.tensor(difficult or [0] * len(boxes)).long()}


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (DIFFICULT, 1.0),  # neither right nor wrong, however often
        (
            [0.0, 0, 9, 9],
            1 / 3,
        ),  # inside the difficult object, with an overlap of 0.09; a crowd of COCO's would take it
        (APART, 1 / 3),
    ],
)
@pytest.mark.parametrize("levels", [VOC_LEVELS, None])
def test_what_overlaps_a_difficult_object_most_does_not_count(box, expected, levels):
    metric = VocPrecision(levels)
    metric.add(0, objects([box, box, OBJECT], [0.9, 0.95, 0.8]), objects([OBJECT, DIFFICULT], difficult=[0, 1]))
    assert metric.compute()["box"]["AP50"] == pytest.approx(expected)


def test_a_class_without_objects_to_be_found_does_not_count():
    metric = VocPrecision(VOC_LEVELS)
    target = objects([OBJECT, DIFFICULT], labels=[1, 2], difficult=[0, 1])
    metric.add(0, objects([OBJECT, OBJECT, APART], [0.5, 0.5, 0.5], [1, 2, 3]), target)
    assert metric.compute()["box"] == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0}
    assert VocPrecision(None).compute()["box"] == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}


def devkit(images, least, levels):
    """The devkit's loop over the detections of one class, as its documentation describes it."""
    detections = sorted(
        ((-score, number, box) for number, (found, _) in enumerate(images) for box, score in found), key=lambda d: d[:2]
    )
    taken, right, wrong = set(), [], []
    for _, number, box in detections:
        best, which = 0.0, None
        for place, (other, _) in enumerate(images[number][1]):
            sides = [min(box[2 + k], other[2 + k]) - max(box[k], other[k]) for k in (0, 1)]
            shared = max(0.0, sides[0]) * max(0.0, sides[1])
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
            if shared / (sum(areas) - shared) > best:
                best, which = shared / (sum(areas) - shared), place
        hit = best > least
        ignored = hit and images[number][1][which][1]
        good = hit and not ignored and (number, which) not in taken
        if good:
            taken.add((number, which))
        right.append(good)
        wrong.append(not good and not ignored)
    count = sum(not hard for _, target in images for _, hard in target)
    recall = np.cumsum(right) / count
    exact = np.cumsum(right) / np.maximum(np.cumsum(right) + np.cumsum(wrong), 1)
    if levels:
        return np.mean([exact[recall >= t].max(initial=0) for t in np.linspace(0, 1, levels)])
    steps = [0.0, *recall]
    return sum((steps[k + 1] - steps[k]) * exact[k:].max() for k in range(len(exact)))


@pytest.mark.parametrize("levels", [VOC_LEVELS, None])
def test_it_is_the_devkits_on_random_boxes_and_any_number_of_ranks(levels, monkeypatch):
    rng = np.random.default_rng(0)
    images = []
    for _ in range(30):
        corners = rng.uniform(0, 60, (3, 2))
        truth = np.concatenate([corners, corners + rng.uniform(20, 40, (3, 2))], axis=1)
        found = np.concatenate([truth + rng.normal(0, 3, truth.shape), truth[:1] + rng.normal(0, 1, (2, 4))])
        scores = rng.integers(0, 10, len(found)) / 10  # many are equal
        images.append(
            (
                list(zip(found.tolist(), scores.tolist(), strict=True)),
                [(box, rng.random() < 0.3) for box in truth.tolist()],
            )
        )
    ranks = [VocPrecision(levels), VocPrecision(levels)]
    for number, (found, truth) in enumerate(images):
        boxes, scores = zip(*found, strict=True)
        real, hard = zip(*truth, strict=True)
        given = objects([*boxes], [*scores]), objects([*real], difficult=[int(one) for one in hard])
        given[0]["scores"] = given[0]["scores"].double()
        for each in given:
            each["boxes"] = each["boxes"].double()
        ranks[number % 2].add(number, *given)
    monkeypatch.setattr(precision, "gather_lists", lambda values: [*values, *other.get(id(values), [])])
    other = {id(getattr(ranks[0], name)): getattr(ranks[1], name) for name in ("_found", "_expected")}
    expected = [devkit(images, least, levels) for least in np.linspace(0.5, 0.95, 10)]
    assert ranks[0].compute()["box"] == pytest.approx(
        {"AP": np.mean(expected), "AP50": expected[0], "AP75": expected[5]}
    )
    assert 0.2 < np.mean(expected) < 0.9
