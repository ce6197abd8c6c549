"""What the training engine asks of a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from synco_fast.models.encoder import Encoder

__all__ = ["Arranged", "Method", "Networks", "StepOutput", "Views"]


class Views(NamedTuple):
    """Two views of each image of this process, (b, 3, H, W), and the image each pair was made from, (b,) int64."""

    first: Tensor
    second: Tensor
    images: Tensor


class Arranged(NamedTuple):
    """A step's input where every process holds the views that it computes on.

    Attributes:
        queries: By direction, the views that become queries, (b, 3, H, W), in the order of the batch.
        keys: By direction, the views that become keys, (b, 3, H, W), this process's share of the permuted global batch.
        orders: By direction, that permutation, (B,) int64, on the device.
        images: (b,) int64.
    """

    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    orders: tuple[Tensor, ...]
    images: Tensor


class Networks(NamedTuple):
    """What maps views to embeddings, (b, 3, H, W) to (b, D): the encoders as the engine wraps them."""

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]


class StepOutput(NamedTuple):
    """The scalar to differentiate, and what is logged: scalars without gradient, by name, the same ones every step."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Method(Protocol):
    """A method says what a step computes; the engine owns precision, processes, optimiser and what is captured.

    A step calls `arrange`, `begin_step`, `loss` once or for several parts of the rows, and `after_step`. Only `arrange`
    may wait for the device or exchange what depends on values on the host; the others run inside a captured graph.
    """

    encoder: Encoder
    networks: Networks

    def arrange(self, views: Views, *, step: int) -> Arranged:
        """Bring every view to the process that computes on it."""
        ...

    def begin_step(self, arranged: Arranged, *, momentum: float | Tensor, parts: int = 1) -> None:
        """What needs no gradient: the momentum update and the keys, these in ``parts`` parts."""
        ...

    def loss(self, arranged: Arranged, *, step: int | Tensor, epoch: int, part: int = 0, parts: int = 1) -> StepOutput:
        """The loss of one of ``parts`` equal parts of this process's rows: their mean."""
        ...

    def like(self, epoch: int) -> int:
        """The first epoch whose steps launch the same work: what is compiled or captured serves both."""
        ...

    def after_step(self, accept: Tensor | None = None) -> None:
        """What happens once the optimiser has moved, such as writing keys; nothing where ``accept`` holds false."""
        ...

    def module(self) -> nn.Module:
        """Everything that a checkpoint must hold."""
        ...
