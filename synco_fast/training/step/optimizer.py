"""Optimizers by name, and schedules of learning rate and EMA momentum."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from synco_fast.config import OptimizerConfig
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.optim_step import build_sgd
from synco_fast.training.step.large_batch import Lamb, Lars

__all__ = ["build_optimizer", "decayed_apart", "key_momentum", "learning_rate"]

_APEX = {
    "apex_sgd": "FusedSGD",
    "apex_adam": "FusedAdam",
    "apex_lamb": "FusedLAMB",
    "apex_mixed_lamb": "FusedMixedPrecisionLamb",
}
#: What does the same without apex.
_PLAIN = {"apex_sgd": "sgd", "apex_adam": "adamw", "apex_lamb": "lamb", "apex_mixed_lamb": "lamb"}
_NVIDIA = "git clone https://github.com/NVIDIA/apex and build it with its CUDA extensions, or take optimizer.name"


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, *, lr: float, device: torch.device
) -> torch.optim.Optimizer:
    """An optimizer: PyTorch's, LARS or LAMB for large batches, or NVIDIA apex's where it is installed.

    SGD decays every parameter, as in MoCo. The others exempt vectors (biases and the affine parameters of
    normalisation); LARS (arXiv 1708.03888) and LAMB (arXiv 1904.00962) do not adapt these either.

    Args:
        module: The module to train.
        config: Name, momentum, betas, weight decay.
        lr: Peak learning rate.
        device: Device of the parameters.

    Raises:
        ConfigError: apex is missing, is another package of that name, or there is no GPU.
    """
    name, decay = config.name, config.weight_decay
    cuda = device.type == "cuda"
    if name == "sgd":
        return build_sgd(module.parameters(), lr=lr, momentum=config.momentum, weight_decay=decay, device=device)
    if name == "apex_sgd":
        fused = _from_apex(_APEX[name], name, device)
        return fused(list(module.parameters()), lr=lr, momentum=config.momentum, weight_decay=decay)
    groups = decayed_apart(module, decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=cuda, capturable=cuda)
    if name == "lars":
        return Lars(groups, lr=lr, momentum=config.momentum)
    if name == "lamb":
        return Lamb(groups, lr=lr, betas=config.betas)
    apex = _from_apex(_APEX[name], name, device)
    if name == "apex_adam":
        return apex(groups, lr=lr, betas=config.betas, capturable=True)
    return apex(groups, lr=lr, betas=config.betas)


def decayed_apart(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Groups of what learns: tensors of two dimensions or more with weight decay, vectors without."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _from_apex(kind: str, name: str, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    plain = _PLAIN[name]
    if importlib.util.find_spec("apex") is None:
        raise ConfigError(f"optimizer.name: found {name} and no NVIDIA apex here, expected: {_NVIDIA} {plain}")
    try:
        found: Callable[..., torch.optim.Optimizer] = getattr(importlib.import_module("apex.optimizers"), kind)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optimizer.name: found {name} and a package 'apex' without {kind}, such as the web toolkit of that name "
            f"on PyPI; expected NVIDIA's: pip uninstall apex, then {_NVIDIA} {plain}"
        ) from error
    if device.type != "cuda":
        raise ConfigError(f"optimizer.name: found {name}, expected {plain} without a GPU")
    return found


def learning_rate(step: int, *, peak: float, steps: int, warmup: int = 0, schedule: str = "cosine") -> float:
    """The learning rate of a step.

    Rises linearly over ``warmup`` steps, then follows half a cosine from ``peak`` to 0 (or stays at ``peak``). MoCo v2
    changes its rate once per epoch; here it changes in every step, on the same curve.

    Args:
        step: Counted from 0.
        peak: The highest rate.
        steps: Length of the run in steps.
        warmup: Steps until ``peak`` is reached.
        schedule: ``"cosine"`` or ``"constant"``.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def key_momentum(step: int, *, base: float, steps: int, schedule: str = "constant") -> float:
    """EMA momentum of the key encoder at a step: ``base``, or from ``base`` to 1 along half a cosine.

    The cosine is that of BYOL (arXiv 2006.07733 section 3.2) and MoCo v3.

    Args:
        step: Counted from 0.
        base: The momentum at the first step.
        steps: Length of the run in steps.
        schedule: ``"constant"`` or ``"cosine"``.
    """
    if schedule == "constant":
        return base
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
