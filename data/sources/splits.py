"""Splits: numbered images in files or arrays; tar shards are in `synco_fast.data.sources.shards`."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synco_fast.data.errors import CorruptImageError, DataError
from synco_fast.data.sources.decode import IMAGE_SUFFIXES, LIMITS, Limits, decode_image, encode_pixels
from synco_fast.data.sources.manifest import Manifest, PackedNames, manifest_path, read_manifest, stamp_of
from synco_fast.data.sources.stream import refuse_stream
from synco_fast.data.sources.walk import is_image, walk_folder

__all__ = [
    "ArraySplit",
    "FileSplit",
    "FolderSplit",
    "Images",
    "ListSplit",
    "Split",
    "SubsetSplit",
    "read_file",
    "share_of",
]


class Split(Protocol):
    """A numbered set of images."""

    classes: tuple[str, ...] | None
    labels: NDArray[np.int64] | None
    limits: Limits

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The image's name in messages: its path, or file and number."""
        ...

    def read_bytes(self, index: int) -> bytes:
        """The bytes of the image's file.

        Raises:
            CorruptImageError: They cannot be read.
        """
        ...

    def read(self, index: int) -> Image.Image:
        """The image in mode RGB, by `decode_image`.

        Raises:
            CorruptImageError: It cannot be decoded.
        """
        return decode_image(self.read_bytes(index), self.name(index), self.limits)


def read_file(file: str, limits: Limits) -> bytes:
    """The bytes of a regular file, up to its size when opened.

    Raises:
        CorruptImageError: It cannot be read, is a pipe or a device, or is too large.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait forever for a writer.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:  # noqa: PTH123
            about = os.fstat(opened.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise CorruptImageError(f"{file}: not a regular file")
            limits.check_size(about.st_size, file)
            return opened.read(about.st_size)
    except OSError as error:
        raise CorruptImageError(f"{file}: {error.strerror or error}") from error
    except CorruptImageError:
        raise
    except ValueError as error:  # a table may name anything
        raise CorruptImageError(f"{file}: {error}") from error


class FileSplit(Split):
    """Images in separate files.

    Args:
        root: The folder that the names are relative to.
        manifest: Names and labels.
        classes: The expected class names, in label order; by default the manifest's.
        key: Key of the manifest, see `manifest_path`.
        limits: Size limits of an image.

    Raises:
        DataError: The manifest has a class that ``classes`` lacks.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        classes: tuple[str, ...] | None,
        key: str,
        limits: Limits = LIMITS,
    ) -> None:
        self.manifest, self.key, self.limits, self._root = manifest, key, limits, os.fspath(root)
        self.labels, self.classes = map_labels(manifest.labels, manifest.classes, classes, root)

    def __len__(self) -> int:
        return len(self.manifest.names)

    def name(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self._root, self.manifest.names[index])  # noqa: PTH118 - once an image: no Path objects

    def read_bytes(self, index: int) -> bytes:
        """The file's bytes."""
        return read_file(self.name(index), self.limits)


def map_labels(
    labels: NDArray[np.int64] | None,
    own: tuple[str, ...] | None,
    classes: tuple[str, ...] | None,
    where: object,
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Labels as indices of ``classes`` instead of ``own``, and the resulting classes.

    Raises:
        DataError: ``own`` has a class that ``classes`` lacks.
    """
    if classes is None or own is None or labels is None:
        return labels, own
    unknown = sorted(set(own) - set(classes))
    if unknown:
        raise DataError(
            f"data: found the class {unknown[0]} in {where}, which the training images do not have, expected only "
            f"classes of theirs, such as {classes[0]}"
        )
    number = {name: place for place, name in enumerate(classes)}
    return np.array([number[name] for name in own], dtype=np.int64)[labels], classes


class FolderSplit(FileSplit):
    """Image files below a folder: one sub-folder per class, or files without classes.

    Args:
        root: The folder. Where it has sub-folders with images, each is a class, in order of name; otherwise the images
            right inside it form a split without labels.
        classes: The expected class names, in label order; by default those found.
        limits: Size limits of an image.

    A manifest of ``synco-fast data check`` replaces the walk as long as no folder has changed.

    Raises:
        DataError: There is no such folder, it holds no image, or its classes are not ``classes``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        classes: tuple[str, ...] | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        root = Path(root)
        if not root.is_dir():
            if root.exists():
                raise DataError(f"data: found a file {root}, expected a folder or another source{_as_source(root)}")
            # A run from another folder may have recorded it.
            raise DataError(f"data: found no folder {root}" + ("" if root.is_absolute() else f" in {Path.cwd()}"))
        key = f"folder:{root.resolve()}"
        manifest = read_manifest(manifest_path(key)) or walk_folder(root)
        if not len(manifest.names):
            raise DataError(f"data: found no image in {root}{_instead(root, manifest.unread)}")
        super().__init__(root, manifest, classes, key, limits)


def _as_source(file: Path) -> str:
    """The source that a file or its folder is, if any, as the end of a sentence."""
    if file.suffix == ".txt":
        return f", such as list:{file}"
    kind = {".tar": "tar", ".parquet": "parquet"}.get(file.suffix) or ("idx" if "-ubyte" in file.name else "")
    return f", such as {kind and f'{kind}:'}{file.parent}" if kind or is_image(file.name) else ""


def _instead(root: Path, unread: dict[str, int]) -> str:
    """What a folder without images holds instead, and how to read it."""
    if ".tar" in unread:
        return f", but tar files, expected tar:{root}"
    if ".parquet" in unread:
        return f", but Parquet files, expected parquet:{root}"
    if any((root / name).is_file() for name in ("data_batch_1", "data_batch_1.bin", "train", "train.bin")):
        return f", but perhaps CIFAR's files, expected cifar:{root}"
    if (root / "unlabeled_X.bin").is_file():
        return f", but perhaps STL-10's files, expected stl10:{root}"
    if any(root.glob("*-ubyte*")):
        return f", but IDX files, expected idx:{root}"
    found = ", ".join(f"{count:,} {kind}" for kind, count in unread.items())
    return f"{' (' + found + ')' if found else ''}, expected files named {', '.join(sorted(IMAGE_SUFFIXES))}"


class ListSplit(FileSplit):
    """The files listed in a text file, one per line: a path, and after a tab its class if there are classes.

    Args:
        file: The list, UTF-8, with or without a byte order mark; relative paths start at its folder. Empty lines and
            those that begin with ``#`` are skipped.
        classes, limits: As in `FolderSplit`.

    Raises:
        DataError: There is no such list, it names nothing, or only some of its lines have a class.
    """

    def __init__(
        self,
        file: Path,
        classes: tuple[str, ...] | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        key = f"list:{os.path.realpath(file)}"
        super().__init__(file.parent, read_manifest(manifest_path(key)) or _parse_list(file), classes, key, limits)


def _parse_list(file: Path) -> Manifest:
    try:
        if file.exists() and not file.is_file():
            raise DataError(f"data: found a folder, pipe or device at {file}, expected a list of images")
        stamp, text = stamp_of(file.stat()), file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"data: cannot read the list {file} ({error.strerror})") from error
    if "\0" in text:
        raise DataError(f"data: found no plain text in the list {file}, expected UTF-8; some programs write UTF-16")
    # Not `splitlines`, which also ends lines at characters that file names may hold.
    lines = [line.partition("\t") for line in text.split("\n") if line.strip() and not line.startswith("#")]
    if not lines:
        raise DataError(f"data: found no path in the list {file}")
    labelled = [bool(tab) for _, tab, _ in lines]
    if any(labelled) and not all(labelled):
        without = lines[labelled.index(False)][0]
        raise DataError(f"data: found no class after {without!r} in {file}, expected one in every line or in none")
    manifest = Manifest(PackedNames.pack(path for path, _, _ in lines), stamps={str(file.resolve()): stamp})
    if any(labelled):
        classes = sorted({label for _, _, label in lines})
        number = {name: place for place, name in enumerate(classes)}
        manifest.classes = tuple(classes)
        manifest.labels = np.array([number[label] for _, _, label in lines], dtype=np.int64)
    return manifest


class Images(Protocol):
    """Images of one size: a NumPy array, or what has as much of one, as `MappedImages`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Images, height, width, and, if there are any, channels."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


class ArraySplit:
    """Images held in memory, or in memory-mapped files.

    Args:
        images: uint8, (n, height, width) or (n, height, width, 3).
        labels: int64, (n,), or None.
        title: The set's name in messages.
        classes: Class names, by default the numbers.
    """

    def __init__(
        self,
        images: Images,
        labels: NDArray[np.int64] | None,
        title: str,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.images, self.labels, self.title, self.limits = images, labels, title, Limits()
        if classes is None and labels is not None:
            classes = tuple(str(label) for label in range(int(labels.max()) + 1))
        self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The set's title and the image's number."""
        return f"{self.title}[{index}]"

    def read_bytes(self, index: int) -> bytes:
        """The image as an uncompressed image file."""
        return encode_pixels(np.asarray(self.read(index)))

    def read(self, index: int) -> Image.Image:
        """The image in mode RGB."""
        return Image.fromarray(self.images[index]).convert("RGB")


class SubsetSplit:
    """A subset of a split, renumbered.

    Args:
        whole: The split.
        numbers: Which images of it, in order.
    """

    def __init__(self, whole: Split, numbers: NDArray[np.int64]) -> None:
        self.whole, self.numbers, self.limits = whole, numbers, whole.limits
        self.classes = whole.classes
        self.labels = None if whole.labels is None else whole.labels[numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        """As in the whole split."""
        return self.whole.name(int(self.numbers[index]))

    def read_bytes(self, index: int) -> bytes:
        """As in the whole split."""
        return self.whole.read_bytes(int(self.numbers[index]))

    def read(self, index: int) -> Image.Image:
        """As in the whole split."""
        return self.whole.read(int(self.numbers[index]))


def share_of(split: Split, share: float) -> Split:
    """A fixed random subset of a split; a smaller fraction is a subset of every larger one.

    Args:
        split: The images; labels are ignored.
        share: In (0, 1], rounded to at least one image.

    Raises:
        DataError: The split is a stream, and ``share`` is below 1.
    """
    if share == 1:
        return split
    refuse_stream(split, "data.fraction")
    order = np.random.default_rng(0).permutation(len(split))
    numbers = np.sort(order[: max(1, round(share * len(split)))]).astype(np.int64)
    if isinstance(split, ArraySplit):
        labels = None if split.labels is None else split.labels[numbers]
        return ArraySplit(split.images[numbers], labels, f"{share:g} of {split.title}", split.classes)
    return SubsetSplit(split, numbers)
