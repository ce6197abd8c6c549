"""The contract between a method and the training engine.

A method says what a step computes and what it consists of. The engine owns the number format, the processes, the
optimizer, and what is compiled or captured. A minimal method sets ``encoder`` and writes `Method.loss`.
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

__all__ = ["Encoders", "Method", "RunInfo", "StepInputs", "StepOutput", "Views"]


class Views(NamedTuple):
    """Two views of each image of this process, (b, 3, H, W), and the image each pair was made from, (b,) int64."""

    first: Tensor
    second: Tensor
    image_ids: Tensor


class StepInputs(NamedTuple):
    """A step's input where every process holds the views that it computes on.

    Attributes:
        queries: By direction, the views that go through `Encoders.query`, (b, 3, H, W), in the order of the batch.
        keys: By direction, the views that go through `Encoders.key`, (b, 3, H, W); after ShuffleBN, this process's
            share of the permuted global batch.
        orders: By direction, that permutation, (B,) int64, on the device; empty without one.
        image_ids: (b,) int64.
    """

    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    orders: tuple[Tensor, ...]
    image_ids: Tensor


class Encoders(NamedTuple):
    """The method's networks as the engine wraps them: from views (n, 3, H, W), pixels or normalised, to (n, D).

    Attributes:
        query: `Method.trainable`, with the gradient averaged over the processes.
        key: `Method.target`.
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]


class StepOutput(NamedTuple):
    """The scalar to differentiate, and what is logged: scalars without gradient, by name, the same ones every step."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class RunInfo:
    """What a method may need to know of the run around it.

    Attributes:
        device: Where the method lies.
        steps_per_epoch: Turns epochs into steps.
        processes: Of the job.
        autocast: The context of a forward pass whose loss is not scaled.
    """

    device: torch.device
    steps_per_epoch: int
    processes: int = 1
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext


class Method(nn.Module):
    """What a step computes, and what the method consists of. Its ``state_dict`` is all that a checkpoint keeps of it.

    A step calls `arrange`, `begin_step`, `loss` once for each micro-batch, `after_step` and `extra_step`. Only
    `arrange` and `extra_step` may wait for the device or exchange what depends on values on the host; the others run
    inside a captured graph.

    Attributes:
        encoder: What is evaluated and exported: its backbone.
        momentum_backend: Of `synco_fast.kernels.momentum_update`, where there is an EMA.
        views_at_once: Views of an image that pass through the encoder together.
        headline: The metrics that the progress bar shows, and the format of each.
        rates: The keys of the configuration to lower where training diverges.
    """

    encoder: Encoder
    momentum_backend: MomentumBackend = "auto"
    views_at_once: int = 1
    headline: Mapping[str, str] = {"loss": "loss {:.3f}"}
    rates: Sequence[str] = ("optimizer.lr",)

    @property
    def stream(self) -> int:
        """Version of the random numbers that the steps to come depend on; another one cannot resume to the bit."""
        return 1

    # -- what it consists of ------------------------------------------------------------------------------------

    @property
    def trainable(self) -> nn.Module:
        """What learns by gradient, as one module from views to outputs: the optimizer and DDP get all of it."""
        return self.encoder

    @property
    def target(self) -> nn.Module | None:
        """The network behind `Encoders.key`, which learns nothing by gradient; None without one."""
        return None

    @property
    def replicated(self) -> Mapping[str, nn.Module]:
        """What must be bit-equal on all processes: parameters, and buffers outside of `statistics`."""
        return {"trainable": self.trainable} | ({} if self.target is None else {"target": self.target})

    @property
    def statistics(self) -> Sequence[nn.Module]:
        """Modules whose batch-norm buffers are restored after a skipped step, and averaged over processes when read."""
        return [self.trainable] + ([] if self.target is None else [self.target])

    # -- a step -------------------------------------------------------------------------------------------------

    def arrange(self, views: Views, *, step: int) -> StepInputs:
        """Bring every view to the process that computes on it."""
        return StepInputs((views.first,), (views.second,), (), views.image_ids)

    def begin_step(
        self, inputs: StepInputs, encode: Encoders, *, momentum: float | Tensor, micro_batches: int = 1
    ) -> None:
        """What needs no gradient, such as the momentum update and the keys, these in ``micro_batches`` parts."""

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
        """The mean loss of one of ``micro_batches`` equal parts of this process's rows.

        It calls ``encode.query`` once, so that DDP meets one forward pass for each backward pass.
        """
        raise NotImplementedError

    def graph_key(self, epoch: int) -> int:
        """A key for the step's graph: epochs with the same key share a compiled or captured step."""
        return 0

    def after_step(self, step_ok: Tensor | None = None) -> None:
        """What follows the optimizer's step, such as writing keys; nothing where ``step_ok`` holds false."""

    def extra_step(
        self, inputs: StepInputs, encode: Encoders, *, step: int | Tensor, epoch: int, step_ok: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Further updates with optimizers of the method's own.

        Returns:
            Whether all updates of the step were taken, bool of no dimensions, and further metrics.
        """
        return step_ok, {}

    # -- the run around the steps -------------------------------------------------------------------------------

    def prepare(self, run: RunInfo) -> None:
        """Make what needs to know the run; called once, on the device.

        Raises:
            ConfigError: The run does not fit the method.
        """

    def begin_run(self, split: Split, workers: int | None, *, fresh: bool) -> list[str]:
        """Read what the method needs beside the views.

        Args:
            split: The training images.
            workers: Decoding processes.
            fresh: Whether the run starts at its first step.

        Returns:
            Lines to show.
        """
        return []

    def figures(self, values: dict[str, float], step: int) -> tuple[dict[str, float], list[str]]:
        """Further values for a line of the log, and warnings; waits for the device.

        Args:
            values: The line so far.
            step: Steps that are done.
        """
        return {}, []

    def artifacts(self, folder: Path, step: int, *, closing: bool = False) -> None:
        """Draw into ``folder``, the run's ``plots/``: at the start, after every epoch, and when the run closes."""

    def kernel_shapes(self, rows: int) -> dict[str, dict[str, Any]]:
        """Which fused kernels of `synco_fast.kernels.proof.KERNELS` the loss uses, and at which shapes.

        Args:
            rows: Images of this process in a micro-batch.
        """
        return {}

    def use_backend(self, kernel: str, backend: str) -> None:
        """Compute what `kernel_shapes` names, or the momentum update, by a backend; called before the first step."""
        if kernel == "momentum":
            self.momentum_backend = cast(MomentumBackend, backend)

    def adapt_state(self, state: dict[str, Any], *, keep: bool) -> list[str]:
        """Let the tensors of a checkpoint and of this method have the same dtypes, before they are loaded.

        Args:
            state: By name, as `state_dict` gave them; changed in place.
            keep: Whether the method takes the checkpoint's dtypes, where it has a choice, instead of the other way.

        Returns:
            Lines to show: what was changed.
        """
        return []

    def extra_state(self) -> dict[str, Any]:
        """State of the method that is no tensor of a module, such as that of its own optimizers."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what `extra_state` returned."""
