"""KID, the kernel inception distance of real and generated images, on the features of a named network."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import normalise
from synco_fast.runtime.errors import ConfigError

__all__ = ["KID", "Features"]

_SUBSETS = 10


class Features(NamedTuple):
    """The feature network: a backbone, the recipe of its input, and its name in words."""

    backbone: nn.Module
    recipe: Recipe
    network: str


class _Embed(nn.Module):
    """Images in [0, 255] to features (n, F) of length sqrt(F): the kernel then has one scale for all networks."""

    def __init__(self, backbone: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.backbone, self.recipe = backbone, recipe

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        if images.shape[-1] != self.recipe.size:
            images = interpolate(images, size=(self.recipe.size,) * 2, mode="bilinear", antialias=True)
        # `normalise` takes floating-point views as normalised already.
        pixels = images.round().clamp(0, 255).to(torch.uint8)
        features = normalize(self.backbone(normalise(pixels, self.recipe)).float(), dim=1)
        return features * math.sqrt(features.shape[1])


class KID:
    """KID (arXiv 1801.01401) of real and generated images, by torchmetrics; lower is better, 0 is best.

    Args:
        features: A feature network; by default a ResNet-18 with fixed random weights, whose values compare only with
            one another, not with published ones.
        size: Side of the images.
        device: Where it computes.

    Attributes:
        network: The name of the network, for labels.

    Raises:
        ConfigError: torchmetrics is not installed.
    """

    def __init__(self, features: Features | None, size: int, device: torch.device) -> None:
        if importlib.util.find_spec("torchmetrics") is None:
            raise ConfigError("kid_every: found no torchmetrics, expected 0, or pip install 'synco-fast[generator]'")
        if features is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                backbone: nn.Module = torchvision.models.resnet18(weights=None)
            backbone.fc = nn.Identity()
            features = Features(backbone, Recipe(size=size), "ResNet-18 with random weights (seed 0)")
        self.network = features.network
        self._features = _Embed(features.backbone, features.recipe).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def measure(self, real: Iterable[Tensor], generated: Iterable[Tensor], images: int) -> float:
        """KID over ``images`` of each kind, given in batches: real ones uint8, generated ones in [0, 1].

        Generated images are rounded to eight bits, as when saved.
        """
        from torchmetrics.image.kid import KernelInceptionDistance

        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            metric = KernelInceptionDistance(self._features, subsets=_SUBSETS, subset_size=max(2, images // 2))
            for batch in real:
                metric.update(batch, real=True)
            for batch in generated:
                metric.update((batch * 255).round(), real=False)
            return float(metric.compute()[0])
