"""Images and views per second, by pipeline, against the plain loader of the released code.

Every pipeline reads the same JPEG files, similar in size to those of ImageNet, with the same number of processes.
Rounds alternate between the pipelines, so that other load on the machine affects all of them. A round begins when the
workers of the others are at rest, and only a pipeline's own workers count.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from synco_fast.bench.baselines.data import two_crop_loader
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.files import atomic_write
from synco_fast.data.pipelines.base import Batch, Pipeline
from synco_fast.data.pipelines.build import build_pipeline, has_dali
from synco_fast.data.pipelines.fused import FusedViews
from synco_fast.data.sources.manifest import Manifest, PackedNames
from synco_fast.data.sources.open import ArraySplit, Source, Split, open_shards
from synco_fast.data.sources.pack import PackSettings, pack_source
from synco_fast.data.sources.splits import FileSplit, SubsetSplit
from synco_fast.data.sources.stream import StreamSettings, StreamSplit
from synco_fast.data.workers import available_cores, keep_freed_memory
from synco_fast.kernels.views import make_views, unserved_by_triton
from synco_fast.runtime.phases import wait_for
from synco_fast.training.tuning.trials import feed

__all__ = ["busy_seconds", "draw_photo", "has_pipeline", "make_photos", "measure_pipelines"]

_WIDTH, _HEIGHT, _QUALITY = 500, 375, 90
#: Seconds between two looks at the CPU time, and the share of one core below which processes are at rest. The system
#: counts hundredths of a second; timers of idle threads take fewer.
_LOOK, _IDLE, _LONGEST_REST = 0.5, 0.05, 60
_RESIDENT_IMAGES, _RESIDENT_SIZE, _RESIDENT_BATCH = 10_000, 32, 512


def make_photos(folder: Path, count: int) -> list[str]:
    """Make JPEG files of 500 x 375 pixels and about 110 kB, with power spectra like those of photographs.

    Returns:
        Their names. Existing files are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:05d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        if not (folder / name).exists():
            (folder / name).write_bytes(draw_photo(0, number))
    return names


def draw_photo(seed: int, number: int, width: int = _WIDTH, height: int = _HEIGHT) -> bytes:
    """A JPEG file with a power spectrum like that of a photograph."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    rng = np.random.default_rng([seed, number])
    phases = rng.uniform(0, 2 * np.pi, (3, *frequency.shape))
    fields = np.fft.irfft2(np.exp(1j * phases) / frequency**1.1, s=(height, width))
    fields = np.moveaxis(fields / fields.std(axis=(1, 2), keepdims=True), 0, -1)
    pixels = 118 + 50 * (0.75 * fields[..., :1] + 0.5 * fields) + rng.normal(0, 4, fields.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def measure_pipelines(
    folder: Path,
    names: list[str],
    *,
    pipelines: list[str],
    device: torch.device,
    batch: int,
    workers: int,
    seconds: float,
    rounds: int,
    recipe: Recipe,
    tick: Callable[[], None],
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Throughput of each pipeline.

    Args:
        folder, names: The JPEG files.
        pipelines: Some of `synco_fast.bench.subjects.PIPELINES`.
        device: Device of the encoder, to which the pipelines deliver.
        batch: Images in a batch.
        workers: Decoding processes of every pipeline; 0: none, and one thread in PyTorch's operations, so that CPU time
            depends little on what else runs.
        seconds: Duration of one round of one pipeline.
        rounds: Rounds through all pipelines.
        recipe: The augmentation.
        tick: Called after each round of each pipeline.
        keep: Called with the results so far after each round of each pipeline, in case time ends early.

    Returns:
        For each pipeline: images per second of every round and their median; views per second; CPU time per image in
        milliseconds, of this process and its workers, for every round and the median; and the fraction of the machine's
        cores that were busy. The last two are None if the system does not report them.
    """
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        if workers == 0:
            keep_freed_memory()  # as workers do
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        streams = []
        for name in pipelines:
            before = _children()
            pipe = _pipeline(name, folder, names, device, batch, workers, recipe)
            stack.enter_context(closing(pipe))
            streams.append(_Stream(pipe, _children() - before))
            found.append({"pipeline": name, "rounds": [], "processor_rounds": []})
        for _ in range(rounds):
            for result, stream in zip(found, streams, strict=True):
                images, busy = stream.measure(device, seconds, settle=2 * workers + 4)
                result["rounds"].append(images)
                result["processor_rounds"].append(None if busy is None else 1e3 * busy)
                tick()
                keep(_summarised(found))
    return _summarised(found)


def _summarised(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pipelines that were measured, with medians over their rounds so far."""
    measured = [result for result in found if result["rounds"]]
    for result in measured:
        result["images_per_second"] = statistics.median(result["rounds"])
        result["views_per_second"] = 2 * result["images_per_second"]
        told = None not in result["processor_rounds"]
        processor = statistics.median(result["processor_rounds"]) if told else None
        result["processor_milliseconds"] = processor
        share = None if processor is None else 1e-3 * processor * result["images_per_second"] / available_cores()
        result["core_share"] = share
    return measured


def _pipeline(
    name: str, folder: Path, names: list[str], device: torch.device, batch: int, workers: int, recipe: Recipe
) -> Pipeline:
    # Treat many epochs as one: with a set of ImageNet's size the pause between epochs is rare.
    many = names * max(1, 100_000 // len(names))
    split: Split | StreamSplit = FileSplit(folder, Manifest(PackedNames.pack(many)), None, "")
    if name.endswith("-stream"):
        split = _streamed(folder, names, len(many), batch)
    if name.endswith("-packed"):
        split = SubsetSplit(_packed(folder, names), np.arange(len(many)) % len(names))
    if name == "pil":
        files = [os.fspath(folder / file) for file in many]
        return _Plain(two_crop_loader(files, recipe, batch=batch, workers=workers))
    if name.endswith("-fused"):
        pipe = _pipeline(name.removesuffix("-fused"), folder, names, device, batch, workers, recipe)
        assert isinstance(pipe, FusedViews)
        pipe.use_kernels(make_views)
        return pipe
    if name == "resident-32":
        pixels = np.random.default_rng(0).integers(
            0, 256, (_RESIDENT_IMAGES, _RESIDENT_SIZE, _RESIDENT_SIZE, 3), dtype=np.uint8
        )
        small = recipe.model_copy(update={"size": _RESIDENT_SIZE, "evaluation_resize": None})
        noise = ArraySplit(pixels, None, "noise")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.uint8
        return build_pipeline(noise, small, batch=_RESIDENT_BATCH, seed=0, name="resident", device=device, dtype=dtype)
    return build_pipeline(
        split,
        recipe,
        batch=batch,
        seed=0,
        name="torchvision" if name.startswith("torchvision") else "dali",
        decode="windows" if name == "dali-windows" else "once",
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        workers=workers,
    )


def _packed(folder: Path, names: list[str]) -> Split:
    """The same files packed by ``synco-fast data pack`` with its defaults, in a folder beside them."""
    out = folder / f"packed-{len(names)}"
    files = FileSplit(folder, Manifest(PackedNames.pack(names)), None, "")
    pack_source(Source(os.fspath(folder), files, None), out, PackSettings())
    return open_shards(out).train


def _streamed(folder: Path, names: list[str], images: int, batch: int) -> StreamSplit:
    """The same files in tar shards beside them, as a stream of some images."""
    readers = math.gcd(batch, 8)
    shards = []
    for number in range(readers):
        shard = folder / f"stream-{len(names)}-{number}-of-{readers}.tar"
        shards.append(os.fspath(shard))
        if not shard.exists():
            with atomic_write(shard) as file, tarfile.open(file, "w") as members:
                for name in names[number::readers]:
                    members.add(folder / name, arcname=name)
    return StreamSplit(shards, settings=StreamSettings(images=images, buffer=len(names), readers=readers))


class _Plain:
    """The plain loader as a `Pipeline`."""

    def __init__(self, loader: torch.utils.data.DataLoader[tuple[Tensor, Tensor]]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Do nothing: the plain loader shuffles anew each time."""

    def __iter__(self) -> Iterator[Batch]:
        for first, second in self._loader:
            yield Batch(first, second, torch.arange(len(first)))

    def close(self) -> None:
        """Stop the workers."""
        del self._loader


class _Stream:
    """The batches of a pipeline, one epoch after the other, and the worker processes that it started."""

    def __init__(self, pipe: Pipeline, workers: Set[int] = frozenset()) -> None:
        self._batches = feed(pipe)
        self._workers = set(workers)

    def measure(self, device: torch.device, seconds: float, settle: int) -> tuple[float, float | None]:
        """Images per second and CPU seconds per image.

        The workers of all pipelines are at rest when it begins: those of the one before go on until they have
        prefetched all that they may. The batches that this pipeline prefetched are consumed before the clock starts.
        """
        _rest()
        others = _children() - self._workers
        for _ in range(settle):
            next(self._batches).to(device)
        wait_for(device)
        images, busy, start = 0, busy_seconds(others), time.perf_counter()
        while time.perf_counter() - start < seconds:
            batch = next(self._batches).to(device)
            images += len(batch.image_ids)
        wait_for(device)
        spent, after = time.perf_counter() - start, busy_seconds(others)
        self._workers |= _children() - others
        return images / spent, None if busy is None or after is None else (after - busy) / images


def _rest() -> None:
    """Wait until this process and all of its workers have used no CPU time for a while, at most a minute.

    Where the system does not report CPU time, the wait is short and fixed.
    """
    before, end = busy_seconds(), time.monotonic() + _LONGEST_REST
    while time.monotonic() < end:
        time.sleep(_LOOK)
        after = busy_seconds()
        if before is None or after is None or after - before <= _IDLE * _LOOK:
            return
        before = after


def _children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def busy_seconds(others: Set[int] = frozenset()) -> float | None:
    """CPU time of this process and its workers so far. Only Linux reports it for live processes.

    Args:
        others: Process numbers of workers that do not count.
    """
    total = 0.0
    for process in (os.getpid(), *(_children() - others)):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            return None
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def has_pipeline(name: str, device: torch.device) -> bool:
    """Whether the packages of a pipeline are installed, and its kernels run on the device."""
    if name.endswith("-fused") and unserved_by_triton(torch.empty(0, dtype=torch.uint8, device=device)):
        return False
    return not name.startswith("dali") or has_dali()
