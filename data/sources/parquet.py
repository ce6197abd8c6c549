"""Images in Parquet files, as on the Hugging Face Hub: a column of encoded images, and one of labels."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from synco_fast.data.errors import CorruptImageError, DataError, one_line
from synco_fast.data.sources.columns import IMAGES, choose_column, label_column, number_labels
from synco_fast.data.sources.decode import LIMITS, Limits
from synco_fast.data.sources.splits import Split, map_labels

__all__ = ["ParquetSplit", "find_parquet"]

#: Files that one process keeps open.
_OPEN_FILES = 16
#: Mean size of a row group in bytes above which a note says that random reads are slow.
_LARGE_GROUP = 1 << 20
_REASON = 200


class _ChangedError(DataError):
    """A file is another one than before."""


class ParquetSplit(Split):
    """The images of some Parquet files, in order of file and row.

    Only the files' footers and the labels are read at first. A row group is decompressed as a whole and the last one is
    kept, so reading in order is fast and random reads are slow: pack such a source before training
    (``synco-fast data pack``). Each worker process opens the files for itself.

    Args:
        files: Parquet files with the same columns: images as bytes, or as a struct with the field ``bytes``, and labels
            as numbers or names where there are any.
        classes: The expected class names, in label order; by default the file's own (Hugging Face's ``ClassLabel``), or
            the labels found.
        title: The set's name in messages.
        limits: Size limits of an image.
        image, label: Names of the columns; by default the first known names. ``none`` for no labels.

    Raises:
        DataError: pyarrow is not installed, a file is not Parquet or lacks a column, or a row has no label.
    """

    def __init__(
        self,
        files: list[Path],
        classes: tuple[str, ...] | None = None,
        title: str = "parquet",
        limits: Limits = LIMITS,
        *,
        image: str | None = None,
        label: str | None = None,
    ) -> None:
        if not files:
            raise DataError(f"data: found no *.parquet in {title}")
        self._files, self.limits = [os.fspath(file) for file in files], limits
        self._group: tuple[int, Any] | None = None
        self._opened: dict[int, Any] = {}
        #: Rows and bytes of each row group of each file.
        self._contents: dict[int, list[tuple[int, int]]] = {}
        schema = self._open(0).schema_arrow
        self._column = choose_column(schema.names, IMAGES, image, files[0])
        labels = label_column(schema.names, label, files[0])
        rows: list[int] = []
        values: list[Any] = []
        size = 0
        self._groups: list[tuple[int, int]] = []
        for number, file in enumerate(files):
            table = self._open(number)
            for name in (self._column, *([labels] if labels else [])):
                choose_column(table.schema_arrow.names, (), name, file)
            groups = [table.metadata.row_group(group) for group in range(table.num_row_groups)]
            self._groups += [(number, group) for group in range(len(groups))]
            rows += [group.num_rows for group in groups]
            size += sum(group.total_byte_size for group in groups)
            if labels is not None:
                values += _values(table, labels, file)
        self._ends = np.cumsum(rows, dtype=np.int64)
        counts = np.bincount([number for number, _ in self._groups], weights=rows, minlength=len(files))
        self._starts = np.cumsum([0, *counts]).astype(np.int64)
        #: Mean bytes of a row group, unpacked.
        self.group_bytes = size / max(1, len(rows))
        self.labels, self.classes = None, None
        if labels is not None:
            found = number_labels(values, _names(schema, labels), title)
            self.labels, self.classes = map_labels(*found, classes, title)
        if not len(self):
            raise DataError(f"data: found no row in {title}")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def note(self) -> str | None:
        """A warning where random reads are slow."""
        if self.group_bytes < _LARGE_GROUP:
            return None
        return (
            f"each image read in random order unpacks a row group of {self.group_bytes / 2**20:,.0f} MiB; "
            "'synco-fast data pack' makes shards with fast random reads"
        )

    def name(self, index: int) -> str:
        """File and row."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._files[number]}[{index - int(self._starts[number])}]"

    def read_bytes(self, index: int) -> bytes:
        """The bytes in the image column.

        Raises:
            CorruptImageError: The row group cannot be read, or the row holds no bytes.
            DataError: The file was replaced by another since the rows were counted.
        """
        group = int(np.searchsorted(self._ends, index, side="right"))
        try:
            if self._group is None or self._group[0] != group:
                number, inside = self._groups[group]
                self._group = group, self._open(number).read_row_group(inside, [self._column]).column(0)
            value = self._group[1][index - (int(self._ends[group - 1]) if group else 0)].as_py()
        except _ChangedError:
            raise
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are subclasses of these
            raise CorruptImageError(f"{self.name(index)}: {error}") from error
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise CorruptImageError(f"{self.name(index)}: found no bytes in the column {self._column}")
        self.limits.check_size(len(content), self.name(index))
        return content

    def _open(self, number: int) -> Any:
        """An open file; the last few are kept.

        Raises:
            DataError: It cannot be read, or holds other row groups than when it was opened first.
        """
        if number not in self._opened:
            if len(self._opened) >= _OPEN_FILES:
                self._opened.pop(next(iter(self._opened))).close()
            opened = _open_file(Path(self._files[number]))
            groups = [opened.metadata.row_group(group) for group in range(opened.num_row_groups)]
            content = [(group.num_rows, group.total_byte_size) for group in groups]
            if self._contents.setdefault(number, content) != content:
                raise _ChangedError(
                    f"data: found {self._files[number]} changed since its rows were counted, expected the same file "
                    "until the end of the run; start again"
                )
            self._opened[number] = opened
        return self._opened[number]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": {}, "_group": None}


def _open_file(file: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        message = "data: found no pyarrow, which parquet: needs; pip install 'synco-fast[embed]'"
        raise DataError(message) from error
    if not file.is_file():  # a pipe would be waited for, and a device has no end
        raise DataError(f"data: found no regular file at {file}, expected a Parquet file")
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"data: found no readable Parquet file at {file} ({error})") from error


def _values(table: Any, column: str, file: Path) -> list[Any]:
    try:
        found: list[Any] = table.read([column]).column(0).to_pylist()
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"data: cannot read the column {column} of {file} ({one_line(error, _REASON)})") from error
    return found


def _names(schema: Any, label: str) -> list[str] | None:
    """The class names of Hugging Face's description, if there is one."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        return [str(name) for name in about["info"]["features"][label]["names"]]
    except (KeyError, ValueError, TypeError):
        return None


def find_parquet(spec: str) -> list[Path]:
    """The Parquet files that a folder holds at any depth, or that a pattern such as ``data/train-*.parquet`` names.

    ``**`` in a pattern stands for any number of folders.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        # Some programs write a folder of that name; those of macOS put a file ._NAME beside NAME on other disks.
        return sorted(file for file in path.rglob("*.parquet") if not file.name.startswith(".") and not file.is_dir())
    if path.is_file():  # its name may have brackets
        return [path]
    return sorted(Path(name) for name in glob.glob(os.fspath(path), recursive=True))  # noqa: PTH207 - may be absolute
