"""Images of one size in files without headers, memory-mapped: no process holds a copy, and workers share the pages."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MappedImages"]


class MappedImages:
    """Images in files, one file after the other; of a NumPy array it has what `ArraySplit` asks for.

    A number gives an image, which is a view of its file. A slice or an array of numbers gives another `MappedImages`,
    without reading; `numpy.asarray` reads. A pickle holds the names of the files alone.

    Args:
        files: Each file, and the number of its images.
        stored: Shape of an image in a file, uint8.
        axes: Which axes of that become height, width and channels.

    Raises:
        OSError: A file cannot be mapped.
    """

    def __init__(
        self, files: Sequence[tuple[Path, int]], stored: tuple[int, int, int], axes: tuple[int, int, int]
    ) -> None:
        self._files, self._stored, self._axes = tuple(files), stored, axes
        self._ends = np.cumsum([count for _, count in self._files])
        self._rows = np.arange(self._ends[-1])
        self._parts = self._map()

    def _map(self) -> list[NDArray[np.uint8]]:
        axes = (0, *(axis + 1 for axis in self._axes))
        return [
            np.memmap(file, np.uint8, "r", shape=(count, *self._stored)).view(np.ndarray).transpose(axes)
            for file, count in self._files
        ]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Images, height, width, channels."""
        return (len(self), *(self._stored[axis] for axis in self._axes))

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        return int(np.prod(self.shape))

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice | np.ndarray):
            row = self._rows[operator.index(key)]
            part = int(np.searchsorted(self._ends, row, side="right"))
            return self._parts[part][row - self._ends[part]]  # from the end of the file: a negative number
        chosen = object.__new__(MappedImages)
        chosen.__dict__.update(self.__dict__, _rows=self._rows[key])
        return chosen

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("copy: found False, expected True or None: the images lie in files")
        found = np.empty(self.shape, np.uint8)
        parts = np.searchsorted(self._ends, self._rows, side="right")
        for number, part in enumerate(self._parts):
            here = np.flatnonzero(parts == number)
            found[here] = part[self._rows[here] - self._ends[number]]
        return found if dtype is None else found.astype(dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_parts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._parts = self._map()
