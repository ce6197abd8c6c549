"""Walking a folder of images: regular files only, every folder once; counts what is not read."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from synco_fast.data.errors import DataError
from synco_fast.data.sources.decode import IMAGE_SUFFIXES
from synco_fast.data.sources.manifest import Manifest, PackedNames, Stamp, stamp_of

__all__ = ["is_image", "kind_of_file", "walk_folder"]

#: The classes of Tiny-ImageNet's validation images, which lie in one folder.
_ANNOTATIONS = "val_annotations.txt"


def is_image(name: str) -> bool:
    """Whether a file name is that of a readable image; hidden files are not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122


def kind_of_file(name: str) -> str:
    """The kind of a file that is not read: its suffix."""
    return os.path.splitext(name)[1].lower() or "without a suffix"  # noqa: PTH122


def walk_folder(root: Path) -> Manifest:
    """The images below a folder: one sub-folder per class, in order of name, or the images right inside it.

    A folder with nothing but `images/` and Tiny-ImageNet's file of their classes has these classes.

    Links are followed. A folder is read once, however many links lead to it, so that a loop of links ends. Pipes,
    devices and sockets are never opened. Hidden files and folders are skipped.

    Raises:
        DataError: The folder cannot be read, or Tiny-ImageNet's file lacks the class of an image.
    """
    walk = _Walk(root)
    names: list[str] = []
    labels: list[int] = []
    classes: list[str] = []
    try:
        files, folders = walk.enter("")
    except OSError as error:
        raise DataError(f"data: cannot read the folder {root} ({error.strerror})") from error
    for folder in folders:
        inside = walk.images(folder)
        if inside:
            names += inside
            labels += [len(classes)] * len(inside)
            classes.append(folder)
    annotations = root / _ANNOTATIONS
    if classes == ["images"] and not files and annotations.is_file():
        labels, classes = _annotated(annotations, names)
        walk.unread[annotations.suffix] -= 1
        walk.stamps[os.path.realpath(annotations)] = stamp_of(annotations.stat())
    if classes:
        walk.unread[f"image{'s' * (len(files) > 1)} outside the class folders"] += len(files)
        manifest = Manifest(PackedNames.pack(names), np.array(labels, dtype=np.int64), tuple(classes))
    else:
        manifest = Manifest(PackedNames.pack(files))
    manifest.stamps, manifest.unread = walk.stamps, {kind: count for kind, count in walk.unread.items() if count}
    return manifest


def _annotated(file: Path, names: list[str]) -> tuple[list[int], list[str]]:
    """The labels of some images, and the classes in order of name, by a file of `NAME TAB CLASS TAB ...` lines."""
    try:
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"data: cannot read {file} ({error.strerror})") from error
    listed = {name: label for name, label, *_ in (line.split("\t") for line in text.splitlines() if "\t" in line)}
    found = [listed.get(os.path.basename(name), "").strip() for name in names]  # noqa: PTH119
    if "" in found:
        raise DataError(f"data: found no class of {names[found.index('')]} in {file}, expected one of each image")
    classes = sorted(set(found))
    number = {name: place for place, name in enumerate(classes)}
    return [number[name] for name in found], classes


class _Walk:
    """One walk.

    Attributes:
        stamps: The stamp of every folder that was read, by path.
        unread: Number of files that are not read, by kind.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: set[tuple[int, int]] = set()
        self.stamps: dict[str, Stamp] = {}
        self.unread: Counter[str] = Counter()

    def enter(self, folder: str) -> tuple[list[str], list[str]]:
        """Sorted names of the images and folders directly inside a folder.

        Args:
            folder: Its path below the root; "" for the root.

        Raises:
            OSError: It cannot be read.
        """
        path = os.path.join(self._root, folder) if folder else os.fspath(self._root)  # noqa: PTH118 - a million files
        about = os.stat(path)  # noqa: PTH116
        if (about.st_dev, about.st_ino) in self._seen:
            self.unread["link to a folder that is read already"] += 1
            return [], []
        files, folders = [], []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                kind = _kind(entry)
                if kind == "folder":
                    folders.append(entry.name)
                elif kind == "file" and is_image(entry.name):
                    files.append(entry.name)
                else:
                    self.unread[kind_of_file(entry.name) if kind == "file" else kind] += 1
        self._seen.add((about.st_dev, about.st_ino))
        self.stamps[os.path.realpath(path)] = stamp_of(about)
        return sorted(files), sorted(folders)

    def images(self, folder: str) -> list[str]:
        """Paths of the images at any depth of a folder, relative to the root."""
        found: list[str] = []
        waiting = [folder]
        while waiting:
            inside = waiting.pop()
            try:
                files, folders = self.enter(inside)
            except OSError:
                self.unread["folder that cannot be read"] += 1
                continue
            found += [os.path.join(inside, name) for name in files]  # noqa: PTH118
            waiting += [os.path.join(inside, name) for name in reversed(folders)]  # noqa: PTH118
        return found


def _kind(entry: os.DirEntry[str]) -> str:
    """The kind of a link or a folder's entry."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "pipe or device" if os.path.exists(entry.path) else "broken link"  # noqa: PTH110
    except OSError:  # a link to itself
        return "broken link"
