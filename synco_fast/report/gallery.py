"""Nearest neighbours by the backbone's features, and a map of the held-out images."""

from __future__ import annotations

import base64
import importlib.util
import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize, pad

from synco_fast.data.sources.open import Split
from synco_fast.evaluation.context import EvalContext
from synco_fast.evaluation.features import extract_features
from synco_fast.evaluation.knn import nearest

__all__ = ["Gallery", "Neighbour", "Sheet", "flatten", "look_around"]

#: Side of a thumbnail in pixels.
_THUMB = 72
#: Far above float32's rounding of the mean of unit vectors.
_SPREAD = 1e-6


@dataclass(frozen=True)
class Neighbour:
    """A neighbour: image as a data URI, class, and whether that is the query's class."""

    picture: str
    label: str
    right: bool
    similarity: float


@dataclass(frozen=True)
class Sheet:
    """A query image and its nearest training images, nearest first."""

    picture: str
    label: str
    neighbours: list[Neighbour]


@dataclass(frozen=True)
class Gallery:
    """Sheets, and features (n, F) with labels (n,) of some held-out images."""

    sheets: list[Sheet]
    right: float
    features: Tensor
    labels: Tensor
    bank: int


def look_around(
    context: EvalContext, *, queries: int = 10, neighbours: int = 5, bank: int = 5000, map: int = 1000
) -> Gallery:
    """Find the nearest training images of some held-out ones.

    Args:
        context: Backbone and images.
        queries: Number of sheets, spread over the classes.
        neighbours: Neighbours per sheet.
        bank: At most so many training images to choose from.
        map: At most so many held-out images whose features are returned.
    """
    train, held_out = (
        extract_features(
            context.backbone,
            split,
            context.recipe,
            device=context.device,
            pipeline=context.pipeline,
            workers=context.workers,
            limit=limit,
        )
        for split, limit in ((context.train, bank), (context.held_out, map))
    )
    similarity, whose = nearest([train.values], held_out.values, min(neighbours, len(train.labels)))
    right = train.labels[whose] == held_out.labels[:, None]
    names = context.train.classes or ()
    sheets = []
    for row in _spread_over_classes(held_out.labels, queries):
        number = int(held_out.numbers[row])
        found = [
            Neighbour(
                _thumbnail(context.train, int(train.numbers[place])),
                names[int(train.labels[place])],
                bool(right[row, column]),
                float(similarity[row, column]),
            )
            for column, place in enumerate(whose[row].tolist())
        ]
        sheets.append(Sheet(_thumbnail(context.held_out, number), names[int(held_out.labels[row])], found))
    return Gallery(sheets, float(right.double().mean()), held_out.values, held_out.labels, len(train.labels))


def _spread_over_classes(labels: Tensor, count: int) -> list[int]:
    """Rows in turn from each class."""
    by_class = [torch.nonzero(labels == label).flatten().tolist() for label in labels.unique()]
    rows = [inside[turn] for turn in range(max(map(len, by_class))) for inside in by_class if turn < len(inside)]
    return rows[:count]


def _thumbnail(split: Split, number: int) -> str:
    image = split.read(number)
    image.thumbnail((_THUMB, _THUMB), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def flatten(features: Tensor) -> tuple[Tensor, str]:
    """Features (n, F) as points (n, 2), and the method: t-SNE, or principal components without scikit-learn.

    Features without any spread, as of a collapsed encoder, are points at 0: scikit-learn would divide by their
    deviation, and its search among the NaN ends the process.
    """
    features = normalize(features, dim=1)
    centred = features - features.mean(dim=0)
    if importlib.util.find_spec("sklearn") and len(features) > 10 and float(centred.abs().max()) > _SPREAD:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(features) - 1) / 3)
        model = TSNE(2, perplexity=perplexity, init="pca", random_state=0, max_iter=500)
        return torch.from_numpy(model.fit_transform(features.numpy())), "t-SNE"
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ directions[:2].T
    return pad(points, (0, 2 - points.shape[1])), "principal components"
