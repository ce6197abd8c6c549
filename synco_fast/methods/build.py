"""From configuration to method."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from synco_fast.config import Config
from synco_fast.generated.method import Generated
from synco_fast.methods.moco import MomentumContrast
from synco_fast.methods.schedule import NegativeSchedule
from synco_fast.models.encoder import Encoder, build_backbone, check_input
from synco_fast.runtime.errors import ConfigError

__all__ = ["build_encoder", "build_method"]


def groups_of_part(config: Config, processes: int) -> int:
    """In how many groups batch norm sees the images that pass through an encoder at once.

    Raises:
        ConfigError: The batch or its groups cannot be spread over the processes and the parts of each.
    """
    training, groups = config.training, config.model.batch_norm_groups
    parts = processes * training.accumulate
    spread = f"{processes} processes" + (f" times {training.accumulate} parts" if training.accumulate > 1 else "")
    if training.batch % parts:
        raise ConfigError(f"training.batch: found {training.batch}, expected a multiple of {parts} ({spread})")
    if groups % parts and parts % groups:
        raise ConfigError(
            f"model.batch_norm_groups: found {groups}, expected a multiple or a divisor of {parts} ({spread})"
        )
    return max(1, groups // parts)


def build_encoder(config: Config, *, processes: int = 1) -> Encoder:
    """The query encoder with the weights that the seed gives it.

    Args:
        config: What to build.
        processes: Over how many the batch is spread.

    Raises:
        ConfigError: The backbone is unknown or does not take images of this size, or as `groups_of_part` says.
    """
    model = config.model
    groups = groups_of_part(config, processes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone, features = build_backbone(
            model.backbone,
            arguments=model.backbone_args,
            small_stem=model.small_stem,
            batch_norm_groups=groups,
        )
        check_input(backbone, config.augment.size, model.backbone)
        if model.sync_batch_norm and processes > 1:
            backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
        return Encoder(backbone, features, model.dim, model.hidden)


def build_method(config: Config, *, processes: int = 1) -> MomentumContrast:
    """The method that the configuration names, on the CPU.

    Args:
        config: What to build.
        processes: Over how many the batch is spread; each normalises its share of the groups.

    Raises:
        ConfigError: As `build_encoder` says, or the batch or its groups cannot be spread like this.
    """
    method = config.method
    frame: dict[str, Any] = {
        "queue_length": method.queue,
        "dim": config.model.dim,
        "schedule": NegativeSchedule(
            method.negatives(), config.training.epochs, method.warmup_epochs, method.cooldown_epochs
        ),
        "temperature": method.temperature,
        "momentum": config.model.momentum,
        "symmetric": method.symmetric,
        "mask_same_image": method.mask_same_image,
        "seed": config.seed,
        "backend": method.backend,
    }
    encoder = build_encoder(config, processes=processes)
    if not config.generates:
        return MomentumContrast(encoder, **frame)
    pair = config.generated
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Generated(
            encoder,
            size=config.augment.size,
            latent=pair.latent,
            width=pair.width,
            pairs=pair.batch,
            weight=pair.weight,
            recipe=config.augment,
            **frame,
        )
