"""Names of devices, number formats, engines and optimizers; importing them is cheap."""

from __future__ import annotations

from typing import Literal

__all__ = ["Device", "EngineName", "Format", "OptimizerName", "QueueDtype"]

Device = Literal["auto", "cpu", "cuda"]
"""``auto`` is a GPU if there is one."""

EngineName = Literal["auto", "eager", "graph", "compile", "compile+graph"]
"""How a training step runs: launch by launch, as one CUDA graph, with encoders under torch.compile, or both."""

Format = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
"""``auto`` is bf16 where the device has it at full speed, else fp32."""

QueueDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""``auto`` is bfloat16 on a GPU that is fast in it, else float32."""

OptimizerName = Literal["sgd", "adamw", "lars", "lamb", "apex_sgd", "apex_adam", "apex_lamb", "apex_mixed_lamb"]
"""PyTorch's two, those for large batches, and NVIDIA apex's."""
