"""``evaluate finetune``: semi-supervised fine-tuning on few labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from synco_fast.evaluation.classifier import ClassifierProtocol, ClassifierResult, train_classifier
from synco_fast.evaluation.context import EvalOptions, join_job, open_context
from synco_fast.evaluation.labelled import balanced_subset, listed_subset
from synco_fast.runtime.distributed import barrier
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.results import finetuning_name

__all__ = ["RATES", "evaluate_finetune", "published_protocol"]

RATES = (0.005, 0.01, 0.02, 0.05, 0.1)
"""Learning rates of the backbone in the sweep of SynCo's released scripts."""


def published_protocol(percent: float) -> ClassifierProtocol:
    """The protocol of SynCo's released scripts: 60 epochs on 1 %, 30 on more; classifier rate 0.5, cosine.

    The held-out split is far larger than the labelled part, so it is classified six times, not after each epoch.
    """
    return ClassifierProtocol(
        epochs=60 if percent <= 1 else 30, batch=1024, head_lr=0.5, backbone_lr=RATES[0], weight_decay=1e-6, tests=6
    )


def evaluate_finetune(
    path: Path,
    options: EvalOptions | None = None,
    *,
    percent: float = 1.0,
    listed: Path | None = None,
    rates: Sequence[float] = RATES,
    protocol: ClassifierProtocol | Callable[[float], ClassifierProtocol] = published_protocol,
    console: Console | None = None,
) -> dict[str, Any]:
    """Accuracy after training backbone and classifier on few labelled images, for each learning rate of the backbone.

    As in the papers, the best rate is chosen on the held-out split; the accuracy of every rate is returned.

    Args:
        path: A run folder, a checkpoint, or an imported file.
        options: Source, folder, device.
        percent: Percentage of each class's training images, in (0, 100], chosen by the protocol's seed.
        listed: A file that names the images instead, one per line.
        rates: Learning rates of the backbone.
        protocol: The protocol, or a function that gives it for a percentage; for a list, that of its images to the
            nearest percent. Its backbone rate is not used.
        console: Where progress is shown.

    Raises:
        CheckpointError, DataError, ConfigError: As `open_context` says, or the percentage is out of range.
        DivergedError: The loss became NaN or infinite.
    """
    if not 0 < percent <= 100:
        raise ConfigError(f"percent: found {percent:g}, expected above 0, up to 100")
    if not rates or min(rates) <= 0:
        raise ConfigError(f"lr: found {', '.join(f'{rate:g}' for rate in rates) or 'none'}, expected rates above 0")
    options = options or EvalOptions()
    with join_job(options.device) as device:
        context = open_context(path, options, device)
        assert context.train.labels is not None
        numbers = listed_subset(context.train, listed) if listed else []
        if listed:  # a list of 1 % holds a little more where each class is rounded up
            percent = round(100 * len(numbers) / len(context.train))
        if callable(protocol):
            protocol = protocol(percent)
        numbers = numbers or balanced_subset(context.train, percent / 100, seed=protocol.seed)
        name = finetuning_name(percent, listed)
        found: dict[str, ClassifierResult] = {}
        for rate in rates:
            result = context.file_of(name)
            state = result.with_name(f"{result.stem}-lr{rate:g}.pt")
            title = f"fine-tuning on {len(numbers):,} images, lr {rate:g}"
            one = replace(protocol, backbone_lr=rate)
            found[f"{rate:g}"] = train_classifier(context, numbers, one, state, title, console)
        barrier()
        best = max(found, key=lambda rate: found[rate].top1)
        what = f"{len(numbers):,} listed images" if listed else f"{percent:g} % of the labels"
        return context.result(
            name,
            {f"fine-tuned on {what}, top-1": found[best].top1, f"fine-tuned on {what}, top-5": found[best].top5},
            top1=found[best].top1,
            top5=found[best].top5,
            lr=float(best),
            rates={rate: result.top1 for rate, result in found.items()},
            images=len(numbers),
            percent=percent,
            images_per_class=[int(count) for count in np.bincount(context.train.labels[numbers])],
            epochs=protocol.epochs,
            batch=protocol.batch,
            head_lr=protocol.head_lr,
            seed=protocol.seed,
        )
