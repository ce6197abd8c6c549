"""The names of pipelines and decoders that a configuration may hold; importing them costs nothing."""

from __future__ import annotations

from typing import Literal

__all__ = ["Decode", "PipelineName"]

PipelineName = Literal["auto", "torchvision", "dali", "resident"]
"""What makes the views."""

Decode = Literal["once", "windows"]
"""How DALI decodes: a whole image once for both views, or each view's window."""
