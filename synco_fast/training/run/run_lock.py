"""The lock of a run folder: one trainer at a time; the kernel releases it when the process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from weakref import finalize

from synco_fast.runtime.errors import ConfigError

__all__ = ["RunLock"]

_NAME = ".lock"
#: Errors of `flock` when another process holds the lock.
_HELD = errno.EWOULDBLOCK, errno.EACCES


class RunLock:
    """The lock of a run folder, initially not held.

    Args:
        folder: The run folder.
        note: Called with one line if the file system has no locks.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self._folder, self._note = folder, note
        self._close: Callable[[], object] | None = None

    def take(self) -> None:
        """Acquire the lock, if this object does not hold it already; a missing folder is created.

        Raises:
            ConfigError: Another trainer holds the lock, or the folder cannot be written.
        """
        if self._close is not None:
            return
        path = self._folder / _NAME
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(
                f"run: found no way to write {path} ({error.strerror}), expected a folder for checkpoints"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                holder = os.pread(file, 300, 0).decode(errors="replace").strip() or "another process"
                os.close(file)
                raise ConfigError(
                    f"run: found {self._folder} in use by {holder}, expected one trainer at a time: wait or stop it"
                ) from error
            self._note(f"{self._folder} is on a file system without locks: a second trainer in it would not be noticed")
        with suppress(OSError):  # only the message of a second trainer needs it, and the disk may be full
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _OPEN.add(file)
        self._close = finalize(self, _close, file)

    def release(self) -> None:
        """Release the lock, if this object holds it."""
        if self._close is not None:
            self._close()
            self._close = None


#: Open files of the locks that this process holds.
_OPEN: set[int] = set()


def _close(file: int) -> None:
    if file in _OPEN:
        _OPEN.discard(file)
        os.close(file)


def _close_all() -> None:
    """In a forked worker: drop the shared file, so that the lock ends with the trainer alone."""
    for file in list(_OPEN):
        _close(file)


os.register_at_fork(after_in_child=_close_all)
