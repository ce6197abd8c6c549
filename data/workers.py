"""Worker processes and threads of the data loaders."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

__all__ = ["available_cores", "keep_freed_memory", "start_threads", "start_worker"]

#: PR_SET_PDEATHSIG of prctl(2) in Linux: the signal that a process receives when its parent dies.
_SET_DEATH_SIGNAL = 1
#: Parameters of mallopt(3) in glibc, and the sizes up to which a worker keeps freed memory.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_IN_ALL, _KEPT_IN_ONE = 256 << 20, 32 << 20


def available_cores() -> int:
    """The number of cores that this process may use; an affinity mask or a container may limit it."""
    return len(os.sched_getaffinity(0))


def start_worker(worker: int) -> None:
    """Set up a worker of `torch.utils.data.DataLoader`."""
    # Workers ignore the signals that stop a job: the training process still needs the batch of its step.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    keep_freed_memory()


def start_threads(count: int) -> ThreadPoolExecutor:
    """Threads of this process whose PyTorch operations take one core each; other threads keep their number of cores.

    The number of cores of an operation is OpenMP's, which each thread has its own of. PyTorch's call also sets the one
    that later threads begin with, which is put back here.
    """
    import torch

    cores, all_started = torch.get_num_threads(), threading.Barrier(count)

    def start() -> None:
        torch.set_num_threads(1)
        all_started.wait()

    pool = ThreadPoolExecutor(count, "views")
    for started in [pool.submit(start) for _ in range(count)]:
        started.result()
    torch.set_num_threads(cores)
    return pool


def _die_with_parent() -> None:
    """Make the kernel kill this process when its parent dies; exit now if the parent is dead already."""
    with suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    # With a fork server, the parent is the server, which exits with the main process.
    if parent is not None and multiprocessing.get_start_method() != "forkserver" and os.getppid() != parent.pid:
        os._exit(1)


def keep_freed_memory() -> None:
    """Make the allocator keep freed memory: fresh pages for each image would take half of a view's time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # no glibc
    mallopt(_MMAP_THRESHOLD, _KEPT_IN_ONE)
    mallopt(_TRIM_THRESHOLD, _KEPT_IN_ALL)


@atexit.register
def _end_workers() -> None:
    """Kill remaining workers at exit: they ignore the SIGTERM that ends daemons."""
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report each as a failed worker
    for process in left:
        process.kill()
