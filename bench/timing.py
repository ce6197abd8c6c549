"""Timing and peak memory on a device, with warm-up and synchronisation, and a warm or cold cache."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from synco_fast.runtime.phases import wait_for

__all__ = ["capture", "graph_seconds", "peak_memory", "reset_peak_memory", "seconds_of"]


def seconds_of(
    run: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 2, cold: bool = False
) -> list[float]:
    """Seconds of each of several runs.

    Args:
        run: The function to time.
        device: On a CUDA device, time between two events; otherwise wall-clock time.
        repeats: Timed runs.
        warmup: Runs before them, which compile and fill caches.
        cold: Read twice the size of the device's L2 cache before each run, to evict the inputs and all dirty lines.
            CUDA only.
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
    """Capture one or more copies of ``run`` as a CUDA graph, and return a function that replays it.

    Args:
        run: The function to capture.
        device: The CUDA device.
        copies: Copies in the graph. With several, the launch of the graph itself matters less.

    Raises:
        RuntimeError: It cannot be captured, for example because it waits for the device.
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

    def replay(kept: Callable[[], object] = run) -> None:
        """The graph holds addresses only, so ``kept`` holds the tensors that it reads and writes."""
        graph.replay()

    return replay


def graph_seconds(run: Callable[[], object], device: torch.device, *, copies: int, repeats: int) -> float:
    """Median seconds of a run among several copies in one CUDA graph, so that neither host nor graph launch counts.

    Args:
        run, device, copies: As in `capture`.
        repeats: Timed replays.
    """
    return statistics.median(seconds_of(capture(run, device, copies=copies), device, repeats=repeats)) / copies


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: on a CUDA device PyTorch's allocations, on a CPU the resident size of the process."""
    wait_for(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) << 10
    # macOS reports bytes, Linux KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_memory(device: torch.device) -> int:
    """Reset the peak to the current memory, and return that in bytes."""
    wait_for(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        # Linux lets a process reset its own high-water mark.
        clear.write_text("5")
    return peak_memory(device)
