"""Opening sources by name: folders, lists, tar shards, Parquet files, datasets of a library, arrays, the demo set.

A source has a `train` split and, if there is one, a held-out `validation` split. A split yields images and labels by
number, without augmentation. A new kind of source is one function here that returns a `Source`, and its prefix in
`open_source`.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synco_fast.data.errors import DataError, one_line
from synco_fast.data.sources.cifar import load_cifar
from synco_fast.data.sources.columns import NONE, split_options
from synco_fast.data.sources.decode import LIMITS, Limits
from synco_fast.data.sources.demo import make_demo
from synco_fast.data.sources.hf import OPTIONS as HF_OPTIONS
from synco_fast.data.sources.hf import load_hf
from synco_fast.data.sources.layout import (
    HELD_OUT,
    TRAIN,
    fixed_folder,
    list_unread,
    names_a_split,
    split_of,
    split_shards,
)
from synco_fast.data.sources.manifest import cache_folder
from synco_fast.data.sources.parquet import ParquetSplit, find_parquet
from synco_fast.data.sources.shards import ShardSplit
from synco_fast.data.sources.splits import ArraySplit, FileSplit, FolderSplit, ListSplit, Split
from synco_fast.data.sources.stl10 import load_stl10
from synco_fast.data.sources.stream import StreamSettings, StreamSplit, expand_shards

__all__ = ["ArraySplit", "FolderSplit", "Source", "Split", "open_source"]

#: Largest array of an IDX file in bytes, since it is kept in memory.
_LARGEST_IDX = 8 << 30
#: Upper bound of the compression ratio.
_DEFLATE = 1032


@dataclass(frozen=True)
class Source:
    """Training images and, if any, held-out images.

    Attributes:
        spec: Its name.
        train, validation: The splits.
        labelled: The training images with labels, where ``train`` has others without.
        layout: A warning about files in neither split, or in the wrong one.
    """

    spec: str
    train: Split
    validation: Split | None
    layout: str | None = None
    labelled: Split | None = None

    @property
    def evaluated(self) -> Split:
        """The training images of evaluations."""
        return self.train if self.labelled is None else self.labelled

    @property
    def missing(self) -> list[str]:
        """Warnings: files that are not read, images excluded by an earlier check, truncated shards."""
        found = [f"{self.spec}: {self.layout}"] if self.layout else []
        unread: Counter[str] = Counter()
        for split in (self.train, self.validation):
            unread.update(split.manifest.unread if isinstance(split, FileSplit | ShardSplit) else {})
            excluded = split.manifest.excluded if isinstance(split, FileSplit | ShardSplit) else {}
            if excluded:
                first = next(iter(excluded.items()))
                found.append(f"{self.spec}: {len(excluded):,} excluded as corrupt, the first: {first[0]}: {first[1]}")
        kinds = list_unread(f"{count:,} {kind}" for kind, count in unread.most_common())
        return found + ([f"{self.spec}: {kinds}"] if kinds else [])

    @property
    def notes(self) -> list[str]:
        """Warnings: what is `missing`, slow reads, and a stream's size that may be out of date."""
        found = self.missing
        if isinstance(self.train, ParquetSplit) and self.train.note:
            found.append(f"{self.spec}: {self.train.note}")
        if isinstance(self.train, StreamSplit) and self.train.note:
            found.append(self.train.note)
        return found


def _read_idx(folder: Path, stem: str, dimensions: int) -> NDArray[np.uint8]:
    """An array of unsigned bytes in the IDX format (the layout that MNIST introduced), plain or gzipped."""
    file = next((path for path in (folder / f"{stem}.gz", folder / stem) if path.is_file()), None)
    if file is None:
        raise DataError(f"data: found no {stem}.gz in {folder}")
    wrong = f"{file}: found another format or a truncated file, expected IDX with uint8 in {dimensions} dimensions"
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            kind, rank = struct.unpack(">HBB", opened.read(4))[1:]
            if kind != 8 or rank != dimensions:
                raise DataError(wrong)
            shape = struct.unpack(f">{rank}I", opened.read(4 * rank))
            size = math.prod(shape)
            if size > _LARGEST_IDX:
                raise DataError(f"{file}: found an array of {size:,} bytes, expected up to {_LARGEST_IDX:,}")
            if size > file.stat().st_size * (_DEFLATE if file.suffix == ".gz" else 1):
                raise DataError(wrong)
            # A few compressed bytes can expand to terabytes: unpack only what the header says.
            content = opened.read(size + 1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{file}: found a corrupt IDX file ({error})") from error
    if len(content) != size:
        raise DataError(wrong)
    return np.frombuffer(content, np.uint8).reshape(shape)


def open_idx(folder: str | os.PathLike[str]) -> Source:
    """MNIST-like IDX files: ``train-images-idx3-ubyte``, ``t10k-images-idx3-ubyte`` and their labels.

    Raises:
        DataError: A file is missing or corrupt, or images and labels differ in number.
    """
    folder = Path(folder)
    splits = []
    for prefix in ("train", "t10k"):
        images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1).astype(np.int64)
        if len(images) != len(labels):
            raise DataError(f"{folder}: found {len(images)} {prefix} images and {len(labels)} labels")
        splits.append(ArraySplit(images, labels, f"{folder}/{prefix}"))
    train, held_out = splits
    return Source(f"idx:{folder}", train, held_out)


def open_folder(folder: str | os.PathLike[str], limits: Limits = LIMITS) -> Source:
    """A folder in ImageNet's layout (``train/CLASS/*``, ``val/CLASS/*``), or one with only images.

    The held-out folder is the first of `HELD_OUT`.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    root = Path(folder).expanduser()
    if not (root / TRAIN).is_dir():
        alone = FolderSplit(root, None, limits)
        return Source(os.fspath(root), alone, None, _misplaced(alone, root))
    train = FolderSplit(root / TRAIN, None, limits)
    held_out = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    note = None
    with suppress(OSError):  # without the right to list the folder, nothing is known of others in it
        others = (path for path in sorted(root.iterdir()) if path.is_dir() and path not in (root / TRAIN, held_out))
        note = list_unread(f"{path.name}/" for path in others if not path.name.startswith("."))
    return Source(os.fspath(root), train, FolderSplit(held_out, train.classes, limits) if held_out else None, note)


def _misplaced(split: FolderSplit, root: Path) -> str | None:
    """A warning where classes are splits, or where the folders of splits are deeper."""
    splits = [name for name in split.classes or () if names_a_split(name)]
    if splits:
        return f"found {', '.join(splits)} among the classes, expected train/ and val/ for splits"
    read = split.manifest.stamps
    deeper = (Path(folder).parent for folder in read if Path(folder).name == TRAIN)
    base = next((base for base in deeper if any(os.fspath(base / name) in read for name in HELD_OUT)), None)
    if base is None or not base.is_relative_to(root.resolve()):
        return None
    inside = root / base.relative_to(root.resolve())
    return f"found train/ and held-out images in {inside}, and took all for training; expected --data {inside}"


def open_list(spec: str, limits: Limits = LIMITS) -> Source:
    """Lists of files: ``TRAIN_LIST`` or ``TRAIN_LIST,HELD_OUT_LIST``, each as `ListSplit` describes.

    Raises:
        DataError: A list cannot be read, or names nothing.
    """
    files = [Path(file).expanduser() for file in spec.split(",")]
    if len(files) > 2:
        raise DataError(f"data: found {len(files)} lists in {spec!r}, expected one, or two separated by a comma")
    train = ListSplit(files[0], None, limits)
    return Source(f"list:{spec}", train, ListSplit(files[1], train.classes, limits) if files[1:] else None)


def open_shards(folder: str | os.PathLike[str], limits: Limits = LIMITS) -> Source:
    """Tar shards: ``train/*.tar`` and ``val/*.tar``, or shards named so, or ``*.tar`` alone; see `split_shards`.

    Raises:
        DataError: There is no shard, one is not a tar file, or no image is in them.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"data: found {'a file' if root.exists() else 'no folder'} {root}, expected a folder of shards")
    own, held_out, others = split_shards(root)
    train = ShardSplit(own, title=f"{root}", limits=limits)
    split = ShardSplit(held_out, train.classes, title=f"{root}", limits=limits) if held_out else None
    return Source(f"tar:{root}", train, split, list_unread(others))


def open_parquet(spec: str, limits: Limits = LIMITS) -> Source:
    """Parquet files in a folder or by a pattern; the first of `HELD_OUT` by name or folder is held out.

    Args:
        spec: ``FOLDER`` or ``PATTERN``, and behind it ``,image=COLUMN``, ``,label=COLUMN`` (``none`` for no labels) and
            ``,validation=PATTERN`` for the held-out files (``none`` for no such files).
        limits: Size limits of an image.

    Raises:
        DataError: There is no such file, or no image column in one.
    """
    name, options = split_options(spec, ("image", "label", "validation"))
    columns = {"image": options.get("image"), "label": options.get("label")}
    files, root = find_parquet(name), fixed_folder(name)
    splits = {file: split_of(file.relative_to(root).with_suffix("").parts) for file in files}
    held_out = next((found for word in HELD_OUT if (found := [file for file in files if splits[file] == word])), [])
    if "validation" in options:
        held_out = [] if options["validation"] == NONE else find_parquet(options["validation"])
        if not held_out and options["validation"] != NONE:
            raise DataError(f"data: found no *.parquet in {options['validation']}")
    apart = {file.resolve() for file in held_out}
    own = [file for file in files if splits[file] not in HELD_OUT and file.resolve() not in apart]
    if files and not own:
        raise DataError(
            f"data: found only held-out files in {spec}, such as {held_out[0] if held_out else files[0]}, expected "
            "training files"
        )
    others = [str(file.relative_to(root)) for file in files if file not in own and file.resolve() not in apart]
    train = ParquetSplit(own, None, spec, limits, **columns)
    split = ParquetSplit(held_out, train.classes, spec, limits, **columns) if held_out else None
    return Source(f"parquet:{spec}", train, split, list_unread(others))


def open_hf(spec: str, limits: Limits = LIMITS) -> Source:
    """A dataset of the ``datasets`` library.

    Args:
        spec: As `load_hf` describes, options behind the name: ``FOLDER,train=SPLIT,validation=SPLIT,label=COLUMN``.
        limits: Size limits of an image.

    Raises:
        DataError: As `load_hf`.
    """
    return Source(f"hf:{spec}", *load_hf(*split_options(spec, HF_OPTIONS), limits))


def demo_folder() -> Path:
    """The folder of the demo set, in the user's cache."""
    return cache_folder() / "demo"


def open_stream(spec: str, limits: Limits = LIMITS, settings: StreamSettings | None = None) -> Source:
    """A stream of tar shards, without random access and without held-out images; see `expand_shards`.

    Raises:
        DataError: There is no such shard.
    """
    return Source(f"stream:{spec}", StreamSplit(expand_shards(spec), f"stream:{spec}", settings, limits), None)


def open_source(spec: str, limits: Limits = LIMITS, stream: StreamSettings | None = None) -> Source:
    """Open a source by the value of ``--data``.

    Args:
        spec: A folder; ``tar:FOLDER`` for tar shards; ``list:FILE`` or ``list:FILE,FILE`` for lists of files;
            ``parquet:FOLDER`` or ``parquet:PATTERN`` for Parquet files; ``hf:NAME`` or ``hf:FOLDER`` for a dataset of
            the ``datasets`` library; ``stream:SHARDS`` for tar shards without random access; ``idx:FOLDER`` for IDX
            files; ``cifar:FOLDER`` for CIFAR-10 or CIFAR-100; ``stl10:FOLDER`` for STL-10; ``demo`` for the demo set,
            generated on first use.
        limits: Size limits; larger images count as corrupt.
        stream: How a stream is read.

    Raises:
        DataError: There is no such source, it cannot be read, or the prefix is unknown.
    """
    place = spec if spec.startswith("~") else spec.partition(":")[2]
    if place.startswith("~") and os.path.expanduser(place) == place:  # noqa: PTH111 - which raises another error
        raise DataError(f"data: found {spec!r}, expected a user of this machine behind ~")
    try:
        return _open(spec, limits, stream)
    except OSError as error:  # a folder without the right to enter it, or a name that is too long
        raise DataError(f"data: cannot read {error.filename or spec} ({error.strerror or error})") from error


def _open(spec: str, limits: Limits, stream: StreamSettings | None) -> Source:
    if spec == "demo":
        try:
            folder = make_demo(demo_folder())
        except ValueError as error:
            raise DataError(f"data: {one_line(error)}") from error
        return open_folder(folder)
    prefix, colon, rest = spec.partition(":")
    if colon and prefix == "idx":
        return open_idx(Path(rest).expanduser())
    if colon and prefix == "cifar":
        return Source(spec, *load_cifar(Path(rest).expanduser()))
    if colon and prefix == "stl10":
        train, held_out, labelled = load_stl10(Path(rest).expanduser())
        return Source(spec, train, held_out, labelled=labelled)
    if colon and prefix == "tar":
        return open_shards(rest, limits)
    if colon and prefix == "parquet":
        return open_parquet(rest, limits)
    if colon and prefix == "hf":
        return open_hf(rest, limits)
    if colon and prefix == "stream":
        return open_stream(rest, limits, stream)
    if colon and prefix == "list":
        return open_list(rest, limits)
    if colon and not Path(spec).exists():
        raise DataError(
            f"data: found {spec!r}, expected a folder, tar:FOLDER, list:FILE, parquet:FOLDER, hf:NAME, stream:SHARDS, "
            "idx:FOLDER, cifar:FOLDER, stl10:FOLDER or demo"
        )
    return open_folder(spec, limits)
