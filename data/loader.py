"""The data loader of all pipelines: worker processes, whose errors stay one line."""

from __future__ import annotations

import multiprocessing
import re
import traceback
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from synco_fast.data.errors import DataError, UserError
from synco_fast.data.workers import available_cores, start_worker

__all__ = ["Loader", "killed_worker"]

T = TypeVar("T")

#: What PyTorch says of a worker that ended, and how.
_ENDED = re.compile(r"DataLoader worker \(pid.*?\) (?:is killed by signal: (?P<signal>[^.]*)|exited unexpectedly)")
#: What it adds to an error that was raised in a worker.
_RAISED = "in DataLoader worker process"


class Loader(Generic[T]):
    """The items of a dataset in a sampler's order, made by worker processes, which are kept from epoch to epoch.

    Args:
        dataset: Makes the item of a place, ready for use.
        places: The places of an epoch.
        workers: Processes that make items; 0 makes them in this process. By default one for each core.
        seed: Seed of the workers' global generators; PyTorch's loader would draw one from that of this process.
        pin_memory: Whether items lie in page-locked memory, for a GPU.
        keep: Whether the workers are kept for the next epoch.

    Attributes:
        workers: How many there are.

    A `UserError` raised in a worker is raised here as a `DataError` with the same line, where PyTorch would add the
    worker's traceback. A worker that was killed is a `DataError` too.
    """

    def __init__(
        self,
        dataset: Dataset[T],
        places: Sampler[Any] | Iterable[Any],
        *,
        workers: int | None = None,
        seed: int = 0,
        pin_memory: bool = False,
        keep: bool = True,
    ) -> None:
        self.workers = available_cores() if workers is None else workers
        self._kept = keep and self.workers > 0
        self._make = partial(
            DataLoader,
            _Reporting(dataset),
            sampler=places,
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            persistent_workers=self._kept,
            worker_init_fn=start_worker,
        )
        self._seed = seed
        self._loader: DataLoader[T | _Failure] | None = None
        self._number = 0
        self._epoch: Callable[[], Generator[T, None, None] | None] = lambda: None
        self._iterator: Callable[[], object] = lambda: None
        self._processes: list[BaseProcess] = []

    def __iter__(self) -> Iterator[T]:
        """One epoch; the workers start on it at once.

        Raises:
            DataError: A worker raised a `UserError`, or was killed. All workers end then; the next epoch starts others.
            RuntimeError: The caller went on with an epoch after the next one began, to which its workers have gone.
        """
        if self._loader is None:
            self._loader = self._make(generator=torch.Generator().manual_seed(self._seed))
        others = set(multiprocessing.active_children())
        found = iter(self._loader)
        if self._iterator() is not found:
            self._iterator = weakref.ref(found)
            self._processes = [each for each in multiprocessing.active_children() if each not in others]
        self._number += 1
        items = self._items(found, self._number)
        self._epoch = weakref.ref(items)
        return items

    def close(self) -> None:
        """End the workers, also where an epoch is left in the middle and still referenced, as by a traceback.

        They would be left for good: freed with the traceback, in any order, PyTorch's iterator tells them no more, and
        they ignore SIGTERM. One that does not answer, such as one that waits for a disk, is killed. The next epoch
        starts others.
        """
        items = self._epoch()
        if items is not None:
            items.close()
        self._loader = None
        if self._iterator() is None:  # else PyTorch would report each as a failed worker
            for process in self._processes:
                process.kill()
            self._processes = []

    def _items(self, found: Iterator[T | _Failure], number: int) -> Generator[T, None, None]:
        while True:
            if self._kept and self._number != number:  # the workers have gone on to the other one
                raise RuntimeError(
                    "found an epoch that goes on after another one of its loader began, expected one at a time"
                )
            try:
                item = next(found)
            except StopIteration:
                return
            except BaseException as error:
                reason = killed_worker(error) if self.workers else None
                if reason is None and self.workers:
                    self._loader = None
                    del found
                    traceback.clear_frames(error.__traceback__)  # of PyTorch's functions
                if reason is None:
                    raise
                item = _Failure(reason)
            if isinstance(item, _Failure):
                # Workers end well only where PyTorch's iterator is freed before its queues: no traceback may hold it.
                self._loader = None
                del found
                raise DataError(item.line)
            yield item


def killed_worker(error: BaseException) -> str | None:
    """One line about a worker that ended early, if that is what an error of PyTorch's loader means; else None.

    PyTorch notices the end by a signal, so its error can come from any line of this process. While a batch is handed
    over, an error of the closed connection comes first.
    """
    said = str(error)
    found = _ENDED.match(said) if isinstance(error, RuntimeError) else None
    if found is None and (not isinstance(error, EOFError | ConnectionError) or _RAISED in said):
        return None
    if "shared memory" in said:
        return (
            "data.workers: found too little shared memory for the workers' batches, expected more in /dev/shm (in a "
            "container, --shm-size 8g) or fewer workers"
        )
    name = found["signal"] if found is not None else None
    return (
        f"data.workers: found a worker process that was killed{f' ({name})' if name else ''}, expected all until the "
        "end; the usual cause is too little memory: use fewer workers"
    )


@dataclass(frozen=True)
class _Failure:
    """What a worker hands over in place of an item."""

    line: str


class _Reporting(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, place: Any) -> Any:
        try:
            return self.dataset[place]
        except UserError as error:
            if get_worker_info() is None:
                raise
            return _Failure(str(error))


def _as_it_is(item: Any) -> Any:
    return item
