"""Time and peak extra memory of the head, forward and gradient, by back end.

Each back end is measured in a process of its own, since what a process has once touched hides a later peak:

    python -m synco_fast.bench.head --json head.json
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from synco_fast.bench.baselines import released_form
from synco_fast.environment import describe_environment
from synco_fast.kernels import Negatives, synthetic_contrast

__all__ = ["BACKENDS", "main", "measure", "sweep"]

BACKENDS = ("released", "reference", "closed_form", "triton")
_MIB = 1 << 20


def measure(
    backend: str, *, rows: int, length: int, dim: int, hard: int, repeats: int = 5, device: str = "cpu"
) -> dict[str, Any]:
    """Forward and gradient of SynCo's head at one shape.

    Args:
        backend: One of `BACKENDS`; "released" is `released_form`.
        rows, length, dim, hard: B, K, D, N.
        repeats: Timed runs, after one that is not.
        device: Where.

    Returns:
        The arguments; the seconds of every run with their median and minimum; the median of the processor seconds of
        all threads, which other programs on the machine disturb less; and the peak extra memory in MiB: on a CPU what
        the process's resident peak rose by, on a CUDA device what the allocator's did.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, queue = (normalize(torch.randn(n, dim, generator=generator), dim=1).to(device) for n in (rows, rows, length))
    q.requires_grad_()
    negatives = Negatives.synco(hard)
    run = _runner(backend, q, k, queue, negatives)
    # Libraries and thread pools are set up on a small shape, so that the peak below is the head's alone.
    small = normalize(torch.randn(8, dim, generator=generator), dim=1).to(device)
    _runner(backend, small.clone().requires_grad_(), small, queue[: max(2 * hard, 64)].clone(), negatives)(0)
    before = _peak(device, reset=True)
    run(0)
    extra = _peak(device) - before
    seconds, busy = [], []
    for step in range(1, 1 + repeats):
        start, start_busy = time.perf_counter(), time.process_time()
        run(step)
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - start_busy)
    return {
        "backend": backend,
        "rows": rows,
        "length": length,
        "dim": dim,
        "hard": hard,
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        "minimum_s": min(seconds),
        "processor_s": statistics.median(busy),
        "peak_extra_mib": extra / _MIB,
    }


def _runner(backend: str, q: Tensor, k: Tensor, queue: Tensor, negatives: Negatives) -> Callable[[int], None]:
    def run(step: int) -> None:
        if backend == "released":
            loss = released_form(q, k, queue, negatives, temperature=0.2)
        else:
            loss = synthetic_contrast(
                q,
                k,
                queue,
                negatives,
                temperature=0.2,
                seed=0,
                step=step,
                backend=backend,  # type: ignore[arg-type]
            ).loss
        torch.autograd.grad(loss.mean(), q)
        if q.is_cuda:
            torch.cuda.synchronize()

    return run


def _peak(device: str, *, reset: bool = False) -> int:
    if torch.device(device).type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    linux = platform.system() == "Linux"
    if linux and reset:
        # Linux lets a process lower its own high-water mark to what it holds now.
        Path("/proc/self/clear_refs").write_text("5")
    if linux:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10
    # In bytes on macOS, the other system that PyTorch is built for with this module.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def sweep(backends: tuple[str, ...], *, threads: int, **arguments: Any) -> dict[str, Any]:
    """`measure` for several back ends, each in a process of its own; the environment beside it."""
    results = []
    for backend in backends:
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--one", backend]
        command += [f"--{name}={value}" for name, value in {**arguments, "threads": threads}.items()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{backend}: {done.stderr.strip().splitlines()[-1]}")
        results.append(json.loads(done.stdout))
    load = Path("/proc/loadavg")
    about: dict[str, Any] = {"load_average": load.read_text().split()[:3] if load.exists() else None}
    return {"environment": {**describe_environment(), "threads": threads, **about}, "results": results}


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints a table, and writes the same figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS[:3]))
    for name, default in (("rows", 256), ("length", 65536), ("dim", 128), ("hard", 1024), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    shape = {name: getattr(options, name) for name in ("rows", "length", "dim", "hard", "repeats", "device")}
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one, **shape)))
        return 0
    report = sweep(tuple(options.backends), threads=options.threads, **shape)
    first = report["results"][0]
    print(f"{'back end':12} {'median s':>9} {'minimum s':>9} {'cpu s':>7} {'extra MiB':>10} {'time':>7} {'memory':>7}")
    for result in report["results"]:
        ratio, memory = first["median_s"] / result["median_s"], result["peak_extra_mib"] / first["peak_extra_mib"]
        figures = f"{result['median_s']:9.3f} {result['minimum_s']:9.3f} {result['processor_s']:7.3f}"
        figures += f" {result['peak_extra_mib']:10.1f}"
        print(f"{result['backend']:12} {figures} {ratio:6.2f}x {memory:6.3f}x")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
