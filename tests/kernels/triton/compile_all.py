"""Run the launcher with launches replaced by compilations for one target; print what each kernel uses.

Usage: python compile_all.py CAPABILITY [--wide] [--dims 64 128] [--dtypes bfloat16] [--hard 1024] [--only scan]

CAPABILITY is 80, 90 or 100. Alone it compiles D = 128 with a mask in three dtypes; with --wide the widths 64, 128, 256
and 512, with and without a mask. The exit code is 1 where a kernel spills, needs more shared memory than there is, or
has its tensor-core products serialised.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from triton.runtime.jit import JITFunction

sys.path.append(str(Path(__file__).resolve().parents[3]))

from synco_fast.bench.cost.launches import compiled_for, tool
from synco_fast.kernels import Negatives
from synco_fast.kernels.triton import config, launch, momentum
from tests.support.compiled import resources

LIMIT = {80: 163, 90: 227, 100: 227}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def serialised(kernel) -> bool:
    """Whether ptxas says that it waits after every product (warning C7515); Triton does not pass that on."""
    ptx = kernel.asm["ptx"]
    if "wgmma" not in ptx:
        return False
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool("ptxas")), "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "registers" in text
    return "serialized" in text


def main(capability: int, cases: list[tuple[int, torch.dtype, bool]], only: str, hard: int) -> int:
    original, seen, failures = JITFunction.run, set(), []

    def compile_only(self, *arguments, grid, warmup, **options):
        if only and self.__name__ not in only.split(","):
            return None
        kernel = original(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash in seen:
            return kernel
        seen.add(kernel.hash)
        registers, stack, local = resources(kernel)
        shared = kernel.metadata.shared
        # The momentum update of aligned tensors moves 16 bytes at once.
        vectors = {"ld.global.v4.b32", "st.global.v4.b32"} <= set(kernel.asm["ptx"].split())
        narrow = options.get("ALIGNED") and not vectors
        line = f"{self.__name__} {case} registers {registers} stack {stack} local {local} shared {shared}"
        # On other devices there is nothing to serialise.
        wait = capability == 90 and serialised(kernel)
        line += (" serialised" if wait else "") + (" narrow" if narrow else "")
        line += " overlapped" if "griddepcontrol.wait" in kernel.asm["ptx"] else ""
        print(line, flush=True)
        if stack or local or wait or narrow or shared > LIMIT[capability] << 10:
            failures.append(line)
        return kernel

    JITFunction.run = compile_only
    with compiled_for(capability):
        for dim, dtype, masked in cases:
            case = f"D={dim} {dtype} {'masked' if masked else 'plain'}"
            q, queue = torch.zeros(256, dim, dtype=dtype), torch.zeros(65536, dim, dtype=dtype)
            ids = {"image_ids": torch.arange(256), "queue_ids": torch.arange(65536)} if masked else {}
            launch.contrast_and_gradient(q, q, queue, Negatives.synco(hard), temperature=0.2, seed=3, step=5, **ids)
        for dtype in DTYPES.values():
            case = f"{dtype}"
            pair = torch.zeros(5000, dtype=dtype), torch.zeros(5000, dtype=dtype)
            odd = torch.zeros(5001, dtype=dtype)[1:]
            for weight in (0.001, torch.tensor(0.001)):
                momentum.update(momentum.Plan([pair[0], odd], [*pair]), weight)
    print("\n".join(["", "failed:", *failures]) if failures else "", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int, choices=LIMIT)
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--dims", type=int, nargs="+", default=[128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--float32", choices=["none", "ieee", "tf32"], default="none", help="precision allowed")
    parser.add_argument(
        "--overlap", type=int, choices=(0, 1, 2), default=config.OVERLAP, help="programmatic dependent launch"
    )
    parser.add_argument("--plain", action="store_true", help="no mask")
    parser.add_argument("--splits", type=int, help="of the queue; by default as many as an H100 gets")
    parser.add_argument("--hard", type=int, default=1024, help="N")
    parser.add_argument("--only", default="", help="names of kernels, with commas")
    given = parser.parse_args()
    torch.backends.cuda.matmul.fp32_precision = given.float32
    config.OVERLAP = given.overlap
    if given.splits:
        launch.splits_of = lambda *_: given.splits
    cases = [(dim, DTYPES[name], not given.plain) for dim in given.dims for name in given.dtypes]
    if given.wide:
        wide = itertools.product((64, 128, 256, 512), given.dtypes, (True, False))
        cases = [(dim, DTYPES[name], masked) for dim, name, masked in wide]
    sys.exit(main(given.capability, cases, given.only, given.hard))
