"""Run the launcher with launches replaced by compilations for one target; print what each kernel uses.

Usage: python compile_all.py CAPABILITY     (80, 90 or 100)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[3]))

from synco_fast.bench.cost.launches import compiled_for
from synco_fast.bench.launches import intercepted
from synco_fast.kernels.views import PARAMETERS, launch
from tests.support.compiled import resources


def main(capability: int) -> None:
    seen = set()

    def keep(kernel, binary, grid, arguments):
        if binary.hash not in seen:
            seen.add(binary.hash)
            registers, stack, local = resources(binary)
            print(f"{kernel.__name__} {case} registers {registers} stack {stack} local {local}", flush=True)

    launch.unserved_by_triton = lambda pixels: None
    shapes = {"integer": torch.int64, "floating": torch.float32, "bool": torch.bool}
    parameters = {name: torch.zeros(512, *shape, dtype=shapes[kind]) for name, (shape, kind) in PARAMETERS.items()}
    images = torch.zeros(512, dtype=torch.int64)
    for size, channels, planar, dtype in (
        (224, 3, False, torch.bfloat16),
        (224, 3, False, torch.uint8),
        (32, 3, True, torch.float16),
        (32, 1, True, torch.float32),
    ):
        case = f"size={size} channels={channels} {'planar' if planar else 'interleaved'} {dtype}"
        pixels, offsets = torch.zeros(1000, dtype=torch.uint8), torch.zeros(256, dtype=torch.int64)
        sizes = torch.ones(256, 2, dtype=torch.int64)
        options = {"size": size, "channels": channels, "planar": planar, "dtype": dtype}
        with compiled_for(capability), intercepted(keep, run=False):
            launch.make_views(pixels, offsets, sizes, images, parameters, **options)


if __name__ == "__main__":
    main(int(sys.argv[1]))
