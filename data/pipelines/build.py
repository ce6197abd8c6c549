"""Choosing and building a pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import DataError
from synco_fast.data.pipelines.base import Decode, Pipeline, PipelineName
from synco_fast.data.pipelines.dali.settings import DaliSettings
from synco_fast.data.pipelines.epochs import replace_corrupt
from synco_fast.data.pipelines.resident import ResidentPipeline, room_on
from synco_fast.data.pipelines.stream import StreamPipeline
from synco_fast.data.pipelines.torchvision import TorchvisionPipeline, evaluation_loader
from synco_fast.data.sources.splits import ArraySplit, Split
from synco_fast.data.sources.stream import StreamSplit, refuse_stream
from synco_fast.data.workers import machine_cores

__all__ = ["build_pipeline", "choose_pipeline", "evaluation_batches", "has_dali", "pipelines_for"]

#: Larger sets are not tried as resident ones: decoding them would take longer than the measurement is worth.
_SMALL_SET = 4 << 30


def has_dali() -> bool:
    """Whether DALI is installed."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def choose_pipeline(name: PipelineName, split: Split, device: torch.device) -> PipelineName:
    """The pipeline that a name stands for.

    ``auto`` is resident for images already in memory, DALI on a GPU if it is installed, and torchvision elsewhere: on a
    CPU it is faster than DALI's CPU backend.

    Raises:
        DataError: ``dali`` is not installed, or the pipeline needs random access and the split is a stream.
    """
    if isinstance(split, StreamSplit):
        if name not in ("auto", "torchvision"):
            raise DataError(
                f"data.pipeline: found {name} for {split.title}, expected auto or torchvision for a stream, which "
                "has no random access"
            )
        return "torchvision"
    if name == "dali" and not has_dali():
        raise DataError(
            "data.pipeline: found dali, expected auto, torchvision or resident here, where DALI is not installed; "
            "pip install 'synco-fast[dali]'"
        )
    if name != "auto":
        return name
    if isinstance(split, ArraySplit):
        return "resident"
    return "dali" if device.type == "cuda" and has_dali() else "torchvision"


def pipelines_for(split: Split, device: torch.device) -> list[PipelineName]:
    """The pipelines worth a measurement, what ``auto`` takes without one first.

    DALI's CPU backend is none of them, being slower than torchvision. Resident is, for images of one size
    that fit: arrays, or files whose first few are alike and that take up to 4 GiB decoded.
    """
    if isinstance(split, StreamSplit):
        return ["torchvision"]
    names = [choose_pipeline("auto", split, device), "torchvision"]
    names += ["dali"] if device.type == "cuda" and has_dali() else []
    names += ["resident"] if isinstance(split, ArraySplit) or _is_small(split, device) else []
    return list(dict.fromkeys(names))


def _is_small(split: Split, device: torch.device) -> bool:
    shapes = {replace_corrupt(len(split), number, split.read)[0].size for number in range(min(8, len(split)))}
    width, height = shapes.pop()
    return not shapes and 3 * width * height * len(split) <= min(_SMALL_SET, room_on(device))


def build_pipeline(
    split: Split,
    recipe: Recipe,
    *,
    batch: int,
    seed: int,
    name: PipelineName = "auto",
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
    decode: Decode = "once",
    dali: DaliSettings = DaliSettings(),  # noqa: B008 - frozen
    rank: int = 0,
    world: int = 1,
) -> Pipeline:
    """The pipeline for a split.

    Args:
        split: The images.
        recipe: How views are made.
        batch: B, images in a batch, over all ranks.
        seed: Seed of order and views, together with the epoch.
        name: The pipeline; see `choose_pipeline`.
        device: Where the encoder is; the CPU by default.
        dtype: The encoder's dtype. Fused kernels normalise to it, and so does DALI on a GPU (to float16 for bfloat16,
            which keeps all eight bits of a pixel); the others yield uint8.
        workers: Processes that read and decode, by default one for each core of this rank.
        decode: How DALI decodes.
        dali: Settings of DALI's decoder on a GPU.
        rank, world: Rank of this process, and number of processes.

    Raises:
        DataError: The split or the settings do not fit the pipeline.
    """
    device = device or torch.device("cpu")
    chosen = choose_pipeline(name, split, device)
    shared: dict[str, Any] = {"batch": batch, "seed": seed, "workers": workers, "rank": rank, "world": world}
    if isinstance(split, StreamSplit):
        return StreamPipeline(split, recipe, pin_memory=device.type == "cuda", **shared)
    if chosen == "resident":
        return ResidentPipeline(split, recipe, device=device, dtype=dtype, **shared)
    if chosen == "dali":
        from synco_fast.data.pipelines.dali.pipeline import DaliPipeline

        views = torch.uint8
        if device.type == "cuda":
            views = torch.float32 if dtype == torch.float32 else torch.float16
        return DaliPipeline(
            split, recipe, device=device, dtype=views, decode=decode, settings=dali, fused_dtype=dtype, **shared
        )
    return TorchvisionPipeline(split, recipe, pin_memory=device.type == "cuda", **shared)


def evaluation_batches(
    split: Split,
    recipe: Recipe,
    *,
    batch: int = 256,
    pipeline: PipelineName = "auto",
    device: torch.device | None = None,
    workers: int | None = None,
    numbers: list[int] | None = None,
) -> Iterable[tuple[Tensor, Tensor, dict[int, str]]]:
    """Central crops in order: uint8 images (b, 3, size, size), their numbers (b,) int64, and the corrupt ones.

    On a CUDA device DALI decodes and resizes them where the run's pipeline is DALI, and leaves them there; everywhere
    else Pillow and torchvision do, and the images are on the CPU. A pixel differs by 8 of 255 levels at most
    (tests/data/test_dali.py).

    Args:
        split: The images.
        recipe: Gives the crop size and the resize before it.
        batch: Batch size; corrupt images are skipped, so b can be smaller.
        pipeline: ``data.pipeline`` of the run.
        device: Where the encoder is; the CPU by default.
        workers: Processes that read and decode, by default one for each core, since other ranks wait meanwhile.
        numbers: Which images, by default all.

    Raises:
        DataError: The split is a stream.
    """
    refuse_stream(split, "an evaluation")
    device = device or torch.device("cpu")
    workers = machine_cores() if workers is None else workers
    if device.type == "cuda" and has_dali() and choose_pipeline(pipeline, split, device) == "dali":
        from synco_fast.data.pipelines.dali.pipeline import dali_evaluation

        return dali_evaluation(split, recipe, batch=batch, workers=workers, numbers=numbers, device=device)
    return evaluation_loader(split, recipe, batch=batch, workers=workers, numbers=numbers)
