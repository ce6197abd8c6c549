"""``backbone.onnx``: written by PyTorch's exporter, checked by onnxruntime."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from synco_fast.export.formats import Written
from synco_fast.export.load import Weights, backbone_of
from synco_fast.runtime.errors import CheckpointError, ConfigError
from synco_fast.runtime.files import atomic_write

__all__ = ["write", "write_onnx"]

#: Relative to the largest feature: rounding of float32 sums in another order.
_TOLERANCE = 1e-4


def write(weights: Weights, folder: Path) -> Written:
    """Write the backbone for onnxruntime: any batch size, and any image size where the backbone takes any.

    Raises:
        ConfigError, CheckpointError: As `write_onnx` says.
    """
    size = weights.config.augment.size
    difference, free = write_onnx(backbone_of(weights), size, folder / "backbone.onnx")
    shape = "H, W" if free else f"{size}, {size}"
    usage = (
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("backbone.onnx")\n'
        '(features,) = session.run(None, {"images": images})    # float32 (B, 3, '
        f"{shape}), normalised as below"
    )
    return ("backbone.onnx",), {"relative difference to PyTorch": difference}, usage


def write_onnx(backbone: nn.Module, size: int, path: Path) -> tuple[float, bool]:
    """Write ``images`` (B, 3, H, W) float32 to ``features`` (B, F), for any B.

    H and W are free where the backbone allows it, as convolutional ones do; else both are ``size``.

    Returns:
        The largest difference between onnxruntime and PyTorch on three random images of every size tried, relative
        to the largest feature; and whether H and W are free.

    Raises:
        ConfigError: A package of the extra ``export`` is missing.
        CheckpointError: onnxruntime's result differs from PyTorch's.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"format: found onnx without {', '.join(missing)}: pip install 'synco-fast[export]'")
    import onnxruntime

    backbone = backbone.to(memory_format=torch.contiguous_format).eval()
    with atomic_write(path) as temporary:
        free = _takes_any_size(backbone, size)
        _export(backbone, torch.zeros(2, 3, size, size), temporary, free=free)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        difference = 0.0
        for height, width in [(size, size), *([(size + 32, size + 64)] if free else [])]:
            images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                expected = backbone(images)
            found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
            difference = max(difference, float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)))
        if not difference <= _TOLERANCE:
            raise CheckpointError(
                f"{path}: found features that differ by {difference:.1e} of the largest one between onnxruntime and "
                f"PyTorch, expected {_TOLERANCE:.0e}"
            )
    return difference, free


def _takes_any_size(backbone: nn.Module, size: int) -> bool:
    """Whether the backbone runs on images of another size and shape; a transformer of fixed positions refuses them."""
    with torch.no_grad():
        expected = backbone(torch.zeros(1, 3, size, size)).shape
        try:
            return bool(backbone(torch.zeros(1, 3, size + 32, size + 64)).shape == expected)
        except (AssertionError, RuntimeError, ValueError):
            return False


def _export(backbone: nn.Module, images: Tensor, path: Path, *, free: bool) -> None:
    dim = torch.export.Dim
    dynamic = {0: dim("batch", min=1), **({2: dim("height"), 3: dim("width")} if free else {})}
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                backbone,
                (images,),
                path,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=(dynamic,),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
