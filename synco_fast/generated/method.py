"""Pairs of generated images as hard positives beside the real ones, after Wu et al. (arXiv 2202.06464).

Built without the paper's equations: the form here is this project's reading, described in ``docs/methods.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from synco_fast.data.augment.recipe import Recipe
from synco_fast.generated.augment import draw_views, view
from synco_fast.generated.discriminator import Discriminator
from synco_fast.generated.generator import Generator
from synco_fast.kernels import synthetic_contrast
from synco_fast.methods.base import Arranged, StepOutput
from synco_fast.methods.moco import MomentumContrast
from synco_fast.runtime.phases import phase

__all__ = ["GENERATED", "Generated", "Played", "pairs_objective"]

#: The image number of a generated key in the queue: no image's, and not that of a random row either.
GENERATED = -2
#: How far the second generator starts off the first, as a share of each tensor's standard deviation.
_PARTING = 0.02


class Played(NamedTuple):
    """What the generators' side of the game is made of.

    Attributes:
        images: Both images of each pair, (2, n, 3, H, W) in [0, 1].
        loss: The contrastive loss of each pair across it, (n,): the mean of each image's query against the other's key.
        similarity: Cosine of the embeddings of both images of a pair under the same augmentation, (n,).
    """

    images: Tensor
    loss: Tensor
    similarity: Tensor


def pairs_objective(loss: Tensor, similarity: Tensor, *, hardness: float, floor: float, floor_weight: float) -> Tensor:
    """What generators add to their adversarial loss: hardness down to a floor, and a push back below it.

    mean of -hardness * L_i over pairs at or above the floor, plus floor_weight * mean of max(0, floor - s_i).

    Args:
        loss: L, (n,).
        similarity: s, (n,).
        hardness: w_hard at this step.
        floor, floor_weight: A pair below the floor is no positive any more: nothing makes it harder.
    """
    harder = torch.where(similarity >= floor, loss, 0.0).mean()
    return floor_weight * relu(floor - similarity).mean() - hardness * harder


class Generated(MomentumContrast):
    """Momentum contrast on real images and on pairs of images from two generators that share a latent vector.

    The encoder minimises L(real) + w_syn L(generated). Of each generated pair four views are made, two queries and two
    keys, one from either image; the loss on generated pairs is the mean over both queries against both keys. A key of
    each pair enters the queue beside the real ones, or being generated would tell positives from negatives.

    Args:
        encoder: The query encoder.
        size, latent, width: Of the generators and the discriminator.
        pairs: Generated pairs a step.
        weight: w_syn.
        recipe: Of the views, of real and generated images alike.
        frame: Every further argument of `MomentumContrast`.
    """

    def __init__(
        self,
        encoder: Any,
        *,
        size: int,
        latent: int,
        width: int,
        pairs: int,
        weight: float,
        recipe: Recipe,
        **frame: Any,
    ) -> None:
        super().__init__(encoder, **frame)
        self.generators = nn.ModuleList(Generator(size, latent=latent, width=width) for _ in range(2))
        self.discriminator = Discriminator(size, width=width)
        self.latent, self.pairs, self.weight, self.recipe = latent, pairs, weight, recipe
        #: A context around what the generators cost; the engine puts a clock in its place.
        self.timed: Callable[[], AbstractContextManager[None]] = nullcontext
        self._views: Tensor | None = None
        self._keys: Tensor | None = None

    @torch.no_grad()
    def begin_step(self, arranged: Arranged, *, momentum: float | Tensor | None = None, parts: int = 1) -> None:
        """Beside the real keys, make the pairs, two query views of each, and the keys of the other two."""
        super().begin_step(arranged, momentum=momentum, parts=parts)
        with self.timed():
            images = self.generate(self.latents(arranged.images.device))
            self._views = self._view(images)
            with phase("key forward"), _statistics_kept(self.key_encoder):
                # Shuffled as real keys are, so that batch norm does not tell which key belongs to which query.
                order = torch.randperm(2 * self.pairs, device=images.device)
                shuffled = self.networks.key(self._view(images)[order]).float()
                self._keys = torch.empty_like(shuffled).index_copy_(0, order, normalize(shuffled, dim=1))

    def loss(self, arranged: Arranged, *, step: int | Tensor, epoch: int, part: int = 0, parts: int = 1) -> StepOutput:
        """L(real) + w_syn L(generated), and the figures of both."""
        real = super().loss(arranged, step=step, epoch=epoch, part=part, parts=parts)
        assert self._views is not None
        assert self._keys is not None
        with phase("query forward"), _statistics_kept(self.encoder):
            q = normalize(self.networks.query(self._views).float(), dim=1)
        generated = self._contrast(q, self._keys, arranged, step, epoch).mean()
        metrics = {"generated/loss": generated.detach()}
        return StepOutput(real.loss + self.weight * generated, real.metrics | metrics)

    def after_step(self, accept: Tensor | None = None) -> None:
        """Write the keys to the queue, one of each generated pair behind the real ones."""
        super().after_step(accept)
        if self._keys is not None:
            keys = self._keys[: self.pairs]
            self.queue.enqueue(keys, torch.full((len(keys),), GENERATED, device=keys.device), accept)
        self._views = self._keys = None

    # -- the generators' side -----------------------------------------------------------------------------------

    def latents(self, device: torch.device) -> Tensor:
        """Latent vectors of a step's pairs, (n, latent), from the global generator."""
        return torch.randn(self.pairs, self.latent, device=device)

    def generate(self, latents: Tensor) -> Tensor:
        """Both images of each pair, (2, n, 3, H, W) in [0, 1], from the latent vectors that they share, (n, latent)."""
        return torch.stack([generator(latents) for generator in self.generators])

    @torch.no_grad()
    def part(self, seed: int) -> None:
        """Move the second generator a little off the first, by noise of a fiftieth of each tensor's deviation.

        Two that are the same to the bit get the same gradient: no game would ever make them differ.
        """
        draws = torch.Generator().manual_seed(seed)
        first, second = (list(generator.parameters()) for generator in self.generators)
        for parameter, start in zip(second, first, strict=True):
            noise = torch.randn(start.shape, generator=draws).to(start.device)
            parameter.copy_(start + _PARTING * start.std(correction=0) * noise)

    def play(self, latents: Tensor, arranged: Arranged, *, step: int | Tensor, epoch: int) -> Played:
        """Pairs and how hard they are, with the graph from the generators through augmentation and query encoder.

        The encoders compute in evaluation mode, so that no statistic of theirs moves; both images of a pair get the
        same augmentation on either side, so that similarity is lowered by the generators alone.
        """
        images = self.generate(latents)
        with _evaluating(self.encoder), _evaluating(self.key_encoder):
            q = normalize(self.networks.query(self._view(images, shared=True)).float(), dim=1)
            with torch.no_grad():
                keys = normalize(self.networks.key(self._view(images.detach(), shared=True)).float(), dim=1)
        losses = self._contrast(q, keys, arranged, step, epoch).view(4, -1)
        first, second = q.chunk(2)
        return Played(images, (losses[1] + losses[2]) / 2, (first * second).sum(dim=1))

    def _view(self, images: Tensor, *, shared: bool = False) -> Tensor:
        """One view of each image of pairs (2, n, 3, H, W): (2 n, 3, size, size) in [0, 255]."""
        flat = images.flatten(0, 1)
        draws = draw_views(images.shape[1] if shared else len(flat), self.recipe, flat.device)
        if shared:
            draws = type(draws)(*(torch.cat([part, part]) for part in draws))
        with torch.autocast(flat.device.type, enabled=False):
            return view(flat, draws, self.recipe) * 255

    def _contrast(self, q: Tensor, keys: Tensor, arranged: Arranged, step: int | Tensor, epoch: int) -> Tensor:
        """The loss of both queries of each pair against both keys, (4 n,), ordered by query, then key, then pair."""
        (one, two), (here, there) = q.chunk(2), keys.chunk(2)
        rows = len(arranged.queries) * len(arranged.images)
        with phase("head"), torch.autocast(q.device.type, enabled=False):
            return synthetic_contrast(
                torch.cat([one, one, two, two]),
                torch.cat([here, there, here, there]),
                self.queue.rows,
                self.schedule.at(epoch),
                temperature=self.temperature,
                seed=self.seed,
                step=step,
                first_row=rows,  # behind the real rows: draws of its own
                backend=self.backend,
            ).loss


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let batch norm normalise by the batch but keep its running statistics, which are the real images'."""
    norms = [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
