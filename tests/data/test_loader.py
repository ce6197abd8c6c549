"""The loader of all pipelines: what fails in a worker is one line here."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset

from synco_fast.data.errors import CorruptImageError, DataError
from synco_fast.data.loader import Loader, killed_worker


class Items(Dataset):
    """Tensors by number; 2 is a user's error, 3 kills its process, 4 is a bug, 5 takes a minute."""

    def __getitem__(self, number):
        if number == 5:
            time.sleep(60)
        if number == 2:
            raise CorruptImageError("data: found two, expected another")
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((3,), number) if number < 4 else [][number]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_error_is_one_line(workers):
    loader = Loader(Items(), [0, 1, 2], workers=workers)
    for _ in range(2):  # the loader stays usable
        items = iter(loader)
        assert [next(items).tolist(), next(items).tolist()] == [[0] * 3, [1] * 3]
        with pytest.raises(DataError, match=r"^data: found two, expected another$"):
            next(items)


@pytest.mark.parametrize("keep", [False, True])
def test_a_bug_keeps_its_traceback_but_no_worker(keep):
    before, loader = set(multiprocessing.active_children()), Loader(Items(), [0, 4], workers=1, keep=keep)
    items = iter(loader)
    next(items)
    (worker,) = set(multiprocessing.active_children()) - before
    with pytest.raises(IndexError, match="Original Traceback"):
        next(items)
    assert not worker.is_alive()


def test_a_killed_worker_is_one_line():
    with pytest.raises(DataError, match=r"^data.workers: found a worker process that was killed.* use fewer workers$"):
        list(Loader(Items(), [0, 3], workers=1, keep=False))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (EOFError(), "found a worker process that was killed, expected"),
        (ConnectionResetError(104, "Connection reset by peer"), "found a worker process that was killed, expected"),
        (
            RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
            "that was killed (Killed), expected",
        ),
        (RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"), "that was killed, expected"),
        (
            RuntimeError(
                "DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that dataloader's workers "
                "are out of shared memory. Please try to raise your shared memory limit."
            ),
            "found too little shared memory",
        ),
        (EOFError("Caught EOFError in DataLoader worker process 0.\nOriginal Traceback ..."), None),
        (RuntimeError("CUDA error"), None),
        (FileNotFoundError(2, "No such file or directory"), None),
    ],
)
def test_what_means_that_a_worker_was_killed(error, says):
    found = killed_worker(error)
    assert (found is None) if says is None else (says in found)


def test_closing_ends_the_workers_of_an_epoch_that_a_traceback_holds():
    """As that of an error in a notebook does."""
    before, loader = set(multiprocessing.active_children()), Loader(Items(), [0, 1, 1], workers=1)
    items = iter(loader)
    assert next(items).tolist() == [0] * 3
    (worker,) = set(multiprocessing.active_children()) - before
    loader.close()
    assert not worker.is_alive()
    assert list(items) == []
    assert [item.tolist() for item in loader] == [[0] * 3, [1] * 3, [1] * 3], "the next epoch starts others"
    loader.close()
    loader.close()
    assert set(multiprocessing.active_children()) <= before


def test_closing_ends_a_worker_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    before, loader = set(multiprocessing.active_children()), Loader(Items(), [0, 5], workers=1)
    assert next(iter(loader)).tolist() == [0] * 3
    (worker,) = set(multiprocessing.active_children()) - before
    loader.close()
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL


def test_an_epoch_that_goes_on_after_another_one_is_refused():
    """Kept workers have gone on to the other one, whose items it would take."""
    loader = Loader(Items(), [0, 1], workers=1)
    first = iter(loader)
    assert next(first).tolist() == [0] * 3
    unread, second = iter(loader), iter(loader)
    assert next(second).tolist() == [0] * 3
    for left in (first, unread):
        with pytest.raises(RuntimeError, match="found an epoch that goes on after another one"):
            next(left)
    assert [item.tolist() for item in second] == [[1] * 3]
    loader.close()
    alone = Loader(Items(), [0, 1], workers=0)
    assert [(one.tolist(), other.tolist()) for one, other in zip(alone, alone, strict=True)] == [
        ([0] * 3, [0] * 3),
        ([1] * 3, [1] * 3),
    ]
