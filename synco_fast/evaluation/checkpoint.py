"""From a checkpoint on disk to an evaluated backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from synco_fast.config import Config, build_config
from synco_fast.data.sources import open_source
from synco_fast.environment import describe_environment
from synco_fast.errors import CheckpointError
from synco_fast.evaluation.protocol import evaluate_backbone
from synco_fast.methods.build import build_encoder
from synco_fast.models.encoder import Encoder
from synco_fast.training.checkpoint import find_checkpoint, load_weights
from synco_fast.training.precision import resolve_device

__all__ = ["evaluate_knn", "load_encoder"]


def load_encoder(path: Path) -> tuple[Encoder, Config, Path]:
    """The query encoder of a run folder or a checkpoint file, in evaluation mode, and the configuration it came from.

    Raises:
        CheckpointError: There is no readable checkpoint, or it holds no encoder.
    """
    state, file, _ = find_checkpoint(path)
    if "config" not in state or "method" not in state:
        raise CheckpointError(f"{file}: found no encoder in it")
    config = build_config(state["config"])
    encoder = build_encoder(config)
    prefix = "encoder."
    weights = {name[len(prefix) :]: value for name, value in state["method"].items() if name.startswith(prefix)}
    load_weights(encoder, weights, file)
    return encoder.eval(), config, file


def evaluate_knn(
    path: Path, *, source: str | None = None, neighbours: int | None = None, temperature: float | None = None
) -> dict[str, Any]:
    """Weighted kNN accuracy of a checkpoint on the held-out split; what is not given comes from the run.

    Raises:
        CheckpointError, DataError, ConfigError: The checkpoint cannot be read, the source has no labelled held-out
            split, or k is larger than the set.
    """
    encoder, config, file = load_encoder(path)
    device = resolve_device(config.training.device)
    given = {"neighbours": neighbours, "temperature": temperature}
    evaluation = config.evaluation.model_copy(
        update={name: value for name, value in given.items() if value is not None}
    )
    opened = open_source(source or config.data.source)
    result = evaluate_backbone(
        encoder.backbone.to(device), opened, config.augment, evaluation, device=device, workers=config.data.workers
    )
    return {
        "checkpoint": str(file),
        "source": opened.spec,
        "knn": result.accuracy,
        "chance": result.chance,
        "neighbours": evaluation.neighbours,
        "bank": result.bank,
        "queries": result.queries,
        "environment": describe_environment(),
    }
