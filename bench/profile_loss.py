"""Profile of the loss: a trace, and the rates that each kernel or operator achieves.

Floating-point operations and bytes are counted, not measured: for matrix products from their shapes, for the Triton
kernels from what each must compute, read and write once. Operators without a count show none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from synco_fast.bench.loss import Shape
from synco_fast.runtime.phases import wait_for

__all__ = ["Line", "profile_loss"]


@dataclass(frozen=True)
class Line:
    """One kernel on a GPU, or one operator on a CPU.

    Attributes:
        name: Name of the kernel or operator.
        calls: Calls in a run.
        seconds: Seconds in a run, without the operators that it calls.
        flops, bytes: Counted operations and bytes of a run; None without a count.
    """

    name: str
    calls: float
    seconds: float
    flops: float | None
    bytes: float | None


def profile_loss(
    run: Callable[[], Tensor], shape: Shape, device: torch.device, trace: Path, *, runs: int = 5
) -> list[Line]:
    """Profile some runs and write a chrome trace.

    Args:
        run: From `synco_fast.bench.loss.prepare`.
        shape: Its shape.
        device: Its device.
        trace: The JSON file to write for chrome://tracing or Perfetto; gzipped if its name ends in .gz.
        runs: Profiled runs, after three runs of warm-up.

    Returns:
        A line for each kernel (on a GPU) or operator (on a CPU), the longest first.
    """
    for _ in range(3):
        run()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(runs):
            run()
        wait_for(device)
    profiler.export_chrome_trace(str(trace))
    counted = _kernel_counts(shape)
    lines: dict[str, Line] = {}
    for event in profiler.events() or ():
        if (event.device_type == DeviceType.CUDA) != on_gpu:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds <= 0:
            continue
        flops, moved = _product_counts(event.name, event.input_shapes, shape.itemsize) or (None, None)
        before = lines.get(event.name, Line(event.name, 0, 0, None, None))
        lines[event.name] = Line(
            event.name,
            before.calls + 1 / runs,
            before.seconds + microseconds / 1e6 / runs,
            _sum(before.flops, None if flops is None else flops / runs),
            _sum(before.bytes, None if moved is None else moved / runs),
        )
    for name, (flops, moved) in counted.items():
        if on_gpu and name in lines:
            lines[name] = Line(name, lines[name].calls, lines[name].seconds, flops, moved)
    return sorted(lines.values(), key=lambda line: -line.seconds)


def _sum(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else one + other


def _product_counts(name: str, shapes: list[list[int]], itemsize: int) -> tuple[float, float] | None:
    """Operations and bytes of a matrix product, from the shapes of its operands."""
    operands = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}
    if name not in operands:
        return None
    one, other = shapes[operands[name]], shapes[operands[name] + 1]
    flops = 2 * math.prod(one) * other[-1]
    numbers = math.prod(one) + math.prod(other) + math.prod(one[:-1]) * other[-1]
    return flops, numbers * itemsize


def _kernel_counts(shape: Shape) -> dict[str, tuple[float, float]]:
    """Operations and bytes of the Triton kernels in one run, by name. Every input and output counts once."""
    rows, length, dim, size = shape.rows, shape.length, shape.dim, shape.itemsize
    hard, negatives = min(shape.hard, length), shape.negatives
    from synco_fast.kernels.triton.config import sampling_of

    stride, rank, _ = sampling_of(length, hard) or (1, 0, 0)
    sample, candidates = math.ceil(length / stride), stride * rank
    return {
        "sample": (2 * rows * sample * dim, (rows + sample) * dim * size + 4 * rows * sample),
        "rank": (2 * rows * dim, 2 * rows * dim * size + 4 * rows * sample),
        "scan": (4 * rows * length * dim, (length + 2 * rows) * dim * size + 8 * rows * candidates),
        "select": (0, 8 * rows * (candidates + hard)),
        "mix": (4 * rows * negatives.synthetic * dim, 2 * rows * negatives.synthetic * dim * size),
        "reduce": (0, 8 * rows * dim + 4 * rows * hard),
    }
