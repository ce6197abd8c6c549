"""Tar shards in WebDataset's layout, read in place by offset."""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np

from synco_fast.data.errors import CorruptImageError, DataError, one_line
from synco_fast.data.sources.decode import IMAGE_SUFFIXES, LIMITS, Limits
from synco_fast.data.sources.manifest import (
    RULES,
    Manifest,
    PackedNames,
    Stamp,
    manifest_path,
    read_manifest,
    stamp_of,
    write_manifest,
)
from synco_fast.data.sources.pack_index import packed_manifest
from synco_fast.data.sources.samples import LABEL_SUFFIXES, choose_images, sample_key, split_suffix
from synco_fast.data.sources.splits import Split, map_labels
from synco_fast.data.sources.stream_reader import DAMAGED, NEGATIVE

__all__ = ["ShardSplit", "index_shards"]

#: A member that may name a class: ``.cls`` or ``.json``, offset and size.
_Label = tuple[str, int, int]
#: An image of a shard: name, offset, size, and its label members.
_Sample = tuple[str, int, int, list[_Label]]


class ShardSplit(Split):
    """The images of some tar shards, in order of shard and member.

    A sample is one image, chosen by `choose_images`, and its label in ``.cls`` (a class name or number) or else in the
    key ``label`` of ``.json``. Without either, the image's folder is its class.

    Only regular members are read, only by offset and size: names in a shard never reach the file system.

    A pack (`synco_fast.data.sources.pack`) has its own index, with checksums that every read is compared with. The
    index of other shards is built once from their headers, and cached until a shard changes.

    Args:
        shards: Uncompressed tar files.
        classes: As in `FolderSplit`.
        title: The set's name in messages.
        limits: Size limits of an image.

    Raises:
        DataError: No shard, one that is not a tar file, no image in them, or classes that are not ``classes``.
    """

    def __init__(
        self,
        shards: list[Path],
        classes: tuple[str, ...] | None = None,
        title: str = "tar",
        limits: Limits = LIMITS,
    ) -> None:
        if not shards:
            raise DataError(f"data: found no *.tar in {title}")
        self.key = "tar:" + "\n".join(str(shard.resolve()) for shard in shards)
        kept = manifest_path(self.key)
        manifest = read_manifest(kept) or packed_manifest(shards)
        if manifest is not None and not _has_last_images(manifest, shards):
            manifest = None
        if manifest is None or manifest.places is None or _is_outdated(manifest):
            manifest = _newer(manifest, index_shards(shards))
            if len(manifest.names):
                with suppress(OSError):  # without a writable cache, the next start reads the headers again
                    write_manifest(kept, manifest)
        if not len(manifest.names):
            others = ", ".join(f"{count:,} {kind}" for kind, count in manifest.unread.items())
            inside = ", expected images: unpack the tar files inside once" if ".tar" in manifest.unread else ""
            raise DataError(
                f"data: found no image in the shards of {title}{' (' + others + ')' if others else ''}{inside}"
            )
        self.limits, self.manifest, self._shards = limits, manifest, [os.fspath(shard) for shard in shards]
        self._places = manifest.places
        self.labels, self.classes = map_labels(manifest.labels, manifest.classes, classes, title)
        self._opened: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.manifest.names)

    def name(self, index: int) -> str:
        """The shard's path and the member's name in it."""
        assert self._places is not None
        return f"{self._shards[int(self._places[index, 0])]}:{self.manifest.names[index]!r}"

    def read_bytes(self, index: int) -> bytes:
        """The member's bytes."""
        assert self._places is not None
        shard, offset, size = self._places[index].tolist()
        self.limits.check_size(size, self.name(index))
        try:
            content = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise CorruptImageError(f"{self.name(index)}: {error.strerror or error}") from error
        if len(content) < size:
            raise CorruptImageError(f"{self.name(index)}: the shard ends inside the image")
        if self.manifest.checksums is not None and zlib.crc32(content) != int(self.manifest.checksums[index]):
            raise CorruptImageError(f"{self.name(index)}: found bytes that differ from the pack's checksum")
        return content

    def _descriptor(self, shard: int) -> int:
        """An open shard. Reads carry their own offset, so that forked workers may share it.

        Raises:
            DataError: It is another one than when it was indexed, with images elsewhere.
        """
        if shard not in self._opened:
            if len(self._opened) >= _OPEN_SHARDS:
                os.close(self._opened.pop(next(iter(self._opened))))
            self._opened[shard] = os.open(self._shards[shard], os.O_RDONLY)
            self._check_unchanged(shard)
        return self._opened[shard]

    def _check_unchanged(self, shard: int) -> None:
        """Refuse another shard under the same name. Of one that was cut short, the images that are left are read."""
        about, expected = os.fstat(self._opened[shard]), self.manifest.stamps.get(os.path.realpath(self._shards[shard]))
        if expected is None or stamp_of(about, like=expected) == expected or self.manifest.checksums is not None:
            return
        assert self._places is not None
        left = np.flatnonzero((self._places[:, 0] == shard) & (self._places[:, 1] <= about.st_size))
        if len(left) and not _has_image(self._shards[shard], self.manifest, int(left[-1])):
            os.close(self._opened.pop(shard))
            raise DataError(
                f"data: found {self._shards[shard]} changed since its headers were read, expected the same shard until "
                "the end of the run; start again"
            )

    def __del__(self) -> None:
        for descriptor in getattr(self, "_opened", {}).values():
            os.close(descriptor)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": {}}


_BLOCK = 512
#: Shards that one process keeps open; the usual limit is 1,024 files.
_OPEN_SHARDS = 256
#: Bytes read of a label member, and maximum length of a class name.
_LONGEST_LABEL, _LONGEST_CLASS = 1 << 16, 1000
_REASON = 200


def _has_image(shard: str | Path, manifest: Manifest, image: int) -> bool:
    """Whether an image lies in a shard where an index says: another shard can have the same size and time."""
    assert manifest.places is not None
    _, offset, size = manifest.places[image].tolist()
    try:
        member = tarfile.TarInfo.frombuf(_block(shard, offset - _BLOCK), "utf-8", "surrogateescape")
    except (OSError, IndexError, *DAMAGED):
        return False
    # Longer names and those that are not ASCII can lie in headers of their own, as can large sizes.
    name = manifest.names[image]
    return (member.size == size or size >= 8 << 30) and (
        member.name == name or len(name) > tarfile.LENGTH_NAME or not name.isascii()
    )


def _has_last_images(manifest: Manifest, shards: list[Path]) -> bool:
    """Whether the last image of each shard lies where an index says."""
    if manifest.places is None or manifest.checksums is not None:
        return True  # a pack's checksums tell
    numbers, backwards = np.unique(manifest.places[::-1, 0], return_index=True)
    last = len(manifest.places) - 1 - backwards
    with ThreadPoolExecutor(max_workers=min(8, len(shards))) as pool:
        there = pool.map(lambda shard, image: _has_image(shards[shard], manifest, image), numbers, last.tolist())
        return all(there)


def _is_outdated(manifest: Manifest) -> bool:
    """Whether an index is of earlier rules, by which a ``.json`` without a label hid the label in ``.cls``.

    Before them, all images of a sample were images of their own. A pack has neither.
    """
    return manifest.rules < RULES and manifest.checksums is None


def _newer(kept: Manifest | None, found: Manifest) -> Manifest:
    """The found index without the images that a check has excluded from the kept one."""
    if kept is None or kept.places is None or found.places is None:
        return found
    read = set(map(tuple, kept.places.tolist()))  # several shards may have an image of the same name
    return found.without(
        {
            number: kept.excluded[name]
            for number, (name, place) in enumerate(zip(found.names, found.places.tolist(), strict=True))
            if name in kept.excluded and tuple(place) not in read
        }
    )


def index_shards(shards: list[Path]) -> Manifest:
    """Read the headers of tar shards.

    Raises:
        DataError: One is missing or is not a tar file. A truncated one yields the images before its end and is named
            in ``excluded``.
    """
    excluded: dict[str, str] = {}
    unread: Counter[str] = Counter()
    # Before anything is read, so that the index of a shard that is written meanwhile is outdated.
    stamps: dict[str, Stamp] = {}
    with suppress(OSError):  # of what is not there, which `_index` reports
        stamps = {str(shard.resolve()): stamp_of(shard.stat()) for shard in shards}
    with ThreadPoolExecutor(max_workers=min(8, len(shards))) as pool:
        found = list(pool.map(lambda shard: _index(shard, excluded, unread), shards))
    names, places, labels = [], [], []
    for number, (shard, samples) in enumerate(zip(shards, found, strict=True)):
        with shard.open("rb") as opened:
            for name, offset, size, members in samples:
                names.append(name)
                places.append((number, offset, size))
                read = (
                    _label(os.pread(opened.fileno(), min(length, _LONGEST_LABEL), start), kind)
                    for kind, start, length in sorted(members)
                )
                labels.append(next((label for label in read if label is not None), None))
                if labels[-1] is not None and len(labels[-1]) > _LONGEST_CLASS:
                    raise DataError(
                        f"data: found a class name of {len(labels[-1]):,} characters for {name!r} in {shard}, expected "
                        f"up to {_LONGEST_CLASS}"
                    )
    if None in labels:
        if any(labels):
            unread[f".cls or .json, since {names[labels.index(None)]!r} has no label"] += sum(
                label is not None for label in labels
            )
        folders = [str(PurePosixPath(name).parent) for name in names]
        labels = list(folders) if "." not in folders else []
    classes = tuple(sorted(set(labels), key=_natural))  # type: ignore[arg-type]
    number_of = {name: number for number, name in enumerate(classes)}
    return Manifest(
        PackedNames.pack(names),
        np.array([number_of[label] for label in labels], dtype=np.int64) if labels else None,
        classes if labels else None,  # type: ignore[arg-type]
        np.array(places, dtype=np.int64).reshape(-1, 3),
        stamps=stamps,
        excluded=excluded,
        unread=dict(unread),
    )


def _natural(name: str) -> tuple[int, str]:
    """Numbers in order of value, before names; the order of a set, of 7 and 07, would be another in each process."""
    return (int(name), name) if name.isdecimal() else (1 << 62, name)


def _index(shard: Path, excluded: dict[str, str], unread: Counter[str]) -> list[_Sample]:
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, list[_Label]] = {}
    try:
        if not shard.is_file() and shard.exists():
            raise DataError(f"data: found a folder, pipe or device at {shard}, expected a tar file")
        length = shard.stat().st_size
        with tarfile.open(shard, "r:") as archive:
            try:
                for member in archive:
                    if member.size < 0 or archive.offset <= member.offset:
                        raise tarfile.ReadError(NEGATIVE)
                    stem, suffix = split_suffix(member.name)
                    if not member.isreg() or member.sparse or PurePosixPath(stem).name.startswith("."):
                        continue
                    if member.offset_data + member.size > length:
                        raise tarfile.ReadError("unexpected end of data")
                    if suffix in IMAGE_SUFFIXES:
                        images[member.name] = (member.name, member.offset_data, member.size)
                    elif suffix in LABEL_SUFFIXES:
                        labels.setdefault(stem, []).append((suffix, member.offset_data, member.size))
                    else:
                        unread[suffix or "without a suffix"] += 1
                    archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                # tarfile takes a truncated or corrupt header as the end, which should be a block of zeros.
                if archive.offset < length and _block(shard, archive.offset) != bytes(_BLOCK):
                    raise tarfile.ReadError("no end of archive")
            except (*DAMAGED, EOFError) as error:
                excluded[str(shard)] = (
                    f"the shard is truncated or corrupt after {len(images):,} images ({one_line(error, _REASON)})"
                )
    except DataError:
        raise
    except (OSError, *DAMAGED) as error:
        if _is_compressed(shard):
            raise DataError(
                f"data: found a compressed tar file at {shard}, expected an uncompressed one, or stream:{shard}"
            ) from error
        raise DataError(f"data: found no readable tar file at {shard} ({one_line(error, _REASON)})") from error
    return _samples([*images.values()], labels, unread)


def _is_compressed(shard: Path) -> bool:
    """Whether a file is one of gzip, bzip2 or xz, which a stream reads."""
    with suppress(OSError):
        return _block(shard, 0).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
    return False


def _samples(
    images: list[tuple[str, int, int]], labels: dict[str, list[_Label]], unread: Counter[str]
) -> list[_Sample]:
    """One image of each sample, with its label, by `choose_images`; counts the others."""
    found = choose_images([name for name, _, _ in images], labels)
    for sample in found:
        for place in sample.others:
            name = images[place][0]
            unread[name[len(sample_key(name)) :].lower()] += 1
    return [(*images[sample.image], labels.get(sample.name, [])) for sample in found]


def _block(shard: str | Path, offset: int) -> bytes:
    with Path(shard).open("rb") as opened:
        return os.pread(opened.fileno(), _BLOCK, offset)


def _label(content: bytes, kind: str) -> str | None:
    """The class that a ``.cls`` or ``.json`` member names; None where it names none."""
    try:
        text = content.decode()
        found = json.loads(text)["label"] if kind == ".json" else text.strip()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return str(found) if isinstance(found, str | int | float) else None
