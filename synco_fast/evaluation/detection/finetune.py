"""``evaluate detection``: fine-tune a detector on the backbone and measure average precision."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from synco_fast.data.loader import Loader
from synco_fast.evaluation.context import (
    EvalOptions,
    check_unchanged,
    folder_of,
    join_job,
    progress,
    weights_sha256,
)
from synco_fast.evaluation.detection.datasets import Detections, DetectionSource, Steps, open_detection
from synco_fast.evaluation.detection.precision import VOC_LEVELS, CocoPrecision, VocPrecision
from synco_fast.evaluation.detection.precision import Precision as AveragePrecision
from synco_fast.export.load import Weights, backbone_of, read_weights
from synco_fast.runtime.checkpoint import read_tensors
from synco_fast.runtime.distributed import barrier, rank, world
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.errors import ConfigError, DivergedError
from synco_fast.runtime.files import atomic_write, write_json
from synco_fast.runtime.optim_step import OptimStep, build_sgd
from synco_fast.runtime.precision import Precision
from synco_fast.runtime.progress import ProgressBar

__all__ = ["DetectionProtocol", "build_detector", "evaluate_detection", "published_protocol"]

#: Test images for the AP before the first step.
_BEFORE = 200
#: Images, and their targets.
_Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


@dataclass(frozen=True)
class DetectionProtocol:
    """The protocol of a detector's fine-tuning by SGD.

    Attributes:
        steps: Iterations.
        drops: Iterations after which the rate is divided by 10.
        warmup: Iterations over which the rate rises from a thousandth of it.
        batch: Images per step, over all ranks.
        lr, momentum, weight_decay: Of SGD; batch norm has no weight decay.
        sizes: Short sides of training images, one drawn for each image, in pixels.
        size: Short side of test images.
        longest: Upper bound of the long side.
        freeze: Whether the backbone is frozen.
        seed: Seed of heads, order and flips.
        keep_every: Iterations between saved states.
        regions: Proposals per training image for the heads.
        proposals: Proposals per test image for the heads.
        detections: At most so many per test image.
    """

    steps: int
    drops: tuple[int, ...]
    warmup: int
    sizes: tuple[int, ...]
    batch: int = 16
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    size: int = 800
    longest: int = 1333
    freeze: bool = False
    seed: int = 0
    keep_every: int = 1000
    regions: int = 512
    proposals: int = 1000
    detections: int = 100

    def rate(self, step: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        rise = min(1.0, 0.001 + 0.999 * step / self.warmup) if self.warmup else 1.0
        return float(self.lr * rise * 0.1 ** sum(step >= drop for drop in self.drops))


def published_protocol(layout: str) -> DetectionProtocol:
    """MoCo's settings (facebookresearch/moco, detection/configs): VOC 24k iterations, COCO the 2x schedule."""
    if layout == "voc":
        return DetectionProtocol(24000, (18000, 22000), warmup=100, sizes=tuple(range(480, 801, 32)))
    return DetectionProtocol(180000, (120000, 160000), warmup=1000, sizes=tuple(range(640, 801, 32)))


def build_detector(weights: Weights, classes: int, *, masks: bool, protocol: DetectionProtocol) -> nn.Module:
    """Faster R-CNN of torchvision, or Mask R-CNN, with a feature pyramid on the pretrained backbone.

    All layers of the backbone are trained, including batch norm, and the pyramid has batch norm too, as in MoCo.

    Args:
        weights: The backbone's weights.
        classes: Number of classes without the background.
        masks: Whether it predicts masks.
        protocol: Image sizes, and whether the backbone is frozen.

    Raises:
        ConfigError: The backbone has no four stages ``layer1`` to ``layer4``.
    """
    backbone = backbone_of(weights)
    stages = [f"layer{number}" for number in (1, 2, 3, 4)]
    if any(not hasattr(backbone, stage) for stage in stages):
        raise ConfigError(
            f"model.backbone: found {weights.config.model.backbone}, expected ResNets, whose stages are "
            f"{', '.join(stages)}"
        )
    widths = _widths(backbone, stages)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(protocol.seed)
        body = BackboneWithFPN(
            backbone, {stage: str(place) for place, stage in enumerate(stages)}, widths, 256, norm_layer=nn.BatchNorm2d
        )
        recipe = weights.config.augment
        detector: nn.Module = (MaskRCNN if masks else FasterRCNN)(
            body,
            classes + 1,
            min_size=protocol.sizes,
            max_size=protocol.longest,
            image_mean=list(recipe.mean),
            image_std=list(recipe.std),
            box_batch_size_per_image=protocol.regions,
            rpn_post_nms_top_n_test=protocol.proposals,
            box_detections_per_img=protocol.detections,
        )
    if protocol.freeze:
        body.body.requires_grad_(False)
    return detector


@torch.no_grad()
def _widths(backbone: nn.Module, stages: list[str]) -> list[int]:
    """Channels of each stage's output."""
    found: dict[str, int] = {}
    hooks = [
        backbone.get_submodule(stage).register_forward_hook(
            lambda module, given, result, stage=stage: found.__setitem__(stage, result.shape[1])
        )
        for stage in stages
    ]
    backbone.eval()(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    return [found[stage] for stage in stages]


def decayed_without_norms(detector: nn.Module) -> list[dict[str, Any]]:
    """Groups of what is trained: the weight decay spares batch norm, as detectron2's does."""
    norms = {value for part in detector.modules() if isinstance(part, _BatchNorm) for value in part.parameters()}
    trained = [value for value in detector.parameters() if value.requires_grad]
    spared = {"params": [value for value in trained if value in norms], "weight_decay": 0.0}
    return [{"params": [value for value in trained if value not in norms]}, spared]


def evaluate_detection(
    path: Path, options: EvalOptions, *, protocol: DetectionProtocol | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Fine-tune a detector on a checkpoint's backbone and measure the average precision of its layout.

    Args:
        path: A run folder, a checkpoint, or an imported file.
        options: ``data`` is ``voc:FOLDER`` or ``coco:FOLDER``.
        protocol: The protocol, by default MoCo's for the layout.
        console: Where progress is shown.

    Returns:
        ``box`` and, with masks, ``mask``: AP, AP50 and AP75 in [0, 1]; ``chance``: AP of the detector before training.

    Raises:
        CheckpointError, DataError, ConfigError: The checkpoint or the images do not fit.
        UserError: The folder of results cannot be written.
        DivergedError: The loss became NaN or infinite.
    """
    if options.data is None:
        raise ConfigError("data: found none, expected voc:FOLDER or coco:FOLDER")
    needed = ("torchmetrics", "pycocotools") if options.data.startswith("coco:") else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"evaluate detection: found no {', '.join(missing)}: pip install 'synco-fast[detection]'")
    with join_job(options.device) as device:
        if world() > 1 and device.type != "cuda":
            raise ConfigError(
                f"device: found {world()} processes on CPUs, expected one, or a GPU for each: batch norm is "
                "synchronised on GPUs alone"
            )
        weights = read_weights(path)
        folder = folder_of(weights, options)
        source = open_detection(options.data, seed=protocol.seed if protocol else 0)
        protocol = protocol or published_protocol(source.layout)
        if protocol.batch % world():
            raise ConfigError(f"batch: found {protocol.batch}, expected a multiple of {world()}, the processes")
        detector = build_detector(weights, len(source.classes), masks=source.masks, protocol=protocol).to(device)
        if world() > 1:
            detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
        job = _Job(
            detector, source, protocol, options, Precision(options.precision, device, key="precision"), device, console
        )
        frozen = weights_sha256(_body(detector)) if protocol.freeze else None
        made_by = {
            "plan": repr(asdict(protocol)),
            "weights": weights_sha256(backbone_of(weights)),
            "precision": job.precision.name,
            "source": source.spec,
            "train": source.train.sha256(),
            "test": source.test.sha256(),
            # Earlier versions dropped difficult objects of VOC, and decayed batch norm.
            "as_detectron2": True,
        }
        state = folder / f"detection_{source.layout}.pt"
        before = job.train(state, made_by, fresh=options.fresh)
        found = job.measure(len(source.test))
        if frozen is not None:
            check_unchanged(_body(detector), frozen)
        barrier()
        return _result(job, weights, folder, found, before)


def _body(detector: nn.Module) -> nn.Module:
    return detector.get_submodule("backbone.body")


def _result(
    job: _Job, weights: Weights, folder: Path, found: dict[str, dict[str, float]], before: float
) -> dict[str, Any]:
    """The result, which rank 0 writes into the folder."""
    source, protocol = job.source, job.protocol
    headline = {
        f"{source.layout.upper()} {kind} {name}": value for kind, part in found.items() for name, value in part.items()
    }
    result = {
        "evaluation": f"detection_{source.layout}",
        "checkpoint": str(weights.file),
        "step": weights.step,
        "source": source.spec,
        "detector": "Mask R-CNN with FPN" if source.masks else "Faster R-CNN with FPN",
        "chance": before,
        "headline": headline,
        **found,
        "train_images": len(source.train),
        "test_images": len(source.test),
        "train_set": source.sets[0],
        "test_set": source.sets[1],
        "metric": source.metric,
        "protocol": asdict(protocol),
        "backbone_unchanged": protocol.freeze,
        "precision": job.precision.name,
        "environment": describe_environment(job.device),
    }
    if rank() == 0:
        write_json(folder / f"detection_{source.layout}.json", result)
    return result


@dataclass
class _Job:
    """A detector in training."""

    detector: nn.Module
    source: DetectionSource
    protocol: DetectionProtocol
    options: EvalOptions
    precision: Precision
    device: torch.device
    console: Console | None

    def train(self, state: Path, made_by: dict[str, Any], *, fresh: bool) -> float:
        """Train from the saved state, if any, or from the start; returns the box AP before the first step."""
        protocol = self.protocol
        settings = {"lr": protocol.lr, "momentum": protocol.momentum, "weight_decay": protocol.weight_decay}
        optimizer = build_sgd(decayed_without_norms(self.detector), **settings, device=self.device)
        optim = OptimStep(optimizer, scaled=self.precision.scaled, device=self.device)
        found = read_tensors(state) if state.is_file() and not fresh else None
        step, before = 0, 0.0
        if isinstance(found, dict) and found.get("made_by") == made_by:
            # Earlier versions measured VOC as COCO.
            known = found.get("metric", "COCO") == self.source.metric
            step, before = found["step"], found["before"] if known else self._measure_before()
            self.detector.load_state_dict(found["detector"])
            optimizer.load_state_dict(found["optimizer"])
            optim.load_state_dict(found.get("scaling", {}))
        else:
            before = self._measure_before()
        barrier()
        model = DistributedDataParallel(self.detector) if world() > 1 else self.detector
        model.train()
        if protocol.freeze:
            _body(self.detector).eval()
        steps = Steps(len(self.source.train), protocol.batch, protocol.seed, step, protocol.steps, rank(), world())
        loader = _loader(self.source.train, steps, self.options)
        total = torch.zeros((), device=self.device)
        with progress(
            self.console, f"detection on {self.source.layout.upper()}", protocol.steps, step, unit="step"
        ) as bar:
            for images, targets in loader:
                for group in optimizer.param_groups:
                    group["lr"] = protocol.rate(step)
                torch.manual_seed(protocol.seed + step)
                with self.precision.autocast():
                    losses = model([image.to(self.device) for image in images], [self._moved(one) for one in targets])
                loss = torch.stack([value.float() for value in losses.values()]).sum()
                optim.descend(loss)
                total, step = loss.detach(), step + 1
                bar.advance()
                if step % 20 == 0 or step == protocol.steps:
                    self._check_loss(float(total), step, bar)
                if rank() == 0 and (step % protocol.keep_every == 0 or step == protocol.steps):
                    _save(state, {"made_by": made_by, "metric": self.source.metric}, step, before, self.detector, optim)
        barrier()
        return before

    def _check_loss(self, loss: float, step: int, bar: ProgressBar) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"loss: found a non-finite value near iteration {step}, expected finite ones; try a lower --lr"
            )
        bar.advance(0, f"loss {loss:.3f}")

    def _moved(self, target: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in target.items()}

    def _measure_before(self) -> float:
        return self.measure(min(_BEFORE, len(self.source.test)))["box"]["AP"]

    @torch.no_grad()
    def measure(self, images: int) -> dict[str, dict[str, float]]:
        """The average precision of the layout over the first test images, by ``box`` and ``mask``."""
        metric: AveragePrecision = (
            CocoPrecision(masks=self.source.masks)
            if self.source.metric == "COCO"
            else VocPrecision(VOC_LEVELS if self.source.metric == "VOC 2007" else None)
        )
        numbers = list(range(rank(), images, world()))
        self.detector.eval()
        transform: Any = self.detector.transform
        sizes, transform.min_size = transform.min_size, (self.protocol.size,)
        with progress(self.console, "test images", len(numbers)) as bar:
            loader = _loader(self.source.test, [[number] for number in numbers], self.options)
            for number, (pictures, targets) in zip(numbers, loader, strict=True):
                with self.precision.autocast():
                    outputs = self.detector([picture.to(self.device) for picture in pictures])
                metric.add(number, self._prediction(outputs[0]), targets[0])
                bar.advance(len(pictures))
        transform.min_size = sizes
        return metric.compute()

    def _prediction(self, output: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: output[name].float().cpu() for name in ("boxes", "scores")}
        found["labels"] = output["labels"].cpu()
        if self.source.masks:
            found["masks"] = (output["masks"][:, 0] > 0.5).cpu()
        return found


class _Batches(Dataset[_Batch]):
    """The images of some keys of `Detections`, and their targets."""

    def __init__(self, images: Detections) -> None:
        self.images = images

    def __getitem__(self, keys: list[Any]) -> _Batch:
        samples = [self.images[key] for key in keys]
        return [image for image, _ in samples], [target for _, target in samples]


def _loader(images: Detections, batches: Iterable[list[Any]], options: EvalOptions) -> Loader[_Batch]:
    return Loader(_Batches(images), batches, workers=options.workers, keep=False)


def _save(
    state: Path,
    about: dict[str, Any],
    step: int,
    before: float,
    detector: nn.Module,
    optim: OptimStep,
) -> None:
    """Atomically save the state needed to resume."""
    content = {**about, "step": step, "before": before, "detector": detector.state_dict()}
    with atomic_write(state) as temporary:
        torch.save({**content, "optimizer": optim.optimizer.state_dict(), "scaling": optim.state_dict()}, temporary)
