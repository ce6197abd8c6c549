"""Images in datasets of Hugging Face's ``datasets`` library: saved in a folder, or from the Hub by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from synco_fast.data.errors import CorruptImageError, DataError, one_line
from synco_fast.data.sources.columns import IMAGES, NONE, choose_column, label_column, number_labels
from synco_fast.data.sources.decode import LIMITS, Limits
from synco_fast.data.sources.splits import Split, map_labels, read_file

__all__ = ["OPTIONS", "HfSplit", "load_hf"]

#: Names of the held-out split, in order of preference.
_HELD_OUT = ("validation", "valid", "val", "dev", "test")
#: Options behind the name.
OPTIONS = ("train", "validation", "image", "label", "config")
_REASON = 240


class HfSplit(Split):
    """One split of a dataset. Its Arrow files are memory-mapped, so random reads are fast and workers share the memory.

    Args:
        rows: A `datasets.Dataset`.
        classes: The expected class names, in label order; by default those of the label's ``ClassLabel``, or the labels
            found.
        title: The split's name in messages.
        limits: Size limits of an image.
        image, label: Names of the columns; by default the first column of type ``Image`` or of a known name, and the
            first of type ``ClassLabel`` or of a known name. ``none`` for no labels.

    Raises:
        DataError: There is no such column, no row, or a row has no label.
    """

    def __init__(
        self,
        rows: Any,
        classes: tuple[str, ...] | None = None,
        title: str = "hf",
        limits: Limits = LIMITS,
        *,
        image: str | None = None,
        label: str | None = None,
    ) -> None:
        import datasets

        features: Mapping[str, Any] = rows.features
        self._title, self.limits = title, limits
        pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        self._column = choose_column([*features], [*pictures, *IMAGES], image, title)
        named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        labels = named[0] if named and label is None else label_column([*features], label, title)
        if not len(rows):
            raise DataError(f"data: found no row in {title}")
        self.labels, self.classes = None, None
        if labels is not None:
            names = features[labels].names if isinstance(features[labels], datasets.ClassLabel) else None
            values = rows.with_format(None).select_columns([labels])[:][labels]
            self.labels, self.classes = map_labels(*number_labels(values, names, title), classes, title)
        images = rows.with_format(None).select_columns([self._column])
        if self._column in pictures:
            images = images.cast_column(self._column, datasets.Image(decode=False))
        self._rows = images

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """The split and the number of the row."""
        return f"{self._title}[{index}]"

    def read_bytes(self, index: int) -> bytes:
        """The bytes of the image, from the row or from the file that the row names.

        Raises:
            CorruptImageError: There are none, or they cannot be read.
        """
        try:
            value = self._rows[index][self._column]
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are subclasses of these
            raise CorruptImageError(f"{self.name(index)}: {error}") from error
        if isinstance(value, Mapping):
            content, path = value.get("bytes"), value.get("path")
            if content is None and isinstance(path, str):
                return read_file(path, self.limits)
            value = content
        if not isinstance(value, bytes):
            raise CorruptImageError(f"{self.name(index)}: found no bytes in the column {self._column}")
        self.limits.check_size(len(value), self.name(index))
        return value


def load_hf(name: str, options: Mapping[str, str], limits: Limits = LIMITS) -> tuple[HfSplit, HfSplit | None]:
    """The training split and, if there is one, the held-out split of a dataset.

    Args:
        name: A folder that ``save_to_disk`` wrote, a folder of images or Parquet files, or a name on the Hub, for which
            the library's cache is enough.
        options: ``train`` and ``validation``: names of the splits, ``none`` for no held-out one; ``image`` and
            ``label``: names of the columns; ``config``: the dataset's configuration on the Hub.
        limits: Size limits of an image.

    Raises:
        DataError: The library is not installed, the dataset cannot be loaded, or has no such split or column.
    """
    title = f"hf:{name}"
    splits = _load(name, options.get("config"))
    known = [*splits]
    train = options.get("train") or ("train" if "train" in splits or len(splits) > 1 else known[0])
    held_out = options.get("validation")
    for chosen in (train, held_out):
        if chosen not in (None, NONE, *known):
            raise DataError(
                f"data: found the splits {', '.join(known)} in {title}, expected {chosen}; choose by "
                f"hf:{name},train=SPLIT,validation=SPLIT"
            )

    def opened(split: str, classes: tuple[str, ...] | None) -> HfSplit:
        where = f"{title}/{split}"
        return HfSplit(splits[split], classes, where, limits, image=options.get("image"), label=options.get("label"))

    first = opened(train, None)
    if held_out is not None:
        return first, None if held_out == NONE else opened(held_out, first.classes)
    for candidate in _HELD_OUT:
        if candidate in splits and candidate != train:
            # The labels of a test set may be kept secret: -1, or none at all.
            with suppress(DataError):
                second = opened(candidate, first.classes)
                if first.labels is None or second.labels is not None:
                    return first, second
    return first, None


def _load(name: str, config: str | None) -> Mapping[str, Any]:
    """The splits of a dataset by name."""
    try:
        # By name: a folder "datasets" in the working directory can be imported too, without the library.
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise DataError("data: found no datasets, which hf: needs; pip install 'synco-fast[hf]'") from error
    path = Path(name).expanduser()
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise DataError(f"data: found no folder {path}, expected one or a name on the Hub behind hf:")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = load_from_disk(os.fspath(path))
        else:
            found = load_dataset(os.fspath(path) if path.exists() else name, config)
    except Exception as error:  # of the network, of the cache, of the files: many kinds
        where = "a folder" if path.exists() else "a name on the Hub within reach, or one in the library's cache"
        raise DataError(f"data: cannot load hf:{name} ({one_line(error, _REASON)}), expected {where}") from error
    return found if isinstance(found, Mapping) else {"train": found}
