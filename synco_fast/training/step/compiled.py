"""torch.compile and CUDA graphs, with a fall-back to eager mode."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synco_fast.methods.base import StepInputs
from synco_fast.runtime.errors import first_line

__all__ = ["GRAPH_WARMUP", "Compiled", "GraphedStep", "allow_shapes", "keep_compile_cache"]

#: torch.compile's backend; the tests use one that needs no C++ compiler.
BACKEND = "inductor"
#: Compiled forms of one function at one shape: torch.compile's own limit, which serves a run of fixed shapes.
_CODE_PER_SHAPE = 8
#: Eager steps before the capture, which create optimizer state, cuDNN plans and workspaces.
GRAPH_WARMUP = 3

Compute = Callable[[StepInputs, Tensor, int, Tensor], None]


class Compiled:
    """A function compiled by torch.compile on its first call.

    If that fails, such as without a compiler, the function runs eagerly, and one note says so.

    Args:
        function: Called with tensors of fixed shapes.
        title: Its name in the note.
        note: Called with the note.

    Attributes:
        works: Whether nothing has failed so far.
    """

    def __init__(self, function: Callable[..., Any], title: str, note: Callable[[str], None]) -> None:
        self._plain, self._title, self._note = function, title, note
        self.works = True
        self._compiled: Callable[..., Any] | None = torch.compile(function, dynamic=False, backend=BACKEND)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the compiled function."""
        if self._compiled is not None:
            try:
                return self._compiled(*arguments, **named)
            except Exception as error:
                if not _is_of_the_compiler(error):
                    raise
                reason = " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
                self._note(
                    f"torch.compile failed for {self._title}; running it eagerly: "
                    f"{reason[:200] or type(error).__name__}"
                )
                self._compiled, self.works = None, False
        return self._plain(*arguments, **named)


def _is_of_the_compiler(error: Exception) -> bool:
    """Whether torch.compile raised the error, not the function."""
    kinds = {kind.__module__.split(".")[1] for kind in type(error).__mro__ if kind.__module__.startswith("torch.")}
    return bool(kinds & {"_dynamo", "_inductor", "_functorch"})


def keep_compile_cache() -> None:
    """Keep compiled code in the user's cache, unless PyTorch's own setting names another place."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "synco-fast" / "inductor"))


def allow_shapes(count: int) -> None:
    """Let torch.compile keep code for so many input shapes; beyond its own limit it would run eagerly, unsaid."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _CODE_PER_SHAPE * count)


class GraphedStep:
    """Runs steps; after ``warmup`` of them with the same graph key, by replaying one CUDA graph.

    Inputs are copied into fixed buffers; step and momentum are tensors on the device. Inputs of other shapes, as
    progressive resizing brings them, are captured anew, after as many eager steps. If the capture fails, the steps run
    eagerly, and one note says so.

    Args:
        compute: The step from views on the device to updated weights, without a synchronisation.
        device: The GPU.
        note: Called with the note.
        warmup: Eager steps before a capture.
        agree: From whether the capture worked here to whether it worked on all processes: they replay together or not
            at all.

    Attributes:
        works: Whether no capture has failed so far.
    """

    def __init__(
        self,
        compute: Compute,
        device: torch.device,
        note: Callable[[str], None],
        warmup: int = GRAPH_WARMUP,
        agree: Callable[[bool], bool] = lambda works: works,
    ) -> None:
        self._compute, self._note, self._warmup, self._agree = compute, note, warmup, agree
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._momentum = torch.zeros((), device=device)
        self._input: StepInputs | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._warm: dict[int, int] = {}
        self._stream, self._device = torch.cuda.Stream(device), device.index or 0
        self._pool = torch.cuda.graph_pool_handle()
        self.works = True

    def __call__(self, inputs: StepInputs, step: int, key: int, momentum: float) -> None:
        """Run one step; ``key`` is `Method.graph_key`."""
        if self._input is not None and _shapes(self._input) != _shapes(inputs):
            self.release()  # views of another size need graphs of their own
        held = self._hold(inputs)
        self._step.fill_(step)
        self._momentum.fill_(momentum)
        if key not in self._graphs and self.works and self._warm.get(key, 0) >= self._warmup:
            self._capture(held, key)
        if key in self._graphs:
            self._graphs[key].replay()
            return
        self._warm[key] = self._warm.get(key, 0) + 1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._compute(held, self._step, key, self._momentum)
        torch.cuda.current_stream().wait_stream(self._stream)

    def release(self) -> None:
        """Drop the graphs and their memory; later steps warm up and capture again."""
        self._graphs.clear()
        self._warm.clear()
        self._input = None
        # A pool ends with its last graph.
        self._pool = torch.cuda.graph_pool_handle()

    def _hold(self, inputs: StepInputs) -> StepInputs:
        """Copy the inputs to the graph's buffers."""
        if self._input is None:
            queries, keys, orders = (tuple(tensor.clone() for tensor in part) for part in inputs[:3])
            self._input = StepInputs(queries, keys, orders, inputs.image_ids.clone())
            return self._input
        for target, source in zip(_tensors(self._input), _tensors(inputs), strict=True):
            target.copy_(source)
        return self._input

    def _capture(self, held: StepInputs, key: int) -> None:
        graph, reason, stream = torch.cuda.CUDAGraph(), "", torch.cuda.current_stream()
        try:
            # PyTorch's own stream for captures stays on the device of the first one in this process. Other threads pin
            # memory meanwhile, which the default mode forbids.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                self._compute(held, self._step, key, self._momentum)
        except RuntimeError as error:
            reason = first_line(error)
            self._recover(stream)
        self.works = self._agree(not reason)
        if self.works:
            self._graphs[key] = graph
            return
        self._graphs.clear()
        self._note(f"CUDA graph disabled: a step cannot be captured: {reason or 'so says another process'}")

    def _recover(self, stream: torch.cuda.Stream) -> None:
        """Take back what a failed capture leaves behind, so that eager steps work."""
        # `torch.cuda.graph` leaves its own stream current where the capture cannot be ended.
        torch.cuda.set_stream(stream)
        # In PyTorch 2.11 the generator stays in that capture: the next draw on the device would be an error.
        for generator in torch.cuda.default_generators[self._device : self._device + 1]:
            generator.graphsafe_set_state(generator.clone_state())


def _shapes(inputs: StepInputs) -> list[torch.Size]:
    return [tensor.shape for tensor in _tensors(inputs)]


def _tensors(inputs: StepInputs) -> list[Tensor]:
    return [*inputs.queries, *inputs.keys, *inputs.orders, inputs.image_ids]
