"""Times of something that runs on a device: warmed up, synchronised, with the cache warm or cold."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["capture", "seconds_of"]


def seconds_of(
    run: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 2, cold: bool = False
) -> list[float]:
    """Seconds of each of several runs.

    Args:
        run: What is timed.
        device: On a CUDA device the time is the device's own, between two events; else the clock on the wall.
        repeats: Timed runs.
        warmup: Runs before them, which compile and fill caches.
        cold: Write through twice the size of the device's L2 cache before each run, so that nothing of its inputs is in
            there. CUDA only.
    """
    for _ in range(warmup):
        run()
    if device.type != "cuda":
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return found
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * cache, dtype=torch.int8, device=device) if cold else None
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for start_event, end_event in events:
        if flush is not None:
            flush.zero_()
        start_event.record()
        run()
        end_event.record()
    torch.cuda.synchronize(device)
    return [start_event.elapsed_time(end_event) / 1e3 for start_event, end_event in events]


def capture(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``run`` as a CUDA graph: the returned function replays it.

    Raises:
        RuntimeError: What it does cannot be captured, a wait for the device say.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
