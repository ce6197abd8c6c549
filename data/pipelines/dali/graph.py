"""DALI graphs: encoded images and crops in, resized crops out, on a GPU or on the CPU.

Nothing in the graph is random: the crops are inputs. DALI decodes and resizes. What follows the crop is in
`synco_fast.data.pipelines.dali.finish`: every view has its own order of the jitter, and as operators of DALI's with
conditions around them it took 133 operators a view.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, pipeline_def, types

from synco_fast.data.augment.draw import ViewParameters
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import Decode

# Else nvImageCodec writes a warning for each image that one of its decoders leaves to the next one.
os.environ.setdefault("DALI_NVIMGCODEC_LOG_LEVEL", "1")

__all__ = ["GraphOptions", "Inputs", "build_crops", "build_evaluation", "crop_inputs", "evaluation_inputs", "source"]

Inputs = dict[str, NDArray[Any]]


# -- inputs -----------------------------------------------------------------------------------------------------------


def crop_inputs(views: Sequence[ViewParameters], decode: Decode) -> Inputs:
    """The inputs of `build_crops` beside ``encoded``, by name, with B rows each."""
    kind = np.float32 if decode == "once" else np.int32  # what the resize and the decoder take
    found: Inputs = {}
    for number, view in enumerate(views):
        start, extent = view.crop[:, :2], view.crop[:, 2:]
        found |= {f"start_{number}": start.astype(kind), f"end_{number}": (start + extent).astype(kind)}
    return found


def evaluation_inputs(recipe: Recipe, sizes: NDArray[np.int64]) -> Inputs:
    """The inputs of `build_evaluation` beside ``encoded``: sizes and positions, rounded as in torchvision."""
    short = sizes.min(axis=1, keepdims=True)
    resized = np.where(sizes == short, recipe.resize, recipe.resize * sizes // short)
    start = np.rint((resized - recipe.size) / 2)
    return {"resized": resized.astype(np.float32), "start": start.astype(np.int32)}


# -- graphs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphOptions:
    """How a graph runs.

    Attributes:
        batch: B, the most images at a time.
        device: Number of the GPU, or None for the CPU backend.
        threads: Threads of DALI's pool.
        depth: Batches in flight.
        decoder: Arguments of the decoder on a GPU, see `DaliSettings.decoder`.
    """

    batch: int
    device: int | None = None
    threads: int = 1
    depth: int = 1
    decoder: Mapping[str, Any] = field(default_factory=dict)

    def build(self, definition: Callable[..., Pipeline], *arguments: Any) -> Pipeline:
        """The graph of a definition and its arguments, ready to run."""
        graph = definition(
            *arguments,
            self.decode_options,
            batch_size=self.batch,
            device_id=self.device,
            num_threads=self.threads,
            prefetch_queue_depth=self.depth,
            exec_dynamic=True,
        )
        graph.build()
        return graph

    @property
    def decode_options(self) -> dict[str, Any]:
        """Arguments of DALI's decoders, which never turn an image: what is turned comes as pixels from the reader."""
        shared = {"output_type": types.RGB, "adjust_orientation": False}
        return {"device": "cpu", **shared} if self.device is None else {"device": "mixed", **shared, **self.decoder}


def build_crops(recipe: Recipe, decode: Decode, options: GraphOptions) -> Pipeline:
    """A graph from ``encoded`` and the inputs of `crop_inputs` to two batches of crops (B, size, size, 3) uint8.

    Args:
        recipe: Gives the size.
        decode: Whether to decode once or by window.
        options: How it runs.
    """
    return options.build(_crops, recipe.size, decode)


def build_evaluation(recipe: Recipe, options: GraphOptions) -> Pipeline:
    """A graph from ``encoded`` and the inputs of `evaluation_inputs` to uint8 crops (b, size, size, 3), b <= B."""
    return options.build(_central_crops, recipe.size)


def source(name: str) -> Any:
    """An input of a graph."""
    return fn.external_source(name=name, device="cpu", no_copy=True)


@pipeline_def  # type: ignore[untyped-decorator]
def _crops(size: int, decode: Decode, options: Mapping[str, Any]) -> Any:
    encoded = source("encoded")
    image = fn.decoders.image(encoded, **options) if decode == "once" else None
    resize = {"size": [size] * 2, "interp_type": types.INTERP_LINEAR, "antialias": True}
    crops = []
    for number in range(2):
        start, end = source(f"start_{number}"), source(f"end_{number}")
        if image is not None:
            crops.append(fn.resize(image, roi_start=start, roi_end=end, **resize))
        else:
            window = fn.decoders.image_slice(encoded, start=start, end=end, axes=[0, 1], **options)
            crops.append(fn.resize(window, **resize))
    return tuple(crops)


@pipeline_def  # type: ignore[untyped-decorator]
def _central_crops(size: int, options: Mapping[str, Any]) -> Any:
    image = fn.decoders.image(source("encoded"), **options)
    image = fn.resize(image, size=source("resized"), interp_type=types.INTERP_LINEAR, antialias=True)
    crop = fn.slice(image, source("start"), [size, size], axes=[0, 1], out_of_bounds_policy="pad")
    return fn.crop_mirror_normalize(crop, dtype=types.UINT8, output_layout="HWC")
