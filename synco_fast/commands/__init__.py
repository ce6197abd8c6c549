"""The verbs of ``synco-fast``, a module each: it adds its arguments, calls the package and prints."""

from __future__ import annotations

from synco_fast.commands import (
    data_demo,
    evaluate_finetune,
    evaluate_knn,
    evaluate_linear,
    export_checkpoint,
    import_checkpoint,
    presets,
    pretrain,
)
from synco_fast.commands.verbs import Verbs

__all__ = ["COMMANDS", "Verbs"]

COMMANDS = (
    pretrain,
    presets,
    evaluate_knn,
    evaluate_linear,
    evaluate_finetune,
    export_checkpoint,
    import_checkpoint,
    data_demo,
)
"""In the order in which the help lists them."""
