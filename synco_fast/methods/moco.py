"""The frame that MoCo v2, MoCHi and SynCo share: one head with three settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from synco_fast.kernels import FAMILIES, Backend, Contrast, synthetic_contrast
from synco_fast.methods.base import Arranged, Networks, StepOutput, Views
from synco_fast.methods.schedule import NegativeSchedule
from synco_fast.models.ema import follow, key_encoder_of
from synco_fast.models.encoder import Encoder
from synco_fast.models.queue import KeyQueue
from synco_fast.models.shuffle import key_order
from synco_fast.runtime.collectives import exchange_rows, gather_rows, rank, world
from synco_fast.runtime.phases import phase

__all__ = ["MomentumContrast"]


class MomentumContrast(nn.Module):
    """Momentum contrast with a queue (MoCo v2, arXiv 2003.04297) and, by schedule, synthetic hard negatives.

    A step: the key encoder follows the query encoder; one view becomes queries, the other keys; each query is
    contrasted with its key, the queue and the synthetic negatives; after the optimiser has moved, the keys enter the
    queue, so that a key is never a negative of its own query. In a job of several processes the keys of all enter it,
    in the order of the global batch, so that every process holds the same queue.

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
        #: Views to embeddings; the engine puts wrapped encoders in their place.
        self.networks = Networks(self.encoder, self.key_encoder)
        self._fresh: list[tuple[Tensor, Tensor]] = []

    def module(self) -> nn.Module:
        """Both encoders and the queue."""
        return self

    def arrange(self, views: Views, *, step: int) -> Arranged:
        """Permute the views that become keys over the whole batch, across processes (ShuffleBN)."""
        pairs = [(views.first, views.second), (views.second, views.first)][: 1 + self.symmetric]
        device = views.images.device
        # What each process sends follows from the order, so that the host must know it where there are several.
        order_device = device if world() == 1 else torch.device("cpu")
        orders = [
            key_order(world() * len(views.images), seed=self.seed, step=step, direction=number, device=order_device)
            for number in range(len(pairs))
        ]
        return Arranged(
            queries=tuple(query for query, _ in pairs),
            keys=tuple(exchange_rows(key, order) for (_, key), order in zip(pairs, orders, strict=True)),
            orders=tuple(order.to(device, non_blocking=True) for order in orders),
            images=views.images,
        )

    @torch.no_grad()
    def begin_step(self, arranged: Arranged, *, momentum: float | Tensor | None = None, parts: int = 1) -> None:
        """Let the key encoder follow and compute the keys of the whole batch, (B, D), the same on every process."""
        with phase("momentum update"):
            follow(self.key_encoder, self.encoder, self.momentum if momentum is None else momentum)
        self._fresh.clear()
        with phase("key forward"):
            for views, order in zip(arranged.keys, arranged.orders, strict=True):
                embeddings = [self.networks.key(part).float() for part in views.chunk(parts)]
                keys, images = _gather(normalize(torch.cat(embeddings), dim=1), arranged.images)
                self._fresh.append((torch.empty_like(keys).index_copy_(0, order, keys), images))

    def like(self, epoch: int) -> int:
        """The first epoch whose steps compute what those of ``epoch`` do."""
        return self.schedule.like(epoch)

    def loss(self, arranged: Arranged, *, step: int | Tensor, epoch: int, part: int = 0, parts: int = 1) -> StepOutput:
        """The mean loss of one part of this process's rows, after `begin_step`."""
        directions = [self._direction(arranged, number, step, epoch, part, parts) for number in range(len(self._fresh))]
        loss = torch.cat([contrast.loss for contrast in directions]).mean()
        return StepOutput(loss, _metrics(loss, directions))

    def after_step(self, accept: Tensor | None = None) -> None:
        """Write the step's keys to the queue, unless ``accept`` (bool, no dimensions) holds false."""
        with phase("enqueue"):
            for keys, images in self._fresh:
                self.queue.enqueue(keys, images, accept)
        self._fresh.clear()

    def _direction(
        self, arranged: Arranged, direction: int, step: int | Tensor, epoch: int, part: int, parts: int
    ) -> Contrast:
        view = arranged.queries[direction].chunk(parts)[part]
        with phase("query forward"):
            q = normalize(self.networks.query(view).float(), dim=1)
        keys, _ = self._fresh[direction]
        begin = rank() * len(arranged.images) + part * len(view)
        images = arranged.images.chunk(parts)[part]
        with phase("head"), torch.autocast(q.device.type, enabled=False):
            return synthetic_contrast(
                q,
                keys[begin : begin + len(view)],
                self.queue.rows,
                self.schedule.at(epoch),
                temperature=self.temperature,
                seed=self.seed,
                step=step,
                first_row=direction * len(keys) + begin,
                image_ids=images if self.mask_same_image else None,
                queue_ids=self.queue.images if self.mask_same_image else None,
                backend=self.backend,
            )


def _gather(keys: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, (b, D) float32, and images, (b,) int64, of all processes, in one exchange."""
    if world() == 1:
        return keys, images
    both = gather_rows(torch.cat([keys, images[:, None].view(torch.float32)], dim=1))
    return both[:, :-2].contiguous(), both[:, -2:].contiguous().view(torch.int64).squeeze(1)


def _metrics(loss: Tensor, directions: list[Contrast]) -> dict[str, Tensor]:
    """Means over the rows of both directions; a kind of negatives that no row met is left out."""
    statistics = [contrast.statistics for contrast in directions]
    metrics = {
        "loss": loss.detach(),
        "top1": torch.cat([part.rank == 0 for part in statistics]).float().mean(),
        "queue_top1": torch.cat([part.queue_rank == 0 for part in statistics]).float().mean(),
        "similarity/positive": torch.cat([part.positive for part in statistics]).mean(),
        "similarity/hard": torch.cat([part.hard for part in statistics]).nanmean(),
        "slow_path": torch.cat([part.fallback for part in statistics]).float().mean(),
    }
    synthetic = torch.cat([part.synthetic for part in statistics]).nanmean(dim=0)
    metrics |= {f"similarity/{family.name}": synthetic[column] for column, family in enumerate(FAMILIES)}
    return metrics
