"""Processor time of the CPU pipelines part by part: decode, resize, jitter, blur, collate, transfer between processes.

The parts are those of the pipelines themselves, called one after the other on the same files in one process, with one
thread. Only the transfer takes a second process.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.dlpack import from_dlpack

from synco_fast.bench.baselines.data import TwoCrops
from synco_fast.bench.data import busy_seconds
from synco_fast.data.augment.draw import JITTER, OPERATIONS, ViewParameters, draw_views
from synco_fast.data.augment.ops import APPLY, crop_and_resize, round_views
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.pixels import read_pixels
from synco_fast.data.sources.manifest import Manifest, PackedNames
from synco_fast.data.sources.splits import FileSplit
from synco_fast.data.workers import start_worker

__all__ = ["MEASURED", "PARTS", "measure_parts"]

#: In the order of a pipeline; the four of the jitter are also part of it. "round" includes the normalisation of pil.
PARTS = (
    *("read", "decode", "draw", "crop", "jitter", *JITTER),
    *("grayscale", "blur", "solarize", "flip", "round", "collate", "transfer"),
)
#: Batches through a worker process, for the transfer; the system counts processor time in hundredths of a second.
_TRANSFERS = 40
_PIL = {
    "RandomResizedCrop": "crop",
    "RandomGrayscale": "grayscale",
    "RandomSolarize": "solarize",
    "RandomHorizontalFlip": "flip",
    "ToTensor": "round",
    "Normalize": "round",
}


class _Clock:
    """Processor seconds of this process by part."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, *names: str) -> Iterator[None]:
        start = time.process_time()
        yield
        spent = time.process_time() - start
        for name in names:
            self.spent[name] += spent


def measure_parts(
    folder: Path,
    names: list[str],
    *,
    pipelines: list[str],
    recipe: Recipe,
    rounds: int,
    tick: Callable[[], None],
) -> dict[str, dict[str, float]]:
    """Milliseconds of processor time an image, by pipeline and part, the median of the rounds.

    Args:
        folder, names: JPEG files; all of them make a batch.
        pipelines: Of pil, torchvision and dali.
        recipe: The augmentation.
        rounds: How often each is measured, the pipelines in turns; every round draws other views.
        tick: Called after each round of each pipeline.
    """
    threads = torch.get_num_threads()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
    try:
        torch.set_num_threads(1)
        for number in range(-1, rounds):  # the first one warms up
            for name in pipelines:
                spent = MEASURED[name](folder, names, recipe, number + 1)
                if number >= 0:
                    found[name].append(spent)
                    tick()
    finally:
        torch.set_num_threads(threads)
    return {
        name: {
            part: 1e3 / len(names) * statistics.median(spent[part] for spent in each)
            for part in PARTS
            if part in each[0]
        }
        for name, each in found.items()
    }


def _pil(folder: Path, names: list[str], recipe: Recipe, number: int) -> dict[str, float]:
    torch.manual_seed(number)
    clock, dataset = _Clock(), TwoCrops([str(folder / name) for name in names], recipe)
    first, second = list[Tensor](), list[Tensor]()
    for place in range(len(names)):
        with clock.part("decode"):
            image = dataset.read(place)
        for views in (first, second):
            view: Any = image
            for transform in dataset.transform.transforms:
                name = type(transform).__name__
                if name == "RandomApply":
                    name = "jitter" if type(transform.transforms[0]).__name__ == "ColorJitter" else "blur"
                with clock.part(_PIL.get(name, name)):
                    view = transform(view)
            views.append(view)
    _collate_and_transfer(clock, lambda: (default_collate(first), default_collate(second)))
    return clock.spent


def _torchvision(folder: Path, names: list[str], recipe: Recipe, number: int) -> dict[str, float]:
    clock, split = _Clock(), _split(folder, names)
    first, second = list[Tensor](), list[Tensor]()
    for few in (range(start, min(start + 8, len(names))) for start in range(0, len(names), 8)):
        images = []
        for place in few:
            with clock.part("read"):
                held = _Held(split, place)
            with clock.part("decode"):
                images.append(read_pixels(held, place))
        with clock.part("draw"):
            sizes = np.repeat([pixels.shape[1:] for pixels in images], 2, axis=0)
            drawn = _draw(recipe, number, np.repeat(few, 2), np.tile([0, 1], len(few)), sizes)
        for row, pixels in enumerate(images):
            for views, place in ((first, 2 * row), (second, 2 * row + 1)):
                parameters = drawn[place : place + 1]
                with clock.part("crop"):
                    crop = crop_and_resize(pixels, parameters.crop[0], recipe.size)
                views.append(_operations(clock, crop, parameters)[0])
    _collate_and_transfer(clock, lambda: (default_collate(first), default_collate(second)))
    return clock.spent


def _dali(folder: Path, names: list[str], recipe: Recipe, number: int) -> dict[str, float]:
    from nvidia.dali import Pipeline, fn, types

    from synco_fast.data.pipelines.dali.graph import GraphOptions, build_crops, crop_inputs
    from synco_fast.data.pipelines.dali.reader import Reader

    clock, count = _Clock(), len(names)
    with clock.part("read"):
        files = Reader(_split(folder, names), replace=True)[[(number, place) for place in range(count)]]
    with clock.part("draw"):
        drawn = [_draw(recipe, number, np.arange(count), np.full(count, view), files.sizes) for view in range(2)]
    decoding = Pipeline(batch_size=count, num_threads=1, device_id=None, exec_dynamic=True, prefetch_queue_depth=1)
    with decoding:
        encoded = fn.external_source(name="encoded", no_copy=True)
        decoding.set_outputs(fn.decoders.image(encoded, output_type=types.RGB))
    graph = build_crops(recipe, "once", GraphOptions(count))
    for name, inputs, pipe in (("decode", {}, decoding), ("crop", crop_inputs(drawn, "once"), graph)):
        _run(pipe, files.files(), inputs)  # it allocates
        with clock.part(name):
            outputs = _run(pipe, files.files(), inputs)
    clock.spent["crop"] -= clock.spent["decode"]
    for crops, view in zip(outputs, drawn, strict=True):
        together = from_dlpack(crops.as_tensor()).permute(0, 3, 1, 2)
        with clock.part("round"):
            views = torch.empty(together.shape, dtype=torch.uint8)
        for row in range(count):
            with clock.part("round"):
                crop = together[row : row + 1].to(torch.float32, memory_format=torch.contiguous_format)
            found = _operations(clock, crop, view[row : row + 1])
            with clock.part("round"):
                views[row] = found[0]
    _transfer(clock, lambda: replace(files, content=files.content.clone()))
    return clock.spent


def _run(graph: Any, files: list[NDArray[np.uint8]], inputs: dict[str, NDArray[Any]]) -> Any:
    graph.feed_input("encoded", files)
    for name, values in inputs.items():
        graph.feed_input(name, values)
    return graph.run()


#: By pipeline.
MEASURED = {"pil": _pil, "torchvision": _torchvision, "dali": _dali}


def _split(folder: Path, names: list[str]) -> FileSplit:
    return FileSplit(folder, Manifest(PackedNames.pack(names)), None, "")


class _Held:
    """An image of a split whose file has been read."""

    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None

    def __init__(self, split: FileSplit, index: int) -> None:
        self._split, self.limits, self._content = split, split.limits, split.read_bytes(index)
        self.name, self.read = split.name, split.read

    def __len__(self) -> int:
        return len(self._split)

    def read_bytes(self, index: int) -> bytes:
        return self._content


def _draw(
    recipe: Recipe, epoch: int, images: NDArray[np.int64], views: NDArray[np.int64], sizes: NDArray[np.int64]
) -> ViewParameters:
    return draw_views(recipe, seed=0, epoch=epoch, images=images, views=views, sizes=sizes)


def _operations(clock: _Clock, crop: Tensor, parameters: ViewParameters) -> Tensor:
    """`finish_views`, timed by operation, and the jitter by its parts too."""
    with clock.part("round"):
        view = crop.to(torch.float32)
    for operation in OPERATIONS[1:]:
        if operation.name != "jitter":
            with clock.part(operation.name):
                view = APPLY[operation.name](view, parameters)
            continue
        for part in parameters.order[0].tolist():
            factors = np.array([[1, 1, 1, 0]], dtype=np.float32)
            factors[0, part] = parameters.factors[0, part]
            alone = replace(parameters, factors=factors)
            with clock.part("jitter", JITTER[part]):
                view = APPLY["jitter"](view, alone)
    with clock.part("round"):
        return round_views(view)


class _Made(Dataset[Any]):
    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __len__(self) -> int:
        return _TRANSFERS

    def __getitem__(self, place: int) -> Any:
        return self._make()


def _collate_and_transfer(clock: _Clock, make: Callable[[], Any]) -> None:
    with clock.part("collate"):
        make()
    _transfer(clock, make)
    clock.spent["transfer"] -= clock.spent["collate"]


def _transfer(clock: _Clock, make: Callable[[], Any]) -> None:
    """Processor seconds of this process and of a worker for what it makes and passes on, once."""
    loader = DataLoader(_Made(make), batch_size=None, num_workers=1, worker_init_fn=start_worker, collate_fn=_as_it_is)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    before, passed = busy_seconds(), 0
    for passed, _ in enumerate(batches, 1):
        if passed == _TRANSFERS - 8:  # while the worker lives
            break
    after = busy_seconds()
    if before is not None and after is not None:
        clock.spent["transfer"] += (after - before) / passed


def _as_it_is(batch: Any) -> Any:
    return batch
