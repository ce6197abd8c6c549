"""A step as one CUDA graph: captured once, replayed with new input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from synco_fast.methods.base import Arranged

__all__ = ["GRAPH_WARMUP", "GraphedStep"]

#: Steps that run as they are before one is captured: optimiser state, cuDNN plans and workspaces come into being.
GRAPH_WARMUP = 3

Compute = Callable[[Arranged, Tensor, int, Tensor], None]


class GraphedStep:
    """Runs steps, from the fourth of a kind on as the replay of a graph.

    Input goes into buffers of its own, step and momentum are tensors on the device, so that a replay computes what the
    step at hand would. Where the capture fails, the steps run as they are, and one line says so.

    Args:
        compute: The step from views on the device to moved weights: launches alone, without a wait for the device.
        device: The GPU.
        note: Takes the line.
    """

    def __init__(self, compute: Compute, device: torch.device, note: Callable[[str], None]) -> None:
        self._compute, self._note = compute, note
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._momentum = torch.zeros((), device=device)
        self._input: Arranged | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._warm: dict[int, int] = {}
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._works = True

    def __call__(self, arranged: Arranged, step: int, kind: int, momentum: float) -> None:
        """Do one step; ``kind`` tells apart steps that launch different work."""
        given = self._take(arranged)
        self._step.fill_(step)
        self._momentum.fill_(momentum)
        if kind not in self._graphs and self._works and self._warm.get(kind, 0) >= GRAPH_WARMUP:
            self._capture(given, kind)
        if kind in self._graphs:
            self._graphs[kind].replay()
            return
        self._warm[kind] = self._warm.get(kind, 0) + 1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._compute(given, self._step, kind, self._momentum)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _take(self, arranged: Arranged) -> Arranged:
        """Copy the input to where the graph reads it."""
        if self._input is None:
            queries, keys, orders = ([part.clone() for part in parts] for parts in arranged[:3])
            self._input = Arranged(tuple(queries), tuple(keys), tuple(orders), arranged.images.clone())
            return self._input
        for target, source in zip(_tensors(self._input), _tensors(arranged), strict=True):
            target.copy_(source)
        return self._input

    def _capture(self, given: Arranged, kind: int) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads pin memory meanwhile, which the default mode forbids.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._compute(given, self._step, kind, self._momentum)
        except RuntimeError as error:
            self._works = False
            reason = str(error).strip().splitlines()[0]
            self._note(f"training.cuda_graph: steps run one launch at a time, since one cannot be captured: {reason}")
            return
        self._graphs[kind] = graph


def _tensors(arranged: Arranged) -> list[Tensor]:
    return [*arranged.queries, *arranged.keys, *arranged.orders, arranged.images]
