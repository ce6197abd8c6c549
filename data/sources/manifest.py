"""Manifests: images of a split with labels and offsets, as arrays, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synco_fast.data.files import atomic_write

__all__ = [
    "RULES",
    "Manifest",
    "PackedNames",
    "Stamp",
    "cache_folder",
    "ignore_manifests",
    "manifest_path",
    "read_manifest",
    "stamp_of",
    "write_manifest",
]

#: Incremented when the format changes, so that older files are rebuilt.
_VERSION = 2
_ignored = ContextVar("ignored", default=False)
#: Incremented when members of tar shards become other images or labels than before; see `Manifest.rules`.
RULES = 2
Stamp = int | list[int]
"""Modification time in nanoseconds; of a file, in a list with its size in bytes."""
#: Names of a `Manifest`'s arrays with one row per image.
_ARRAYS = ("labels", "places", "checksums")


class PackedNames(Sequence[str]):
    """Many strings in two arrays, which worker processes share; a list of strings would be copied.

    Args:
        text: All names, concatenated, in the file system's encoding; uint8.
        ends: End of each name in ``text``, (n,) int64.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def pack(cls, names: Iterable[str]) -> PackedNames:
        """Pack strings."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8) if encoded else np.empty(0, np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.text[start : int(self.ends[index])].tobytes())


@dataclass
class Manifest:
    """The images of one split.

    Attributes:
        names: Each image's path below the split's folder, or its name in a shard.
        labels: (n,) int64 numbers of ``classes``, or None.
        classes: Class names, or None.
        places: For images in tar shards, (n, 3) int64: number of the shard, offset and size in bytes.
        checksums: For images of a pack, the CRC-32 of their bytes, (n,) uint32.
        stamps: Those of the folders, list files and shards that were read, by path.
        excluded: Reason by name, for excluded corrupt images and shards.
        unread: Number of files that are not read, by kind.
        rules: The rules by which the images were found; 0 before there were any.
    """

    names: PackedNames
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    places: NDArray[np.int64] | None = None
    checksums: NDArray[np.uint32] | None = None
    stamps: dict[str, Stamp] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    rules: int = RULES

    def without(self, corrupt: dict[int, str]) -> Manifest:
        """The same manifest without the images of these numbers."""
        keep = np.ones(len(self.names), dtype=bool)
        keep[list(corrupt)] = False
        return Manifest(
            PackedNames.pack(self.names[index] for index in np.flatnonzero(keep).tolist()),
            classes=self.classes,
            stamps=self.stamps,
            unread=self.unread,
            excluded={**self.excluded, **{self.names[index]: reason for index, reason in corrupt.items()}},
            rules=self.rules,
            **{name: values[keep] for name, values in self.arrays().items()},
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The existing arrays with one row per image, by name."""
        return {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}

    def is_current(self) -> bool:
        """Whether no folder, list file or shard has changed since."""
        try:
            return all(stamp == stamp_of(os.stat(path), like=stamp) for path, stamp in self.stamps.items())  # noqa: PTH116
        except OSError:
            return False


def stamp_of(about: os.stat_result, *, like: Stamp | None = None) -> Stamp:
    """The stamp of a file or folder.

    A file copied with its time is another one by its size. The size of a folder says nothing: copies differ in it.

    Args:
        about: What the system says of it.
        like: An earlier stamp, with or without a size.
    """
    sized = not stat.S_ISDIR(about.st_mode) if like is None else isinstance(like, list)
    return [about.st_mtime_ns, about.st_size] if sized else about.st_mtime_ns


def cache_folder() -> Path:
    """The package's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "synco-fast"


def manifest_path(key: str) -> Path:
    """The path of a split's manifest; ``key`` identifies the split."""
    return cache_folder() / "lists" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}.npz"


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest atomically."""
    about = {
        "version": _VERSION,
        "classes": manifest.classes,
        "stamps": manifest.stamps,
        "excluded": manifest.excluded,
        "unread": manifest.unread,
        "rules": manifest.rules,
    }
    arrays: dict[str, Any] = {"text": manifest.names.text, "ends": manifest.names.ends, **manifest.arrays()}
    with atomic_write(path) as temporary:
        np.savez(temporary, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)


@contextmanager
def ignore_manifests() -> Iterator[None]:
    """Within the block, no manifest is read."""
    token = _ignored.set(True)
    try:
        yield
    finally:
        _ignored.reset(token)


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in a file; None if it is missing, damaged, out of date or ignored."""
    if _ignored.get():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            if about["version"] != _VERSION:
                return None
            arrays = {name: file[name] for name in ("text", "ends", *_ARRAYS) if name in file}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    manifest = Manifest(
        PackedNames(arrays.pop("text"), arrays.pop("ends")),
        classes=None if about["classes"] is None else tuple(about["classes"]),
        stamps=about["stamps"],
        excluded=about["excluded"],
        unread=about.get("unread", {}),  # earlier versions kept none
        rules=about.get("rules", 0),
        **arrays,
    )
    return manifest if manifest.is_current() else None
