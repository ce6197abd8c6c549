"""CPU time of JPEG decoders, for an image of ImageNet's size and for a large photograph.

``python -m synco_fast.bench.experiments.decoders`` decodes a drawn photograph of each size to a uint8 tensor, on one
thread, all decoders in turn. ``--json FILE`` writes the figures.
"""

# mypy: disable-error-code="import-not-found, import-untyped, unused-ignore"

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from synco_fast.bench.data import draw_photo
from synco_fast.data.workers import keep_freed_memory
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.files import write_json

__all__ = ["DECODERS", "SIZES", "measure"]

#: Width and height of the photographs.
SIZES = ((500, 375), (3000, 2250))


def _pillow(content: bytes, size: tuple[int, int] | None = None) -> Tensor:
    image = Image.open(io.BytesIO(content))
    if size is not None:
        image.draft("RGB", size)
    return torch.from_numpy(np.array(image.convert("RGB")))


def _torchvision(content: bytes) -> Tensor:
    decoded: Tensor = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    return decoded


def _simplejpeg(content: bytes, **options: object) -> Tensor:
    import simplejpeg

    return torch.from_numpy(simplejpeg.decode_jpeg(content, "RGB", **options))


DECODERS: dict[str, Callable[[bytes], Tensor]] = {
    "Pillow, and the copy to a tensor": _pillow,
    "torchvision.io": _torchvision,
    "simplejpeg": _simplejpeg,
    "simplejpeg, fast DCT and upsampling": lambda content: _simplejpeg(content, fastdct=True, fastupsample=True),
    "simplejpeg, scaled to 600 pixels or more": lambda content: _simplejpeg(content, min_height=600, min_width=600),
    "Pillow, scaled by a half": lambda content: _pillow(content, (1500, 1125)),
    "Pillow, scaled by a quarter": lambda content: _pillow(content, (750, 563)),
}
"""Functions from a JPEG file to a tensor. The last three decode to fewer pixels."""


def measure(content: bytes, names: Sequence[str], *, repeats: int = 7, calls: int = 10) -> dict[str, list[float]]:
    """Milliseconds of CPU time for an image, by decoder; a figure is a mean over ``calls``, and decoders take turns."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, figures in found.items():
            DECODERS[name](content)
            start = time.process_time()
            for _ in range(calls):
                DECODERS[name](content)
            figures.append(1e3 * (time.process_time() - start) / calls)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both sizes, print the medians, and write the figures."""
    parser = argparse.ArgumentParser(description="CPU time of JPEG decoders.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the workers of a run do
    found = {}
    for number, (width, height) in enumerate(SIZES):
        # The small image is below the size that a scaling decoder would keep.
        names = list(DECODERS)[: None if number else 4]
        content = draw_photo(0, number, width, height)
        found[f"{width} x {height}"] = measure(content, names, repeats=options.repeats, calls=3 if number else 30)
    for size, decoders in found.items():
        for name, figures in decoders.items():
            print(f"{size:12} {name:42} {statistics.median(figures):7.2f} ms")
    if options.json:
        write_json(options.json, {"environment": describe_environment(), "milliseconds": found})


if __name__ == "__main__":
    main()
