"""The verbs of ``synco-fast``, a module each: it adds its arguments, calls the package and prints."""

from __future__ import annotations

from synco_fast.commands import (
    bench_head,
    bench_step,
    data_demo,
    evaluate_knn,
    presets,
    pretrain,
    profile_head,
    profile_step,
    validate,
)
from synco_fast.commands.verbs import Verbs

__all__ = ["COMMANDS", "Verbs"]

COMMANDS = (
    pretrain,
    presets,
    evaluate_knn,
    data_demo,
    validate,
    bench_head,
    profile_head,
    bench_step,
    profile_step,
)
"""In the order in which the help lists them."""
