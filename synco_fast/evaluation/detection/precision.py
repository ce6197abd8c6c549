"""Average precision of detections: COCO's, and PASCAL VOC's with its rule for difficult objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from synco_fast.runtime.distributed import gather_lists

__all__ = ["VOC_LEVELS", "CocoPrecision", "Precision", "VocPrecision"]

VOC_LEVELS = 11
"""Levels of recall at which precision is averaged for VOC 2007."""
#: Overlaps from which a detection counts.
_OVERLAPS = np.linspace(0.5, 0.95, 10)
#: Of these, the ones that have names of their own.
_NAMED = {"AP50": 0, "AP75": 5}

Objects = dict[str, Tensor]


class Precision(Protocol):
    """Average precision over some images."""

    def add(self, number: int, found: Objects, target: Objects) -> None:
        """Add an image by its number: the detector's output, and what there is."""
        ...

    def compute(self) -> dict[str, dict[str, float]]:
        """AP, AP50 and AP75 in [0, 1], by ``box`` and ``mask``, over the images of all ranks."""
        ...


class CocoPrecision:
    """COCO's average precision, by torchmetrics and pycocotools.

    Args:
        masks: Whether masks are measured too.
    """

    def __init__(self, *, masks: bool) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        kinds: Any = ("bbox", "segm") if masks else ("bbox",)
        self._names = {"box": "bbox_", "mask": "segm_"} if masks else {"box": ""}
        self._metric = MeanAveragePrecision(
            iou_type=kinds,
            # COCO's own. torchmetrics rounds its to float32, so that a recall of 0.8 does not reach the threshold 0.8.
            iou_thresholds=_OVERLAPS.tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            backend="pycocotools",
            sync_on_compute=False,
        )

    def add(self, number: int, found: Objects, target: Objects) -> None:
        """See `Precision`; ``target`` may mark crowds as ``iscrowd``."""
        self._metric.update([found], [target])

    def compute(self) -> dict[str, dict[str, float]]:
        """See `Precision`."""
        # torchmetrics would gather image by image, which needs equal counts on all ranks.
        gathered: Any
        for name, gathered in self._metric.metric_state.items():
            setattr(self._metric, name, gather_lists(gathered))
        values = self._metric.compute()
        return {
            part: {
                title: max(0.0, float(values[f"{prefix}{key}"]))
                for title, key in (("AP", "map"), ("AP50", "map_50"), ("AP75", "map_75"))
            }
            for part, prefix in self._names.items()
        }


@dataclass(frozen=True)
class _Found:
    """The detections of one class in one image.

    Attributes:
        image: Its number.
        scores: (n,).
        overlaps: With the object that each overlaps most, (n,); 0 without objects.
        objects: Which object that is, (n,).
        difficult: Whether that one is difficult, (n,).
    """

    image: int
    scores: NDArray[np.float64]
    overlaps: NDArray[np.float64]
    objects: NDArray[np.int64]
    difficult: NDArray[np.bool_]


class VocPrecision:
    """PASCAL VOC's average precision, averaged over overlaps from 0.5 to 0.95 as in detectron2.

    A detection belongs to the object of its class that it overlaps most. The first one of an object, by score, is
    right, others are wrong, as are those that overlap too little. Difficult objects need not be found, and what belongs
    to one is neither right nor wrong. Classes without an object that must be found do not count.

    Args:
        levels: Levels of recall at which precision is averaged, `VOC_LEVELS` for VOC 2007; None for the area below the
            curve, as for VOC from 2010 on.
    """

    def __init__(self, levels: int | None) -> None:
        self._levels = levels
        self._found: list[tuple[int, _Found]] = []
        self._expected: list[tuple[int, int]] = []

    def add(self, number: int, found: Objects, target: Objects) -> None:
        """See `Precision`; ``target`` marks difficult objects as ``difficult``."""
        for label in {*found["labels"].tolist(), *target["labels"].tolist()}:
            ours, theirs = found["labels"] == label, target["labels"] == label
            difficult = target["difficult"][theirs].bool()
            self._expected.append((label, int((~difficult).sum())))
            if not ours.any():
                continue
            scores = found["scores"][ours].double().numpy()
            overlaps, objects, marked = np.zeros(len(scores)), np.zeros(len(scores), np.int64), [False] * len(scores)
            if theirs.any():
                most = box_iou(found["boxes"][ours].double(), target["boxes"][theirs].double()).max(dim=1)
                overlaps, objects = most.values.numpy(), most.indices.numpy()
                marked = difficult[most.indices].tolist()
            self._found.append((label, _Found(number, scores, overlaps, objects, np.array(marked))))

    def compute(self) -> dict[str, dict[str, float]]:
        """See `Precision`."""
        found, expected = gather_lists(self._found), gather_lists(self._expected)
        counts: dict[int, int] = {}
        for label, count in expected:
            counts[label] = counts.get(label, 0) + count
        # By image, so that equal scores have the same order on any number of ranks.
        parts = {label: sorted((each for other, each in found if other == label), key=_image) for label in counts}
        values = [self._of_class(parts[label], count) for label, count in sorted(counts.items()) if count]
        means = np.mean(values, axis=0) if values else np.zeros(len(_OVERLAPS))
        named = {name: float(means[place]) for name, place in _NAMED.items()}
        return {"box": {"AP": float(means.mean()), **named}}

    def _of_class(self, parts: Sequence[_Found], count: int) -> NDArray[np.float64]:
        """The average precision of a class at each of `_OVERLAPS`; ``count``: objects that must be found."""
        if not parts:
            return np.zeros(len(_OVERLAPS))
        scores, overlaps, objects, difficult = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("scores", "overlaps", "objects", "difficult")
        )
        images = np.repeat([part.image for part in parts], [len(part.scores) for part in parts])
        order = np.argsort(-scores, kind="stable")
        overlaps, difficult, owners = overlaps[order], difficult[order], np.stack([images, objects], axis=1)[order]
        values = []
        for least in _OVERLAPS:
            hits = overlaps > least
            right = np.zeros(len(order), bool)
            meant = np.flatnonzero(hits & ~difficult)
            if meant.size:
                right[meant[np.unique(owners[meant], axis=0, return_index=True)[1]]] = True
            wrong = ~right & ~(hits & difficult)
            values.append(_average(right.cumsum(), wrong.cumsum(), count, self._levels))
        return np.array(values)


def _image(found: _Found) -> int:
    return found.image


def _average(right: NDArray[np.int64], wrong: NDArray[np.int64], count: int, levels: int | None) -> float:
    """Average precision from the running numbers of right and wrong detections, best score first."""
    recall = right / count
    # The precision at a recall is the best one at that recall or above.
    precision = np.maximum.accumulate((right / np.maximum(right + wrong, 1))[::-1])[::-1]
    if levels is None:
        return float((np.diff(recall, prepend=0) * precision).sum())
    places = np.searchsorted(recall, np.linspace(0, 1, levels))
    return float(np.append(precision, 0)[places].mean())
