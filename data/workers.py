"""Worker processes and threads of the data loaders, and the cores for them."""

from __future__ import annotations

import atexit
import ctypes
import gc
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath

__all__ = ["available_cores", "keep_freed_memory", "machine_cores", "start_threads", "start_worker"]

#: PR_SET_PDEATHSIG of prctl(2) in Linux: the signal that a process receives when its parent dies.
_SET_DEATH_SIGNAL = 1
#: Parameters of mallopt(3) in glibc, and the sizes up to which a worker keeps freed memory.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_IN_ALL, _KEPT_IN_ONE = 256 << 20, 32 << 20


def machine_cores() -> int:
    """The number of cores that this process may use while the other ranks on this machine wait.

    An affinity mask or the quota of a container may limit it.
    """
    return max(1, int(min(len(os.sched_getaffinity(0)), _quota())))


def available_cores() -> int:
    """The number of cores of this process: its share of those that the ranks of a job have on this machine.

    A process whose affinity mask is its own, as under Slurm's ``--cpus-per-task``, keeps all cores of the mask.
    """
    own = len(os.sched_getaffinity(0))
    ranks, cores = _local_ranks(os.environ)
    return max(1, int(min(own, max(own, cores) / ranks, _quota() / ranks)))


def _local_ranks(variables: Mapping[str, str]) -> tuple[int, int]:
    """The ranks of a job on this machine, and the cores that they have together; 0 where nothing tells.

    The variables are those of `synco_fast.runtime.dist_env`, which reports what is wrong in them.
    """

    def number(name: str) -> int:
        found = re.match(r"\d+", variables.get(name, ""))  # Slurm writes 8(x2) for two machines of eight
        return int(found[0]) if found else 0

    if "RANK" in variables and "WORLD_SIZE" in variables:
        ranks = number("LOCAL_WORLD_SIZE") if number("WORLD_SIZE") > 1 else 1
        with suppress(OSError):  # whoever starts the ranks has the cores of all of them
            return max(1, ranks), len(os.sched_getaffinity(os.getppid()))
        return max(1, ranks), 0
    if variables.get("SLURM_STEP_ID", "").isdigit() and (number("SLURM_STEP_NUM_TASKS") or number("SLURM_NTASKS")) > 1:
        ranks = number("SLURM_STEP_TASKS_PER_NODE") or number("SLURM_TASKS_PER_NODE")
        return max(1, ranks), number("SLURM_CPUS_ON_NODE")
    return 1, 0


def _quota(root: Path = Path("/")) -> float:
    """The cores that the control groups of this process allow, versions 2 and 1; infinite without a limit."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return float("inf")
    return min((limit for group in groups for limit in _limits(group, root / "sys/fs/cgroup")), default=float("inf"))


def _limits(group: str, root: Path) -> Iterator[float]:
    """The limits of a control group and of those around it, by its line in ``/proc/self/cgroup``."""
    controllers, _, path = group.partition(":")[2].partition(":")
    mounts = ("", "unified") if not controllers else (controllers, "cpu") if "cpu" in controllers.split(",") else ()
    # A container can show the path outside of it: its own group is then the root of the mount.
    inside = PurePosixPath(path.lstrip("/"))
    for mount in mounts:
        for folder in {root / mount, *(root / mount / part for part in (inside, *inside.parents))}:
            with suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if int(quota) > 0:  # "max", or -1, is no limit
                    yield int(quota) / int(period)


def start_worker(worker: int) -> None:
    """Set up a worker of `torch.utils.data.DataLoader`."""
    # Workers ignore the signals that stop a job: the training process still needs the batch of its step.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # A loader that the parent has dropped but not collected yet would be collected here, and a traceback would say that
    # its workers are not this process's.
    gc.freeze()
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
