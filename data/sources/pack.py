"""Packing a source: images shrunk once to JPEG tar shards, so that training decodes fewer pixels."""

from __future__ import annotations

import fcntl
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from synco_fast.data.errors import CorruptImageError, DataError
from synco_fast.data.files import atomic_write
from synco_fast.data.loader import Loader
from synco_fast.data.sources.decode import decode_image, plain_jpeg_size
from synco_fast.data.sources.identity import digest_of
from synco_fast.data.sources.open import Source
from synco_fast.data.sources.pack_index import INDEX, PackIndex, member_name, read_index
from synco_fast.data.sources.shards import ShardSplit
from synco_fast.data.sources.splits import ArraySplit, FileSplit, Split
from synco_fast.data.sources.stream import refuse_stream

__all__ = ["PackSettings", "pack_source", "shrink"]

_VERSION = 1
_SETTINGS = "pack.json"
_AT_A_TIME = 16
#: The largest side of a JPEG image.
_LONGEST = 65_500

Tick = Callable[[str, int, int, int], None]


@dataclass(frozen=True)
class PackSettings:
    """The settings of a pack.

    Attributes:
        short_side: Length of the short side in pixels; smaller images are not enlarged.
        quality: JPEG quality, 1 to 100 in Pillow's scale.
        shard_bytes: A shard ends with the image that reaches this size.
    """

    short_side: int = 320
    quality: int = 90
    shard_bytes: int = 256 << 20


def shrink(content: bytes, name: str, settings: PackSettings) -> tuple[bytes, tuple[int, int], tuple[int, int]]:
    """The packed form of an image file, with height and width before and after.

    A plain JPEG file that is small enough keeps its bytes, without loss. Everything else is decoded, shrunk by an
    antialiased Lanczos filter if its short side is too long, and encoded as JPEG.

    Raises:
        CorruptImageError: It cannot be decoded, or is too long for JPEG.
    """
    image = decode_image(content, name)
    before = image.height, image.width
    if plain_jpeg_size(content, turned=True) is not None and min(before) <= settings.short_side:
        return content, before, before
    scale = min(1.0, settings.short_side / min(before))
    height, width = (max(1, round(side * scale)) for side in before)
    if max(height, width) > _LONGEST:
        raise CorruptImageError(f"{name}: found {width} x {height} pixels, expected sides up to {_LONGEST} for JPEG")
    if (height, width) != before:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=settings.quality)
    return file.getvalue(), before, (height, width)


@dataclass
class _Shrunk:
    """A worker's result for one image; ``content`` is None for a corrupt one."""

    number: int
    name: str
    read: int
    content: bytes | None = None
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)
    kept: bool = False
    reason: str = ""


class _Shrinker(Dataset[list[_Shrunk]]):
    def __init__(self, split: Split, settings: PackSettings) -> None:
        self.split, self.settings = split, settings

    def __getitem__(self, numbers: range) -> list[_Shrunk]:
        return [self._shrunk(number) for number in numbers]

    def _shrunk(self, number: int) -> _Shrunk:
        name, read = _short_name(self.split, number), 0
        try:
            content = self.split.read_bytes(number)
            read = len(content)
            packed, before, after = shrink(content, self.split.name(number), self.settings)
        except CorruptImageError as error:
            return _Shrunk(number, name, read, reason=str(error))
        return _Shrunk(number, name, read, packed, before, after, packed is content)


def _short_name(split: Split, number: int) -> str:
    """An image's name relative to its source's folder."""
    if isinstance(split, FileSplit | ShardSplit):
        return str(split.manifest.names[number])
    return split.name(number)


def pack_source(
    source: Source,
    out: Path,
    settings: PackSettings,
    *,
    workers: int | None = None,
    tick: Tick = lambda title, done, total, corrupt: None,
) -> dict[str, PackIndex]:
    """Pack both splits of a source below ``out``: ``train/00000.tar`` ..., ``val/00000.tar`` ..., an index in each.

    An interrupted pack is resumed after its last complete shard; the result is identical byte for byte. A finished
    pack is only read.

    Args:
        source: The images, in files or shards.
        out: A new or empty folder, or an interrupted pack of the same source and settings.
        settings: Settings of the pack.
        workers: Processes that decode and encode; by default one for each core.
        tick: Called with split, images done, images in total, and corrupt ones.

    Returns:
        The index by split, ``train`` and, where there is one, ``val``.

    Raises:
        DataError: The folder holds something else, another pack runs in it, the source is in memory or a stream, or no
            image can be decoded.
        OSError: The folder cannot be written.
    """
    splits = {"train": source.train, "val": source.validation}
    for split in splits.values():
        refuse_stream(split, "a pack")
        if isinstance(split, ArraySplit):
            raise DataError(f"data: found {source.spec}, expected image files or shards to pack; arrays need no pack")
    with _locked(out):
        _check_settings(out, source, settings)
        return {
            title: _pack_split(title, split, out / title, settings, workers, tick)
            for title, split in splits.items()
            if split is not None
        }


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    # The lock ends with the process, however that ends.
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"data: found another pack running in {out}, expected one at a time") from error
        yield


def _check_settings(out: Path, source: Source, settings: PackSettings) -> None:
    """Start a pack, or check that the existing one has the same settings."""
    file = out / _SETTINGS
    wanted = {"version": _VERSION, "source": os.fsencode(source.spec).decode(errors="replace"), **asdict(settings)}
    splits = [split for split in (source.train, source.validation) if split is not None]
    wanted["images"] = [len(split) for split in splits]
    digests = [digest_of(split) for split in splits]
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        for name, value in wanted.items():
            if not isinstance(found, dict) or found.get(name) != value:
                was = found.get(name) if isinstance(found, dict) else None
                raise DataError(
                    f"data: found a pack with {name} {was!r} in {out}, expected {value!r}; choose another folder"
                )
        # Earlier versions kept no digests.
        if found.get("digests", digests) != digests:
            raise DataError(
                f"data: found a pack in {out} of other images than those of {source.spec} today, though as many; "
                "choose another folder"
            )
    elif any(path.name != ".lock" for path in out.iterdir()):
        raise DataError(f"data: found other files in {out}, expected a new or empty folder, or an interrupted pack")
    else:
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps({**wanted, "digests": digests}, indent=2) + "\n", encoding="utf-8")


def _pack_split(
    title: str, split: Split, folder: Path, settings: PackSettings, workers: int | None, tick: Tick
) -> PackIndex:
    finished = read_index(folder / INDEX)
    if finished is not None:
        return finished
    folder.mkdir(exist_ok=True)
    parts = _whole_shards(folder)
    start = parts[-1].end if parts else 0
    corrupt = sum(len(part.excluded) for part in parts)
    tick(title, start, len(split), corrupt)
    writer = _ShardWriter(folder, len(parts), start, split)
    for shrunk in _shrunk(split, start, settings, workers):
        writer.add(shrunk)
        corrupt += shrunk.content is None
        tick(title, shrunk.number + 1, len(split), corrupt)
        if writer.size >= settings.shard_bytes:
            parts.append(writer.close())
            writer = _ShardWriter(folder, len(parts), shrunk.number + 1, split)
    parts.append(writer.close())
    index = PackIndex.join(parts)
    if not len(index):
        raise DataError(f"data: found no readable image besides {split.name(0)}")
    index.write(folder / INDEX)
    for shard in index.shards:
        _journal(folder / shard).unlink()
    return index


def _shrunk(split: Split, start: int, settings: PackSettings, workers: int | None) -> Iterator[_Shrunk]:
    parts = [range(first, min(first + _AT_A_TIME, len(split))) for first in range(start, len(split), _AT_A_TIME)]
    for part in Loader(_Shrinker(split, settings), parts, workers=workers, keep=False):
        yield from part


def _journal(shard: Path) -> Path:
    """The index file of one shard during packing."""
    return shard.with_suffix(".npz")


def _whole_shards(folder: Path) -> list[PackIndex]:
    """The indices of an interrupted pack's complete shards; incomplete files are removed."""
    parts: list[PackIndex] = []
    for number in range(len(list(folder.glob("*.tar")))):
        part = read_index(_journal(folder / _shard_name(number)))
        if part is None:
            break
        parts.append(part)
    whole = {name for part in parts for name in part.shards}
    for path in [*folder.iterdir()]:
        if path.with_suffix(".tar").name not in whole or path.suffix not in (".tar", ".npz"):
            path.unlink()
    return parts


def _shard_name(number: int) -> str:
    return f"{number:05d}.tar"


class _Row(NamedTuple):
    number: int
    place: tuple[int, int, int]
    checksum: int
    after: tuple[int, int]
    before: tuple[int, int]
    kept: bool


class _ShardWriter:
    """Writes one shard: its index first, its final name last, so that a named shard is complete."""

    def __init__(self, folder: Path, number: int, start: int, split: Split) -> None:
        self._number, self._split, self._end = number, split, start
        self._shard = folder / _shard_name(number)
        self._part = folder / f"{self._shard.stem}.part"
        self._file: BinaryIO = self._part.open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._images: list[_Row] = []
        self._excluded: dict[str, str] = {}
        self._read = 0

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return int(self._tar.offset)

    def add(self, shrunk: _Shrunk) -> None:
        """Write an image and its label, or record it as corrupt."""
        self._end, self._read = shrunk.number + 1, self._read + shrunk.read
        if shrunk.content is None:
            self._excluded[os.fsencode(shrunk.name).decode(errors="replace")] = shrunk.reason
            return
        offset = self._write(member_name(shrunk.number), shrunk.content)
        self._images.append(
            _Row(
                shrunk.number,
                (self._number, offset, len(shrunk.content)),
                zlib.crc32(shrunk.content),
                shrunk.after,
                shrunk.before,
                shrunk.kept,
            )
        )
        about = {"name": os.fsencode(shrunk.name).decode(errors="replace")}
        if self._split.labels is not None and self._split.classes is not None:
            label = self._split.classes[int(self._split.labels[shrunk.number])]
            about["label"] = os.fsencode(label).decode(errors="replace")
        self._write(member_name(shrunk.number).replace(".jpg", ".json"), json.dumps(about).encode())

    def _write(self, name: str, content: bytes) -> int:
        """Append a member; returns the offset of its bytes."""
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))
        return self.size - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def close(self) -> PackIndex:
        """Finish the shard; returns its index, without a shard if it has no image."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        labels, rows = self._split.labels, self._images
        numbers = np.array([row.number for row in rows], dtype=np.int64)
        index = PackIndex(
            numbers=numbers,
            places=np.array([row.place for row in rows], dtype=np.int64).reshape(-1, 3),
            checksums=np.array([row.checksum for row in rows], dtype=np.uint32),
            sizes=np.array([row.after for row in rows], dtype=np.int64).reshape(-1, 2),
            source_sizes=np.array([row.before for row in rows], dtype=np.int64).reshape(-1, 2),
            labels=None if labels is None else labels[numbers],
            classes=self._split.classes,
            shards={},
            excluded=self._excluded,
            read=self._read,
            kept=sum(row.kept for row in rows),
            end=self._end,
        )
        if not rows:
            self._part.unlink()
            return index
        index.shards = {self._shard.name: self._part.stat().st_size}
        # Named before the shard, so that a named shard always has its index.
        index.write(_journal(self._shard))
        self._part.replace(self._shard)
        return index
