"""Time and peak extra memory of the loss, forward and gradient, by back end and shape.

What a process has once touched hides a later peak, so on a CPU each measurement has a process of its own; on a GPU,
where the allocator counts, each back end has one.
"""

from __future__ import annotations

import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from synco_fast.bench.baselines.loss import released_form
from synco_fast.bench.timing import capture, seconds_of
from synco_fast.kernels import Negatives, reference, synthetic_contrast
from synco_fast.kernels.ops import unserved_by_triton

__all__ = ["BACKENDS", "Shape", "extra_bytes", "measure", "prepare", "sweep"]

BACKENDS = {
    "released": "the cost model of the method as released (`bench/baselines.py`)",
    "reference": "plain PyTorch, vectorised over negatives",
    "compiled": "the reference under torch.compile",
    "blockwise": "in blocks, without synthetic vectors",
    "triton": "the fused kernels",
}
TEMPERATURE = 0.2
_MIB = 1 << 20


@dataclass(frozen=True)
class Shape:
    """B queries against K keys of D numbers, N of them hard; dtype by its name in torch."""

    rows: int
    length: int
    dim: int = 128
    hard: int = 1024
    dtype: str = "float32"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def negatives(self) -> Negatives:
        """SynCo's 960 synthetic negatives; fewer hard ones than published where K holds no more."""
        return Negatives.synco(min(self.hard, self.length))


def prepare(backend: str, shape: Shape, device: torch.device) -> Callable[[], Tensor]:
    """A function that computes the mean loss and its gradient to q once, and returns the gradient.

    Args:
        backend: One of `BACKENDS`.
        shape: See `Shape`.
        device: Where.

    Raises:
        RuntimeError: The kernels do not serve the shape or the device.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = (shape.rows, shape.rows, shape.length)
    q, k, queue = (
        normalize(torch.randn(n, shape.dim, generator=generator), dim=1).to(device, shape.torch_dtype) for n in sizes
    )
    q.requires_grad_()
    # On the device, so that neither a compiled nor a captured form meets a new number in each step.
    step = torch.zeros((), dtype=torch.int64, device=device)
    negatives = shape.negatives
    if backend == "triton" and (reason := unserved_by_triton(q, queue, TEMPERATURE)):
        raise RuntimeError(reason)

    def plain(q: Tensor, step: Tensor) -> Tensor:
        return reference.contrast(q, k, queue, negatives, temperature=TEMPERATURE, seed=0, step=step).loss.mean()

    compiled = torch.compile(plain) if backend == "compiled" else plain

    def run() -> Tensor:
        if backend == "released":
            loss = released_form(q, k, queue, negatives, temperature=TEMPERATURE).mean()
        elif backend == "reference":
            loss = plain(q, step)
        elif backend == "compiled":
            loss = compiled(q, step)
        else:
            loss = synthetic_contrast(
                q,
                k,
                queue,
                negatives,
                temperature=TEMPERATURE,
                seed=0,
                step=step,
                backend=backend,  # type: ignore[arg-type]
            ).loss.mean()
        (gradient,) = torch.autograd.grad(loss, q)
        step.add_(1)
        return gradient

    return run


def measure(backend: str, shape: Shape, *, device: torch.device, repeats: int = 5) -> dict[str, Any]:
    """Forward and gradient of SynCo's loss at one shape.

    Args:
        backend: One of `BACKENDS`.
        shape: See `Shape`.
        device: Where.
        repeats: Timed runs of each kind.

    Returns:
        The shape; ``seconds``, of every run, and their median; ``extra_mib``, by how much the peak of memory rose in a
        run (of the process on a CPU, of the allocator on a GPU). On a GPU also ``cold_s``, with an empty L2 cache, and
        ``graph_s``, as a replayed CUDA graph, or ``graph``, why it cannot be one.
    """
    # Libraries and thread pools are set up on a small shape, so that the peak below is the loss's alone.
    prepare(backend, Shape(8, 2048, shape.dim, min(shape.hard, 1024), shape.dtype), device)()
    run = prepare(backend, shape, device)
    found: dict[str, Any] = {"backend": backend, **asdict(shape)}
    if backend == "compiled":
        run()  # Compiling takes memory that running does not.
    before = _peak(device, reset=True)
    run()
    found["extra_mib"] = (_peak(device) - before) / _MIB
    found["seconds"] = seconds_of(run, device, repeats=repeats)
    found["median_s"] = statistics.median(found["seconds"])
    if device.type == "cuda":
        found["cold_s"] = statistics.median(seconds_of(run, device, repeats=repeats, cold=True))
        try:
            replay = capture(run, device)
        except RuntimeError as error:
            found["graph"] = f"cannot be captured: {str(error).splitlines()[0]}"
        else:
            found["graph_s"] = statistics.median(seconds_of(replay, device, repeats=repeats))
            found["graph_cold_s"] = statistics.median(seconds_of(replay, device, repeats=repeats, cold=True))
    return found


def _peak(device: torch.device, *, reset: bool = False) -> int:
    """The highest memory so far, or since a reset, in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    linux = platform.system() == "Linux"
    if linux and reset:
        # Linux lets a process lower its own high-water mark to what it holds now.
        Path("/proc/self/clear_refs").write_text("5")
    if linux:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10
    # In bytes on macOS, the other system that PyTorch is built for with this module.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def extra_bytes(backend: str, shape: Shape) -> int:
    """About the most that a run holds beside its inputs, to know beforehand what cannot fit."""
    if backend in ("blockwise", "triton"):
        return 64 * _MIB
    logits = 6 * shape.rows * shape.length * max(4, shape.itemsize)
    return logits + 4 * shape.rows * shape.negatives.synthetic * shape.dim * max(4, shape.itemsize)


def sweep(
    backends: Sequence[str],
    shapes: Sequence[Shape],
    *,
    device: torch.device,
    repeats: int = 5,
    rounds: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, Any]]:
    """`measure` for back ends and shapes, in processes of their own.

    Args:
        backends: Of `BACKENDS`.
        shapes: Each is measured with every back end.
        device: Where.
        repeats: Timed runs in a process.
        rounds: How often the back ends are measured in turn, each time in fresh processes: where memory lies decides a
            good part of a CPU's time, and it is another place in each process.
        threads: Of PyTorch on the CPU; its own choice by default.

    Yields:
        What `measure` returns, over all rounds; or the back end, the shape and ``failed``, why there is no figure.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available()
    for group in [list(shapes)] if device.type == "cuda" else [[shape] for shape in shapes]:
        found: dict[tuple[str, Shape], list[dict[str, Any]]] = {}
        for shape, backend in itertools.product(group, backends):
            found[backend, shape] = []
            if (wanted := extra_bytes(backend, shape)) > free:
                why = f"not run: takes about {wanted / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
                found[backend, shape].append({"backend": backend, **asdict(shape), "failed": why})
        fit = {backend: [shape for shape in group if not found[backend, shape]] for backend in backends}
        for _, backend in itertools.product(range(rounds), backends):
            if fit[backend]:
                for result in _in_a_process(backend, fit[backend], device, repeats, threads):
                    found[backend, Shape(**{name: result[name] for name in asdict(group[0])})].append(result)
        yield from (_over_rounds(results) for results in found.values())


def _over_rounds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several rounds as one: all seconds, the median of every other figure."""
    for result in results:
        if "failed" in result:
            return result
    together = dict(results[0])
    together["seconds"] = [second for result in results for second in result["seconds"]]
    together["median_s"] = statistics.median(together["seconds"])
    for name in ("extra_mib", "cold_s", "graph_s", "graph_cold_s"):
        if name in together:
            together[name] = statistics.median(result[name] for result in results if name in result)
    return together


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 62
    return int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) << 10


def _in_a_process(
    backend: str, shapes: list[Shape], device: torch.device, repeats: int, threads: int | None
) -> Iterator[dict[str, Any]]:
    task: dict[str, Any] = {"backend": backend, "shapes": [asdict(shape) for shape in shapes], "device": str(device)}
    task |= {"repeats": repeats, "threads": threads}
    command = [sys.executable, "-m", "synco_fast.bench.loss", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    yield from results
    for shape in shapes[len(results) :]:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        yield {"backend": backend, **asdict(shape), "failed": said[-1]}


def main() -> None:
    """Measure what the first argument describes, as `sweep` asks for it; a line of JSON for each shape."""
    task = json.loads(sys.argv[1])
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    for values in task["shapes"]:
        shape = Shape(**values)
        try:
            found = measure(task["backend"], shape, device=torch.device(task["device"]), repeats=task["repeats"])
        except Exception as error:
            # One shape that fails, for want of memory or of a compiler, must not take the others' figures along.
            first = (str(error).strip().splitlines() or [""])[0]
            found = {"backend": task["backend"], **values, "failed": f"{type(error).__name__}: {first}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
