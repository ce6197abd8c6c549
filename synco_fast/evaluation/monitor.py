"""The health of a run while it trains: what is measured at log lines and evaluations, and what is warned of.

Nothing here changes training. It runs where a log line is written, which waits for the device anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synco_fast.evaluation.health import (
    best_window,
    class_share,
    collapse,
    contraction,
    rankme,
    rows_for_health,
    uniformity,
)
from synco_fast.methods.base import Recent
from synco_fast.runtime.distributed import mean_over_ranks

__all__ = ["HealthMonitor", "feature_figures"]

#: Keys that `uniformity` compares at a log line: half a million pairs.
_KEYS = 1024
#: Queries of each process whose hard negatives are looked up at a log line.
_QUERIES = 64
#: Measures of the effective rank by name in ``metrics.jsonl``, and how many figures make a mean.
_RANKS = {"key_rank": 5, "feature_rank": 1}
#: How many figures of top-1 and of the similarities make a mean.
_WINDOW = 5


def feature_figures(features: Tensor) -> dict[str, float]:
    """Effective rank and uniformity of backbone features, on up to 4,096 evenly spaced images.

    Args:
        features: (n, F), n of 2 or more.

    Returns:
        ``feature_rank`` and ``feature_uniformity``; empty if a feature is not finite.
    """
    rows = rows_for_health(features)
    if len(rows) < 2 or not bool(torch.isfinite(rows).all()):
        return {}
    return {"feature_rank": rankme(rows), "feature_uniformity": uniformity(rows)}


class HealthMonitor:
    """Measures a run at its log lines, and warns once of each sign of contraction or collapse.

    Curves are kept from the start of the run, so that a resumed run warns as an uninterrupted one does.
    """

    def __init__(self) -> None:
        self._labels: NDArray[np.int64] | None = None
        self._top1: list[float] = []
        self._similarity: list[float] = []
        self._ranks: dict[str, list[float]] = {name: [] for name in _RANKS}
        #: `best_window` of each curve, which one figure more changes by one comparison.
        self._best: dict[str, int | None] = {}
        self._warned: set[str] = set()

    def begin(self, labels: NDArray[np.int64] | None, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        """Start a run, or take up a resumed one.

        Args:
            labels: Labels of the training images by image id, (n,) int64, or None.
            lines: The lines of ``metrics.jsonl`` up to the step at which the run resumes. What they warn of was shown.
        """
        self._labels = labels
        for line in lines:
            self.look(line)

    def measure(self, values: Mapping[str, float], recent: Recent | None) -> dict[str, float]:
        """Figures of a log line; called by all processes of a job at the same step.

        Args:
            values: The log line so far.
            recent: From `Method.recent`.

        Returns:
            ``alignment`` of queries and keys, from ``similarity/positive``; with a queue ``uniformity`` and
            ``key_rank`` of its keys; with labels as well ``false_negatives``, the share of each query's N nearest keys
            of other images that have its class, over some queries of every process. What cannot be measured is
            omitted.
        """
        found = {}
        if "similarity/positive" in values:
            found["alignment"] = 2 - 2 * values["similarity/positive"]
        if recent is None:
            return found
        real = (recent.key_ids >= 0).nonzero().squeeze(1)
        rows = recent.keys[rows_for_health(real)]
        if len(rows) >= 2 and bool(torch.isfinite(rows).all()):
            found |= {"uniformity": uniformity(recent.keys[rows_for_health(real, _KEYS)]), "key_rank": rankme(rows)}
        if self._labels is not None:
            share = torch.tensor(self._false_negatives(recent), dtype=torch.float64, device=recent.keys.device)
            mean_over_ranks([share])
            found["false_negatives"] = float(share)
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _false_negatives(self, recent: Recent) -> float:
        queries, ids = (rows_for_health(part, _QUERIES) for part in (recent.queries, recent.query_ids))
        if not bool(torch.isfinite(queries).all()):
            return math.nan
        # A row that is excluded is still chosen where others are too few. It has no label then.
        out = (recent.key_ids < 0) | (recent.key_ids == ids[:, None])
        similarity = (queries @ recent.keys.to(queries.dtype).T).masked_fill(out, -torch.inf)
        nearest = similarity.topk(min(recent.hard, len(recent.keys)), dim=1).indices
        chosen = torch.where(out.gather(1, nearest), -1, recent.key_ids[nearest])
        return class_share(self._labels_of(ids), self._labels_of(chosen))

    def _labels_of(self, image_ids: Tensor) -> Tensor:
        """Labels by image id, on the CPU; -1 for a negative id."""
        assert self._labels is not None
        ids = image_ids.cpu().numpy()
        return torch.from_numpy(np.where(ids < 0, -1, self._labels[np.maximum(ids, 0)]))

    def look(self, values: Mapping[str, Any]) -> list[str]:
        """Take the figures of one line; returns each warning that is due, once a run."""
        found = {}
        near = [values.get(f"similarity/{name}", math.nan) for name in ("hard", "positive")]
        known = [value for value in near if math.isfinite(value)]
        if "queue_top1" in values and known:
            self._top1.append(values["queue_top1"])
            self._similarity.append(known[0])
            best = self._best_of("contraction", self._top1, _WINDOW)
            if "contraction" not in self._warned:
                found["contraction"] = contraction(self._top1, self._similarity, window=_WINDOW, best=best)
        for name, window in _RANKS.items():
            if name in values:
                self._ranks[name].append(values[name])
                best = self._best_of(name, self._ranks[name], window)
                if name not in self._warned:
                    found[name] = collapse(self._ranks[name], window=window, name=name, best=best)
        new = {kind: warning for kind, warning in found.items() if warning is not None}
        self._warned |= new.keys()
        return [f"{warning} (docs/curves.md)" for warning in new.values()]

    def _best_of(self, kind: str, curve: list[float], window: int) -> int | None:
        self._best[kind] = best_window(curve, window, self._best.get(kind))
        return self._best[kind]
