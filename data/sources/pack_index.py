"""Index of a pack: offsets, labels, sizes and checksums of the images in its tar shards, in one file per split."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synco_fast.data.files import atomic_write
from synco_fast.data.sources.manifest import Manifest, PackedNames, stamp_of

__all__ = ["INDEX", "PackIndex", "counts_in", "member_name", "packed_manifest", "read_index"]

#: The index file beside a split's shards.
INDEX = "index.npz"
_VERSION = 1
_ARRAYS = ("numbers", "places", "checksums", "sizes", "source_sizes", "labels")


def member_name(number: int) -> str:
    """An image's name in its shard, from its number in the source."""
    return f"{number:08d}.jpg"


@dataclass
class PackIndex:
    """Index of a pack's split, or of one of its shards.

    Attributes:
        numbers: Each image's number in the source, (n,) int64.
        places: Number of the shard, offset and size in bytes, (n, 3) int64.
        checksums: CRC-32 of the image's bytes, (n,) uint32.
        sizes: Height and width in pixels, (n, 2) int64.
        source_sizes: The same in the source, (n, 2) int64.
        labels: (n,) int64 numbers of ``classes``, or None.
        classes: Class names, or None.
        shards: Size in bytes of each shard, by name, in order.
        excluded: Reason by name, for corrupt images of the source.
        read: Bytes of the source's images, including corrupt ones.
        kept: Images whose bytes were kept unchanged.
        end: Number of the first image of the source after these.
    """

    numbers: NDArray[np.int64]
    places: NDArray[np.int64]
    checksums: NDArray[np.uint32]
    sizes: NDArray[np.int64]
    source_sizes: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None
    shards: dict[str, int]
    excluded: dict[str, str] = field(default_factory=dict)
    read: int = 0
    kept: int = 0
    end: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    @classmethod
    def join(cls, parts: Sequence[PackIndex]) -> PackIndex:
        """Join one or more consecutive indices."""

        def merged(name: str) -> Any:
            return np.concatenate([getattr(part, name) for part in parts])

        return cls(
            **{name: merged(name) for name in _ARRAYS[:-1]},
            labels=None if parts[0].labels is None else merged("labels"),
            classes=parts[0].classes,
            shards={name: size for part in parts for name, size in part.shards.items()},
            excluded={name: reason for part in parts for name, reason in part.excluded.items()},
            read=sum(part.read for part in parts),
            kept=sum(part.kept for part in parts),
            end=parts[-1].end,
        )

    def write(self, path: Path) -> None:
        """Write it atomically."""
        about = {name: getattr(self, name) for name in ("classes", "shards", "excluded", "read", "kept", "end")}
        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        text = json.dumps({"version": _VERSION, **about})
        with atomic_write(path) as temporary:
            np.savez(temporary, about=np.frombuffer(text.encode(), np.uint8), **arrays)


def read_index(path: Path) -> PackIndex | None:
    """The index in a file; None if it is missing or damaged, or a shard is missing or has another size."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            if about.pop("version") != _VERSION:
                return None
            arrays = {name: file[name] for name in _ARRAYS if name in file}
        about["classes"] = None if about["classes"] is None else tuple(about["classes"])
        found = PackIndex(**{"labels": None, **arrays, **about})
        whole = all((path.parent / name).stat().st_size == size for name, size in found.shards.items())
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return found if whole and {len(values) for values in arrays.values()} == {len(found)} else None


def counts_in(content: bytes) -> dict[str, int]:
    """The number of images in each shard, by its name, from the bytes of an index.

    Raises:
        ValueError: They are no index of this version.
    """
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        about = json.loads(file["about"].tobytes())
        if about.get("version") != _VERSION:
            raise ValueError("an index of another version")
        counts = np.bincount(file["places"][:, 0], minlength=len(about["shards"]))
    return dict(zip(about["shards"], counts.tolist(), strict=True))


def packed_manifest(shards: Sequence[Path]) -> Manifest | None:
    """The manifest of a pack's shards from the index beside them; None if the shards are not exactly the index's."""
    found = read_index(shards[0].parent / INDEX)
    if found is None or [shard.name for shard in shards] != list(found.shards):
        return None
    return Manifest(
        PackedNames.pack(member_name(number) for number in found.numbers.tolist()),
        found.labels,
        found.classes,
        found.places,
        found.checksums,
        {str(shard.resolve()): stamp_of(shard.stat()) for shard in shards},
    )
