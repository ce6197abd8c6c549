"""SimCLR (arXiv 2002.05709): each view is contrasted with all other views of the batch.

There is no queue, no momentum encoder and no shuffle. Of the section ``method`` it reads only ``temperature``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, normalize

from synco_fast.config import Config
from synco_fast.methods.base import Encoders, Method, StepInputs, StepOutput
from synco_fast.methods.build import build_encoder
from synco_fast.models.encoder import Encoder
from synco_fast.runtime.distributed import gather_rows, rank, world
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.phases import phase

__all__ = ["SimCLR", "build", "nt_xent"]


def build(config: Config, processes: int) -> SimCLR:
    """Build the method of a configuration, on the CPU.

    Raises:
        ConfigError: The batch is split into micro-batches, which would remove negatives.
    """
    if config.training.accumulate > 1:
        raise ConfigError(
            f"training.accumulate: found {config.training.accumulate}, expected 1 with method.name simclr, whose "
            "negatives are the rest of the batch"
        )
    return SimCLR(build_encoder(config, processes=processes), config.method.temperature)


class SimCLR(Method):
    """Contrastive learning within the global batch.

    Args:
        encoder: Backbone and projection head.
        temperature: T.
    """

    views_at_once = 2
    headline: Mapping[str, str] = {"loss": "loss {:.3f}", "top1": "acc {:.1%}"}

    def __init__(self, encoder: Encoder, temperature: float) -> None:
        super().__init__()
        self.encoder, self.temperature = encoder, temperature

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
        """NT-Xent over both views of every image."""
        views = torch.cat([*inputs.queries, *inputs.keys])
        with phase("query forward"):
            z = normalize(encode.query(views).float(), dim=1)
        with phase("loss"), torch.autocast(z.device.type, enabled=False):
            return nt_xent(z, self.temperature)


def nt_xent(z: Tensor, temperature: float) -> StepOutput:
    """The normalised temperature-scaled cross entropy (SimCLR eq. 1), the mean over this process's 2 b views.

    Args:
        z: Unit rows, (2 b, D): the first views of b images, then their second views in the same order. Negatives come
            from all processes, and the gradient reaches all of them.
        temperature: T.

    Returns:
        The loss; ``top1``, the share of views whose nearest view is their partner; and the mean similarity to the
        partner and to the nearest other view.
    """
    rows, half = len(z), len(z) // 2
    everyone = _gather(z)
    place = torch.arange(rows, device=z.device)
    own, partner = rank() * rows + place, rank() * rows + (place + half) % rows
    similarity = (z @ everyone.T).scatter(1, own[:, None], -torch.inf)
    loss = cross_entropy(similarity / temperature, partner)
    with torch.no_grad():
        positive = similarity.gather(1, partner[:, None]).squeeze(1)
        hardest = similarity.scatter(1, partner[:, None], -torch.inf).amax(dim=1)
    return StepOutput(
        loss,
        {
            "loss": loss.detach(),
            "top1": (positive > hardest).float().mean(),
            "similarity/positive": positive.mean(),
            "similarity/hard": hardest.mean(),
        },
    )


def _gather(z: Tensor) -> Tensor:
    """The rows of every rank, (n, D) to (W n, D), in order of rank, with gradient."""
    gathered: Tensor = z if world() == 1 else _GatherRows.apply(z)
    return gathered


class _GatherRows(torch.autograd.Function):
    """An all-gather whose backward pass sums the gradients of all ranks' losses.

    DDP averages the parameters' gradients over ranks, which gives the gradient of the mean loss.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Gather."""
        ctx.rows = len(rows)
        return gather_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The part of this rank in the summed gradient."""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]
