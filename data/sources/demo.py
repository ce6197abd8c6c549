"""The built-in demo images: eleven kinds of texture, generated and stored as JPEG files in class folders.

A class is only a pattern (upright stripes, slanted ones, checks, dots ...). Colours, scale, tilt, position, the shape
of the patch that carries it, background, lighting and clutter are drawn for every image. So neither colour nor position
tells the classes apart, and a network has to learn the texture. All patterns are regular, so that two views of an image
have in common what all images of its class have in common. An image has one hue, a dark and a light tone of it, which
hue jitter takes away. The layout is ImageNet's: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synco_fast.data.files import locked
from synco_fast.data.workers import start_worker

__all__ = ["CLASSES", "SIDE", "demo_image", "make_demo"]

Array = NDArray[np.float64]
#: Incremented when the images change, so that an older set on disk is not reused.
VERSION = 3
#: Image size in pixels, the same for all images, so that the set can be kept in memory and augmented in batches.
SIDE = 64
_CARD = "demo.json"
_OVERSAMPLE = 2
_LUMA = np.array([0.299, 0.587, 0.114])
#: How far the luma of an image's dark and light tone is from that of the set.
_TONE = 0.06


def _fraction(x: Array) -> Array:
    """Signed distance to the nearest whole number, in [-0.5, 0.5)."""
    return x - np.round(x)


def _rows(u: Array, v: Array, shift: float) -> tuple[Array, Array]:
    """Cell coordinates with every other row shifted, as in brickwork."""
    return _fraction(u + shift * (np.floor(v) % 2)), _fraction(v - 0.5)


def _stripes(u: Array, v: Array, rng: np.random.Generator) -> Array:
    return 0.25 - np.abs(_fraction(u))


def _bars(u: Array, v: Array, rng: np.random.Generator) -> Array:
    return _stripes(v, u, rng)


def _slants(u: Array, v: Array, rng: np.random.Generator) -> Array:
    return _stripes((u + v) / np.sqrt(2), v, rng)


def _diamonds(u: Array, v: Array, rng: np.random.Generator) -> Array:
    return _checks((u + v) / np.sqrt(2), (u - v) / np.sqrt(2), rng)


def _checks(u: Array, v: Array, rng: np.random.Generator) -> Array:
    return np.asarray(np.sin(np.pi * u) * np.sin(np.pi * v))


def _dots(u: Array, v: Array, rng: np.random.Generator) -> Array:
    x, y = _rows(u, v, 0.5)
    return rng.uniform(0.22, 0.3) - np.hypot(x, y)


def _rings(u: Array, v: Array, rng: np.random.Generator) -> Array:
    x, y = rng.uniform(-1, 1, 2)
    return 0.25 - np.abs(_fraction(np.hypot(u - x, v - y)))


def _zigzag(u: Array, v: Array, rng: np.random.Generator) -> Array:
    return 0.25 - np.abs(_fraction(u + rng.uniform(0.9, 1.3) * np.abs(_fraction(v / 1.5))))


def _bricks(u: Array, v: Array, rng: np.random.Generator) -> Array:
    x, y = _rows(u / 2, v, 0.5)
    return np.minimum(0.44 - np.abs(x), 0.38 - np.abs(y))


def _rays(u: Array, v: Array, rng: np.random.Generator) -> Array:
    x, y = rng.uniform(-1, 1, 2)
    return np.asarray(np.sin(rng.integers(9, 16) * np.arctan2(v - y, u - x)))


def _triangles(u: Array, v: Array, rng: np.random.Generator) -> Array:
    return np.asarray(u % 1 - v % 1)


Pattern = Callable[[Array, Array, np.random.Generator], Array]

#: A pattern is positive where its first colour shows. Arguments: cell coordinates, and the image's generator.
PATTERNS: dict[str, Pattern] = {
    "bars": _bars,
    "bricks": _bricks,
    "checks": _checks,
    "diamonds": _diamonds,
    "dots": _dots,
    "rays": _rays,
    "rings": _rings,
    "slants": _slants,
    "stripes": _stripes,
    "triangles": _triangles,
    "zigzag": _zigzag,
}
CLASSES: tuple[str, ...] = tuple(PATTERNS)


def demo_image(name: str, rng: np.random.Generator) -> Image.Image:
    """One image of class ``name``: RGB, `SIDE` pixels a side.

    Raises:
        KeyError: ``name`` is not one of `CLASSES`.
    """
    pattern = PATTERNS[name]
    width = height = SIDE
    y, x = np.mgrid[0 : height * _OVERSAMPLE, 0 : width * _OVERSAMPLE] / _OVERSAMPLE

    hue = rng.uniform(0, 2 * np.pi)
    canvas = _background(x, y, hue, rng)
    angle, cell = rng.uniform(-0.15, 0.15), rng.uniform(10, 14)
    u = ((x - width / 2) * np.cos(angle) - (y - height / 2) * np.sin(angle)) / cell + rng.uniform()
    v = ((x - width / 2) * np.sin(angle) + (y - height / 2) * np.cos(angle)) / cell + rng.uniform()
    dark, light = (_tint(hue, centre + rng.uniform(-_TONE, _TONE), rng) for centre in (0.27, 0.73))
    ink, paper = (dark, light) if rng.uniform() < 0.5 else (light, dark)
    texture = np.where((pattern(u, v, rng) > 0)[..., None], ink, paper)
    canvas = np.where(_patch(x, y, rng)[..., None], texture, canvas)
    for _ in range(rng.integers(0, 4)):
        canvas = _clutter(canvas, x, y, rng)

    shade = 1 + rng.uniform(-0.25, 0.25) * (x / width - 0.5) + rng.uniform(-0.25, 0.25) * (y / height - 0.5)
    canvas = canvas * shade[..., None]
    canvas = canvas.reshape(height, _OVERSAMPLE, width, _OVERSAMPLE, 3).mean(axis=(1, 3))
    canvas += rng.normal(0, rng.uniform(0, 0.04), canvas.shape)
    return Image.fromarray((canvas.clip(0, 1) * 255).round().astype(np.uint8))


def _tint(hue: float, luma: float, rng: np.random.Generator) -> Array:
    """A colour of this hue in radians and of this luma (ITU-R BT.601), before clipping; its saturation is drawn."""
    chroma = np.cos(hue - np.array([0, 2, 4]) * np.pi / 3) * rng.uniform(0.1, 0.35)
    return np.asarray((luma + chroma - chroma @ _LUMA).clip(0, 1))


def _background(x: Array, y: Array, hue: float, rng: np.random.Generator) -> Array:
    """A soft gradient between two middle tones of the hue, bent by a few slow waves."""
    blend = rng.uniform(-1, 1) * x / x.max() + rng.uniform(-1, 1) * y / y.max() + rng.uniform()
    for _ in range(3):
        blend = blend + 0.2 * np.sin(rng.uniform(-0.18, 0.18) * x + rng.uniform(-0.18, 0.18) * y + rng.uniform(0, 6))
    start, end = _tint(hue, 0.4, rng), _tint(hue, 0.6, rng)
    share = blend.clip(0, 1)[..., None]
    return np.asarray(start * share + end * (1 - share))


def _patch(x: Array, y: Array, rng: np.random.Generator) -> NDArray[np.bool_]:
    """The region that carries the pattern: a blob with a wavy outline around a random centre."""
    width, height = x.max(), y.max()
    dx, dy = x - rng.uniform(0.35, 0.65) * width, y - rng.uniform(0.35, 0.65) * height
    angle, radius = np.arctan2(dy, dx), rng.uniform(0.6, 1.0) * min(width, height)
    outline = 1 + sum(rng.uniform(0, 0.12) * np.cos(k * angle + rng.uniform(0, 6)) for k in (2, 3, 5))
    return np.asarray(np.hypot(dx, dy) < radius * outline)


def _clutter(canvas: Array, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """A straight bar or an ellipse across the picture, in a random colour."""
    dx, dy = x - rng.uniform(0, x.max()), y - rng.uniform(0, y.max())
    angle = rng.uniform(0, np.pi)
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    if rng.uniform() < 0.5:
        inside = (np.abs(across) < rng.uniform(0.5, 1.7)) & (np.abs(along) < rng.uniform(10, 40))
    else:
        inside = np.hypot(along / rng.uniform(2, 8), across / rng.uniform(2, 8)) < 1
    return np.where(inside[..., None], rng.uniform(0, 1, 3), canvas)


def make_demo(
    folder: str | os.PathLike[str],
    *,
    train: int = 200,
    validation: int = 50,
    seed: int = 0,
    tick: Callable[[int], None] = lambda images: None,
) -> Path:
    """Write the set to ``folder``, unless the same set is there already, or another process just writes it.

    The same seed and counts give the same files, byte for byte, with the same versions of NumPy and Pillow. An image
    depends only on seed, split, class and its number, so a larger set contains the smaller one.

    Args:
        folder: The folder of ``train/`` and ``val/``.
        train: Images per class in ``train/``.
        validation: Images per class in ``val/``.
        seed: Seed of the set.
        tick: Called with the number of images of each class that is drawn.

    Returns:
        The folder.

    Raises:
        ValueError: A count is below 1, or the folder holds other files.
    """
    folder = Path(folder)
    if train < 1 or validation < 1:
        raise ValueError(
            f"demo images: found {train} train and {validation} validation images per class, expected 1 or more"
        )
    wanted = {"version": VERSION, "seed": seed, "train": train, "val": validation, "classes": list(CLASSES)}
    if not _holds(folder, wanted):
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not _holds(folder, wanted):
                _write(folder, wanted, tick)
    return folder


def _holds(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether a folder holds this set; it may be replaced otherwise.

    Raises:
        ValueError: It holds something else than a demo set.
    """
    with suppress(FileNotFoundError):
        text = (folder / _CARD).read_text(encoding="utf-8", errors="replace")
        try:
            return bool(json.loads(text) == wanted)
        except ValueError as error:  # cut short by a power failure, or another program's
            raise ValueError(f"{folder / _CARD}: found a damaged file; remove {folder} if it is a demo set") from error
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: found a folder with other files, expected an empty one or an earlier demo set")
    return False


def _write(folder: Path, wanted: dict[str, Any], tick: Callable[[int], None]) -> None:
    scratch, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    for left in (scratch, old):
        shutil.rmtree(left, ignore_errors=True)
    jobs = [
        (scratch / split / name, wanted[split], [VERSION, wanted["seed"], split == "val", label])
        for split in ("train", "val")
        for label, name in enumerate(CLASSES)
    ]
    # Not spawned, since such a process runs a caller's script again that begins with `synco_fast.pretrain("demo")`: it
    # would wait for this one, and this one for it.
    with ProcessPoolExecutor(mp_context=get_context("fork"), initializer=start_worker, initargs=(0,)) as pool:
        try:
            for _, (_, count, _) in zip(pool.map(_draw_class, jobs), jobs, strict=True):
                tick(count)
        except BaseException:
            # Leaving the context waits for all that has not begun as well.
            pool.shutdown(cancel_futures=True)
            raise
    (scratch / _CARD).write_text(json.dumps(wanted), encoding="utf-8")
    if folder.exists():
        folder.replace(old)
    scratch.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _draw_class(job: tuple[Path, int, list[int]]) -> None:
    folder, count, entropy = job
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng([*entropy, number])
        image, file = demo_image(folder.name, rng), io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(80, 96)))
        (folder / f"{number:05d}.jpg").write_bytes(file.getvalue())
