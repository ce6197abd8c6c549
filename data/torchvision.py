"""The portable pipeline: Pillow decodes an image once, torchvision's transforms make two views of it."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms import v2

from synco_fast.data.augment import Recipe
from synco_fast.data.errors import BrokenImageError, DataError
from synco_fast.data.pipeline import Batch, epoch_order
from synco_fast.data.seeding import derive_seed
from synco_fast.data.sources import Split

__all__ = ["TorchvisionPipeline", "evaluation_loader", "evaluation_transform", "view_transform"]

#: How many images in a row may be broken before a place in a batch cannot be filled.
_REPLACEMENTS = 64

Transform = Callable[[Image.Image], Tensor]


class _Blur(v2.Transform):
    """Gaussian blur as MoCo v2 has it: Pillow's, with the radius drawn uniformly."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        low, high = self.sigma
        return image.filter(ImageFilter.GaussianBlur(low + (high - low) * float(torch.rand(()))))


def view_transform(recipe: Recipe) -> Transform:
    """An RGB image to one random view, uint8 (3, size, size). Draws come from torch's global generator."""
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    transform: Transform = v2.Compose(
        [
            v2.RandomResizedCrop(recipe.size, scale=recipe.area, ratio=recipe.ratio),
            v2.RandomApply([jitter], recipe.jitter_probability),
            v2.RandomGrayscale(recipe.greyscale_probability),
            v2.RandomApply([_Blur(recipe.blur_sigma)], recipe.blur_probability),
            v2.RandomHorizontalFlip(recipe.flip_probability),
            v2.PILToTensor(),
        ]
    )
    return transform


def evaluation_transform(recipe: Recipe) -> Transform:
    """An RGB image to its central crop, uint8 (3, size, size)."""
    transform: Transform = v2.Compose([v2.Resize(recipe.resize), v2.CenterCrop(recipe.size), v2.PILToTensor()])
    return transform


class _Views(Dataset[tuple[Tensor, Tensor, int, dict[int, str]]]):
    """Two views of an image by (epoch, number); the views depend on seed, epoch and number, not on the worker."""

    def __init__(self, split: Split, recipe: Recipe, seed: int) -> None:
        self.split, self.transform, self.seed = split, view_transform(recipe), seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int, dict[int, str]]:
        epoch, wanted = key
        broken: dict[int, str] = {}
        for shift in range(_REPLACEMENTS):
            index = (wanted + shift) % len(self.split)
            try:
                image = self.split.read(index)
            except BrokenImageError as error:
                broken[index] = str(error)
                continue
            # A worker owns its generator; the training process must get its own back untouched.
            with nullcontext() if get_worker_info() else torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.seed, epoch, wanted))
                return self.transform(image), self.transform(image), index, broken
        reason = next(iter(broken.values()))
        raise DataError(f"data: found {_REPLACEMENTS} broken images in a row, the first: {reason}")


class _EpochBatches:
    """The batch sampler: which images make this process's share of which batch of the current epoch."""

    def __init__(self, length: int, batch: int, seed: int, rank: int, world: int) -> None:
        self.length, self.batch, self.seed = length, batch, seed
        self.share = batch // world
        self.shift = rank * self.share
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.length // self.batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = epoch_order(self.length, seed=self.seed, epoch=self.epoch).tolist()
        for number in range(self.start, len(self)):
            begin = number * self.batch + self.shift
            yield [(self.epoch, index) for index in order[begin : begin + self.share]]


def _collate(samples: list[tuple[Tensor, Tensor, int, dict[int, str]]]) -> Batch:
    first, second, images, broken = zip(*samples, strict=True)
    merged = {index: reason for part in broken for index, reason in part.items()}
    return Batch(torch.stack(first), torch.stack(second), torch.tensor(images), merged)


class TorchvisionPipeline:
    """Batches of two views from worker processes; see `Pipeline` for what it promises.

    Args:
        split: The images.
        recipe: How views are made.
        batch: B, images in a batch, over all processes.
        seed: Decides order and views together with the epoch.
        workers: Processes that decode; 0 decodes in the training process. By default one for each core.
        pin_memory: Whether batches lie in page-locked memory, for a GPU.
        rank, world: Number of this process, and of all. Each yields its share of every batch, in blocks of B / world
            images, so that a batch holds the same images whatever the number of processes.

    Raises:
        DataError: The split holds fewer images than a batch, or B is not a multiple of ``world``.
    """

    def __init__(
        self,
        split: Split,
        recipe: Recipe,
        *,
        batch: int,
        seed: int,
        workers: int | None = None,
        pin_memory: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch % world:
            raise DataError(f"training.batch: found {batch}, allowed a multiple of {world}, the number of processes")
        if batch > len(split):
            raise DataError(f"training.batch: found {batch}, allowed up to {len(split)}, the number of training images")
        self._batches = _EpochBatches(len(split), batch, seed, rank, world)
        workers = default_workers() if workers is None else workers
        self._loader: DataLoader[Batch] = DataLoader(
            _Views(split, recipe, seed),  # type: ignore[arg-type]
            batch_sampler=self._batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals,
            # The loader draws a base seed from this generator, not from the global one that a checkpoint holds.
            generator=torch.Generator().manual_seed(seed),
        )

    def __len__(self) -> int:
        return len(self._batches)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration yields, and its first batch."""
        self._batches.epoch, self._batches.start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)

    def close(self) -> None:
        """End the workers; the pipeline yields nothing afterwards."""
        del self._loader


class _Whole(Dataset[tuple[Tensor, int, str | None]]):
    def __init__(self, split: Split, recipe: Recipe, numbers: list[int]) -> None:
        self.split, self.numbers, self.transform, self.size = split, numbers, evaluation_transform(recipe), recipe.size

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[Tensor, int, str | None]:
        index = self.numbers[place]
        try:
            return self.transform(self.split.read(index)), index, None
        except BrokenImageError as error:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), index, str(error)


def _collate_whole(samples: list[tuple[Tensor, int, str | None]]) -> tuple[Tensor, Tensor, dict[int, str]]:
    good = [sample for sample in samples if sample[2] is None]
    broken = {index: reason for _, index, reason in samples if reason is not None}
    images = torch.stack([image for image, _, _ in good]) if good else samples[0][0].new_empty(0, *samples[0][0].shape)
    return images, torch.tensor([index for _, index, _ in good], dtype=torch.int64), broken


def evaluation_loader(
    split: Split, recipe: Recipe, *, batch: int = 256, workers: int | None = None, numbers: list[int] | None = None
) -> DataLoader[tuple[Tensor, Tensor, dict[int, str]]]:
    """Central crops in order: uint8 images (b, 3, size, size), their numbers (b,) int64, and what was broken.

    Args:
        split: The images.
        recipe: Gives the size and the resize before the crop.
        batch: Images read at a time.
        workers: Processes that decode, by default one for each core.
        numbers: Which images, by default all.

    Broken images are left out of a batch, so b can be smaller than ``batch``.
    """
    dataset = _Whole(split, recipe, list(range(len(split))) if numbers is None else numbers)
    workers = default_workers() if workers is None else workers
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch,
        num_workers=workers,
        collate_fn=_collate_whole,
        generator=generator,
        worker_init_fn=_leave_signals,
    )


def _leave_signals(worker: int) -> None:
    """A worker outlives the signals that ask a job to stop: the training process still wants its step's batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """What is left of the workers at the end of the program, which ends daemons by a SIGTERM that they ignore."""
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report each as a failed worker
    for process in left:
        process.kill()


def default_workers() -> int:
    """One worker for each core that this process may use."""
    return len(os.sched_getaffinity(0))
