"""Images in Parquet files, as on the Hugging Face Hub: a column of encoded images, and one of labels."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synco_fast.data.errors import CorruptImageError, DataError
from synco_fast.data.sources.decode import LIMITS, Limits, decode_image
from synco_fast.data.sources.splits import map_labels

__all__ = ["ParquetSplit", "find_parquet"]

#: Names of the columns, in order of preference.
_IMAGES = ("image", "img", "bytes", "jpg", "jpeg", "png", "webp")
_LABELS = ("label", "labels", "class", "cls", "fine_label")


class ParquetSplit:
    """The images of some Parquet files, in order of file and row.

    A row group is decompressed as a whole and the last one is kept, so reading in order is fast and random reads are
    slow: pack such a source before training (``synco-fast data pack``).

    Args:
        files: Parquet files with the same columns: images as bytes, or as a struct with the field ``bytes``, and labels
            as numbers or names where there are any.
        classes: The expected class names, in label order; by default the file's own (Hugging Face's ``ClassLabel``), or
            the labels found.
        title: The set's name in messages.
        limits: Size limits of an image.

    Raises:
        DataError: pyarrow is not installed, a file is not Parquet, or no column holds images.
    """

    def __init__(
        self, files: list[Path], classes: tuple[str, ...] | None = None, title: str = "parquet", limits: Limits = LIMITS
    ) -> None:
        if not files:
            raise DataError(f"data: found no *.parquet in {title}")
        self._files, self.limits = [os.fspath(file) for file in files], limits
        self._group: tuple[int, Any] | None = None
        self._opened: dict[int, Any] = {}
        tables = [self._open(number) for number in range(len(files))]
        schema = tables[0].schema_arrow
        self._column = _find(schema.names, _IMAGES, files[0])
        label = next((name for name in _LABELS if name in schema.names), None)
        rows = [
            (number, group, table.metadata.row_group(group).num_rows)
            for number, table in enumerate(tables)
            for group in range(table.num_row_groups)
        ]
        self._groups = [(number, group) for number, group, _ in rows]
        self._ends = np.cumsum([count for _, _, count in rows], dtype=np.int64)
        self._starts = np.cumsum([0, *(table.metadata.num_rows for table in tables)], dtype=np.int64)
        self.labels, self.classes = None, None
        if label is not None:
            values = [value for table in tables for value in table.read([label]).column(0).to_pylist()]
            self.labels, self.classes = map_labels(*_classes(values, schema, label), classes, title)
        if not len(self):
            raise DataError(f"data: found no row in {title}")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, index: int) -> str:
        """File and row."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._files[number]}[{index - int(self._starts[number])}]"

    def read_bytes(self, index: int) -> bytes:
        """The bytes in the image column.

        Raises:
            CorruptImageError: The row group cannot be read, or the row holds no bytes.
        """
        group = int(np.searchsorted(self._ends, index, side="right"))
        try:
            if self._group is None or self._group[0] != group:
                number, inside = self._groups[group]
                self._group = group, self._open(number).read_row_group(inside, [self._column]).column(0)
            value = self._group[1][index - (int(self._ends[group - 1]) if group else 0)].as_py()
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are subclasses of these
            raise CorruptImageError(f"{self.name(index)}: {error}") from error
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise CorruptImageError(f"{self.name(index)}: found no bytes in the column {self._column}")
        self.limits.check_size(len(content), self.name(index))
        return content

    def read(self, index: int) -> Image.Image:
        """The decoded image; see `decode_image`."""
        return decode_image(self.read_bytes(index), self.name(index), self.limits)

    def _open(self, number: int) -> Any:
        if number not in self._opened:
            try:
                from pyarrow import parquet
            except ImportError as error:
                message = "data: found no pyarrow, which parquet: needs; pip install 'synco-fast[embed]'"
                raise DataError(message) from error
            if not Path(self._files[number]).is_file():  # a pipe would be waited for, and a device has no end
                raise DataError(f"data: found no regular file at {self._files[number]}, expected a Parquet file")
            try:
                self._opened[number] = parquet.ParquetFile(self._files[number])
            except (OSError, ValueError, NotImplementedError) as error:
                raise DataError(f"data: found no readable Parquet file at {self._files[number]} ({error})") from error
        return self._opened[number]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": {}, "_group": None}


def _find(names: list[str], wanted: tuple[str, ...], file: Path) -> str:
    found = next((name for name in wanted if name in names), None)
    if found is None:
        raise DataError(f"data: found the columns {', '.join(names)} in {file}, expected one of {', '.join(wanted)}")
    return found


def _classes(values: list[Any], schema: Any, label: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as numbers of class names."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names = tuple(str(name) for name in about["info"]["features"][label]["names"])
        numbers = np.array(values, dtype=np.int64)
        if not len(numbers) or (numbers.min() >= 0 and numbers.max() < len(names)):
            return numbers, names
    except (KeyError, ValueError, TypeError):
        pass
    found = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    number = {value: place for place, value in enumerate(found)}
    return np.array([number[value] for value in values], dtype=np.int64), tuple(str(value) for value in found)


def find_parquet(spec: str) -> list[Path]:
    """The Parquet files that a folder holds at any depth, or that a pattern such as ``data/train-*.parquet`` names."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return sorted(path.rglob("*.parquet"))
    return sorted(Path(name) for name in glob.glob(os.fspath(path)))  # noqa: PTH207 - the pattern may be absolute
