"""Building encoder and method from a configuration."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import nn

from synco_fast.config import Config
from synco_fast.methods import METHODS, extra_of, with_queue
from synco_fast.methods.base import Method
from synco_fast.models.encoder import Encoder, build_backbone, check_input, parameters_of
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.memory import check_memory
from synco_fast.runtime.precision import resolve_device

__all__ = ["build_encoder", "build_method", "groups_of_part"]

#: Of a network in training: weights and gradients; most methods and optimizers keep more.
_COPIES = 2


def groups_of_part(config: Config, processes: int) -> int:
    """Batch-norm groups of one forward pass: of one micro-batch on one process.

    Raises:
        ConfigError: The batch or its groups cannot be divided among the processes and micro-batches.
    """
    training, groups = config.training, config.model.batch_norm_groups
    parts = processes * training.accumulate
    spread = f"{processes} processes" + (
        f" times {training.accumulate} micro-batches" if training.accumulate > 1 else ""
    )
    if training.batch % parts:
        raise ConfigError(f"training.batch: found {training.batch}, expected a multiple of {parts} ({spread})")
    if groups % parts and parts % groups:
        raise ConfigError(
            f"model.batch_norm_groups: found {groups}, expected a multiple or a divisor of {parts} ({spread})"
        )
    return max(1, groups // parts)


def build_encoder(config: Config, *, processes: int = 1) -> Encoder:
    """The encoder with weights drawn by the seed.

    Args:
        config: The configuration.
        processes: Number of processes; each normalises its share of the groups.

    Raises:
        ConfigError: The backbone is unknown or does not take images of this size, the network or its activations need
            more memory than there is, or as `groups_of_part` says.
    """
    model, training = config.model, config.training
    groups = groups_of_part(config, processes)
    device = resolve_device(training.device)
    if model.backbone_args:
        size = _COPIES * 4 * parameters_of(model.backbone, model.backbone_args)
        check_memory(size, device, f"model.backbone_args: found {model.backbone_args}")
    if model.sync_batch_norm and processes > 1 and device.type == "cpu":
        raise ConfigError(
            f"model.sync_batch_norm: found true in {processes} processes on CPUs (training.device), expected false: "
            "SyncBN runs on GPUs"
        )
    fused = model.norm != "plain" and not model.sync_batch_norm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone, features = build_backbone(
            model.backbone,
            arguments=model.backbone_args,
            small_stem=model.small_stem,
            batch_norm_groups=1 if fused else groups,
        )
        name = f"{model.backbone} with {model.backbone_args}" if model.backbone_args else model.backbone
        images = training.batch // processes // training.accumulate
        together = images * processes if model.sync_batch_norm else images // groups
        kept = check_input(backbone, config.augment.size, name, features, together=together)
        for smaller in config.augment.sides[:-1]:
            check_input(backbone, smaller, name, features, "augment.min_size", together)
        check_memory(
            # At least: in two bytes a number, where the format may have as few.
            images * kept * (4 if training.precision in ("fp32", "tf32") else 2),
            device,
            f"training.batch: found {training.batch} images of {config.augment.size} pixels (augment.size) for "
            f"{model.backbone}",
        )
        hidden = model.hidden or features
        check_memory(
            _COPIES * 4 * hidden * (features + model.dim),
            device,
            f"model.dim: found {model.dim:,} behind {hidden:,} (model.hidden) and {features:,} features",
        )
        if model.sync_batch_norm and processes > 1:
            backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
        encoder = Encoder(backbone, features, model.dim, model.hidden)
    if fused:
        from synco_fast.models.fusion import fuse_batch_norm  # imports timm, which takes a second

        on_gpu = device.type == "cuda"
        fusion = fuse_batch_norm(backbone, groups, "triton" if on_gpu and model.norm == "fused" else "auto")
        if model.norm == "fused" or not fusion.whole:
            encoder.remark = f"model.norm: {model.backbone}: {fusion}"
    return encoder


def build_method(config: Config, *, processes: int = 1) -> Method:
    """The method of a configuration, with its extra if one is on, on the CPU.

    Args:
        config: The configuration.
        processes: Number of processes.

    Raises:
        ConfigError: As `build_encoder` says, or the method does not support the configuration.
    """
    if config.method.name in with_queue():
        keys, dim = config.method.queue, config.model.dim
        check_memory(
            keys * (4 * dim + 8),
            resolve_device(config.training.device),
            f"method.queue: found {keys:,} keys of {dim:,} numbers (model.dim)",
        )
    extra = extra_of(config)
    if extra is not None:
        method: Method = extra.build(config, processes)
        return method
    module = import_module(f"{__package__}.{METHODS[config.method.name].module}")
    built: Method = module.build(config, processes)
    return built
