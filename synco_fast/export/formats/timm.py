"""``model.safetensors`` and ``config.json``, timm's model format, which is also the layout of the Hugging Face Hub."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from synco_fast.export.formats import Written
from synco_fast.export.load import Weights
from synco_fast.export.stock import SMALL_STEM, contiguous, in_torchvision, stock_name
from synco_fast.models.encoder import build_backbone
from synco_fast.runtime.files import atomic_write, write_json

__all__ = ["write"]


def write(weights: Weights, folder: Path) -> Written:
    """Write the backbone for ``timm.create_model("local-dir:FOLDER")``, or ``hf-hub:`` once it is uploaded.

    The weights carry our own description too, so that `synco_fast.load_backbone` reads the folder.

    Raises:
        CheckpointError: timm has no such backbone.
    """
    model = weights.config.model
    name = stock_name(weights, "timm")
    recipe = weights.config.augment
    arguments = model.backbone_args if not in_torchvision(model.backbone) else {}
    built = build_backbone(f"timm/{name}", arguments=arguments)[0]
    stock: dict[str, Any] = getattr(built, "pretrained_cfg", None) or {}  # none where a user registered the model
    card = {
        "architecture": name,
        "num_classes": 0,
        # As timm writes it: the width before the pooling, which can differ from that of the features.
        "num_features": built.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, recipe.size, recipe.size],
            "mean": list(recipe.mean),
            "std": list(recipe.std),
            "crop_pct": _share(recipe.size, recipe.resize),
            "interpolation": "bilinear",
            "num_classes": 0,
            # Without these timm does not load the weights beside a new classifier, or for another number of channels.
            **{key: stock[key] for key in ("first_conv", "classifier") if stock.get(key)},
        },
    }
    with atomic_write(folder / "model.safetensors") as file:
        save_file(contiguous(weights.backbone), file, metadata={"synco_fast": json.dumps(weights.description())})
    write_json(folder / "config.json", card)
    files = "model.safetensors", "config.json"
    if model.small_stem:
        usage = (
            "import timm, torch\nfrom safetensors.torch import load_file\n\n"
            f"model = timm.create_model({name!r}, num_classes=0)\n{SMALL_STEM}"
            'model.load_state_dict(load_file("model.safetensors"))'
        )
        return files, {}, usage
    usage = (
        'model = timm.create_model("local-dir:FOLDER", pretrained=True)    # this folder\n'
        'model = timm.create_model("hf-hub:USER/NAME", pretrained=True)    # the same folder on the Hugging Face Hub'
    )
    return files, {}, f"import timm\n\n{usage}"


def _share(size: int, resize: int) -> float:
    """``size / resize``, rounded so that timm, which divides by it and takes the whole part, gets ``resize``."""
    share = size / resize
    return share if math.floor(size / share) == resize else math.nextafter(share, 0)
