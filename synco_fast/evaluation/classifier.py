"""A linear classifier on a backbone, frozen or not: what linear evaluation and fine-tuning train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from synco_fast.data.pipelines.base import normalise
from synco_fast.data.pipelines.torchvision import evaluation_loader
from synco_fast.evaluation.context import Subject, fingerprint
from synco_fast.evaluation.labelled import LabelledBatches
from synco_fast.evaluation.progress import Bar
from synco_fast.evaluation.ranks import barrier, rank, sum_over_ranks, world
from synco_fast.evaluation.scaling import Update
from synco_fast.export.load import backbone_of
from synco_fast.runtime.checkpoint import read_tensors
from synco_fast.runtime.errors import DivergedError
from synco_fast.runtime.files import atomic_write

__all__ = ["Outcome", "Plan", "train_classifier"]


@dataclass(frozen=True)
class Plan:
    """How a classifier is trained, by SGD.

    Attributes:
        epochs: Over the training images.
        batch: Images a step, over all ranks.
        head_lr: Of the classifier.
        backbone_lr: Of the backbone; 0 freezes it, running statistics included.
        weight_decay: Of whatever learns.
        momentum: Of SGD.
        drops: Shares of the run after which the rates fall to a tenth; empty for half a cosine, changed once an epoch.
        seed: Of the head, the order and the crops.
        tests: How often the held-out split is classified, the last epoch included; after every epoch if unset.
    """

    epochs: int
    batch: int
    head_lr: float
    backbone_lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.9
    drops: tuple[float, ...] = ()
    seed: int = 0
    tests: int | None = None

    def tested(self, epoch: int) -> bool:
        """Whether the held-out split is classified after an epoch, counted from 0."""
        every = 1 if self.tests is None else max(1, self.epochs // self.tests)
        return (self.epochs - 1 - epoch) % every == 0

    def factor(self, epoch: int) -> float:
        """What the rates are multiplied with in an epoch, counted from 0."""
        if self.drops:
            return float(0.1 ** sum(epoch >= round(share * self.epochs) for share in self.drops))
        return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


@dataclass(frozen=True)
class Outcome:
    """Accuracies in [0, 1] on the held-out split; ``confusion[a][b]`` counts images of class a taken for b."""

    top1: float
    top5: float
    best: float
    history: list[dict[str, float]]
    confusion: list[list[int]]


class _Classifier(nn.Module):
    def __init__(self, backbone: nn.Module, features: int, classes: int, frozen: bool, seed: int) -> None:
        super().__init__()
        self.backbone, self.frozen = backbone, frozen
        self.head = nn.Linear(features, classes)
        generator = torch.Generator().manual_seed(seed)
        self.head.weight.data = torch.randn(classes, features, generator=generator) * 0.01
        nn.init.zeros_(self.head.bias)
        backbone.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> _Classifier:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(images)
        logits: Tensor = self.head(features)
        return logits


def train_classifier(
    subject: Subject, numbers: list[int], plan: Plan, state: Path, title: str, console: Console | None = None
) -> Outcome:
    """Train on the given training images, test on the held-out split; goes on from ``state``.

    Args:
        subject: The backbone, which is copied, and the images.
        numbers: Which training images.
        plan: How.
        state: A file that holds everything after each epoch; a finished one is only read.
        title: For the progress bar.
        console: Where progress is shown.

    Raises:
        DivergedError: The loss was no number.
        RuntimeError: A frozen backbone was changed.
    """
    frozen = plan.backbone_lr == 0
    probe = torch.zeros(1, 3, subject.recipe.size, subject.recipe.size, device=subject.device)
    with torch.no_grad():
        features = subject.backbone(probe).shape[1]
    backbone = backbone_of(subject.weights).to(subject.device)
    before = fingerprint(backbone)
    model = _Classifier(backbone, features, subject.classes, frozen, plan.seed).to(subject.device)
    groups: list[dict[str, Any]] = [{"params": model.head.parameters(), "lr": plan.head_lr}]
    if not frozen:
        groups.append({"params": model.backbone.parameters(), "lr": plan.backbone_lr})
    peaks = [group["lr"] for group in groups]
    optimizer = torch.optim.SGD(groups, momentum=plan.momentum, weight_decay=plan.weight_decay)
    made_by = {"plan": repr(asdict(plan)), "weights": before, "images": len(numbers), "source": subject.source.spec}
    history: list[dict[str, float]] = []
    confusion: list[list[int]] = []
    found = _taken_up(state, made_by) if not subject.fresh else None
    barrier()
    if found is not None:
        history, confusion = found["history"], found["confusion"]
        if len(history) < plan.epochs:
            model.load_state_dict(found["model"], strict=not frozen)
            optimizer.load_state_dict(found["optimizer"])
    batches = LabelledBatches(
        subject.train,
        subject.recipe,
        numbers,
        batch=plan.batch,
        seed=plan.seed,
        workers=subject.workers,
        rank=rank(),
        world=world(),
    )
    trained = DistributedDataParallel(model) if world() > 1 else model
    with Bar(console, title, plan.epochs * len(batches), len(history) * len(batches)) as bar:
        for epoch in range(len(history), plan.epochs):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * plan.factor(epoch)
            loss = _epoch(subject, trained, optimizer, batches.epoch(epoch), bar)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"loss: found a value that is not finite in epoch {epoch + 1} of {title}, expected finite ones; "
                    "try a lower --lr"
                )
            history.append({"epoch": epoch + 1, "loss": loss})
            if plan.tested(epoch):
                top1, top5, confusion = _test(subject, model)
                history[-1] |= {"top1": top1, "top5": top5}
                bar.advance(0, f"loss {loss:.3f}  top-1 {top1:.1%}")
            if rank() == 0:
                _keep(state, made_by, history, confusion, model, optimizer, done=epoch + 1 == plan.epochs)
    if frozen and fingerprint(model.backbone) != before:
        raise RuntimeError("a frozen backbone was changed by its evaluation")
    last = history[-1]
    best = max(line["top1"] for line in history if "top1" in line)
    return Outcome(last["top1"], last["top5"], best, history, confusion)


def _epoch(
    subject: Subject,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    bar: Bar,
) -> float:
    """One pass; the mean loss over its batches."""
    model.train()
    update = Update(subject.precision)
    total, count = torch.zeros((), device=subject.device), 0
    for images, labels in batches:
        images = normalise(images.to(subject.device, non_blocking=True), subject.recipe)
        with subject.precision.autocast():
            logits = model(images)
        loss = cross_entropy(logits.float(), labels.to(subject.device, non_blocking=True))
        update(loss, optimizer)
        total += loss.detach()
        count += 1
        bar.advance(1)
    return float(sum_over_ranks(total)) / (count * world())


@torch.no_grad()
def _test(subject: Subject, model: nn.Module) -> tuple[float, float, list[list[int]]]:
    """Top-1, top-5 and the confusion over the held-out split, whose images the ranks share."""
    model.eval()
    classes = subject.classes
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=subject.device)
    counts = torch.zeros(2, dtype=torch.int64, device=subject.device)
    numbers = list(range(rank(), len(subject.held_out), world()))
    loader = evaluation_loader(subject.held_out, subject.recipe, workers=subject.workers, numbers=numbers)
    assert subject.held_out.labels is not None
    for images, indices, _ in loader:
        if not len(images):
            continue
        with subject.precision.autocast():
            logits = model(normalise(images.to(subject.device), subject.recipe)).float()
        labels = torch.from_numpy(subject.held_out.labels)[indices].to(subject.device)
        top = logits.topk(min(5, classes), dim=1).indices
        counts += torch.stack([(top == labels[:, None]).any(dim=1).sum(), torch.tensor(len(labels)).to(counts)])
        confusion.index_put_((labels, top[:, 0]), torch.ones_like(labels), accumulate=True)
    sum_over_ranks(counts)
    sum_over_ranks(confusion)
    five, seen = counts.tolist()
    return float(confusion.diagonal().sum()) / seen, five / seen, confusion.tolist()


def _taken_up(state: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call left, if it was about the same weights, images and plan."""
    if not state.is_file():
        return None
    found = read_tensors(state)
    return found if isinstance(found, dict) and found.get("made_by") == made_by else None


def _keep(
    state: Path,
    made_by: dict[str, Any],
    history: list[dict[str, float]],
    confusion: list[list[int]],
    model: _Classifier,
    optimizer: torch.optim.Optimizer,
    *,
    done: bool,
) -> None:
    """Write what resuming needs, whole or not at all; of a frozen backbone or a finished run the head alone."""
    weights = model.state_dict()
    if model.frozen or done:
        weights = {name: value for name, value in weights.items() if name.startswith("head.")}
    content: dict[str, Any] = {"made_by": made_by, "history": history, "confusion": confusion, "model": weights}
    if not done:
        content["optimizer"] = optimizer.state_dict()
    with atomic_write(state) as temporary:
        torch.save(content, temporary)
