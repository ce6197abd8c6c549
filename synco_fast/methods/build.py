"""From configuration to method."""

from __future__ import annotations

import torch

from synco_fast.config import Config
from synco_fast.methods.moco import MomentumContrast
from synco_fast.methods.schedule import NegativeSchedule
from synco_fast.models.encoder import Encoder, build_backbone, check_input

__all__ = ["build_encoder", "build_method"]


def build_encoder(config: Config) -> Encoder:
    """The query encoder with the weights that the seed gives it.

    Raises:
        ConfigError: The backbone is unknown or does not take images of this size.
    """
    model = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone, features = build_backbone(
            model.backbone,
            arguments=model.backbone_args,
            small_stem=model.small_stem,
            batch_norm_groups=model.batch_norm_groups,
        )
        check_input(backbone, config.augment.size, model.backbone)
        return Encoder(backbone, features, model.dim, model.hidden)


def build_method(config: Config) -> MomentumContrast:
    """The method that the configuration names, on the CPU.

    Raises:
        ConfigError: As `build_encoder` says.
    """
    method = config.method
    return MomentumContrast(
        build_encoder(config),
        queue_length=method.queue,
        dim=config.model.dim,
        schedule=NegativeSchedule(
            method.negatives(), config.training.epochs, method.warmup_epochs, method.cooldown_epochs
        ),
        temperature=method.temperature,
        momentum=config.model.momentum,
        symmetric=method.symmetric,
        mask_same_image=method.mask_same_image,
        seed=config.seed,
        backend=method.backend,
    )
