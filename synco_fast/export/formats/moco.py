"""``checkpoint.pth.tar``: the layout of facebookresearch/moco, which MoCHi and SynCo share."""

from __future__ import annotations

from pathlib import Path

import torch

from synco_fast.export.formats import Written
from synco_fast.export.layouts import to_moco
from synco_fast.export.load import Weights
from synco_fast.runtime.files import atomic_write

__all__ = ["write"]


def write(weights: Weights, folder: Path) -> Written:
    """Write encoders and queue for the authors' scripts."""
    content = {
        "epoch": round(weights.epochs or 0),
        "arch": weights.config.model.backbone.rpartition("/")[2],
        "state_dict": to_moco(weights.state),
        "synco_fast": weights.description(),
    }
    with atomic_write(folder / "checkpoint.pth.tar") as file:
        torch.save(content, file)
    usage = (
        f"python main_lincls.py -a {content['arch']} --pretrained checkpoint.pth.tar ... /data/imagenet"
        "    # facebookresearch/moco"
    )
    return ("checkpoint.pth.tar",), {}, usage
