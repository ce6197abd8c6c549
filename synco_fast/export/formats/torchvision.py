"""``backbone.pth``: a state_dict under torchvision's names."""

from __future__ import annotations

from pathlib import Path

import torch

from synco_fast.export.formats import Written
from synco_fast.export.load import Weights
from synco_fast.export.stock import SMALL_STEM, contiguous, stock_name
from synco_fast.runtime.files import atomic_write

__all__ = ["write"]


def write(weights: Weights, folder: Path) -> Written:
    """Write the backbone for ``torchvision.models.NAME().load_state_dict(..., strict=False)``.

    Raises:
        CheckpointError: torchvision has no such backbone.
    """
    name = stock_name(weights, "torchvision")
    with atomic_write(folder / "backbone.pth") as file:
        torch.save(contiguous(weights.backbone), file)
    usage = (
        "import torch, torchvision\n\n"
        f"model = torchvision.models.{name}()\n"
        + (SMALL_STEM if weights.config.model.small_stem else "")
        + 'missing = model.load_state_dict(torch.load("backbone.pth", weights_only=True), strict=False)\n'
        "assert not missing.unexpected_keys    # only the classifier is missing"
    )
    return ("backbone.pth",), {}, usage
