"""The layout of a source: which of its files are training images, and which are held out, by their names."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["HELD_OUT", "TRAIN", "fixed_folder", "list_unread", "names_a_split", "split_of", "split_shards"]

TRAIN = "train"
HELD_OUT = ("val", "valid", "validation", "dev", "test")
"""Names of a held-out split, in order of preference."""
#: Runs of letters, since numbers stand right behind a name, as in ``val2017``.
_WORD = re.compile(r"[^\W\d_]+")
_TRAIN_WORD = re.compile(r"train(ing|val)?(set)?")
_HELD_OUT_WORD = re.compile(rf"({'|'.join(HELD_OUT)})(set)?")
#: Names in a note.
_NAMED = 3


def split_of(parts: Sequence[str]) -> str | None:
    """The split that the names of a file and of the folders around it tell: `TRAIN`, one of `HELD_OUT`, or None.

    Args:
        parts: From the outermost folder to the file, without its suffix. The innermost name that has the word of a
            split decides; one with words of both kinds, such as ``train-test-split``, tells nothing.
    """
    for part in reversed(parts):
        words = _WORD.findall(part.lower())
        held_out = [found[1] for found in map(_HELD_OUT_WORD.fullmatch, words) if found]
        train = any(map(_TRAIN_WORD.fullmatch, words))
        if train != bool(held_out):
            return TRAIN if train else held_out[0]
    return None


def names_a_split(name: str) -> bool:
    """Whether all words of a name are those of splits, as in ``val2017``."""
    words = _WORD.findall(name.lower())
    return bool(words) and all(_TRAIN_WORD.fullmatch(word) or _HELD_OUT_WORD.fullmatch(word) for word in words)


def split_shards(root: Path) -> tuple[list[Path], list[Path], list[str]]:
    """The training shards of a folder, those held out, and the names of the tar files that are neither.

    The folder of a split comes before shards with its name. Shards without the name of a split are training images
    where none has that name. No shard is in both splits.
    """
    by_name = _named(_shards(root, "*.tar"))

    def chosen(split: str) -> list[Path]:
        return _shards(root / split, "*.tar") or by_name.get(split, [])

    train = chosen(TRAIN) or by_name.get(None, [])
    held_out = next((found for found in map(chosen, HELD_OUT) if found), [])
    if not train:
        train, held_out = held_out, []
    read = {*train, *held_out}
    names = [path.name for path in _shards(root, "*.tar") if path not in read]
    folders = dict.fromkeys(f"{path.parent.name}/" for path in _shards(root, "*/*.tar") if path not in read)
    return train, held_out, [*folders, *names]


def _shards(root: Path, pattern: str) -> list[Path]:
    """Files that match, without hidden ones, such as those that macOS puts beside others on a foreign disk."""
    return sorted(path for path in root.glob(pattern) if not path.name.startswith("."))


def _named(shards: list[Path]) -> dict[str | None, list[Path]]:
    """Shards by the split that their names tell."""
    splits = [split_of([shard.stem]) for shard in shards]
    if not any(splits) and any(TRAIN in shard.stem for shard in shards):
        # Words that are joined to others, as in imagenettrain-000.tar.
        splits = [next((word for word in (TRAIN, *HELD_OUT) if word in shard.stem), None) for shard in shards]
    found: dict[str | None, list[Path]] = {}
    for split, shard in zip(splits, shards, strict=True):
        found.setdefault(split, []).append(shard)
    return found


def fixed_folder(pattern: str) -> Path:
    """The folder of a pattern before its first wildcard, or the pattern itself if it is a folder."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        return path
    while glob.has_magic(str(path)):
        path = path.parent
    return path if path.is_dir() else path.parent


def list_unread(names: Iterable[str]) -> str | None:
    """The first few of some names that are not read, and how many more there are; None without any."""
    names = [*names]
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"not read: {', '.join(names[:_NAMED])}{more}" if names else None
