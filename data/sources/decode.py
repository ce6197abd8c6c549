"""Decoding image files to RGB, and reading JPEG headers."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError, features

from synco_fast.data.errors import CorruptImageError, one_line

__all__ = [
    "IMAGE_SUFFIXES",
    "LIMITS",
    "LONGEST_RATIO",
    "Limits",
    "central_part",
    "decode_image",
    "encode_pixels",
    "plain_jpeg_size",
]

_AVIF = bool(features.check("avif"))
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
#: Suffixes of image files; AVIF if Pillow supports it.
IMAGE_SUFFIXES = frozenset(_SUFFIXES | ({".avif"} if _AVIF else set()))
#: Formats that are decoded, whatever the suffix. Pillow knows more, even PostScript, for which it runs an interpreter.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF", *(("AVIF",) if _AVIF else ()))
#: Formats whose integer pixels Pillow scales to 16 bits, though some of its versions hold them in 32.
_SCALED = ("PNG", "PPM")
#: Images with a larger ratio of sides are cropped to their middle before the resize of an evaluation.
LONGEST_RATIO = 16

#: What makes an image upright, by its orientation; of others, the stored rows are the image's.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Orientations in which the stored rows are the upright image's columns.
_LYING = (5, 6, 7, 8)
#: Bytes from its end within which a complete JPEG file has its end marker; some cameras pad a little.
_TAIL = 64
#: Pixels of more than eight bits that are converted at a time.
_CONVERTED = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Size limits of an image; a larger one counts as corrupt.

    Attributes:
        file_bytes: Largest file, 512 MiB by default.
        pixels: Most pixels; default and maximum are Pillow's limit of 178,956,970.
    """

    file_bytes: int = 512 << 20
    pixels: int = 178_956_970

    def check_size(self, size: int, name: str) -> None:
        """Refuse a file that is too large.

        Raises:
            CorruptImageError: It is.
        """
        if size > self.file_bytes:
            raise CorruptImageError(
                f"{name}: found a file of {size:,} bytes, expected up to {self.file_bytes:,} (data.max_file_bytes)"
            )


#: The default limits.
LIMITS = Limits()


def decode_image(content: bytes, name: str, limits: Limits = LIMITS) -> Image.Image:
    """Decode an image file's bytes to RGB, upright.

    Grayscale, palette, CMYK and transparent images are converted; 16-bit ones keep their upper eight bits; pixels of 32
    bits and floats are scaled from 1, 255 or 65,535, the first of these that none exceeds. The orientation in EXIF or
    XMP is applied; metadata that cannot be read is ignored.

    Raises:
        CorruptImageError: The file is empty, truncated, no image, or has more pixels than ``limits`` allow; the message
            starts with ``name``.
    """
    if not content:
        raise CorruptImageError(f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(content), formats=_FORMATS)
            if image.width * image.height > limits.pixels:
                raise CorruptImageError(
                    f"{name}: found {image.width} x {image.height} pixels, expected up to {limits.pixels:,} in all "
                    "(data.max_pixels)"
                )
            image.load()
            scaled = image.format in _SCALED
            turn = _TURNS.get(_orientation(image))
            if turn is not None:
                # Not `ImageOps.exif_transpose`, which also writes the EXIF again and fails on values of a wrong type.
                image = image.transpose(turn)
            if image.mode == "RGB":
                return image
            if image.mode.startswith(("I", "F")):
                return Image.fromarray(_eight_bits(np.asarray(image), scaled=scaled)).convert("RGB")
            if image.mode in ("P", "PA", "LA", "La"):
                image = image.convert("RGBA")
            return image.convert("RGB")
    except (MemoryError, CorruptImageError):
        raise
    except Exception as error:  # decoders raise many kinds, down to SyntaxError for a corrupt PNG
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image in a format that can be read" if unknown else one_line(error)
        raise CorruptImageError(f"{name}: {reason}") from error


def _orientation(image: Image.Image) -> int:
    """The orientation, 1 to 8, in EXIF or else XMP, as Pillow reads them; 1 if neither can be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(found) if found in _TURNS else 1
    except MemoryError:
        raise
    except Exception:  # metadata may hold anything; the pixels are good
        return 1


def _eight_bits(pixels: NDArray[np.generic], *, scaled: bool) -> NDArray[np.uint8]:
    """Single-channel pixels of 16 or 32 bits, or floats, as eight bits.

    Floats up to 1 are scaled from 1. Floats and integers of 32 bits up to 255 have eight bits already, whatever their
    type. All others are scaled from 16 bits. NaN is black, and infinity does not count for the range.

    Args:
        pixels: The pixels.
        scaled: Whether integers have 16 bits, also where Pillow holds them in 32.
    """
    # Some rows at a time: all of a large image as float64 would take gigabytes in each worker.
    rows = max(1, _CONVERTED // max(1, pixels.shape[1]))
    parts = [pixels[first : first + rows] for first in range(0, len(pixels), rows)]
    largest = max((float(part.max(initial=0, where=np.isfinite(part))) for part in parts), default=0.0)
    floating = np.issubdtype(pixels.dtype, np.floating)
    factor = 1
    if floating and largest <= 1:
        factor = 65535
    elif largest <= 255 and (floating or (pixels.dtype.itemsize > 2 and not scaled)):
        factor = 257
    found = np.empty(pixels.shape, np.uint8)
    for number, part in enumerate(parts):
        values = np.nan_to_num(part.astype(np.float64), nan=0.0, posinf=65535, neginf=0) * factor
        found[number * rows : number * rows + len(part)] = (values.clip(0, 65535) / 257).round()
    return found


def encode_pixels(pixels: NDArray[np.uint8]) -> bytes:
    """RGB pixels (H, W, 3) as an uncompressed image file that every decoder reads (PPM)."""
    height, width = pixels.shape[:2]
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()


def central_part(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The middle of an image (H, W, 3) whose long side is more than 16 times the short one; others unchanged.

    A central crop needs less than that. Resizing a whole line of 30,000 x 1 pixels to a height of 256 would take 6 GB.
    """
    height, width = pixels.shape[:2]
    longest = LONGEST_RATIO * min(height, width)
    for axis, length in enumerate((height, width)):
        if length > longest:
            keep = longest + (length - longest) % 2  # as much off one end as off the other
            start = (length - keep) // 2
            pixels = pixels[start : start + keep] if axis == 0 else pixels[:, start : start + keep]
    return pixels


def _stores_rgb(header: Image.Image) -> bool:
    """Whether a JPEG file has no YCbCr: by Adobe's marker or, without it and JFIF's, by the names of its components."""
    if "adobe" in header.info or "jfif" in header.info:
        return header.info.get("adobe_transform") == 0
    return bytes(part[0] for part in getattr(header, "layer", ())) == b"RGB"


def plain_jpeg_size(content: bytes, limits: Limits = LIMITS, *, turned: bool = False) -> tuple[int, int] | None:
    """Height and width of the upright image if the file is a plain JPEG, else None.

    Not plain are CMYK and directly stored RGB, which decoders read differently, files without a JPEG end marker, images
    above ``limits``, and those that an orientation in EXIF or XMP turns, which other decoders find by other rules or
    not at all. Only the header is read.

    Args:
        content: The file.
        limits: Size limits.
        turned: Whether an image that an orientation turns is plain too.
    """
    if not content.startswith(b"\xff\xd8\xff") or content.find(b"\xff\xd9", max(0, len(content) - _TAIL)) < 0:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = Image.open(io.BytesIO(content), formats=("JPEG",))
            orientation = _orientation(header)
    except Exception:  # the decoder will report it
        return None
    if header.format != "JPEG" or header.mode not in ("RGB", "L") or _stores_rgb(header):
        return None
    width, height = header.size
    if width * height > limits.pixels or (orientation in _TURNS and not turned):
        return None
    return (width, height) if orientation in _LYING else (height, width)
