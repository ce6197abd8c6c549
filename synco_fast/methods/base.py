"""What the training loop asks of a method."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from synco_fast.models.encoder import Encoder

__all__ = ["Method", "StepOutput", "Views"]


class Views(NamedTuple):
    """Two normalised views of each image, (B, 3, H, W), and the image each pair was made from, (B,) int64."""

    first: Tensor
    second: Tensor
    images: Tensor


class StepOutput(NamedTuple):
    """The scalar to differentiate, and what is logged: scalars without gradient, by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Method(Protocol):
    """A method says what a step computes; the loop owns data, precision, optimiser, checkpoints and logs."""

    encoder: Encoder

    def training_step(self, views: Views, *, step: int, epoch: int) -> StepOutput:
        """The loss of one batch."""
        ...

    def after_step(self) -> None:
        """What happens once the optimiser has moved, such as writing keys to the queue."""
        ...

    def module(self) -> nn.Module:
        """Everything that a checkpoint must hold."""
        ...
