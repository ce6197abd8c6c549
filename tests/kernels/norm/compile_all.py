"""Run the norm's launcher with launches replaced by compilations for one target; print what each kernel uses.

Usage: python compile_all.py CAPABILITY [--wide]     (80, 90 or 100; --wide adds float16, float32, one group and odd C)
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

from synco_fast.kernels.norm.triton import launch

DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
#: Channels and side of the maps of ResNet-18 and ResNet-50 at 224 pixels.
MAPS = ((64, 112), (64, 56), (128, 28), (128, 56), (256, 14), (256, 56), (512, 7), (512, 28), (1024, 14), (2048, 7))


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


def resources(cubin: bytes) -> tuple[str, str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(DUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()


def launch_all(channels: int, side: int, groups: int, dtype: torch.dtype, batch: int = 256) -> None:
    """All that a step launches for a layer: norm, norm + ReLU, norm + add + ReLU, training and evaluation."""
    # Nothing touches this memory: only its address counts.
    x, y = (torch.empty(batch, side, side, channels, dtype=dtype).permute(0, 3, 1, 2) for _ in range(2))
    weight, bias, running_mean, running_var = torch.empty(4, channels)
    tracked = torch.zeros((), dtype=torch.int64)
    mean, variance = launch.statistics(x, running_mean, running_var, tracked, groups=groups, momentum=0.1)
    for relu, residual in ((False, None), (True, None), (True, y)):
        affine = weight, bias
        launch.apply(x, mean, variance, *affine, residual, relu=relu, eps=1e-5)
        launch.apply(x, running_mean[None], running_var[None], *affine, residual, relu=relu, eps=1e-5)
        output = None if residual is None else y
        launch.backward(x, x, output, mean, variance, *affine, relu=relu, training=True, eps=1e-5)


def main(capability: int, cases: list[tuple[int, int, int, torch.dtype]]) -> None:
    driver.set_active(Target(capability))
    original, seen = JITFunction.run, set()

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = original(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            registers, stack, local = resources(kernel.asm["cubin"])
            shared = kernel.metadata.shared
            print(
                f"{self.__name__} {case} registers {registers} stack {stack} local {local} shared {shared}", flush=True
            )
        seen.add(kernel.hash)
        return kernel

    JITFunction.run = compile_only
    for channels, side, groups, dtype in cases:
        case = f"C={channels} {side}x{side} G={groups} {str(dtype).removeprefix('torch.')}"
        launch_all(channels, side, groups, dtype)
        print(f"done {case}", flush=True)


if __name__ == "__main__":
    cases = [(channels, side, 8, torch.bfloat16) for channels, side in MAPS]
    if "--wide" in sys.argv:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            cases += [(channels, side, groups, dtype) for channels, side in MAPS for groups in (1, 8)]
            cases += [(3, 7, 2, dtype), (130, 9, 4, dtype)]
    main(int(sys.argv[1]), cases)
