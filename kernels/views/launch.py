"""Argument checks and launches of the augmentation kernels."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from synco_fast.kernels.sizes import cdiv, next_power_of_2
from synco_fast.kernels.views.words import PARAMETERS, WORDS, as_words

__all__ = ["make_views", "unserved_by_triton"]

#: Pixels for each program.
_BLOCK = 512
_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


def unserved_by_triton(pixels: Tensor) -> str | None:
    """The reason why the kernels cannot take images on this device, or None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not pixels.is_cuda or torch.version.hip:
        return f"pixels are on {pixels.device.type}; the kernels run on CUDA devices"
    if torch.cuda.get_device_capability(pixels.device) < (8, 0):
        return "the device is older than compute capability 8.0"
    return None


def make_views(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    images: Tensor,
    parameters: Mapping[str, Tensor] | Tensor,
    *,
    size: int,
    channels: int = 3,
    planar: bool = False,
    dtype: torch.dtype = torch.uint8,
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
    std: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Make V views of N decoded images: crop, jitter in its drawn order, grayscale, blur, solarize, flip.

    Compared with torchvision in Triton's interpreter and with PyTorch on an H100; compiled for compute capability 8.0
    and 10.0 too. It takes four launches, and 24 bytes of scratch memory for each pixel of a view. The values of the
    parameters are not checked, since the host would have to wait for them. A crop outside its image reads out of
    bounds.

    Args:
        pixels: (n,) uint8: the concatenated images, in any order, with or without gaps.
        offsets: Start of each image in ``pixels``, (N,) int64.
        sizes: Height and width of each image, (N, 2) integers.
        images: Image indices, (I,) integers with V a multiple of I: view v is of image v % I.
        parameters: The tensors of `PARAMETERS` by name, each (V, ...): crops as top, left, height and width in pixels;
            the jitter operations (0 brightness, 1 contrast, 2 saturation, 3 hue) in the order of each view, and their
            factors (hue in turns of the colour circle); grayscale; sigma of the blur in pixels, 0 for none; solarize;
            flip. Or all of them as the words of `as_words`, (V, 16) int32, which saves the operations that make these.
        size: Side of a view in pixels, 2 or more.
        channels: Channels of the images, 3 or 1.
        planar: Whether images are (C, H, W), not (H, W, C).
        dtype: torch.uint8 for pixels, or a floating dtype for normalised values.
        mean, std: Normalisation of each channel for values in [0, 1]; used with a floating ``dtype``.

    Returns:
        The views, (V, 3, size, size) of ``dtype``, in channels-last layout.

    Raises:
        TypeError, ValueError: An argument has the wrong type, shape or device.
        RuntimeError: The kernels do not run on this device; see `unserved_by_triton`.
    """
    _check(pixels, offsets, sizes, images, parameters, size, channels, dtype)
    words = parameters if isinstance(parameters, Tensor) else as_words(parameters)
    reason = unserved_by_triton(pixels)
    if reason is not None:
        raise RuntimeError(f"make_views: {reason}")
    # Triton launches on the current device and stream, which may differ from those of the pixels.
    with torch.cuda.device_of(pixels):
        return _launch(pixels, offsets, sizes, images, words, size, channels, planar, dtype, mean, std)


def _check(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    images: Tensor,
    parameters: Mapping[str, Tensor] | Tensor,
    size: int,
    channels: int,
    dtype: torch.dtype,
) -> None:
    if pixels.dtype != torch.uint8 or pixels.dim() != 1:
        raise TypeError(f"pixels: found {pixels.dtype} of shape {tuple(pixels.shape)}, expected uint8 of shape (n,)")
    kinds: dict[str, tuple[Tensor, tuple[int, ...], str]] = {
        "offsets": (offsets, (len(sizes),), "integer"),
        "sizes": (sizes, (len(offsets), 2), "integer"),
        "images": (images, (len(images),), "integer"),
    }
    if isinstance(parameters, Tensor):
        views = len(parameters)
        kinds["parameters"] = parameters, (views, WORDS), "integer"
        if parameters.dtype != torch.int32:
            raise TypeError(f"parameters: found {parameters.dtype}, expected torch.int32")
    elif set(parameters) != set(PARAMETERS):
        wrong = sorted(set(parameters) ^ set(PARAMETERS))
        raise ValueError(f"parameters: found {wrong[0]} missing or unknown, expected {', '.join(PARAMETERS)}")
    else:
        views = len(parameters["crop"])
        kinds |= {name: (parameters[name], (views, *shape), kind) for name, (shape, kind) in PARAMETERS.items()}
    if views % len(images) if len(images) else views:
        raise ValueError(f"images: found {len(images)} for {views} views, expected a divisor of these")
    for name, (tensor, shape, kind) in kinds.items():
        if tensor.shape != shape or tensor.device != pixels.device:
            raise ValueError(
                f"{name}: found shape {tuple(tensor.shape)} on {tensor.device}, expected {shape} on {pixels.device}"
            )
        if _kind(tensor.dtype) != kind:
            raise TypeError(f"{name}: found {tensor.dtype}, expected {kind}")
    if size < 2:
        raise ValueError(f"size: found {size}, expected 2 or more")
    if channels not in (1, 3):
        raise ValueError(f"channels: found {channels}, expected 1 or 3")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: found {dtype}, expected one of {', '.join(str(kind) for kind in _DTYPES)}")


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating"
    return "bool" if dtype == torch.bool else "integer"


def _launch(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    images: Tensor,
    words: Tensor,
    size: int,
    channels: int,
    planar: bool,
    dtype: torch.dtype,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    from synco_fast.kernels.views import stages

    count, device, area = len(words), pixels.device, size * size
    out = torch.empty((count, size, size, 3), dtype=dtype, device=device)
    if not count:
        return out.permute(0, 3, 1, 2)
    blocks = cdiv(area, _BLOCK)
    grid = (count, blocks)
    words = words.contiguous()
    planes, blurred = (torch.empty((count, 3, area), dtype=torch.float32, device=device) for _ in range(2))
    sums = torch.empty((count, blocks), dtype=torch.float32, device=device)
    stages.crop[grid](
        pixels.contiguous(),
        offsets.to(torch.int64).contiguous(),
        sizes.to(torch.int32).contiguous(),
        images.contiguous(),
        words,
        planes,
        sums,
        len(images),
        SIZE=size,
        CHANNELS=channels,
        PLANAR=planar,
        BLOCK=_BLOCK,
    )
    stages.colour[grid](
        planes,
        sums,
        words,
        blocks,
        SIZE=size,
        BLOCK=_BLOCK,
        SUMS=next_power_of_2(blocks),
    )
    stages.blur_rows[grid](planes, blurred, words, SIZE=size, BLOCK=_BLOCK)
    stages.blur_columns[grid](
        planes,
        blurred,
        words,
        out,
        *(255.0 * value for value in mean),
        *(1 / (255.0 * value) for value in std),
        SIZE=size,
        NORMALISE=dtype != torch.uint8,
        BLOCK=_BLOCK,
    )
    return out.permute(0, 3, 1, 2)
