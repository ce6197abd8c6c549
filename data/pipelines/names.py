"""Names of pipelines and decoders; importing them is cheap."""

from __future__ import annotations

from typing import Literal

__all__ = ["Decode", "PipelineName"]

PipelineName = Literal["auto", "torchvision", "dali", "resident"]
"""The data pipelines."""

Decode = Literal["once", "windows"]
"""How DALI decodes: the whole image once for both views, or the window of each view."""
