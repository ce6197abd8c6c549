"""The frame that MoCo v2, MoCHi and SynCo share: one head with three settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from synco_fast.data.seeding import derive_seed
from synco_fast.kernels import FAMILIES, Backend, Contrast, synthetic_contrast
from synco_fast.methods.base import StepOutput, Views
from synco_fast.methods.schedule import NegativeSchedule
from synco_fast.models.encoder import Encoder
from synco_fast.models.momentum import follow, key_encoder_of
from synco_fast.queue import KeyQueue

__all__ = ["MomentumContrast"]


class MomentumContrast(nn.Module):
    """Momentum contrast with a queue (MoCo v2, arXiv 2003.04297) and, by schedule, synthetic hard negatives.

    A step: the key encoder follows the query encoder; one view becomes queries, the other keys; each query is
    contrasted with its key, the queue and the synthetic negatives; after the optimiser has moved, the keys enter the
    queue, so that a key is never a negative of its own query.

    Args:
        encoder: The query encoder.
        queue_length: K.
        dim: D, the encoder's output width.
        schedule: Which negatives, when.
        temperature: T.
        momentum: Of the key encoder.
        symmetric: Each view serves as query and as key; the loss is the mean of both directions, and both sets of keys
            enter the queue.
        mask_same_image: A queue key of the query's own image is no negative: for sets smaller than the queue.
        seed: Of queue, shuffles and draws.
        backend: Of the head.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        queue_length: int,
        dim: int,
        schedule: NegativeSchedule,
        temperature: float = 0.2,
        momentum: float = 0.999,
        symmetric: bool = False,
        mask_same_image: bool = False,
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.key_encoder = key_encoder_of(encoder)
        self.queue = KeyQueue(queue_length, dim, seed=seed)
        self.schedule = schedule
        self.temperature, self.momentum = temperature, momentum
        self.symmetric, self.mask_same_image = symmetric, mask_same_image
        self.seed, self.backend = seed, backend
        self._fresh: list[tuple[Tensor, Tensor]] = []

    def module(self) -> nn.Module:
        """Both encoders and the queue."""
        return self

    def training_step(self, views: Views, *, step: int, epoch: int) -> StepOutput:
        """The loss of one batch; `after_step` must follow once the optimiser has moved."""
        follow(self.key_encoder, self.encoder, self.momentum)
        directions = [self._direction(views.first, views.second, views.images, step, epoch, 0)]
        if self.symmetric:
            directions.append(self._direction(views.second, views.first, views.images, step, epoch, 1))
        loss = torch.cat([contrast.loss for contrast in directions]).mean()
        return StepOutput(loss, _metrics(loss, directions))

    def after_step(self) -> None:
        """Write the step's keys to the queue."""
        for keys, images in self._fresh:
            self.queue.enqueue(keys, images)
        self._fresh.clear()

    def _direction(
        self, query_view: Tensor, key_view: Tensor, images: Tensor, step: int, epoch: int, direction: int
    ) -> Contrast:
        q = normalize(self.encoder(query_view).float(), dim=1)
        k = self._keys(key_view, step, direction)
        self._fresh.append((k, images))
        with torch.autocast(q.device.type, enabled=False):
            return synthetic_contrast(
                q,
                k,
                self.queue.rows,
                self.schedule.at(epoch),
                temperature=self.temperature,
                seed=self.seed,
                step=step,
                first_row=direction * len(q),
                image_ids=images if self.mask_same_image else None,
                queue_ids=self.queue.images if self.mask_same_image else None,
                backend=self.backend,
            )

    @torch.no_grad()
    def _keys(self, view: Tensor, step: int, direction: int) -> Tensor:
        """Unit keys, (B, D): the batch goes through the key encoder in another order than through the query encoder."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step, direction))
        order = torch.randperm(len(view), generator=generator).to(view.device)
        keys = normalize(self.key_encoder(view[order]).float(), dim=1)
        return torch.empty_like(keys).index_copy_(0, order, keys)


def _metrics(loss: Tensor, directions: list[Contrast]) -> dict[str, Tensor]:
    """Means over the rows of both directions; a kind of negatives that no row met is left out."""
    statistics = [contrast.statistics for contrast in directions]
    metrics = {
        "loss": loss.detach(),
        "top1": torch.cat([part.rank == 0 for part in statistics]).float().mean(),
        "queue_top1": torch.cat([part.queue_rank == 0 for part in statistics]).float().mean(),
        "similarity/positive": torch.cat([part.positive for part in statistics]).mean(),
        "similarity/hard": torch.cat([part.hard for part in statistics]).nanmean(),
    }
    synthetic = torch.cat([part.synthetic for part in statistics]).nanmean(dim=0)
    metrics |= {f"similarity/{family.name}": synthetic[column] for column, family in enumerate(FAMILIES)}
    return metrics
