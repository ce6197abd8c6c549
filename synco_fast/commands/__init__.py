"""The verbs of ``synco-fast``, a module each: it adds its arguments, calls the package and prints."""

from __future__ import annotations

from synco_fast.commands import (
    bench_data,
    bench_head,
    data_check,
    data_demo,
    data_show,
    evaluate_knn,
    presets,
    pretrain,
    profile_head,
    validate,
)
from synco_fast.commands.verbs import Verbs

__all__ = ["COMMANDS", "Verbs"]

COMMANDS = (
    pretrain,
    presets,
    evaluate_knn,
    data_demo,
    data_check,
    data_show,
    validate,
    bench_head,
    bench_data,
    profile_head,
)
"""In the order in which the help lists them."""
