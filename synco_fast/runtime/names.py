"""Names of devices and number formats; importing them is cheap."""

from __future__ import annotations

from typing import Literal

__all__ = ["Device", "Format"]

Device = Literal["auto", "cpu", "cuda"]
"""``auto`` is a GPU if there is one."""

Format = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
"""``auto`` is bf16 where the device is fast in it, else fp32."""
