"""Time and peak extra memory of the loss, forward and gradient, by backend and shape.

On a CPU each measurement runs in its own process, since earlier peaks of a process hide later ones. On a GPU the
allocator counts, so each backend needs only one process.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from synco_fast.bench.baselines.field import linear_cross_entropy, product_loss, top_k
from synco_fast.bench.baselines.loss import baseline_loss
from synco_fast.bench.timing import capture, graph_seconds, peak_memory, reset_peak_memory, seconds_of
from synco_fast.kernels import FAMILIES, Negatives, reference, synthetic_contrast
from synco_fast.kernels.ops import unserved_by_triton

__all__ = ["Shape", "bare", "extra_bytes", "failure", "measure", "prepare", "prepare_selection", "sweep"]

TEMPERATURE = 0.2
_MIB = 1 << 20
#: Copies of the bare operator in one CUDA graph.
_COPIES = 16


@dataclass(frozen=True)
class Shape:
    """B queries against K keys of D numbers, N hard negatives, M synthetic ones, and the name of a torch dtype."""

    rows: int
    length: int
    dim: int = 128
    hard: int = 1024
    dtype: str = "float32"
    synthetic: int = Negatives.synco().synthetic

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def negatives(self) -> Negatives:
        """SynCo's synthetic negatives, scaled to M with at least one in each family, and at most K hard negatives."""
        share = self.synthetic / Negatives.synco().synthetic
        counts: dict[str, Any] = {family.name: max(1, round(share * family.published)) for family in FAMILIES}
        return Negatives(min(self.hard, self.length), **counts)


def _inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and a queue of unit rows, the same for every backend."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape.rows, shape.rows, shape.length)
    q, k, queue = (
        normalize(torch.randn(n, shape.dim, generator=generator), dim=1).to(device, shape.torch_dtype) for n in sizes
    )
    return q, k, queue


def _check(backend: str, q: Tensor, queue: Tensor) -> None:
    if backend == "triton" and (reason := unserved_by_triton(q, queue, TEMPERATURE)):
        raise RuntimeError(reason)


def prepare(backend: str, shape: Shape, device: torch.device) -> Callable[[], Tensor]:
    """A function that computes the mean loss and its gradient for q once, and returns the gradient.

    Args:
        backend: One of `synco_fast.bench.subjects.LOSS_BACKENDS`.
        shape: See `Shape`.
        device: Device of the inputs.

    Raises:
        RuntimeError: The kernels do not support the shape or the device.
        UserError: A package is not installed.
    """
    q, k, queue = _inputs(shape, device)
    q.requires_grad_()
    # A device tensor, so that compiled and captured functions need not change in each step.
    step = torch.zeros((), dtype=torch.int64, device=device)
    negatives = shape.negatives
    _check(backend, q, queue)

    def plain(q: Tensor, step: Tensor) -> Tensor:
        return reference.contrast(q, k, queue, negatives, temperature=TEMPERATURE, seed=0, step=step).loss.mean()

    def ours(q: Tensor, step: Tensor) -> Tensor:
        return _operator(backend, q, k, queue, negatives, step).mean()

    def released(q: Tensor, step: Tensor) -> Tensor:
        return baseline_loss(q, k, queue, negatives, temperature=TEMPERATURE).mean()

    forms = {"released": released, "reference": plain, "blockwise": ours, "triton": ours}
    if backend == "compiled":
        # Not dynamic: the smaller shape before this one would make all sizes symbolic, which is slower.
        form: Callable[[Tensor, Tensor], Tensor] = torch.compile(plain, dynamic=False)
    elif backend.startswith("topk"):
        choose = top_k("flashinfer" if backend.endswith("flashinfer") else "torch")
        product = product_loss(choose, hard=negatives.hard, temperature=TEMPERATURE)
        form = lambda q, step: product(q, k, queue).mean()  # noqa: E731
    elif backend.startswith("linear-ce"):
        linear = linear_cross_entropy("liger" if backend.endswith("liger") else "torch", temperature=TEMPERATURE)
        form = lambda q, step: linear(q, k, queue)  # noqa: E731
    else:
        form = forms[backend]

    def run() -> Tensor:
        (gradient,) = torch.autograd.grad(form(q, step), q)
        step.add_(1)
        return gradient

    return run


def _operator(backend: str, q: Tensor, k: Tensor, queue: Tensor, negatives: Negatives, step: Tensor) -> Tensor:
    settings: dict[str, Any] = {"temperature": TEMPERATURE, "seed": 0, "step": step, "backend": backend}
    return synthetic_contrast(q, k, queue, negatives, **settings).loss


def bare(backend: str, shape: Shape, device: torch.device) -> Callable[[], Tensor]:
    """The operator alone, which computes loss and gradient: no mean, no autograd, no step counter.

    Args:
        backend: ``blockwise`` or ``triton``.
        shape, device: As for `prepare`.

    Raises:
        RuntimeError: As for `prepare`.
    """
    q, k, queue = _inputs(shape, device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    _check(backend, q, queue)
    return lambda: _operator(backend, q, k, queue, shape.negatives, step)


def prepare_selection(subject: str, shape: Shape, device: torch.device) -> Callable[[], Tensor]:
    """A function that finds the N largest similarities of each row once.

    Args:
        subject: One of `synco_fast.bench.subjects.SELECTIONS`.
        shape, device: As for `prepare`.

    Returns:
        A function that returns the values, (B, N), in any order. This package's own backends return their loss.

    Raises:
        RuntimeError, UserError: As for `prepare`.
    """
    q, k, queue = _inputs(shape, device)
    hard = shape.negatives.hard
    _check(subject, q, queue)
    if subject in ("blockwise", "triton"):
        step = torch.zeros((), dtype=torch.int64, device=device)
        return lambda: _operator(subject, q, k, queue, Negatives(hard=hard), step)
    choose = top_k("flashinfer" if "flashinfer" in subject else "torch")
    if subject.endswith("-only"):
        similarity = q @ queue.T
        return lambda: choose(similarity, hard)[0]
    return lambda: choose(q @ queue.T, hard)[0]


def measure(
    backend: str, shape: Shape, *, device: torch.device, repeats: int = 5, part: str = "loss"
) -> dict[str, Any]:
    """Forward and gradient of SynCo's loss at one shape, or the selection alone.

    Args:
        backend: One of `synco_fast.bench.subjects.LOSS_BACKENDS`, or of its `SELECTIONS`.
        shape: See `Shape`.
        device: Device to measure on.
        repeats: Timed runs of each kind.
        part: ``loss`` or ``selection``.

    Returns:
        The shape; ``seconds`` of every run, and their median; ``extra_mib``, the increase of peak memory during a run
        (of the process on a CPU, of the allocator on a GPU); for this package's operator also ``bare_s``, the time of
        the operator alone. On a GPU also ``cold_s``, with a cold L2 cache, and ``graph_s``, as a replayed CUDA graph,
        or ``graph``, the reason why it cannot be captured. There ``bare_s`` is the mean over one graph with several
        copies.
    """
    make = prepare if part == "loss" else prepare_selection
    # Set up libraries and thread pools on a small shape first, so that they do not count in the peak.
    make(backend, Shape(8, 2048, shape.dim, min(shape.hard, 1024), shape.dtype, shape.synthetic), device)()
    run = make(backend, shape, device)
    found: dict[str, Any] = {"backend": backend, "part": part, **asdict(shape)}
    if backend == "compiled":
        run()  # Compiling needs memory that later runs do not.
    before = reset_peak_memory(device)
    run()
    found["extra_mib"] = (peak_memory(device) - before) / _MIB
    found["seconds"] = seconds_of(run, device, repeats=repeats)
    found["median_s"] = statistics.median(found["seconds"])
    alone = bare(backend, shape, device) if part == "loss" and backend in ("blockwise", "triton") else None
    if device.type != "cuda":
        if alone is not None:
            found["bare_s"] = statistics.median(seconds_of(alone, device, repeats=repeats, warmup=1))
        return found
    found["cold_s"] = statistics.median(seconds_of(run, device, repeats=repeats, cold=True))
    try:
        replay = capture(run, device)
        found["graph_s"] = statistics.median(seconds_of(replay, device, repeats=repeats))
        found["graph_cold_s"] = statistics.median(seconds_of(replay, device, repeats=repeats, cold=True))
        if alone is not None:
            found["bare_s"] = graph_seconds(alone, device, copies=_COPIES, repeats=repeats)
    except RuntimeError as error:
        found["graph"] = f"cannot be captured: {str(error).splitlines()[0]}"
    return found


def extra_bytes(backend: str, shape: Shape) -> int:
    """Estimate of the peak memory of a run in addition to its inputs, to skip runs that cannot fit."""
    if backend in ("blockwise", "triton"):
        return 64 * _MIB
    if backend.startswith("linear-ce"):
        return 64 * _MIB + 8 * shape.length * shape.dim
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
    part: str = "loss",
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> Iterator[dict[str, Any]]:
    """`measure` for backends and shapes, in processes of their own.

    Args:
        backends: Backends or selections of `measure`.
        shapes: Each is measured with every backend.
        device: Device to measure on.
        repeats: Timed runs in a process.
        rounds: Rounds through all backends, each in new processes. On a CPU the time depends on where the memory is
            allocated, which differs between processes.
        threads: PyTorch's threads on the CPU; by default its own choice.
        part: ``loss`` or ``selection``.
        keep: Called with every result as soon as it is available, before other rounds finish.

    Yields:
        The result of `measure` over all rounds; or the backend, the shape and ``failed``, the reason of the failure.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available()
    for group in [list(shapes)] if device.type == "cuda" else [[shape] for shape in shapes]:
        found: dict[tuple[str, Shape], list[dict[str, Any]]] = {}
        for shape, backend in itertools.product(group, backends):
            found[backend, shape] = []
            if (wanted := extra_bytes(backend, shape)) > free:
                why = f"not run: takes about {wanted / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
                found[backend, shape].append({"backend": backend, "part": part, **asdict(shape), "failed": why})
        fit = {backend: [shape for shape in group if not found[backend, shape]] for backend in backends}
        for _, backend in itertools.product(range(rounds), backends):
            if fit[backend]:
                for result in _in_a_process(backend, fit[backend], device, repeats, threads, part):
                    keep(result)
                    found[backend, Shape(**{name: result[name] for name in asdict(group[0])})].append(result)
        yield from (_over_rounds(results) for results in found.values())


def _over_rounds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the results of several rounds: all seconds, and the median of every other figure."""
    for result in results:
        if "failed" in result:
            return result
    together = dict(results[0])
    together["seconds"] = [second for result in results for second in result["seconds"]]
    together["median_s"] = statistics.median(together["seconds"])
    for name in ("extra_mib", "cold_s", "graph_s", "graph_cold_s", "bare_s"):
        if name in together:
            together[name] = statistics.median(result[name] for result in results if name in result)
    return together


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 62
    return int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) << 10


def _in_a_process(
    backend: str, shapes: list[Shape], device: torch.device, repeats: int, threads: int | None, part: str
) -> Iterator[dict[str, Any]]:
    task: dict[str, Any] = {"backend": backend, "shapes": [asdict(shape) for shape in shapes], "device": str(device)}
    task |= {"repeats": repeats, "threads": threads, "part": part}
    command = [sys.executable, "-m", "synco_fast.bench.loss", json.dumps(task)]
    done = 0
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        assert process.stdout is not None
        # Read line by line, so that results are kept if the time limit ends the process.
        for line in process.stdout:
            if line.startswith("{"):
                done += 1
                yield json.loads(line)
        code = process.wait()
        said.seek(0)
        last = said.read().strip().splitlines() or [f"exit code {code}"]
    for shape in shapes[done:]:
        yield {"backend": backend, "part": part, **asdict(shape), "failed": last[-1]}


def failure(error: Exception) -> dict[str, str]:
    """``failed``, one line, and ``message``, the end of the whole message: a compiler's first line says little."""
    message = str(error).strip()
    first, _, _ = message.partition("\n")
    return {"failed": f"{type(error).__name__}: {first}", "message": message[-4000:]}


def main() -> None:
    """Measure the request in the first argument (JSON from `sweep`), and print a line of JSON for each shape."""
    task = json.loads(sys.argv[1])
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    for values in task["shapes"]:
        shape, device = Shape(**values), torch.device(task["device"])
        try:
            found = measure(task["backend"], shape, device=device, repeats=task["repeats"], part=task["part"])
        except Exception as error:
            # A failure at one shape, such as no memory or no compiler, must not lose the other results.
            found = {"backend": task["backend"], "part": task["part"], **values, **failure(error)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
