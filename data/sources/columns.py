"""Tables of images: the options of their sources, the choice of columns, and labels as numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synco_fast.data.errors import DataError

__all__ = ["IMAGES", "LABELS", "NONE", "choose_column", "label_column", "number_labels", "split_options"]

#: Names of the columns, in order of preference.
IMAGES = ("image", "img", "bytes", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "labels", "class", "cls", "fine_label")
#: The value of an option that turns its part off.
NONE = "none"
_OPTION = re.compile(r"([a-z_]+)=(.*)", re.DOTALL)


def split_options(spec: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """A source's name and the options behind it: ``NAME,key=value,key=value``.

    A file or folder whose own name looks like that is taken as it is.

    Raises:
        DataError: An option is unknown, twice there, or empty.
    """
    options: dict[str, str] = {}
    rest = spec
    while not Path(rest).expanduser().exists():
        name, comma, last = rest.rpartition(",")
        found = _OPTION.fullmatch(last)
        if not comma or found is None:
            break
        key, value = found.groups()
        if key not in known or key in options or not value:
            allowed = ", ".join(f"{one}=..." for one in known)
            raise DataError(f"data: found {last!r} in {spec!r}, expected {allowed}, each once and not empty")
        options[key], rest = value, name
    return rest, options


def choose_column(names: Sequence[str], wanted: Sequence[str], chosen: str | None, where: object) -> str:
    """A column's name: ``chosen``, or the first of ``wanted`` that there is.

    Raises:
        DataError: There is no such column.
    """
    found = next((name for name in ([chosen] if chosen else wanted) if name in names), None)
    if found is None:
        expected = chosen or f"one of {', '.join(wanted)}, or image=COLUMN"
        raise DataError(f"data: found the columns {', '.join(names)} in {where}, expected {expected}")
    return found


def label_column(names: Sequence[str], chosen: str | None, where: object) -> str | None:
    """The column of the labels, or None without labels; ``chosen`` may be ``none``.

    Raises:
        DataError: The chosen column does not exist.
    """
    if chosen == NONE:
        return None
    if chosen is not None:
        return choose_column(names, (), chosen, where)
    return next((name for name in LABELS if name in names), None)


def number_labels(
    values: Sequence[Any], names: Sequence[str] | None, where: object
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as numbers of class names, and the names in label order.

    Args:
        values: Numbers or names, one a row.
        names: Class names by number, as in Hugging Face's ``ClassLabel``; without them, or where a number has no name,
            the classes are the distinct values in order.
        where: The set, for messages.

    Raises:
        DataError: A row has no label.
    """
    missing = next(
        (row for row, value in enumerate(values) if not isinstance(value, str | int | float) or value != value), None
    )
    if missing is not None:
        raise DataError(
            f"data: found {values[missing]!r} as the label of row {missing} in {where}, expected a class in every row; "
            "label=none reads without labels"
        )
    if names is not None and all(isinstance(value, int) and 0 <= value < len(names) for value in values):
        return np.array(values, dtype=np.int64), tuple(names)
    found = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    number = {value: place for place, value in enumerate(found)}
    return np.array([number[value] for value in values], dtype=np.int64), tuple(str(value) for value in found)
