"""Run the norm's launcher with launches replaced by compilations for one target; print what each kernel uses.

Usage: python compile_all.py CAPABILITY [--wide]     (80, 90 or 100; --wide adds float16, float32, one group and odd C)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[3]))

from synco_fast.bench.cost.launches import compiled_for
from synco_fast.bench.launches import intercepted
from synco_fast.kernels.norm.triton import launch
from tests.support.compiled import resources

#: Channels and side of the maps of ResNet-18 and ResNet-50 at 224 pixels.
MAPS = ((64, 112), (64, 56), (128, 28), (128, 56), (256, 14), (256, 56), (512, 7), (512, 28), (1024, 14), (2048, 7))


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
    seen = set()

    def keep(kernel, binary, grid, arguments):
        if binary.hash in seen:
            return
        seen.add(binary.hash)
        registers, stack, local = resources(binary)
        used = f"registers {registers} stack {stack} local {local} shared {binary.metadata.shared}"
        print(f"{kernel.__name__} {case} {used}", flush=True)

    with compiled_for(capability), intercepted(keep, run=False):
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
