"""The contrastive loss as a module, for your own training loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from synco_fast.kernels import Backend, Contrast, Negatives, Statistics, synthetic_contrast
from synco_fast.methods import with_queue
from synco_fast.models.queue import KeyQueue
from synco_fast.runtime.distributed import gather_rows, rank

__all__ = ["SynthContrastLoss"]


class SynthContrastLoss(nn.Module):
    """InfoNCE with a queue and synthetic hard negatives: MoCo v2, MoCHi (arXiv 2010.01028), SynCo (arXiv 2410.02401).

    Call it with the embeddings of two views. It holds the queue, the settings and the step count; queue and count are
    part of ``state_dict``. Move it to the device of the embeddings. The keys of a training step enter the queue after
    its loss is computed; in evaluation mode the queue and the count do not change. If `torch.distributed` is
    initialised, the keys of all ranks enter each rank's queue; their batches must have the same size.

    Args:
        method: The name of a method with a queue, such as ``"synco"``, or a `Negatives` of your own.
        dim: D, width of the embeddings.
        queue: K, past keys; at least the batch.
        temperature: T.
        seed: Seed of the queue's random initial rows and of the draws; the same on all ranks.
        backend: Backend of the loss.

    Attributes:
        queue: The `KeyQueue`.
        negatives: The synthetic negatives; may be replaced at any time, such as after a warm-up.
        statistics: Statistics of the last call, one value per row; None before the first.

    Raises:
        ValueError: The method's name is unknown, or N is larger than the queue.
    """

    step: Tensor

    def __init__(
        self,
        method: str | Negatives = "synco",
        *,
        dim: int = 128,
        queue: int = 65536,
        temperature: float = 0.2,
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        known = with_queue()
        if isinstance(method, str) and method not in known:
            raise ValueError(f"method: found {method!r}, expected {', '.join(known)} or Negatives")
        self.negatives = known[method]() if isinstance(method, str) else method
        if self.negatives.hard > queue:
            raise ValueError(f"queue: found {queue}, expected {self.negatives.hard} or more, the hard negatives N")
        self.queue = KeyQueue(queue, dim, seed=seed)
        self.temperature, self.seed, self.backend = temperature, seed, backend
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.statistics: Statistics | None = None

    def forward(self, query: Tensor, key: Tensor, images: Tensor | None = None) -> Tensor:
        """The mean loss of a batch; the gradient reaches ``query`` alone.

        Args:
            query: Embeddings of one view by the encoder that learns, (B, D); normalised here.
            key: Embeddings of the other view by the momentum encoder, (B, D); normalised here.
            images: The image of each row, (B,) int64. If given, queue keys of the same image are excluded from the
                negatives: for sets smaller than the queue.

        Raises:
            TypeError, ValueError: As `synco_fast.kernels.synthetic_contrast` says.
            ConfigError: The batch is larger than the queue.
        """
        q, k = normalize(query.float(), dim=1), normalize(key.detach().float(), dim=1)
        owners = images if images is not None else self.queue.image_ids.new_full((len(k),), -1)
        # The reference keeps the queue for its backward pass, but the keys enter before that.
        rows = self.queue.rows.clone() if self.backend == "reference" and self.training else self.queue.rows
        found: Contrast = synthetic_contrast(
            q,
            k,
            rows,
            self.negatives,
            temperature=self.temperature,
            seed=self.seed,
            step=self.step,
            first_row=rank() * len(q),
            image_ids=images,
            queue_ids=None if images is None else self.queue.image_ids,
            backend=self.backend,
        )
        self.statistics = found.statistics
        if self.training:
            self.queue.enqueue(gather_rows(k), gather_rows(owners))
            self.step.add_(1)
        return found.loss.mean()

    def extra_repr(self) -> str:
        """Settings in `repr`."""
        return f"{self.negatives}, temperature={self.temperature}, seed={self.seed}"
