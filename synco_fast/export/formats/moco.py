"""``checkpoint.pth.tar``: the layout of facebookresearch/moco, which MoCHi and SynCo share."""

from __future__ import annotations

from pathlib import Path

import torch

from synco_fast.export.formats import Written
from synco_fast.export.layouts import to_moco
from synco_fast.export.load import Weights
from synco_fast.export.stock import stock_name
from synco_fast.runtime.errors import CheckpointError
from synco_fast.runtime.files import atomic_write

__all__ = ["write"]


def write(weights: Weights, folder: Path) -> Written:
    """Write encoders and queue for the authors' scripts.

    Raises:
        CheckpointError: The scripts build torchvision's model of the backbone's name, which does not take the weights.
    """
    arch = stock_name(weights, "torchvision")
    if weights.config.model.small_stem:
        raise CheckpointError(
            f"{weights.file}: found {weights.config.model.backbone} with a small stem, expected the stem of "
            "torchvision's, which the authors' scripts build; --format torchvision takes it"
        )
    content = {
        "epoch": round(weights.epochs or 0),
        "arch": arch,
        "state_dict": to_moco(weights.state),
        "synco_fast": weights.description(),
    }
    with atomic_write(folder / "checkpoint.pth.tar") as file:
        torch.save(content, file)
    usage = (
        f"python main_lincls.py -a {arch} --pretrained checkpoint.pth.tar ... /data/imagenet    # facebookresearch/moco"
    )
    return ("checkpoint.pth.tar",), {}, usage
