"""What can be known before the first step."""

from __future__ import annotations

from synco_fast.config import EvaluationConfig
from synco_fast.data.sources.open import Source
from synco_fast.runtime.errors import ConfigError, DataError

__all__ = ["check_evaluation"]

_WITHOUT = "--evaluation.every 0 pretrains without kNN"


def check_evaluation(evaluation: EvaluationConfig, source: Source) -> None:
    """Raise where the periodic kNN cannot work on this source.

    Raises:
        DataError: No held-out split, or a split without labels.
        ConfigError: k is larger than the number of training images to choose from.
    """
    if not evaluation.every:
        return
    if source.validation is None:
        raise DataError(
            f"data: found no held-out split in {source.spec}, expected train/ and val/ with one folder a class; "
            f"{_WITHOUT}"
        )
    for split in (source.train, source.validation):
        if split.labels is None:
            raise DataError(
                f"data: found no class folders beside {split.name(0)}, expected one folder a class for kNN; {_WITHOUT}"
            )
    bank = min(len(source.train), evaluation.train_images or len(source.train))
    if evaluation.neighbours > bank:
        raise ConfigError(
            f"evaluation.neighbours: found {evaluation.neighbours}, expected up to {bank}, the images to choose from"
        )
