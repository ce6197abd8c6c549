"""The queue of past keys: first in, first out, on the device, saved in checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.migrations import TENSORS

__all__ = ["KeyQueue"]


class KeyQueue(nn.Module):
    """K unit rows that are overwritten oldest first (MoCo's dictionary, arXiv 1911.05722 section 3.2).

    Rows and pointer are buffers: they move, save and load with the module. Enqueueing never waits for the device.
    The queue starts with random unit rows. As any module's, its buffers are made on PyTorch's default device.

    Args:
        length: K.
        dim: D.
        seed: Seed of the random rows.
        dtype: Dtype of the rows.

    Attributes:
        rows: Keys, (K, D), unit length before rounding to ``dtype``.
        image_ids: The image of each key, (K,) int64; -1 for a random row.
        pointer: The row of the next key, an int64 scalar.
    """

    rows: Tensor
    image_ids: Tensor
    pointer: Tensor

    def __init__(self, length: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        # Drawn and normalised in float32 on the CPU, so that they do not depend on PyTorch's default device and dtype.
        drawn = torch.randn(length, dim, generator=generator, device="cpu", dtype=torch.float32)
        self.register_buffer("rows", normalize(drawn, dim=1).to(torch.get_default_device(), dtype))
        self.register_buffer("image_ids", torch.full((length,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for old, new in TENSORS.items():
            name = prefix + old.removeprefix("queue.")
            if name in state_dict:
                state_dict[prefix + new.removeprefix("queue.")] = state_dict.pop(name)
        pointer = state_dict.get(f"{prefix}pointer", self.pointer)
        if not 0 <= int(pointer) < len(self):
            errors = rest[-1]
            errors.append(f"found {int(pointer)} as {prefix}pointer, expected 0 to {len(self) - 1}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, image_ids: Tensor, step_ok: Tensor | None = None) -> None:
        """Write ``keys``, (n, D), over the n oldest rows, wrapping at the end.

        Args:
            keys: (n, D).
            image_ids: (n,) int64.
            step_ok: A bool scalar on the device; if false nothing changes, without a host synchronisation.

        Raises:
            ConfigError: n is larger than K, so that a key would overwrite one of its own batch.
        """
        if len(keys) > len(self):
            raise ConfigError(f"method.queue: found {len(self)}, expected {len(keys)} or more, the keys of one step")
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self)
        keys = keys.to(self.rows.dtype)
        if step_ok is not None:
            keys = torch.where(step_ok, keys, self.rows[places])
            image_ids = torch.where(step_ok, image_ids, self.image_ids[places])
        self.rows.index_copy_(0, places, keys)
        self.image_ids.index_copy_(0, places, image_ids)
        self.pointer.add_(len(keys) if step_ok is None else len(keys) * step_ok).remainder_(len(self))
