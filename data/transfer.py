"""Small arrays from the host to a device."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["to_device"]


def to_device(values: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Copy to a device; without waiting for it, unless it is the CPU.

    A copy from pageable memory may first wait for the stream (CUDA Runtime API, "API synchronization behavior"), so
    what goes to a CUDA device is page-locked first.

    Args:
        values: An array, or a tensor.
        device: The device. On the CPU, the result shares the memory of ``values`` where these are there.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    # To the CPU the copy is waited for: PyTorch would hand out memory that the device has not filled yet.
    return tensor.to(device, non_blocking=device.type != "cpu")
