"""Small arrays from the host to a device."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["to_device"]


def to_device(values: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it.

    A copy from pageable memory may first wait for the stream (CUDA Runtime API, "API synchronization behavior"), so
    what goes to a CUDA device is page-locked first.

    Args:
        values: An array, or a tensor on the CPU or already on the device.
        device: The device. On the CPU, the result shares the memory of ``values``.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
