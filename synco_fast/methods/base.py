"""The contract between a method and the training engine.

A method defines its networks and what a step computes. The engine owns number format, processes, optimizer, compilation
and CUDA graphs. A minimal method sets ``encoder`` and implements `Method.loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from synco_fast.data.sources.splits import Split
from synco_fast.kernels.momentum import MomentumBackend
from synco_fast.models.encoder import Encoder

__all__ = ["Encoders", "Method", "Recent", "RunInfo", "StepInputs", "StepOutput", "Views"]


class Views(NamedTuple):
    """Two views of each image of this process, (b, 3, H, W), and the image ids, (b,) int64."""

    first: Tensor
    second: Tensor
    image_ids: Tensor


class StepInputs(NamedTuple):
    """Inputs of a step: every process holds the views that it computes on.

    Attributes:
        queries: By direction, the views for `Encoders.query`, (b, 3, H, W), in the order of the batch.
        keys: By direction, the views for `Encoders.key`, (b, 3, H, W); with ShuffleBN, this process's share of the
            permuted global batch.
        orders: By direction, that permutation, (B,) int64, on the device; empty without one.
        image_ids: (b,) int64.
    """

    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    orders: tuple[Tensor, ...]
    image_ids: Tensor


class Encoders(NamedTuple):
    """The method's networks, wrapped by the engine: views (n, 3, H, W), pixels or normalised, to (n, D).

    Attributes:
        query: `Method.trainable`; its gradient is averaged over the processes.
        key: `Method.target`.
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]


class StepOutput(NamedTuple):
    """The scalar loss, and metrics: detached scalars by name, the same names every step."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Recent(NamedTuple):
    """Embeddings to look at beside the training: the last step's queries, and the keys that the next one meets.

    Attributes:
        queries: Unit rows of this process's images, of one view each, (b, D).
        query_ids: Their image ids, (b,) int64.
        keys: Unit rows, (K, D).
        key_ids: Their image ids, (K,) int64; negative for a row that is no key of a real image.
        hard: N, the number of hard negatives to look at.
    """

    queries: Tensor
    query_ids: Tensor
    keys: Tensor
    key_ids: Tensor
    hard: int


@dataclass(frozen=True)
class RunInfo:
    """What a method may need to know about the run.

    Attributes:
        device: Device of the method.
        steps_per_epoch: Steps per epoch.
        processes: Number of processes.
        autocast: The context of a forward pass whose loss is not scaled.
    """

    device: torch.device
    steps_per_epoch: int
    processes: int = 1
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext


class Method(nn.Module):
    """A method: its networks, and what a step computes. A checkpoint stores its ``state_dict``.

    A step calls `shard`, `begin_step`, `loss` once for each micro-batch, `after_step` and `extra_step`. Only
    `shard` and `extra_step` may synchronise with the device or exchange data on the host; the others run inside a
    captured graph.

    Attributes:
        encoder: Its backbone is evaluated and exported.
        momentum_backend: Backend of the EMA update.
        views_at_once: Views of an image in one forward pass.
        headline: Metrics in the progress bar, each with its format.
        rates: Configuration keys to lower if training diverges.
    """

    encoder: Encoder
    momentum_backend: MomentumBackend = "auto"
    views_at_once: int = 1
    headline: Mapping[str, str] = {"loss": "loss {:.3f}"}
    rates: Sequence[str] = ("optimizer.lr",)

    @property
    def stream(self) -> int:
        """Version of the random stream; a run of another version cannot be resumed bit for bit."""
        return 1

    # -- what it consists of ------------------------------------------------------------------------------------

    @property
    def trainable(self) -> nn.Module:
        """Everything that learns by gradient, as one module from views to outputs; given to the optimizer and DDP."""
        return self.encoder

    @property
    def target(self) -> nn.Module | None:
        """The network behind `Encoders.key`, trained without gradient, such as an EMA; None without one."""
        return None

    @property
    def replicated(self) -> Mapping[str, nn.Module]:
        """Modules that must be bit-equal on all processes, apart from the buffers of `statistics`."""
        return {"trainable": self.trainable} | ({} if self.target is None else {"target": self.target})

    @property
    def statistics(self) -> Sequence[nn.Module]:
        """Modules whose batch-norm buffers are restored after a skipped step, and averaged over processes for use."""
        return [self.trainable] + ([] if self.target is None else [self.target])

    # -- a step -------------------------------------------------------------------------------------------------

    def shard(self, views: Views, *, step: int) -> StepInputs:
        """Bring every view to the process that computes on it (ShuffleBN)."""
        return StepInputs((views.first,), (views.second,), (), views.image_ids)

    def begin_step(
        self, inputs: StepInputs, encode: Encoders, *, momentum: float | Tensor, micro_batches: int = 1
    ) -> None:
        """Work without gradient before the loss, such as EMA update and keys, the latter in ``micro_batches`` parts."""

    def loss(
        self,
        inputs: StepInputs,
        encode: Encoders,
        *,
        step: int | Tensor,
        epoch: int,
        micro_batch: int = 0,
        micro_batches: int = 1,
    ) -> StepOutput:
        """The mean loss of one micro-batch, one of ``micro_batches`` equal parts of this process's rows.

        It calls ``encode.query`` once: DDP needs one forward pass per backward pass.
        """
        raise NotImplementedError

    def graph_key(self, epoch: int) -> int:
        """A key for the step's graph: epochs with the same key share a compiled or captured step."""
        return 0

    def after_step(self, step_ok: Tensor | None = None) -> None:
        """Work after the optimizer's step, such as enqueueing keys; must have no effect where ``step_ok`` is false."""

    def extra_step(
        self, inputs: StepInputs, encode: Encoders, *, step: int | Tensor, epoch: int, step_ok: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Further updates, with the method's own optimizers.

        Returns:
            Whether all updates of the step were taken, a bool scalar, and further metrics.
        """
        return step_ok, {}

    # -- the run around the steps -------------------------------------------------------------------------------

    def prepare(self, run: RunInfo) -> None:
        """Create what depends on the run; called once, on the device.

        Raises:
            ConfigError: The run does not fit the method.
        """

    def begin_run(self, split: Split, workers: int | None, *, fresh: bool) -> list[str]:
        """Read data that the method needs beside the views.

        Args:
            split: The training images.
            workers: Decoding processes.
            fresh: Whether the run starts at its first step.

        Returns:
            Notes to show.
        """
        return []

    def figures(self, values: dict[str, float], step: int) -> tuple[dict[str, float], list[str]]:
        """Further values of a log line, and warnings; waits for the device.

        Args:
            values: The log line so far.
            step: Completed steps.
        """
        return {}, []

    def recent(self, epoch: int) -> Recent | None:
        """The last step's embeddings, for monitors; None without a queue.

        Called after a step of ``epoch``, counted from 0. It costs a step nothing, and must change nothing.
        """
        return None

    def artifacts(self, folder: Path, step: int, *, closing: bool = False) -> None:
        """Draw plots into ``folder``, the run's ``plots/``: at the start, after every epoch, and at the end."""

    def kernel_shapes(self, rows: int) -> dict[str, dict[str, Any]]:
        """Shapes of the fused kernels in `loss`, by name in `synco_fast.kernels.proof.KERNELS`.

        Args:
            rows: Images of this process in a micro-batch.
        """
        return {}

    def use_backend(self, kernel: str, backend: str) -> None:
        """Set the backend of a kernel in `kernel_shapes`, or of ``momentum``; called before the first step."""
        if kernel == "momentum":
            self.momentum_backend = cast(MomentumBackend, backend)

    def start_from_encoder(self) -> None:
        """Take over weights that were loaded into the encoder before the first step: the target becomes its copy."""
        if self.target is not None:
            self.target.load_state_dict(self.encoder.state_dict())

    def adapt_state(self, state: dict[str, Any], *, keep: bool) -> list[str]:
        """Match the dtypes of a checkpoint and of the method before loading.

        Args:
            state: The checkpoint's `state_dict`; modified in place.
            keep: Whether the method takes over the checkpoint's dtypes where it can, rather than convert the state.

        Returns:
            Lines to show about the changes.
        """
        return []

    def extra_state(self) -> dict[str, Any]:
        """State beside the module's tensors, such as that of the method's own optimizers."""
        return {}

    def load_extra_state(self, state: dict[str, Any], file: Path) -> None:
        """Load what `extra_state` returned, which was read from the checkpoint ``file``."""
