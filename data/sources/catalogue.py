"""Lists of many images that take little memory and are read from disk in one go."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synco_fast.data.files import atomic_write

__all__ = ["Catalogue", "PackedNames", "cache_folder", "catalogue_path", "read_catalogue", "write_catalogue"]

#: Raised with every change of the format, so that an older file is made anew.
_VERSION = 1


class PackedNames(Sequence[str]):
    """Many strings in two arrays: a worker process shares them, where a list of strings would be copied bit by bit.

    Args:
        text: All names, one after the other, as file names are encoded; uint8.
        ends: Where each ends in ``text``, (n,) int64.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def pack(cls, names: Iterable[str]) -> PackedNames:
        """From strings."""
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
class Catalogue:
    """The images of one split.

    Attributes:
        names: Each image's path below the split's folder, or its name in a shard.
        labels: (n,) int64 numbers of ``classes``, or None.
        classes: Class names, or None.
        places: For images in tar shards, (n, 3) int64: number of the shard, offset and size in bytes.
        stamps: What was read to make the list, with its time of change in nanoseconds: folders, list files, shards.
        left_out: What is not in the list because it cannot be read, by name, with the reason.
    """

    names: PackedNames
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    places: NDArray[np.int64] | None = None
    stamps: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def without(self, broken: dict[int, str]) -> Catalogue:
        """The same list less the images with these numbers."""
        keep = np.ones(len(self.names), dtype=bool)
        keep[list(broken)] = False
        return Catalogue(
            PackedNames.pack(self.names[index] for index in np.flatnonzero(keep).tolist()),
            None if self.labels is None else self.labels[keep],
            self.classes,
            None if self.places is None else self.places[keep],
            self.stamps,
            {**self.left_out, **{self.names[index]: reason for index, reason in broken.items()}},
        )

    def is_current(self) -> bool:
        """Whether nothing that was read to make the list has changed since."""
        try:
            return all(os.stat(path).st_mtime_ns == time for path, time in self.stamps.items())  # noqa: PTH116
        except OSError:
            return False


def cache_folder() -> Path:
    """The program's folder below the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "synco-fast"


def catalogue_path(key: str) -> Path:
    """Where the list of a split is kept; ``key`` tells splits apart."""
    return cache_folder() / "lists" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}.npz"


def write_catalogue(path: Path, catalogue: Catalogue) -> None:
    """Write a list, whole or not at all."""
    about = {
        "version": _VERSION,
        "classes": catalogue.classes,
        "stamps": catalogue.stamps,
        "left_out": catalogue.left_out,
    }
    arrays: dict[str, Any] = {"text": catalogue.names.text, "ends": catalogue.names.ends}
    for name in ("labels", "places"):
        values = getattr(catalogue, name)
        if values is not None:
            arrays[name] = values
    with atomic_write(path) as temporary:
        np.savez(temporary, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)


def read_catalogue(path: Path) -> Catalogue | None:
    """The list in a file; None where there is none, or none that is sound and still true."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            if about["version"] != _VERSION:
                return None
            arrays = {name: file[name] for name in ("text", "ends", "labels", "places") if name in file}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    catalogue = Catalogue(
        PackedNames(arrays["text"], arrays["ends"]),
        arrays.get("labels"),
        None if about["classes"] is None else tuple(about["classes"]),
        arrays.get("places"),
        about["stamps"],
        about["left_out"],
    )
    return catalogue if catalogue.is_current() else None
