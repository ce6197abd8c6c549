"""Training a linear classifier on a frozen or trained backbone, for linear evaluation and fine-tuning."""

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
from synco_fast.data.pipelines.build import evaluation_batches
from synco_fast.evaluation.context import EvalContext, check_unchanged, progress, weights_sha256
from synco_fast.evaluation.labelled import LabelledBatches, images_sha256
from synco_fast.export.load import backbone_of
from synco_fast.runtime.checkpoint import read_tensors
from synco_fast.runtime.distributed import barrier, mean_over_ranks, rank, sum_over_ranks, world
from synco_fast.runtime.errors import ConfigError, DivergedError
from synco_fast.runtime.files import atomic_write
from synco_fast.runtime.optim_step import OptimStep, build_sgd
from synco_fast.runtime.progress import ProgressBar

__all__ = ["ClassifierProtocol", "ClassifierResult", "train_classifier"]


@dataclass(frozen=True)
class ClassifierProtocol:
    """The protocol of a classifier's training by SGD.

    Attributes:
        epochs: Passes over the training images.
        batch: Images per step, over all ranks.
        head_lr: Learning rate of the classifier.
        backbone_lr: Learning rate of the backbone; 0 freezes it, running statistics included.
        weight_decay: Weight decay.
        momentum: Momentum of SGD.
        drops: Fractions of the run after which the rates are divided by 10; empty for a cosine, updated every epoch.
        seed: Seed of the classifier's weights, the order and the crops.
        tests: How often the held-out split is classified, including after the last epoch; every epoch if unset.
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
        """Whether the held-out split is classified after this epoch, counted from 0."""
        every = 1 if self.tests is None else max(1, self.epochs // self.tests)
        return (self.epochs - 1 - epoch) % every == 0

    def factor(self, epoch: int) -> float:
        """The factor of the learning rates in an epoch, counted from 0."""
        if self.drops:
            return float(0.1 ** sum(epoch >= round(fraction * self.epochs) for fraction in self.drops))
        return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


@dataclass(frozen=True)
class ClassifierResult:
    """Accuracies in [0, 1] on the held-out split; ``confusion[a][b]`` counts images of class a predicted as b."""

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
    context: EvalContext,
    numbers: list[int],
    protocol: ClassifierProtocol,
    state: Path,
    title: str,
    console: Console | None = None,
) -> ClassifierResult:
    """Train on the given images and test on the held-out split; resumes from ``state``.

    Args:
        context: The backbone (a copy is trained) and the images.
        numbers: Which training images.
        protocol: How to train.
        state: The file saved after each epoch; if its run is finished, it is only read.
        title: For the progress bar.
        console: Where progress is shown.

    Raises:
        ConfigError: The batch cannot be divided among the processes.
        DivergedError: The loss became NaN or infinite.
        RuntimeError: A frozen backbone was changed.
    """
    if protocol.batch % world():
        raise ConfigError(f"batch: found {protocol.batch}, expected a multiple of {world()}, the processes")
    frozen = protocol.backbone_lr == 0
    probe = torch.zeros(1, 3, context.recipe.size, context.recipe.size, device=context.device)
    with torch.no_grad():
        features = context.backbone(probe).shape[1]
    backbone = backbone_of(context.weights).to(context.device)
    before = weights_sha256(backbone)
    model = _Classifier(backbone, features, context.classes, frozen, protocol.seed).to(context.device)
    optim = _optim_step(context, model, protocol)
    peaks = [group["lr"] for group in optim.optimizer.param_groups]
    made_by = _origin(context, numbers, protocol, before)
    history: list[dict[str, float]] = []
    confusion: list[list[int]] = []
    found = _saved(state, made_by) if not context.fresh else None
    barrier()
    if found is not None:
        history, confusion = found["history"], found["confusion"]
        if len(history) < protocol.epochs:
            model.load_state_dict(found["model"], strict=not frozen)
            optim.optimizer.load_state_dict(found["optimizer"])
            optim.load_state_dict(found.get("scaling", {}))
    batches = LabelledBatches(
        context.train,
        context.recipe,
        numbers,
        batch=protocol.batch,
        seed=protocol.seed,
        workers=context.workers,
        rank=rank(),
        world=world(),
    )
    trained = DistributedDataParallel(model) if world() > 1 else model
    with progress(console, title, protocol.epochs * len(batches), len(history) * len(batches)) as bar:
        for epoch in range(len(history), protocol.epochs):
            for group, peak in zip(optim.optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * protocol.factor(epoch)
            loss = _epoch(context, trained, optim, batches.epoch(epoch), bar)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"loss: found a non-finite value in epoch {epoch + 1} of {title}, expected finite ones; "
                    "try a lower --lr"
                )
            history.append({"epoch": epoch + 1, "loss": loss})
            if protocol.tested(epoch):
                if not frozen:  # each rank's last step moved its own
                    mean_over_ranks([buffer for buffer in model.buffers() if buffer.is_floating_point()])
                top1, top5, confusion = _test(context, model)
                history[-1] |= {"top1": top1, "top5": top5}
                bar.advance(0, f"loss {loss:.3f}  top-1 {top1:.1%}")
            if rank() == 0:
                _save(state, made_by, history, confusion, model, optim, done=epoch + 1 == protocol.epochs)
    if frozen:
        check_unchanged(model.backbone, before)
    last = history[-1]
    best = max(line["top1"] for line in history if "top1" in line)
    return ClassifierResult(last["top1"], last["top5"], best, history, confusion)


def _optim_step(context: EvalContext, model: _Classifier, protocol: ClassifierProtocol) -> OptimStep:
    groups: list[dict[str, Any]] = [{"params": model.head.parameters(), "lr": protocol.head_lr}]
    if not model.frozen:
        groups.append({"params": model.backbone.parameters(), "lr": protocol.backbone_lr})
    optimizer = build_sgd(
        groups,
        lr=protocol.head_lr,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
        device=context.device,
    )
    return OptimStep(optimizer, scaled=context.precision.scaled, device=context.device)


def _epoch(
    context: EvalContext,
    model: nn.Module,
    optim: OptimStep,
    batches: Iterator[tuple[Tensor, Tensor]],
    bar: ProgressBar,
) -> float:
    """One epoch; the mean loss over its batches."""
    model.train()
    total, count = torch.zeros((), device=context.device), 0
    for images, labels in batches:
        images = normalise(images.to(context.device, non_blocking=True), context.recipe)
        with context.precision.autocast():
            logits = model(images)
        loss = cross_entropy(logits.float(), labels.to(context.device, non_blocking=True))
        optim.descend(loss)
        total += loss.detach()
        count += 1
        bar.advance()
    return float(sum_over_ranks(total)) / (count * world())


@torch.no_grad()
def _test(context: EvalContext, model: nn.Module) -> tuple[float, float, list[list[int]]]:
    """Top-1, top-5 and the confusion matrix of the held-out split, whose images are spread over the ranks."""
    model.eval()
    classes = context.classes
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=context.device)
    counts = torch.zeros(2, dtype=torch.int64, device=context.device)
    numbers = list(range(rank(), len(context.held_out), world()))
    loader = evaluation_batches(
        context.held_out,
        context.recipe,
        pipeline=context.pipeline,
        device=context.device,
        workers=context.workers,
        numbers=numbers,
    )
    assert context.held_out.labels is not None
    for images, indices, _ in loader:
        if not len(images):
            continue
        with context.precision.autocast():
            logits = model(normalise(images.to(context.device), context.recipe)).float()
        labels = torch.from_numpy(context.held_out.labels)[indices.cpu()].to(context.device)
        top = logits.topk(min(5, classes), dim=1).indices
        counts += torch.stack([(top == labels[:, None]).any(dim=1).sum(), torch.tensor(len(labels)).to(counts)])
        confusion.index_put_((labels, top[:, 0]), torch.ones_like(labels), accumulate=True)
    sum_over_ranks(counts)
    sum_over_ranks(confusion)
    five, seen = counts.tolist()
    return float(confusion.diagonal().sum()) / seen, five / seen, confusion.tolist()


def _origin(context: EvalContext, numbers: list[int], protocol: ClassifierProtocol, weights: str) -> dict[str, Any]:
    """Everything that a classifier's figures depend on; a state with another origin is not resumed."""
    recipe = context.recipe
    return {
        "plan": repr(asdict(protocol)),
        "weights": weights,
        "precision": context.precision.name,
        "crops": f"{recipe.size} {recipe.resize} {recipe.mean} {recipe.std}",
        "source": context.source.spec,
        "classes": context.classes,
        "train": images_sha256(context.train, numbers),
        "held_out": images_sha256(context.held_out),
    }


def _saved(state: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """The state of an earlier call with the same origin, if any."""
    if not state.is_file():
        return None
    found = read_tensors(state)
    return found if isinstance(found, dict) and found.get("made_by") == made_by else None


def _save(
    state: Path,
    made_by: dict[str, Any],
    history: list[dict[str, float]],
    confusion: list[list[int]],
    model: _Classifier,
    optim: OptimStep,
    *,
    done: bool,
) -> None:
    """Save the state needed to resume; for a frozen backbone or a finished run only the classifier."""
    weights = model.state_dict()
    if model.frozen or done:
        weights = {name: value for name, value in weights.items() if name.startswith("head.")}
    content: dict[str, Any] = {"made_by": made_by, "history": history, "confusion": confusion, "model": weights}
    if not done:
        content |= {"optimizer": optim.optimizer.state_dict(), "scaling": optim.state_dict()}
    with atomic_write(state) as temporary:
        torch.save(content, temporary)
