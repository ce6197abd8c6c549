"""The training pipeline of a configuration."""

from __future__ import annotations

import torch

from synco_fast.config import Config
from synco_fast.data.pipelines.base import Pipeline
from synco_fast.data.pipelines.build import build_pipeline
from synco_fast.data.pipelines.names import PipelineName
from synco_fast.data.sources.splits import Split
from synco_fast.runtime.distributed import DistEnv

__all__ = ["open_pipeline"]


def open_pipeline(
    config: Config,
    split: Split,
    *,
    device: torch.device,
    dtype: torch.dtype,
    name: PipelineName | None = None,
    batch: int | None = None,
    env: DistEnv = DistEnv(),  # noqa: B008 - frozen
) -> Pipeline:
    """The pipeline that a configuration describes.

    Args:
        config: Augmentation, batch, seed, and the section ``data``.
        split: The images.
        device: Device of the encoder.
        dtype: Dtype of the encoder's activations.
        name: The pipeline; ``data.pipeline`` by default.
        batch: Images per batch, over all ranks; ``training.batch`` by default.
        env: This process's rank, and the number of ranks.

    Raises:
        DataError: The pipeline does not support these images.
    """
    return build_pipeline(
        split,
        config.augment,
        batch=config.training.batch if batch is None else batch,
        seed=config.seed,
        name=config.data.pipeline if name is None else name,
        device=device,
        dtype=dtype,
        workers=config.data.workers,
        decode=config.data.decode,
        dali=config.data.dali,
        rank=env.rank,
        world=env.world,
    )
