"""BYOL (arXiv 2006.07733): a predictor on the online network learns the EMA network's embedding of the other view.

No negatives. It reads ``model.momentum`` and ``model.momentum_schedule`` (0.996 and cosine in the paper), ``model.dim``
and ``model.hidden`` (256 and 4096 in the paper), and only the name of the section ``method``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from synco_fast.config import Config
from synco_fast.methods.base import Encoders, Method, StepInputs, StepOutput
from synco_fast.methods.build import build_encoder
from synco_fast.models.ema import ema_update, make_ema_copy
from synco_fast.models.encoder import Encoder
from synco_fast.runtime.phases import phase

__all__ = ["BYOL", "build"]


def build(config: Config, processes: int) -> BYOL:
    """Build the method of a configuration, on the CPU."""
    encoder = build_encoder(config, processes=processes)
    dim, hidden = config.model.dim, config.model.hidden or encoder.features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder.head = _mlp(encoder.features, hidden, dim)
        return BYOL(encoder, predictor=_mlp(dim, hidden, dim))


def _mlp(features: int, hidden: int, dim: int) -> nn.Sequential:
    """BYOL's projector and predictor (section 3.3): two layers with batch norm and ReLU between."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
    )


class BYOL(Method):
    """Bootstrap your own latent.

    Args:
        encoder: The online backbone and projector.
        predictor: From the online projection to the prediction, (n, D) to (n, D).
    """

    views_at_once = 2
    headline: Mapping[str, str] = {"loss": "loss {:.3f}", "embedding_std": "std {:.2f}"}

    def __init__(self, encoder: Encoder, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.key_encoder = make_ema_copy(encoder)
        #: Targets of this step's first and second views: the embedding of the other view, (b, D) each.
        self._targets: tuple[Tensor, Tensor] | None = None

    @property
    def trainable(self) -> nn.Module:
        """Encoder and predictor."""
        return nn.Sequential(self.encoder, self.predictor)

    @property
    def target(self) -> nn.Module:
        """The EMA of the encoder, which has no predictor."""
        return self.key_encoder

    @torch.no_grad()
    def begin_step(
        self, inputs: StepInputs, encode: Encoders, *, momentum: float | Tensor, micro_batches: int = 1
    ) -> None:
        """Update the EMA and compute both targets."""
        with phase("EMA update"):
            ema_update(self.key_encoder, self.encoder, momentum, backend=self.momentum_backend)
        (first,), (second,) = inputs.queries, inputs.keys
        with phase("key forward"):
            parts = [
                encode.key(torch.cat(views)).float().chunk(2)
                for views in zip(second.chunk(micro_batches), first.chunk(micro_batches), strict=True)
            ]
            of_first, of_second = (normalize(torch.cat(way), dim=1) for way in zip(*parts, strict=True))
        self._targets = of_first, of_second

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
        """|p - z|^2 of normalised prediction and target (eq. 2), summed over both directions (eq. 3)."""
        assert self._targets is not None
        views = [way.chunk(micro_batches)[micro_batch] for way in (*inputs.queries, *inputs.keys)]
        z = torch.cat([way.chunk(micro_batches)[micro_batch] for way in self._targets])
        with phase("query forward"):
            p = normalize(encode.query(torch.cat(views)).float(), dim=1)
        with phase("loss"), torch.autocast(p.device.type, enabled=False):
            similarity = (p * z).sum(dim=1)
            loss = 2 * (2 - 2 * similarity).mean()
        return StepOutput(
            loss,
            {
                "loss": loss.detach(),
                "similarity/positive": similarity.detach().mean(),
                # 1 for targets spread evenly over the sphere, 0 if all are equal (arXiv 2011.10566).
                "embedding_std": z.std(dim=0).mean() * z.shape[1] ** 0.5,
            },
        )

    def after_step(self, step_ok: Tensor | None = None) -> None:
        """Forget the targets."""
        self._targets = None
