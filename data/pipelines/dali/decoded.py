"""DALI decodes and no more: ragged uint8 images in one buffer with offsets, for the kernels that make the views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from synco_fast.data.pipelines.dali.graph import GraphOptions, Inputs, source
from synco_fast.data.pipelines.dali.reader import EncodedBatch
from synco_fast.data.pipelines.fused import WORDS
from synco_fast.data.transfer import to_device

__all__ = ["build_decoding", "decoding_inputs", "gather_decoded", "other_sizes"]


@pipeline_def  # type: ignore[untyped-decorator]
def _decoding(options: Mapping[str, Any]) -> Any:
    words = source("words")
    if Pipeline.current().device_id is not None:
        words = words.gpu()
    return fn.decoders.image(source("encoded"), **options), words


def build_decoding(options: GraphOptions) -> Pipeline:
    """A graph from ``encoded`` and the input of `decoding_inputs` to decoded images and the parameters of their views.

    Args:
        options: How it runs.
    """
    return options.build(_decoding)


def decoding_inputs(first: Any, second: Any) -> Inputs:
    """The graph's input beside ``encoded``: `packed` parameters of first and second views, (B, 16) each."""
    return {"words": np.concatenate([first, second], axis=1)}


def gather_decoded(outputs: Any) -> list[Tensor]:
    """The decoded batch of the graph's outputs.

    The images are copied into one buffer, in one launch. DALI's memory is in use until the copy is done, so the caller
    keeps the list until then.

    Returns:
        All images one after the other, channels innermost, (n,) uint8; where each begins, (B,) int64; height and width,
        (B, 2) int64; the `packed` parameters of the first and then of the second views, (2 B, 16); the sizes again, on
        the CPU; and DALI's own tensors.
    """
    images, words = outputs
    decoded = [from_dlpack(images[row]) for row in range(len(images))]
    sizes = torch.tensor([image.shape[:2] for image in decoded])
    lengths = 3 * sizes.prod(dim=1)
    drawn = from_dlpack(words.as_tensor())
    pixels = torch.cat([image.reshape(-1) for image in decoded])
    shapes = torch.cat([(lengths.cumsum(0) - lengths)[:, None], sizes], dim=1)
    shapes = to_device(shapes, drawn.device)
    both = drawn.view(-1, 2, WORDS).transpose(0, 1).reshape(-1, WORDS)
    return [pixels, shapes[:, 0], shapes[:, 1:], both, sizes, *decoded, drawn]


def other_sizes(outputs: list[Tensor], files: EncodedBatch) -> list[int]:
    """The rows of a batch that DALI decoded to another size than their headers say; their crops could lie outside.

    Args:
        outputs: Those of `gather_decoded`.
        files: The batch.
    """
    return [int(row) for row in np.flatnonzero((outputs[4].numpy() != files.sizes).any(axis=1))]
