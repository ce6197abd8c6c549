"""Atomic writing of files."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write"]

# A process's umask can only be read by setting it, which is safe while nothing else runs.
_UMASK = os.umask(0o077)
os.umask(_UMASK)
_MODE = 0o666 & ~_UMASK


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside ``path``, which replaces it when the block ends.

    It gets the mode that the user's umask gives to new files, whatever wrote it: some libraries keep theirs private.
    The content is synced to disk before the rename, so that a reader finds the old file or the new one, also after a
    power failure. If the block raises, the temporary file is removed and ``path`` is unchanged. A killed process can
    leave ``.STEM.TOKEN.SUFFIX`` behind.

    Args:
        path: The file to write; its folder is created if missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        temporary.chmod(_MODE)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
