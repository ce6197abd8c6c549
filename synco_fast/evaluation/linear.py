"""``evaluate linear``: MoCo's linear evaluation, and a fast variant on cached features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from synco_fast.data.pipelines.base import epoch_order
from synco_fast.evaluation.classifier import ClassifierProtocol, train_classifier
from synco_fast.evaluation.context import (
    EvalContext,
    EvalOptions,
    check_unchanged,
    for_features,
    join_job,
    open_context,
    progress,
    weights_sha256,
)
from synco_fast.evaluation.features import cached_features
from synco_fast.runtime.distributed import barrier, rank
from synco_fast.runtime.files import read_json
from synco_fast.runtime.progress import ProgressBar
from synco_fast.runtime.results import same_source

__all__ = ["FAST_RATES", "PUBLISHED", "evaluate_linear", "evaluate_linear_fast", "sweep_heads"]

PUBLISHED = ClassifierProtocol(epochs=100, batch=256, head_lr=30.0, drops=(0.6, 0.8))
"""MoCo's protocol (arXiv 1911.05722 section 4.1; facebookresearch/moco, main_lincls.py): lr / 10 at epochs 60, 80."""

FAST_RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def evaluate_linear(
    path: Path,
    options: EvalOptions | None = None,
    *,
    protocol: ClassifierProtocol = PUBLISHED,
    console: Console | None = None,
) -> dict[str, Any]:
    """Accuracy of a linear classifier on the frozen backbone, trained on random crops.

    Args:
        path: A run folder, a checkpoint, or an imported file.
        options: Source, folder, device.
        protocol: The protocol; its backbone rate must be 0.
        console: Where progress is shown.

    Raises:
        CheckpointError, DataError, ConfigError: As `open_context` says.
        DivergedError: The loss became NaN or infinite.
    """
    options = options or EvalOptions()
    with join_job(options.device) as device:
        context = open_context(path, options, device)
        numbers = list(range(len(context.train)))
        state = context.file_of("linear").with_suffix(".pt")
        found = train_classifier(context, numbers, protocol, state, "linear probe", console)
        barrier()
        return context.result(
            "linear",
            {"linear top-1": found.top1, "linear top-5": found.top5},
            top1=found.top1,
            top5=found.top5,
            best=found.best,
            agreement=_agreement(context, "linear_fast", found.top1),
            epochs=protocol.epochs,
            batch=protocol.batch,
            lr=protocol.head_lr,
            history=found.history,
            confusion=found.confusion,
            class_names=list(context.train.classes or ()),
            backbone_unchanged=True,
        )


def evaluate_linear_fast(
    path: Path,
    options: EvalOptions | None = None,
    *,
    protocol: ClassifierProtocol = PUBLISHED,
    rates: Sequence[float] = FAST_RATES,
    console: Console | None = None,
) -> dict[str, Any]:
    """Linear classifiers on features of central crops, extracted once; all learning rates in one pass.

    It differs from the published protocol in one point: the classifier sees only one crop of each image. If both were
    evaluated, ``agreement`` gives their difference.

    Args:
        path: A run folder, a checkpoint, or an imported file.
        options: Source, folder, device; precision ``auto`` is fp32.
        protocol: Epochs, batch and schedule; its learning rate is not used.
        rates: The learning rates.
        console: Where progress is shown.

    Raises:
        CheckpointError, DataError, ConfigError: As `open_context` says.
    """
    options = for_features(options or EvalOptions())
    with join_job(options.device) as device:
        context = open_context(path, options, device)
        before = weights_sha256(context.backbone)
        train = cached_features(context, context.train, "training images", console).load()
        held_out = cached_features(context, context.held_out, "held-out images", console).load()
        with progress(console, "linear probes", protocol.epochs, unit="epoch") as bar:
            predicted = sweep_heads(
                train.values.to(device),
                train.labels.to(device),
                held_out.values.to(device),
                classes=context.classes,
                rates=rates,
                protocol=protocol,
                bar=bar,
            )
        labels = held_out.labels.to(device)
        accuracies = (predicted == labels).double().mean(dim=1).tolist()
        best = max(range(len(rates)), key=lambda place: accuracies[place])
        confusion = torch.zeros(context.classes, context.classes, dtype=torch.int64, device=device)
        confusion.index_put_((labels, predicted[best]), torch.ones_like(labels), accumulate=True)
        check_unchanged(context.backbone, before)
        return context.result(
            "linear_fast",
            {"linear top-1, cached features": accuracies[best]},
            top1=accuracies[best],
            lr=rates[best],
            rates={f"{rate:g}": accuracy for rate, accuracy in zip(rates, accuracies, strict=True)},
            agreement=_agreement(context, "linear", accuracies[best]),
            epochs=protocol.epochs,
            batch=protocol.batch,
            confusion=confusion.tolist(),
            class_names=list(context.train.classes or ()),
            backbone_unchanged=True,
        )


def sweep_heads(
    values: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    classes: int,
    rates: Sequence[float],
    protocol: ClassifierProtocol,
    bar: ProgressBar | None = None,
) -> Tensor:
    """Train a linear classifier for each rate, all with one gather and one matrix product per step.

    Args:
        values: Features, (n, F).
        labels: (n,) int64.
        queries: Features to classify, (m, F).
        classes: C.
        rates: R learning rates.
        protocol: Epochs, batch, momentum, weight decay, schedule and seed.
        bar: Advanced by an epoch at a time.

    Returns:
        Predicted classes, (R, m) int64; a diverged classifier predicts class 0 everywhere.
    """
    generator = torch.Generator().manual_seed(protocol.seed)
    first = torch.randn(classes, values.shape[1], generator=generator).mul_(0.01).to(values)
    heads: list[Tensor] = [nn.Parameter(first.clone()) for _ in rates]
    biases: list[Tensor] = [nn.Parameter(first.new_zeros(classes)) for _ in rates]
    optimizer = torch.optim.SGD(
        [{"params": pair, "lr": rate} for *pair, rate in zip(heads, biases, rates, strict=True)],
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
    )
    for epoch in range(protocol.epochs):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * protocol.factor(epoch)
        order = epoch_order(len(values), seed=protocol.seed, epoch=epoch).to(values.device)
        for chosen in order.split(protocol.batch):
            logits = (values[chosen] @ torch.cat(heads).T + torch.cat(biases)).view(len(chosen), len(rates), classes)
            wanted = labels[chosen, None].expand(-1, len(rates))
            loss = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / len(chosen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if bar is not None:
            bar.advance()
    with torch.no_grad():
        logits = torch.stack([queries @ head.T + bias for head, bias in zip(heads, biases, strict=True)])
        return logits.nan_to_num(nan=-torch.inf).argmax(dim=2)


def _agreement(context: EvalContext, other: str, top1: float) -> dict[str, float] | None:
    """The difference from the other variant's result for the same weights and source, or None."""
    found = read_json(context.file_of(other)) if rank() == 0 else {}
    if not same_source(str(found.get("source") or ""), context.source.spec):
        return None
    # By their content: the folder may have moved, or is named from another one now.
    if found.get("weights") != weights_sha256(context.backbone):
        return None
    return {"other_top1": found["top1"], "difference_in_points": 100 * (top1 - found["top1"])}
