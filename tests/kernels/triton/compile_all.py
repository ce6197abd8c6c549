"""Run the launcher with launches replaced by compilations for one target; print what each kernel uses.

Usage: python compile_all.py CAPABILITY [--wide]     (80, 90 or 100; --wide adds widths 64 and 512, and no mask)
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

from synco_fast.kernels import Negatives
from synco_fast.kernels.triton import launch, momentum

DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LIMIT = {80: 163, 90: 227, 100: 227}
SYNCO = Negatives.synco(512)


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


def main(capability: int, cases: list[tuple[int, torch.dtype, bool]]) -> None:
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
        shared = kernel.metadata.shared
        print(f"{self.__name__} {case} registers {registers} stack {stack} local {local} shared {shared}", flush=True)
        assert local == "0"
        # The momentum update of aligned tensors moves 16 bytes at once.
        assert not options.get("ALIGNED") or {"ld.global.v4.b32", "st.global.v4.b32"} <= set(kernel.asm["ptx"].split())
        assert shared <= LIMIT[capability] << 10
        return kernel

    JITFunction.run = compile_only
    for dim, dtype, masked in cases:
        case = f"D={dim} {dtype} {'masked' if masked else 'plain'}"
        q, queue = torch.zeros(256, dim, dtype=dtype), torch.zeros(65536, dim, dtype=dtype)
        ids = {"image_ids": torch.arange(256), "queue_ids": torch.arange(65536)} if masked else {}
        launch.contrast_and_gradient(q, q, queue, SYNCO, temperature=0.2, seed=3, step=5, **ids)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = f"{dtype}"
        pair = torch.zeros(5000, dtype=dtype), torch.zeros(5000, dtype=dtype)
        odd = torch.zeros(5001, dtype=dtype)[1:]
        for weight in (0.001, torch.tensor(0.001)):
            momentum.update(momentum.Plan([pair[0], odd], [*pair]), weight)


if __name__ == "__main__":
    usual = [(128, torch.bfloat16, True), (128, torch.float16, True), (128, torch.float32, True)]
    wide = [
        (dim, dtype, dim != 128) for dim in (64, 512, 128) for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    main(int(sys.argv[1]), usual + (wide if "--wide" in sys.argv else []))
