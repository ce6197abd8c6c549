"""DALI pipeline: decodes, augments and normalises on a GPU, or on DALI's CPU backend.

The files are read by worker processes, in the order that every pipeline has, and the parameters are drawn by
`synco_fast.data.augment.draw`, so what an epoch yields depends on seed and epoch alone. DALI's own readers, random
operators and checkpoints are not used: they would tie order and views to the number of ranks and to what ran before.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synco_fast.data.augment.draw import ViewParameters, draw_views
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import Batch, Decode
from synco_fast.data.pipelines.dali.decoded import build_decoding, decoding_inputs, gather_decoded, other_sizes
from synco_fast.data.pipelines.dali.finish import finish_crops
from synco_fast.data.pipelines.dali.graph import (
    GraphOptions,
    build_crops,
    build_evaluation,
    crop_inputs,
    evaluation_inputs,
)
from synco_fast.data.pipelines.dali.reader import EncodedBatch, Reader
from synco_fast.data.pipelines.dali.runner import GraphRunner
from synco_fast.data.pipelines.dali.settings import DaliSettings
from synco_fast.data.pipelines.epochs import EpochBatches, EpochPipeline
from synco_fast.data.pipelines.fused import MakeViews, make_pair, packed
from synco_fast.data.sources.splits import Split
from synco_fast.data.workers import available_cores, start_threads

__all__ = ["DaliPipeline", "dali_evaluation"]

#: Batches that the graph works on at a time, one less while a step takes one.
_DEPTH = 3


class DaliPipeline(EpochPipeline):
    """Batches of two views made by DALI; see `Pipeline` for what it promises.

    Args:
        split: The images.
        recipe: How views are made.
        batch: B, images in a batch, over all ranks.
        seed: Seed of order and views, together with the epoch.
        workers: Processes that read files; 0 reads in the training process. By default one for each core.
        device: Device of graph and views.
        dtype: torch.uint8 for pixels; torch.float16 or torch.float32 for normalised views.
        decode: "once" decodes a whole image for both views, "windows" decodes each view's window.
        fused_dtype: As ``dtype``, of the views that fused kernels make from images that DALI only decodes.
        settings: Of the decoder on a GPU, and the threads.
        rank, world: Rank of this process, and number of processes; each yields its part of every batch.

    On a GPU the views are channels-last. Corrupt images are replaced as in every pipeline.

    Raises:
        DataError: The split holds fewer images than a step takes.
    """

    def __init__(
        self,
        split: Split,
        recipe: Recipe,
        *,
        batch: int,
        seed: int,
        workers: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.uint8,
        decode: Decode = "once",
        fused_dtype: torch.dtype = torch.uint8,
        settings: DaliSettings = DaliSettings(),  # noqa: B008 - frozen
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._decode, self._fused_dtype = decode, fused_dtype
        self._make: MakeViews | None = None
        self._batches = EpochBatches(len(split), batch, seed, rank, world)
        self._recipe, self._dtype = recipe, dtype
        self._number = number = _gpu_number(device)
        gpu = _about(number)
        self._options = GraphOptions(
            self._batches.share,
            number,
            settings.count_threads(available_cores(), gpu and gpu[0]),
            _DEPTH,
            {} if gpu is None else settings.decoder(*gpu),
        )
        self._reader = Reader(split, replace=True, draw=partial(_draw, recipe, seed))
        self._loader = self._reader.loader(self._batches, workers, seed)
        #: The recipe of the epoch's views, whose size the graph is built for.
        self._sized = recipe.at(0)
        self._runner = GraphRunner(
            lambda: build_crops(self._sized, decode, self._options),
            partial(_crop_inputs, decode),
            self._reader,
            batch=self._options.batch,
            device=number,
            depth=_DEPTH,
        )
        self._pool = start_threads(self._options.threads) if number is None else None

    def __iter__(self) -> Iterator[Batch]:
        self._take_size(self._recipe.at(self._batches.epoch))
        if self._make is not None:
            yield from self._fused(self._make)
            return
        for files, crops in self._runner.run(self._loader):
            first, second = finish_crops(crops, files.views, self._recipe, self._dtype, self._pool)
            yield Batch(first, second, torch.from_numpy(files.images), files.corrupt)

    def close(self) -> None:
        """End the workers and free DALI's memory; the pipeline yields nothing afterwards."""
        self._runner.close()
        if self._pool is not None:
            self._pool.shutdown()
        loader = self.__dict__.pop("_loader", None)
        if loader is not None:
            loader.close()

    @property
    def kernel_input(self) -> dict[str, Any] | None:
        """See `FusedViews`; None where DALI decodes windows."""
        if self._decode != "once":
            return None
        return {
            "sides": self._recipe.sides,
            "views": 2 * self._batches.share,
            "dtype": self._fused_dtype,
            "image": None,
            "channels": 3,
            "planar": False,
            "sigma": self._recipe.blur_sigma[1],
        }

    def use_kernels(self, make: MakeViews) -> None:
        """See `FusedViews`."""
        self._runner.close()
        self._make = make
        self._runner = GraphRunner(
            partial(build_decoding, self._options),
            _packed,
            self._reader,
            batch=self._options.batch,
            device=self._number,
            depth=_DEPTH,
            gather=gather_decoded,
            wrong=other_sizes,
        )

    def _fused(self, make: MakeViews) -> Iterator[Batch]:
        for files, (pixels, offsets, sizes, words, *_) in self._runner.run(self._loader):
            rows = torch.arange(len(files), device=pixels.device)
            buffer = pixels, offsets, sizes
            size, dtype = self._sized.size, self._fused_dtype
            first, second = make_pair(make, self._recipe, *buffer, rows, words, size=size, dtype=dtype)
            yield Batch(first, second, torch.from_numpy(files.images), files.corrupt)

    def _take_size(self, recipe: Recipe) -> None:
        """Rebuild the graph where the views of an epoch have another size than those before."""
        if recipe.size == self._sized.size:
            return
        self._sized = recipe
        if self._make is None:
            self._runner.close()


def _draw(recipe: Recipe, seed: int, files: EncodedBatch) -> tuple[ViewParameters, ...]:
    draw = partial(draw_views, recipe, seed=seed, epoch=files.epoch, images=files.wanted, sizes=files.sizes)
    return tuple(draw(views=np.full(len(files), view)) for view in range(2))


def _crop_inputs(decode: Decode, files: EncodedBatch) -> dict[str, NDArray[Any]]:
    return crop_inputs(files.views, decode)


def _packed(files: EncodedBatch) -> dict[str, NDArray[Any]]:
    return decoding_inputs(*map(packed, files.views))


def dali_evaluation(
    split: Split,
    recipe: Recipe,
    *,
    batch: int = 256,
    workers: int | None = None,
    numbers: list[int] | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[Tensor, Tensor, dict[int, str]]]:
    """Like `evaluation_loader`, but made by DALI, with the images on ``device``.

    Args:
        split: The images.
        recipe: Gives the crop size and the resize before it.
        batch: Batch size.
        workers: Processes that read files, by default one for each core.
        numbers: Which images, by default all.
        device: Device of graph and images.
    """
    number = _gpu_number(device)
    gpu, settings = _about(number), DaliSettings()
    reader = Reader(split, replace=False)
    wanted = range(len(split)) if numbers is None else numbers
    places = ([(0, number) for number in wanted[first : first + batch]] for first in range(0, len(wanted), batch))
    options = GraphOptions(
        batch,
        number,
        settings.count_threads(available_cores(), gpu and gpu[0]),
        _DEPTH,
        {} if gpu is None else settings.decoder(*gpu, allocate=False),
    )
    runner = GraphRunner(
        partial(build_evaluation, recipe, options),
        lambda files: evaluation_inputs(recipe, files.sizes),
        reader,
        batch=batch,
        device=number,
        depth=_DEPTH,
    )
    nothing = torch.empty((0, recipe.size, recipe.size, 3), dtype=torch.uint8, device=device)
    loader = reader.loader(places, workers, 0)
    try:
        for files, images in runner.run(loader):
            crops = (images[0] if images else nothing).permute(0, 3, 1, 2)
            yield crops, torch.from_numpy(files.images), files.corrupt
    finally:
        runner.close()
        loader.close()


def _gpu_number(device: torch.device | None) -> int | None:
    """The GPU's number for DALI; None for the CPU."""
    if device is None or device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _about(number: int | None) -> tuple[tuple[int, int], int] | None:
    """Compute capability and memory in bytes of a GPU; None for the CPU."""
    if number is None:
        return None
    return torch.cuda.get_device_capability(number), torch.cuda.get_device_properties(number).total_memory
