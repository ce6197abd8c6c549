"""The kNN accuracy of raw pixels, which an encoder has to beat.

``python -m synco_fast.bench.experiments.raw_pixels CONFIG`` takes the images of a preset or YAML file at its size. It
measures by the protocol of a run's periodic kNN, and by that of ``synco-fast evaluate knn``: all labelled images, k 20
and 200. ``--json FILE`` writes the figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synco_fast.config import Config
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.sources.open import Split, open_source
from synco_fast.evaluation.features import extract_features
from synco_fast.evaluation.knn import knn_accuracy, periodic_knn
from synco_fast.presets import load_config
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.files import write_json

__all__ = ["raw_pixels"]

_PIXELS, _CPU = nn.Flatten(), torch.device("cpu")


def raw_pixels(config: Config) -> dict[str, Any]:
    """Accuracies in [0, 1].

    Args:
        config: Its source, image size and evaluation; pixels are not normalised.

    Returns:
        ``knn_in_training``, and ``accuracies`` by k over all images.

    Raises:
        DataError: The source has no labelled held-out split.
    """
    recipe = config.augment.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    source, evaluation = open_source(config.data.source), config.evaluation
    during = periodic_knn(_PIXELS, source, recipe, evaluation, device=_CPU, workers=0).accuracy
    assert source.validation is not None  # periodic_knn has read it
    bank, queries = (_features(split, recipe) for split in (source.train, source.validation))
    accuracies = {
        str(each): knn_accuracy(*bank, *queries, k=each, temperature=evaluation.temperature)
        for each in (20, 200)
        if each <= len(bank[1])
    }
    return {"knn_in_training": during, "accuracies": accuracies}


def _features(split: Split, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    found = extract_features(_PIXELS, split, recipe, device=_CPU, workers=0)
    return found.values, found.labels


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The kNN accuracy of raw pixels.")
    parser.add_argument("config", help="a preset or YAML file")
    parser.add_argument("--data", metavar="SOURCE", help="other images than the configuration's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options = parser.parse_args(words)
    changes = {} if options.data is None else {"data.source": options.data}
    config = load_config(options.config, changes)
    found = raw_pixels(config)
    print(f"raw pixels: kNN in training {found['knn_in_training']:.1%}")
    for k, accuracy in found["accuracies"].items():
        print(f"raw pixels: kNN, k {k}, all labels {accuracy:.1%}")
    if options.json is not None:
        write_json(options.json, {**found, "source": config.data.source, "environment": describe_environment()})


if __name__ == "__main__":
    main()
