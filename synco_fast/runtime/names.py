"""Names of devices and number formats; importing them is cheap."""

from __future__ import annotations

from typing import Literal

__all__ = ["Device", "Format", "QueueDtype"]

Device = Literal["auto", "cpu", "cuda"]
"""``auto`` is a GPU if there is one."""

Format = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
"""``auto`` is bf16 where the device is fast in it, else fp32."""

QueueDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""``auto`` is bfloat16 on a GPU that is fast in it, else float32."""
