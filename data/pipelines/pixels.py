"""Decoding images to tensors: plain JPEG files by simplejpeg where it is installed, everything else by Pillow.

Both decode with libjpeg-turbo and give the same pixels, bit for bit. simplejpeg writes them where they are needed;
an image of Pillow's is copied twice on its way to a tensor.
"""

# mypy: disable-error-code="import-not-found, import-untyped, unused-ignore"

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from synco_fast.data.sources.decode import LIMITS, Limits, decode_image, plain_jpeg_size
from synco_fast.data.sources.splits import ArraySplit, Split

try:
    from simplejpeg import decode_jpeg
except ImportError:
    decode_jpeg = None

__all__ = ["decode_pixels", "pixels_of", "read_pixels"]


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W), channels innermost in memory, as torchvision's fastest resize needs it."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_pixels(split: Split, index: int) -> Tensor:
    """The upright image as uint8 (3, H, W), channels innermost in memory; the pixels are those of `Split.read`.

    Raises:
        CorruptImageError: It cannot be read or decoded.
    """
    if isinstance(split, ArraySplit):
        return pixels_of(split.read(index))
    return decode_pixels(split.read_bytes(index), split.name(index), split.limits)


def decode_pixels(content: bytes, name: str, limits: Limits = LIMITS) -> Tensor:
    """The upright image as uint8 (3, H, W), channels innermost in memory; the pixels are those of `decode_image`.

    Args:
        content: The file.
        name: For messages.
        limits: Size limits.

    Raises:
        CorruptImageError: It cannot be decoded.
    """
    if decode_jpeg is not None and plain_jpeg_size(content, limits) is not None:
        with suppress(ValueError):  # it refuses files with slight damage too: Pillow decides
            return torch.from_numpy(decode_jpeg(content, "RGB")).permute(2, 0, 1)
    return pixels_of(decode_image(content, name, limits))
