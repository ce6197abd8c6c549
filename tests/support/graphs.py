"""A stand-in for CUDA graphs on a CPU: a replay does the captured step again, on the tensors that it was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar
from weakref import WeakSet

import torch
import torch.distributed as dist

from synco_fast.training.step import engine as engine_module
from synco_fast.training.step.engine import Engine
from synco_fast.training.tuning import autotune, trials

#: Eager steps of DDP before a capture, in the place of eleven.
WARMUP = 3


class Stream:
    """Everything happens at once."""

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        """Nothing to wait for."""


class Graph:
    """What was captured into it."""

    capturing: Graph | None = None
    alive: ClassVar[WeakSet[Graph]] = WeakSet()

    def __init__(self) -> None:
        self.replay: Any = None
        Graph.alive.add(self)


@contextmanager
def capture(graph: Graph, **settings: Any) -> Iterator[None]:
    """Steps inside are kept, not done."""
    Graph.capturing = graph
    try:
        yield
    finally:
        Graph.capturing = None


#: The parts of `torch.cuda` that a capture uses.
CUDA: dict[str, Any] = {
    "Stream": Stream,
    "CUDAGraph": Graph,
    "graph": capture,
    "current_stream": Stream,
    "stream": lambda stream: nullcontext(),
    "graph_pool_handle": lambda: 0,
}


def stand_in(monkeypatch: Any, **others: Any) -> None:
    """Put `CUDA`, or others of its parts, in the place of PyTorch's for a test."""
    for name, value in (CUDA | others).items():
        monkeypatch.setattr(torch.cuda, name, value)


def install() -> None:
    """Let engines on a CPU capture, and let a run of any length choose the graph; for a process that ends with it."""
    done, destroy = Engine._compute, dist.destroy_process_group

    def compute(self: Engine, *arguments: Any) -> None:
        if Graph.capturing is None:
            done(self, *arguments)
        else:
            Graph.capturing.replay = lambda: done(self, *arguments)

    def leave() -> None:
        # NCCL would wait for them, without end.
        assert not Graph.alive, "a captured exchange outlives the job"
        destroy()

    def timed(engine: Engine, *rest: Any) -> list[float]:
        return [0.5 if engine.form == "graph" else 1.0]

    for name, value in CUDA.items():
        setattr(torch.cuda, name, value)
    dist.destroy_process_group = leave
    engine: Any = Engine
    engine._compute, engine.uncapturable = compute, lambda self: None
    for module, name, value in (
        (trials, "_timed", timed),
        (autotune, "MIN_STEPS", 1),
        (engine_module, "DDP_GRAPH_WARMUP", WARMUP),
        (autotune, "_cpp_compiler", lambda: None),
    ):
        setattr(module, name, value)
