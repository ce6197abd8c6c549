"""Run the launcher with launches replaced by compilations for one target; print what each kernel uses.

Usage: python compile_all.py CAPABILITY     (80, 90 or 100)
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from synco_fast.kernels.views import PARAMETERS, launch

DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Target:
    """What the compiler asks of a driver, and no more."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(capability: int) -> None:
    driver.set_active(Target(capability))
    original, seen = JITFunction.run, set()

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = original(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash in seen:
            return kernel
        seen.add(kernel.hash)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [str(DUMP), "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
        print(f"{self.__name__} {case} registers {registers} stack {stack} local {local}", flush=True)
        return kernel

    JITFunction.run = compile_only
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
        launch.make_views(pixels, offsets, sizes, images, parameters, **options)


if __name__ == "__main__":
    main(int(sys.argv[1]))
