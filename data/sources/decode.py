"""Decoding image files to RGB, and reading JPEG headers."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from synco_fast.data.errors import CorruptImageError

__all__ = ["IMAGE_SUFFIXES", "decode_image", "encode_pixels", "plain_jpeg_size"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})

_ORIENTATION = 0x0112
#: Orientations in which the stored rows are the upright image's columns.
_LYING = (5, 6, 7, 8)
#: How near its end a JPEG file that is not truncated has its end marker; some cameras pad a little.
_TAIL = 64


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decode an image file's bytes to RGB, upright.

    Grayscale, palette, CMYK and transparent images are converted; 16-bit ones keep their upper eight bits; the EXIF
    orientation is applied.

    Raises:
        CorruptImageError: The file is empty, truncated, no image, or larger than Pillow's limit of 179 megapixels; the
            message begins with ``name``.
    """
    if not content:
        raise CorruptImageError(f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(content))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "RGB":
                return image
            if image.mode.startswith(("I", "F")):
                return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
            if image.mode in ("P", "PA", "LA", "La"):
                image = image.convert("RGBA")
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds, down to SyntaxError for a corrupt PNG
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image in a format that can be read"
        raise CorruptImageError(f"{name}: {reason}") from error


def _eight_bits(pixels: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Single-channel pixels of 16 or 32 bits, or floats, as eight bits: whole numbers by their 16-bit scale."""
    values = pixels.astype(np.float64)
    if np.issubdtype(pixels.dtype, np.floating) and values.size and values.max() <= 1:
        values = values * 65535
    return (values.clip(0, 65535) / 257).round().astype(np.uint8)


def encode_pixels(pixels: NDArray[np.uint8]) -> bytes:
    """RGB pixels (H, W, 3) as an uncompressed image file that every decoder knows (PPM)."""
    height, width = pixels.shape[:2]
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()


def plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Height and width of the upright image where a file is a JPEG that needs no special care, else None.

    Special are CMYK and directly stored RGB, which decoders read differently, what does not end as a JPEG file ends,
    and what is larger than Pillow's safety limit. Only the header is read.
    """
    if not content.startswith(b"\xff\xd8\xff") or content.find(b"\xff\xd9", max(0, len(content) - _TAIL)) < 0:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = Image.open(io.BytesIO(content))
            orientation = header.getexif().get(_ORIENTATION, 1)
    except Exception:  # the decoder will report it
        return None
    if header.format != "JPEG" or header.mode not in ("RGB", "L") or header.info.get("adobe_transform") == 0:
        return None
    width, height = header.size
    return (width, height) if orientation in _LYING else (height, width)
