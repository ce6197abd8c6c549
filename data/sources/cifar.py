"""CIFAR-10 and CIFAR-100 as they are published: pickled batches (the Python version), or binary files."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from synco_fast.data.errors import DataError
from synco_fast.data.sources.splits import ArraySplit

__all__ = ["load_cifar"]

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
#: Larger files are none of CIFAR's, whose largest has 155 MB.
_LARGEST = 1 << 30
#: All that CIFAR's pickles refer to. Others could run any code.
_ALLOWED = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


class _Version(NamedTuple):
    """The files of a version.

    Attributes:
        folder: The folder in the archive.
        train, test, names: Files of the splits, and of the class names.
        labels, classes: Keys of the labels and of the class names in pickles.
        skip: In binary files, the bytes of coarse labels before a label.
    """

    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    labels: str = ""
    classes: str = ""
    skip: int = 0


_FIVE = tuple(f"data_batch_{number}" for number in range(1, 6))
_VERSIONS = (
    _Version("cifar-10-batches-py", _FIVE, "test_batch", "batches.meta", "labels", "label_names"),
    _Version("cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names"),
    _Version("cifar-10-batches-bin", tuple(f"{name}.bin" for name in _FIVE), "test_batch.bin", "batches.meta.txt"),
    _Version("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", skip=1),
)


def load_cifar(folder: Path) -> tuple[ArraySplit, ArraySplit]:
    """The training and the test images of CIFAR-10 or CIFAR-100, the latter with its 100 fine classes.

    Args:
        folder: The unpacked folder, or the one around it.

    Raises:
        DataError: A file is missing, or is not CIFAR's. Of a pickle only numbers, text and arrays are read.
    """
    found = next(
        (
            (version, place)
            for version in _VERSIONS
            for place in (folder, folder / version.folder)
            if all((place / name).is_file() for name in (*version.train, version.test, version.names))
        ),
        None,
    )
    if found is None:
        known = ", ".join(version.folder for version in _VERSIONS)
        raise DataError(f"data: found no files of CIFAR in {folder}, expected those of {known}")
    version, place = found
    if version.labels:
        classes = _unpickle(place / version.names).get(version.classes)
    else:
        classes = (place / version.names).read_text(errors="replace").split()
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise _wrong(place / version.names)
    train, test = (
        _split([place / name for name in names], version, tuple(classes)) for names in (version.train, (version.test,))
    )
    return train, test


def _split(files: list[Path], version: _Version, classes: tuple[str, ...]) -> ArraySplit:
    read = [_read_pickle(file, version) if version.labels else _read_binary(file, version) for file in files]
    for file, (rows, labels) in zip(files, read, strict=True):
        if not len(rows) or labels.shape != (len(rows),) or labels.min() < 0 or labels.max() >= len(classes):
            raise _wrong(file)
    rows = np.concatenate([rows for rows, _ in read])
    images = np.ascontiguousarray(rows.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))
    labels = np.concatenate([labels for _, labels in read])
    return ArraySplit(images, labels, str(files[0] if len(files) == 1 else files[0].parent), classes)


def _read_pickle(file: Path, version: _Version) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    batch = _unpickle(file)
    rows, labels = batch.get("data"), batch.get(version.labels)
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != _PIXELS:
        raise _wrong(file)
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise _wrong(file)
    return rows, np.array(labels, dtype=np.int64)


def _read_binary(file: Path, version: _Version) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = np.frombuffer(_read(file), np.uint8)
    width = version.skip + 1 + _PIXELS
    if len(content) % width:
        raise _wrong(file)
    rows = content.reshape(-1, width)
    return rows[:, version.skip + 1 :], rows[:, version.skip].astype(np.int64)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _unpickle(file: Path) -> dict[str, Any]:
    try:
        # Python 2 wrote them, whose text and bytes are one type.
        found = _Unpickler(io.BytesIO(_read(file)), encoding="latin1").load()
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises many kinds
        raise _wrong(file) from error
    if not isinstance(found, dict):
        raise _wrong(file)
    return found


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > _LARGEST:
            raise _wrong(file)
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"data: cannot read {file} ({error.strerror})") from error


def _wrong(file: Path) -> DataError:
    return DataError(f"{file}: found another format or a damaged file, expected CIFAR's images, labels and classes")
