"""The devices and number formats that a person may name; importing them costs nothing."""

from __future__ import annotations

from typing import Literal

__all__ = ["Device", "Format", "QueueDtype"]

Device = Literal["auto", "cpu", "cuda"]
"""``auto`` is a GPU where there is one."""

Format = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
"""``auto`` is bf16 where the device computes in it at speed, else fp32."""

QueueDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""``auto`` is bfloat16 on a GPU that computes in it at speed, else float32."""
