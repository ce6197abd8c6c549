"""Compile the kernels of `bench/gpu.sh` for another machine's GPU into Triton's cache."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from synco_fast.bench.cost.launches import compiled_for
from synco_fast.bench.launches import intercepted
from synco_fast.bench.loss import TEMPERATURE, Shape
from synco_fast.bench.subjects import CAPABILITIES
from synco_fast.bench.variants import PARTS, applied, variants_of
from synco_fast.kernels import Negatives
from synco_fast.kernels.triton import launch
from synco_fast.kernels.validation import cases

__all__ = ["compile_all"]

#: Shapes of bench/gpu.sh: the published one, the warm-up shape, and the small one for sanitizers.
SHAPES = (
    *(Shape(256, 65536, 128, 1024, dtype) for dtype in ("bfloat16", "float32", "float16")),
    Shape(8, 2048, 128, 1024, "bfloat16"),
    *(Shape(65, 4097, 64, 63, dtype) for dtype in ("bfloat16", "float32")),
)


def compile_all(capability: int, shapes: tuple[Shape, ...] = SHAPES, tests: Path | None = None) -> int:
    """Compile the launches of some shapes and of their variants, and optionally those of the tests.

    Args:
        capability: Compute capability of the device, such as 90.
        shapes: See `Shape`.
        tests: A test file whose SHAPES are compiled, too.

    Returns:
        The number of distinct kernels compiled.
    """
    hashes: set[str] = set()

    def keep(kernel: Any, binary: Any, grid: Any, arguments: dict[str, Any]) -> None:
        hashes.add(binary.hash)

    with compiled_for(capability), intercepted(keep, run=False):
        for shape, negatives, masked, step, variant in _calls(shapes, tests):
            started = time.monotonic()
            before = len(hashes)
            with applied(variant):
                _call(shape, negatives, masked, step)
            fresh = len(hashes) - before
            what = f"{shape.rows} x {shape.length} x {shape.dim} {shape.dtype}" + (
                f", {variant.name}" if variant else ""
            )
            print(f"{what}: {fresh} kernels in {time.monotonic() - started:.1f} s", flush=True)
    return len(hashes)


def _calls(shapes: tuple[Shape, ...], tests: Path | None) -> Iterator[tuple[Shape, Negatives, bool, Any, Any]]:
    on_device = torch.zeros((), dtype=torch.int64)
    cpu = torch.device("cpu")
    for shape in shapes:
        for step in (7, on_device):
            yield shape, shape.negatives, False, step, None
    shape = shapes[0]
    yield shape, Negatives(hard=shape.negatives.hard), False, on_device, None
    for parts in PARTS:
        yield replace(shape, rows=shape.rows // parts), shape.negatives, False, on_device, None
    for variant in variants_of(shape, cpu):
        yield shape, shape.negatives, False, on_device, variant
    if tests is not None:
        found = importlib.util.spec_from_file_location("gpu_tests", tests)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        dtypes = [torch.float32, torch.bfloat16, torch.float16]
        for case in cases(module.SHAPES, dtypes):
            named = str(case.dtype).removeprefix("torch.")
            yield Shape(case.rows, case.length, case.dim, case.hard, named), case.negatives, case.masked, 7, None


def _call(shape: Shape, negatives: Negatives, masked: bool, step: Any) -> None:
    q = torch.empty(shape.rows, shape.dim, dtype=shape.torch_dtype)
    queue = torch.empty(shape.length, shape.dim, dtype=shape.torch_dtype)
    ids: dict[str, Any] = {}
    if masked:
        ids = {"image_ids": torch.arange(shape.rows), "queue_ids": torch.arange(shape.length)}
    launch.contrast_and_gradient(q, q, queue, negatives, temperature=TEMPERATURE, seed=3, step=step, **ids)


def main() -> None:
    """Fill the cache folder TRITON_CACHE_DIR."""
    parser = argparse.ArgumentParser(description="Compile the kernels of the loss for a remote GPU.")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, default=90, help="times ten: 90 is 9.0")
    parser.add_argument("--tests", action="store_true", help="compile the shapes of the GPU tests, too")
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    tests = root / "tests" / "kernels" / "triton" / "test_gpu.py" if options.tests else None
    print(f"{compile_all(options.capability, tests=tests)} kernels")


if __name__ == "__main__":
    main()
