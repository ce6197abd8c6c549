"""The subcommands of ``synco-fast``, one module each: arguments, a call of the package, printed output."""

from __future__ import annotations

from synco_fast.commands import (
    bench_data,
    bench_loss,
    bench_norm,
    bench_optimizer,
    bench_step,
    compare,
    data_check,
    data_demo,
    data_pack,
    data_show,
    embed,
    evaluate_detection,
    evaluate_finetune,
    evaluate_knn,
    evaluate_linear,
    export,
    import_checkpoint,
    presets,
    pretrain,
    pretrain_generator,
    profile_loss,
    profile_step,
    report,
    study,
    validate,
)
from synco_fast.commands.parser import Commands

__all__ = ["COMMANDS", "Commands"]

COMMANDS = (
    pretrain,
    pretrain_generator,
    presets,
    evaluate_knn,
    evaluate_linear,
    evaluate_finetune,
    evaluate_detection,
    export,
    import_checkpoint,
    embed,
    report,
    study,
    compare,
    data_demo,
    data_check,
    data_pack,
    data_show,
    validate,
    bench_loss,
    bench_norm,
    bench_data,
    bench_step,
    bench_optimizer,
    profile_loss,
    profile_step,
)
"""In the order in which the help lists them."""
