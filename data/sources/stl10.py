"""STL-10 as it is published: binary files of 100,000 images without labels, 5,000 with them, and 8,000 for a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synco_fast.data.errors import DataError
from synco_fast.data.sources.mapped import MappedImages
from synco_fast.data.sources.splits import ArraySplit

__all__ = ["load_stl10"]

_FOLDER = "stl10_binary"
_TRAIN, _TEST, _UNLABELLED, _CLASSES = "train_{}.bin", "test_{}.bin", "unlabeled_X.bin", "class_names.txt"
_FILES = (*(name.format(kind) for name in (_TRAIN, _TEST) for kind in "Xy"), _UNLABELLED, _CLASSES)
#: An image in a file: channels, columns, rows.
_SHAPE = (3, 96, 96)


def load_stl10(folder: Path) -> tuple[ArraySplit, ArraySplit, ArraySplit]:
    """STL-10's images: all for training without labels, the test images, and those for training that have labels.

    The first are those of torchvision's ``train+unlabeled``, in its order, as is usual for pretraining. All stay in
    their files, which are memory-mapped.

    Args:
        folder: The unpacked folder, or the one around it.

    Raises:
        DataError: A file is missing, or is not STL-10's.
    """
    places = (folder, folder / _FOLDER)
    missing = {place: [name for name in _FILES if not (place / name).is_file()] for place in places}
    place = min(places, key=lambda place: len(missing[place]))
    if missing[place]:
        files = ", ".join(missing[place]) if len(missing[place]) < len(_FILES) else "files"
        raise DataError(f"data: found no {files} of STL-10 in {place}, expected those of {_FOLDER}.tar.gz")
    try:
        classes = tuple((place / _CLASSES).read_text(errors="replace").split())
        labels = [_labels(place / name.format("y"), classes) for name in (_TRAIN, _TEST)]
        train, test, unlabelled = (place / name.format("X") for name in (_TRAIN, _TEST, _UNLABELLED))
        images = [_images(*files) for files in ((train, unlabelled), (test,), (train,))]
    except OSError as error:
        raise DataError(f"data: cannot read {error.filename or place} ({error.strerror})") from error
    for file, found, expected in ((train, images[2], labels[0]), (test, images[1], labels[1])):
        if len(found) != len(expected):
            raise _wrong(file)
    return (
        ArraySplit(images[0], None, f"{place}/train+unlabeled"),
        ArraySplit(images[1], labels[1], f"{place}/test", classes),
        ArraySplit(images[2], labels[0], f"{place}/train", classes),
    )


def _images(*files: Path) -> MappedImages:
    counts = []
    for file in files:
        count, rest = divmod(file.stat().st_size, int(np.prod(_SHAPE)))
        if rest or not count:
            raise _wrong(file)
        counts.append((file, count))
    return MappedImages(counts, _SHAPE, (2, 1, 0))


def _labels(file: Path, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """Those of a file, which count from 1."""
    with file.open("rb") as opened:
        found = np.frombuffer(opened.read(file.stat().st_size), np.uint8).astype(np.int64) - 1
    if not len(found) or found.min() < 0 or found.max() >= len(classes):
        raise _wrong(file)
    return found


def _wrong(file: Path) -> DataError:
    return DataError(f"{file}: found another format or a damaged file, expected STL-10's images, labels and classes")
