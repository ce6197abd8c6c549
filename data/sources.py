"""Where images come from: folders, gzipped IDX files, and the embedded demo set.

A source has a `train` split and, where there is one, a held-out `validation` split. A split yields RGB images and
labels by number and knows nothing of augmentation. A new kind of source is one function here that returns a `Source`,
and its prefix in `open_source`.
"""

from __future__ import annotations

import gzip
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from synco_fast.data.demo import make_demo
from synco_fast.data.errors import BrokenImageError, DataError

__all__ = ["IMAGE_SUFFIXES", "ArraySplit", "FolderSplit", "Source", "Split", "open_source", "read_image"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})


class Split(Protocol):
    """A numbered set of images."""

    classes: tuple[str, ...] | None
    labels: NDArray[np.int64] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a message: its path, or file and number."""
        ...

    def read(self, index: int) -> Image.Image:
        """The image in mode RGB.

        Raises:
            BrokenImageError: It cannot be decoded.
        """
        ...


@dataclass(frozen=True)
class Source:
    """Images to train on and, where the source holds them apart, images to evaluate on."""

    spec: str
    train: Split
    validation: Split | None


def read_image(file: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file to RGB, upright.

    Greyscale, palette, CMYK and transparent images are converted; 16-bit ones keep their upper eight bits; the EXIF
    orientation is applied.

    Raises:
        BrokenImageError: The file is empty, cut short, no image, or larger than Pillow's safety limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as opened:
                opened.load()
                image: Image.Image = ImageOps.exif_transpose(opened)
                if image.mode.startswith(("I", "F")):
                    return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
                if image.mode in ("P", "PA", "LA", "La"):
                    image = image.convert("RGBA")
                return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds, down to SyntaxError for a broken PNG
        size = Path(file).stat().st_size if Path(file).exists() else None
        reason = "the file has no bytes" if size == 0 else (str(error) or type(error).__name__).replace(str(file), "it")
        raise BrokenImageError(f"{file}: {reason}") from error


def _eight_bits(pixels: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Single-channel pixels of 16 or 32 bits, or floats, as eight bits: whole numbers by their 16-bit scale."""
    values = pixels.astype(np.float64)
    if np.issubdtype(pixels.dtype, np.floating) and values.size and values.max() <= 1:
        values = values * 65535
    return (values.clip(0, 65535) / 257).round().astype(np.uint8)


class FolderSplit:
    """Image files below a folder: one sub-folder a class, or files without classes.

    Args:
        root: The folder. Where it has sub-folders with images, each is a class, in order of name; otherwise the images
            right inside it form a split without labels.
        classes: The class names that must be found, in label order; by default those that are there.

    Raises:
        DataError: There is no such folder, it holds no image, or its classes are not ``classes``.
    """

    def __init__(self, root: str | os.PathLike[str], classes: tuple[str, ...] | None = None) -> None:
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"data: found no folder {root}")
        by_class = {
            folder.name: _image_files(folder)
            for folder in sorted(root.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
        }
        by_class = {name: files for name, files in by_class.items() if files}
        flat = [file for file in sorted(root.iterdir()) if _is_image(file)]
        self.labels: NDArray[np.int64] | None = None
        self.classes: tuple[str, ...] | None = None
        if by_class:
            self.classes = classes or tuple(by_class)
            unknown = sorted(set(by_class) - set(self.classes))
            if unknown:
                raise DataError(f"data: found the class {unknown[0]} in {root}, which the training images do not have")
            files = [(file, self.classes.index(name)) for name, inside in by_class.items() for file in inside]
            self.files = [file for file, _ in files]
            self.labels = np.array([label for _, label in files], dtype=np.int64)
        elif flat:
            self.files = [os.fspath(file) for file in flat]
        else:
            raise DataError(f"data: found no image in {root}, allowed files named {', '.join(sorted(IMAGE_SUFFIXES))}")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The file's path."""
        return self.files[index]

    def read(self, index: int) -> Image.Image:
        """The decoded file; see `read_image`."""
        return read_image(self.files[index])


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def _image_files(folder: Path) -> list[str]:
    found = []
    for inside, folders, names in os.walk(folder):
        folders.sort()
        found += [
            os.path.join(inside, name)  # noqa: PTH118 - a million files: strings, not Path objects
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")  # noqa: PTH122
        ]
    return found


class ArraySplit:
    """Images held in memory.

    Args:
        images: uint8, (n, height, width) or (n, height, width, 3).
        labels: int64, (n,), or None.
        title: What a message calls the set.
        classes: Class names, by default the numbers.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64] | None,
        title: str,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.images, self.labels, self.title = images, labels, title
        if classes is None and labels is not None:
            classes = tuple(str(label) for label in range(int(labels.max()) + 1))
        self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The set's title and the image's number."""
        return f"{self.title}[{index}]"

    def read(self, index: int) -> Image.Image:
        """The image in mode RGB."""
        return Image.fromarray(self.images[index]).convert("RGB")


def _read_idx(folder: Path, stem: str, dimensions: int) -> NDArray[np.uint8]:
    """An array of unsigned bytes in the IDX format (the layout that MNIST introduced), plain or gzipped."""
    file = next((path for path in (folder / f"{stem}.gz", folder / stem) if path.is_file()), None)
    if file is None:
        raise DataError(f"data: found no {stem}.gz in {folder}")
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        kind, rank = struct.unpack(">HBB", content[:4])[1:]
        shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    except (OSError, EOFError, struct.error) as error:
        raise DataError(f"{file}: found a broken IDX file ({error})") from error
    if kind != 8 or rank != dimensions or values.size != np.prod(shape):
        raise DataError(f"{file}: found no IDX file of unsigned bytes in {dimensions} dimensions, or one cut short")
    return values.reshape(shape)


def open_idx(folder: str | os.PathLike[str]) -> Source:
    """MNIST-like IDX files: ``train-images-idx3-ubyte``, ``t10k-images-idx3-ubyte`` and their labels.

    Raises:
        DataError: A file is missing or broken, or images and labels differ in number.
    """
    folder = Path(folder)
    splits = []
    for prefix in ("train", "t10k"):
        images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1).astype(np.int64)
        if len(images) != len(labels):
            raise DataError(f"{folder}: found {len(images)} {prefix} images and {len(labels)} labels")
        splits.append(ArraySplit(images, labels, f"{folder}/{prefix}"))
    return Source(f"idx:{folder}", *splits)


def open_folder(folder: str | os.PathLike[str]) -> Source:
    """A folder laid out like ImageNet's (``train/CLASS/*``, ``val/CLASS/*``), or one of images alone.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    root = Path(folder).expanduser()
    if not (root / "train").is_dir():
        return Source(os.fspath(root), FolderSplit(root), None)
    train = FolderSplit(root / "train")
    held_out = next((root / name for name in ("val", "validation", "test") if (root / name).is_dir()), None)
    return Source(os.fspath(root), train, FolderSplit(held_out, train.classes) if held_out else None)


def demo_folder() -> Path:
    """Where the demo set is kept: below the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "synco-fast" / "demo"


def open_source(spec: str) -> Source:
    """Open a source by what a person writes after ``--data``.

    Args:
        spec: A folder; ``idx:FOLDER`` for IDX files; ``demo`` for the embedded set, drawn on first use.

    Raises:
        DataError: There is nothing to read there, or the prefix is unknown.
    """
    if spec == "demo":
        return open_folder(make_demo(demo_folder()))
    prefix, colon, rest = spec.partition(":")
    if colon and prefix == "idx":
        return open_idx(Path(rest).expanduser())
    if colon and not Path(spec).exists():
        raise DataError(f"data: found the source {spec!r}, allowed a folder, idx:FOLDER or demo")
    return open_folder(spec)
