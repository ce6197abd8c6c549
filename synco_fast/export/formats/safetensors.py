"""``backbone.safetensors``: self-describing; read by `synco_fast.load_backbone`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from synco_fast.export.formats import Written
from synco_fast.export.load import Weights
from synco_fast.export.stock import contiguous
from synco_fast.runtime.files import atomic_write

__all__ = ["write"]


def write(weights: Weights, folder: Path) -> Written:
    """Write any backbone."""
    with atomic_write(folder / "backbone.safetensors") as file:
        save_file(contiguous(weights.backbone), file, metadata={"synco_fast": json.dumps(weights.description())})
    usage = 'import synco_fast\n\nbackbone = synco_fast.load_backbone("backbone.safetensors")'
    return ("backbone.safetensors",), {}, usage
