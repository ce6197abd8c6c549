"""Timing and peak memory on a device: with warm-up and synchronisation, warm or cold cache."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["capture", "peak_memory", "reset_peak_memory", "seconds_of"]


def seconds_of(
    run: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 2, cold: bool = False
) -> list[float]:
    """Seconds of each of several runs.

    Args:
        run: What is timed.
        device: On a CUDA device the time is the device's own, between two events; else the clock on the wall.
        repeats: Timed runs.
        warmup: Runs before them, which compile and fill caches.
        cold: Read through twice the size of the device's L2 cache before each run, so that nothing of its inputs is in
            there, and nothing that would have to be written back while it runs. CUDA only.
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
    flush = torch.zeros(2 * cache // 4, device=device) if cold else None
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for start_event, end_event in events:
        if flush is not None:
            flush.sum()
        start_event.record()
        run()
        end_event.record()
    torch.cuda.synchronize(device)
    return [start_event.elapsed_time(end_event) / 1e3 for start_event, end_event in events]


def capture(run: Callable[[], object], device: torch.device, *, copies: int = 1) -> Callable[[], object]:
    """``run``, some times in a row, as a CUDA graph: the returned function replays it.

    Args:
        run: What is captured.
        device: Where.
        copies: How often it stands in the graph; several make a graph's own launch small beside them.

    Raises:
        RuntimeError: What it does cannot be captured, such as a wait for the device.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            run()
    return graph.replay


def peak_memory(device: torch.device) -> int:
    """Bytes: on a CUDA device what PyTorch had allocated at most, on a CPU the process's largest resident size."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) << 10
    # In bytes on macOS, the other system that PyTorch is built for with this module.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_memory(device: torch.device) -> int:
    """Begin a new peak at what is held now, and return that in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        # Linux lets a process lower its own high-water mark to what it holds now.
        clear.write_text("5")
    return peak_memory(device)
