"""synco-fast: contrastive pretraining with synthetic hard negatives."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from synco_fast.version import __version__

if TYPE_CHECKING:
    from synco_fast.api import Run, pretrain
    from synco_fast.export.load import load_backbone
    from synco_fast.loss import SynthContrastLoss

__all__ = ["Run", "SynthContrastLoss", "__version__", "load_backbone", "pretrain"]

_HOMES = {
    "Run": "synco_fast.api",
    "SynthContrastLoss": "synco_fast.loss",
    "load_backbone": "synco_fast.export.load",
    "pretrain": "synco_fast.api",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: the commands start without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'synco_fast' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet: for completion in a notebook."""
    return sorted({*globals(), *__all__})
