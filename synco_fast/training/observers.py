"""What looks at a pretraining run from outside: the contracts of its periodic evaluation and of its monitor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from synco_fast.config import EvaluationConfig
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.names import PipelineName
from synco_fast.data.sources.open import Source
from synco_fast.methods.base import Recent

__all__ = ["Evaluate", "Evaluation", "Monitor"]


class Evaluation(Protocol):
    """The result of a periodic evaluation: accuracy in [0, 1], number of images, corrupt images, further figures."""

    @property
    def accuracy(self) -> float:
        """Accuracy on the held-out images."""
        ...

    @property
    def queries(self) -> int:
        """Number of held-out images."""
        ...

    @property
    def corrupt(self) -> Sequence[str]:
        """Images that could not be read."""
        ...

    @property
    def figures(self) -> Mapping[str, float]:
        """Further figures of its line in the log."""
        ...


class Evaluate(Protocol):
    """A periodic evaluation."""

    def check(self, evaluation: EvaluationConfig, source: Source) -> None:
        """Raise before the first step if it cannot work on this source."""
        ...

    def __call__(
        self,
        backbone: nn.Module,
        source: Source,
        recipe: Recipe,
        evaluation: EvaluationConfig,
        *,
        device: torch.device,
        pipeline: PipelineName,
        workers: int | None,
    ) -> Evaluation:
        """Evaluate the backbone."""
        ...


class Monitor(Protocol):
    """Looks at a run without changing it, such as `synco_fast.evaluation.monitor.HealthMonitor`."""

    def begin(self, labels: NDArray[np.int64] | None, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        """Take the training images' labels by image id, and the lines logged before the step of a resumed run."""
        ...

    def measure(self, values: Mapping[str, float], recent: Recent | None) -> dict[str, float]:
        """Further figures of a log line; called by all processes at the same step."""
        ...

    def look(self, values: Mapping[str, Any]) -> list[str]:
        """Take the figures of one line of the log; returns warnings."""
        ...
