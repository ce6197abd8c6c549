"""Number formats: where the encoders compute in sixteen bits, and loss scaling where that needs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from synco_fast.errors import ConfigError

__all__ = ["Precision", "resolve_device"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or the CPU where there is none.

    Raises:
        ConfigError: ``cuda`` is asked for and there is none.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError("training.device: found cuda, allowed cpu on this machine, where PyTorch sees no GPU")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and found) else "cpu")


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


class Precision:
    """Autocast and, for fp16, loss scaling behind one interface.

    Args:
        name: ``auto`` (bf16 where the device computes in it at speed, else fp32), ``fp32``, ``bf16`` or ``fp16``.
        device: Where the encoders run.

    Raises:
        ConfigError: fp16 on a CPU.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "fp16" and device.type != "cuda":
            raise ConfigError("training.precision: found fp16, allowed auto, fp32 or bf16 without a GPU")
        self.name = ("bf16" if _has_fast_bf16(device) else "fp32") if name == "auto" else name
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    @property
    def dtype(self) -> torch.dtype:
        """In which the encoders' products are computed."""
        return _DTYPES.get(self.name, torch.float32)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass. Weight copies are not cached: the momentum encoder changes in between."""
        dtype = _DTYPES.get(self.name, torch.bfloat16)
        return torch.autocast(self.device.type, dtype, enabled=self.name != "fp32", cache_enabled=False)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Backward pass and optimiser step; one with infinite gradients is skipped where losses are scaled."""
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The loss scale, for the checkpoint."""
        state: dict[str, Any] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the loss scale from a checkpoint."""
        self.scaler.load_state_dict(state)


def memory_format(module: nn.Module, channels_last: bool) -> torch.memory_format:
    """Lay the module's convolutions out as asked, and say which layout its input should have."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    module.to(memory_format=form)
    return form
