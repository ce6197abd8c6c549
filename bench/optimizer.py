"""Time of an optimizer step by implementation, including gradient norm and skipping of bad steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from timm.optim.lamb import Lamb
from timm.optim.lars import Lars
from torch import nn

from synco_fast.bench.subjects import OPTIMIZERS
from synco_fast.bench.timing import seconds_of
from synco_fast.config import OptimizerConfig
from synco_fast.models.encoder import build_backbone
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.optim_step import OptimStep
from synco_fast.training.step.optimizer import build_optimizer, decayed_apart
from synco_fast.training.tuning.audit import count_operations

__all__ = ["build", "measure_optimizers", "unavailable"]

_LR, _DECAY = 0.01, 1e-4


def unavailable(subject: str, device: torch.device) -> str | None:
    """The reason why an implementation cannot run here, or None if it can."""
    try:
        build(subject, nn.Linear(2, 2).to(device), device)
    except ConfigError as error:
        return str(error)
    return None


def build(subject: str, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Build the optimizer of one implementation.

    Args:
        subject: One of `synco_fast.bench.subjects.OPTIMIZERS`.
        module: The network, on the device.
        device: Device to run on.

    Raises:
        ConfigError: The package is not installed, or does not run on this device.
    """
    name, _, form = subject.partition("-")
    if form == "foreach":
        if name == "sgd":
            return torch.optim.SGD(module.parameters(), lr=_LR, momentum=0.9, weight_decay=_DECAY, foreach=True)
        return torch.optim.AdamW(decayed_apart(module, _DECAY), lr=_LR, foreach=True)
    if form == "timm":
        groups = decayed_apart(module, _DECAY)
        return Lars(groups, lr=_LR, momentum=0.9) if name == "lars" else Lamb(groups, lr=_LR)
    config = OptimizerConfig.model_validate({"name": name, "weight_decay": _DECAY})
    return build_optimizer(module, config, lr=_LR, device=device)


def measure_optimizers(
    subjects: list[str],
    backbone: str,
    device: torch.device,
    *,
    repeats: int,
    rounds: int,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Time each implementation on the parameters of a backbone with random gradients. They take turns.

    Args:
        subjects: Some of `synco_fast.bench.subjects.OPTIMIZERS`.
        backbone: A torchvision model, or timm/NAME.
        device: Device to run on.
        repeats, rounds: Timed steps in a round, and rounds through all implementations.
        advance: Called after each implementation of each round.

    Returns:
        For each implementation: the number of parameters, seconds of every step and their median, the number of PyTorch
        operations in a step, and whether the host waits for the device.
    """
    runs: dict[str, tuple[nn.Module, OptimStep]] = {}
    for subject in subjects:
        torch.manual_seed(0)
        module = build_backbone(backbone)[0].to(device)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        optimizer = build(subject, module, device)
        for group in optimizer.param_groups:
            if isinstance(optimizer.defaults["lr"], torch.Tensor):
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(device)
        runs[subject] = module, OptimStep(optimizer, scaled=False, device=device)
    seconds: dict[str, list[float]] = {subject: [] for subject in subjects}
    for _ in range(rounds):
        for subject, (_, update) in runs.items():
            seconds[subject] += seconds_of(update.step, device, repeats=repeats)
            advance()
    results = []
    for subject, (module, update) in runs.items():
        counted = count_operations(update.step)
        results.append(
            {
                "subject": subject,
                "about": OPTIMIZERS[subject],
                "parameters": sum(parameter.numel() for parameter in module.parameters()),
                "seconds": seconds[subject],
                "median_s": statistics.median(seconds[subject]),
                "operations": sum(sum(operations.values()) for operations in counted.values()),
                "waits": update.waits,
            }
        )
    return results
