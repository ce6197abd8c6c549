"""Atomic writing of files, and locks between processes."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic_write", "locked"]

# A process's umask can only be read by setting it, which is safe while nothing else runs.
_UMASK = os.umask(0o077)
os.umask(_UMASK)
_MODE = 0o666 & ~_UMASK
#: Bytes of a write that asks whether there is room.
_PROBE = 1 << 16


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside ``path``, which replaces it when the block ends.

    It gets the mode that the user's umask gives to new files, whatever wrote it: some libraries keep theirs private.
    The content is synced to disk before the rename, so that a reader finds the old file or the new one, also after a
    power failure. If the block raises, the temporary file is removed and ``path`` is unchanged. A killed process can
    leave ``.STEM.TOKEN.SUFFIX`` behind.

    Args:
        path: The file to write; its folder is created if missing.

    Raises:
        OSError: It cannot be written, such as on a full disk, whatever the block raised for that; ``filename`` is set.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        temporary.chmod(_MODE)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        _raise_reason(temporary, path, error)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _raise_reason(temporary: Path, path: Path, error: Exception) -> None:
    """Raise the system's reason why a file cannot be written, if there is one.

    safetensors, which is Rust, has its number in the message. torch.save loses it on a full disk; another write finds
    it, into a file of its own, since ``temporary`` can be a hard link.
    """
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    probe = temporary.with_name(f"{temporary.name}.probe")
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE))
    except OSError as reason:
        raise OSError(reason.errno, reason.strerror, str(path)) from error
    finally:
        probe.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes, and wait for the process that has it.

    The kernel releases the lock when its process ends, however that ends. On a file system without locks nothing is
    waited for.

    Args:
        path: The file of the lock, which exists only meanwhile; its folder is created if missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked_file(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _locked_file(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with suppress(OSError):  # no locks here
                fcntl.flock(file, fcntl.LOCK_EX)
            # The process that had it has removed the file: others may hold the lock of a newer one.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), path.stat()):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)
