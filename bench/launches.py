"""Time each launch of the loss on its own: launches are intercepted, recorded and replayed.

It handles any launch. ``python -m synco_fast.bench.launches`` prints a line of JSON for each launch,
and one for all of them in one CUDA graph.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from synco_fast.bench.loss import Shape, bare
from synco_fast.bench.subjects import DTYPES
from synco_fast.bench.timing import capture, graph_seconds, seconds_of

__all__ = ["Recorded", "add_shape", "intercepted", "recorded", "shape_of", "time_all", "time_launches"]

#: Callback with the kernel, the return value of the launch, the grid and the arguments by name.
Seen = Callable[[Any, Any, Any, dict[str, Any]], None]
#: Copies of a launch in the CUDA graph that times it.
_COPIES = 20


@dataclass(frozen=True)
class Recorded:
    """A recorded launch that can be replayed: kernel, grid, positional and keyword arguments."""

    kernel: Any
    grid: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        found: str = self.kernel.fn.__name__
        return found

    def __call__(self) -> None:
        """Launch."""
        self.kernel.run(*self.arguments, grid=self.grid, warmup=False, **self.options)


@contextlib.contextmanager
def intercepted(seen: Seen, *, run: bool, before: Callable[[Recorded], None] | None = None) -> Iterator[None]:
    """Context in which ``seen`` is called after every launch of a Triton kernel, interpreted or not.

    Args:
        seen: See `Seen`.
        run: Whether to launch; otherwise the kernel is only compiled.
        before: Called before every launch.
    """
    originals = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}

    def watched(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        names = inspect.signature(self.fn).parameters
        bound = dict(zip(names, arguments, strict=False)) | {key: options[key] for key in options if key in names}
        if before is not None:
            before(Recorded(self, grid, arguments, dict(options)))
        made = originals[type(self)](self, *arguments, grid=grid, warmup=warmup or not run, **options)
        seen(self, made, grid, bound)
        return made

    for kind in originals:
        kind.run = watched
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.run = original


def recorded(run: Callable[[], object]) -> list[Recorded]:
    """The launches of ``run``, each with its own tensors."""
    found: list[Recorded] = []
    with intercepted(lambda *seen: None, run=True, before=found.append):
        run()
    return found


def _replay(launches: list[Recorded]) -> None:
    for launch in launches:
        launch()


def time_launches(
    run: Callable[[], object], device: torch.device, *, repeats: int, only: str | None = None
) -> list[dict[str, Any]]:
    """The time of each launch of ``run`` on its own, in order.

    Args:
        run: A function that launches kernels.
        device: On a GPU a CUDA graph holds some twenty copies of a launch; on a CPU the launch is called.
        repeats: Timed runs.
        only: Name of the launches to time; all by default.

    Returns:
        For each launch its name and ``microseconds``. On a GPU also ``cold_us``, the time of one launch with a cold L2
        cache, which includes the launch of a graph, and without ``only`` ``added_us``, what it adds to a graph of the
        launches before it. A copy of itself has just read what a launch reads, and the launches before it have not.
    """
    found = []
    launches = recorded(run)
    until = 0.0
    # In order, since launches share buffers: each reads what the previous ones have just written.
    for number, launch in enumerate(launches):
        if only not in (None, launch.name):
            continue
        line: dict[str, Any] = {"launch": launch.name, "number": number}
        if device.type == "cuda":
            line["microseconds"] = 1e6 * graph_seconds(launch, device, copies=_COPIES, repeats=repeats)
            once = capture(launch, device)
            line["cold_us"] = 1e6 * statistics.median(seconds_of(once, device, repeats=repeats, cold=True))
            if only is None:
                before = until
                until = 1e6 * graph_seconds(
                    partial(_replay, launches[: number + 1]), device, copies=_COPIES, repeats=repeats
                )
                line["added_us"] = until - before
        else:
            line["microseconds"] = 1e6 * statistics.median(seconds_of(launch, device, repeats=repeats, warmup=0))
        found.append(line)
    return found


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the options of a `Shape`, with the published values as defaults."""
    published = Shape(256, 65536)
    for name in ("rows", "length", "dim", "hard", "synthetic"):
        parser.add_argument(f"--{name}", type=int, default=getattr(published, name))


def shape_of(options: argparse.Namespace, dtype: str) -> Shape:
    """The shape from the options of `add_shape`."""
    return Shape(options.rows, options.length, options.dim, options.hard, dtype, options.synthetic)


def main() -> None:
    """Time each launch at one shape, or launch them once for a sanitizer or profiler."""
    parser = argparse.ArgumentParser(description="Time the launches of the loss one by one.")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--repeats", type=int, default=30)
    add_shape(parser)
    parser.add_argument("--once", action="store_true", help="launch each kernel once, for a sanitizer or a profiler")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in options.dtypes:
        shape = shape_of(options, dtype)
        run = bare("triton", shape, device)
        if options.once:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            print(json.dumps({"dtype": dtype, "made": True}), flush=True)
            continue
        for line in time_launches(run, device, repeats=options.repeats):
            print(json.dumps({"dtype": dtype, **line}), flush=True)
        print(
            json.dumps({"dtype": dtype, "launch": "all", **time_all(run, device, repeats=options.repeats)}), flush=True
        )


def time_all(run: Callable[[], object], device: torch.device, *, repeats: int) -> dict[str, float]:
    """Microseconds of all launches of ``run``. On a GPU: from one graph with several copies, and with a cold cache."""
    if device.type != "cuda":
        return {"microseconds": 1e6 * statistics.median(seconds_of(run, device, repeats=repeats, warmup=0))}
    many = graph_seconds(run, device, copies=_COPIES, repeats=repeats)
    return {
        "microseconds": 1e6 * many,
        "cold_us": 1e6 * statistics.median(seconds_of(capture(run, device), device, repeats=repeats, cold=True)),
    }


if __name__ == "__main__":
    main()
