"""The graph that DALI runs: encoded images and drawn parameters in, views out, on a GPU or on the CPU.

Nothing in it is random: every operation takes its parameters as inputs. Conditions send an image through those
operations alone that it was drawn for, so that images without jitter or blur cost nothing there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, math, pipeline_def, types

from synco_fast.data.augment.draw import JITTER, ViewParameters
from synco_fast.data.augment.ops import BLUR_SIGMAS, LUMA
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import Decode

__all__ = ["build_evaluation", "build_views", "evaluation_inputs", "view_inputs"]

_HUE = JITTER.index("hue")
_CONTRAST = JITTER.index("contrast")
_SATURATION = JITTER.index("saturation")
#: Steps before the hue and after it: the three other parts of the jitter may all come on one side.
_STEPS = len(JITTER) - 1
_TYPES = {torch.uint8: types.UINT8, torch.float16: types.FLOAT16, torch.float32: types.FLOAT}
_LUMA_ROWS = [*LUMA, *LUMA, *LUMA]


# -- inputs -----------------------------------------------------------------------------------------------------------


def view_inputs(views: list[ViewParameters]) -> dict[str, NDArray[Any]]:
    """What the graph of `build_views` takes beside ``encoded``, by name, each with B rows.

    Brightness, contrast and saturation all have the form M x + offset * luma(mean of the view), with a matrix M over
    the channels; a view's own order of the jitter becomes up to three such steps before its hue shift and three after.
    """
    found: dict[str, NDArray[Any]] = {}
    for number, view in enumerate(views):
        start, extent = view.crop[:, :2].astype(np.float32), view.crop[:, 2:].astype(np.float32)
        used, matrix, offset = _affine_steps(view)
        shift = view.factors[:, _HUE]
        inputs: dict[str, NDArray[Any]] = {
            "start": start,
            "extent": extent,
            "hued": shift != 0,
            "shift": shift,
            "grey": view.grey,
            "blurred": view.sigma > 0,
            # The operator checks every sigma, also those of views that are not sent through it.
            "sigma": np.where(view.sigma > 0, view.sigma, 1).astype(np.float32),
            "flip": view.flip.astype(np.int32),
        }
        for step in range(2 * _STEPS):
            inputs |= {f"used{step}": used[:, step], f"matrix{step}": matrix[:, step], f"offset{step}": offset[:, step]}
        found |= {f"{name}_{number}": np.ascontiguousarray(values) for name, values in inputs.items()}
    return found


def _affine_steps(view: ViewParameters) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    """Which of the six steps each view takes, (B, 6), their matrices (B, 6, 3, 3) and offsets (B, 6)."""
    rows = len(view)
    used = np.zeros((rows, 2 * _STEPS), dtype=bool)
    matrix = np.zeros((rows, 2 * _STEPS, 3, 3), dtype=np.float32)
    offset = np.zeros((rows, 2 * _STEPS), dtype=np.float32)
    after = np.zeros(rows, dtype=np.int64)
    taken = np.zeros((rows, 2), dtype=np.int64)
    identity, grey = np.eye(3, dtype=np.float32), np.tile(np.array(LUMA, dtype=np.float32), (3, 1))
    for part, chosen in view.steps():
        if part == _HUE:
            after[chosen] = 1
            continue
        step = after[chosen] * _STEPS + taken[chosen, after[chosen]]
        taken[chosen, after[chosen]] += 1
        factor = view.factors[chosen, part]
        used[chosen, step] = True
        matrix[chosen, step] = factor[:, None, None] * identity
        if part == _SATURATION:
            matrix[chosen, step] += (1 - factor)[:, None, None] * grey
        elif part == _CONTRAST:
            offset[chosen, step] = 1 - factor
    return used, matrix, offset


def evaluation_inputs(recipe: Recipe, sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """What the graph of `build_evaluation` takes beside ``encoded``: sizes and places as torchvision rounds them."""
    short = sizes.min(axis=1, keepdims=True)
    resized = np.where(sizes == short, recipe.resize, recipe.resize * sizes // short)
    start = np.rint((resized - recipe.size) / 2)
    return {"resized": resized.astype(np.float32), "start": start.astype(np.int32)}


# -- graphs -----------------------------------------------------------------------------------------------------------


def build_views(
    recipe: Recipe, *, batch: int, device: int | None, threads: int, decode: Decode, dtype: torch.dtype, depth: int
) -> Pipeline:
    """A graph from ``encoded`` and the inputs of `view_inputs` to two batches of views (B, size, size, 3).

    Args:
        recipe: Size, normalisation, and which parts of the jitter there are.
        batch: B.
        device: Number of the GPU, or None for the CPU back end.
        threads: Of DALI's own pool.
        decode: Whether to decode once or by window.
        dtype: torch.uint8 for pixels; torch.float32 or torch.float16 for normalised values.
        depth: Batches in flight.
    """
    graph = _views(
        recipe,
        decode,
        dtype,
        batch_size=batch,
        device_id=device,
        num_threads=threads,
        prefetch_queue_depth=depth,
        exec_dynamic=True,
    )
    graph.build()
    return graph


def build_evaluation(
    recipe: Recipe, *, batch: int, device: int | None, threads: int, dtype: torch.dtype, depth: int
) -> Pipeline:
    """A graph from ``encoded`` and the inputs of `evaluation_inputs` to central crops (b, size, size, 3), b <= B."""
    graph = _central_crops(
        recipe,
        dtype,
        batch_size=batch,
        device_id=device,
        num_threads=threads,
        prefetch_queue_depth=depth,
        exec_dynamic=True,
    )
    graph.build()
    return graph


def _source(name: str) -> Any:
    return fn.external_source(name=name, device="cpu", no_copy=True)


def _backend() -> str:
    return "cpu" if Pipeline.current().device_id is None else "gpu"


def _on_device(value: Any) -> Any:
    return value if _backend() == "cpu" else value.gpu()


def _constant(values: list[float]) -> Any:
    return types.Constant(np.array(values, dtype=np.float32), device=_backend())


def _decoder_options() -> dict[str, Any]:
    mixed = {} if _backend() == "cpu" else {"jpeg_fancy_upsampling": True}  # the chroma upsampling that Pillow has
    return {"device": "cpu" if _backend() == "cpu" else "mixed", "output_type": types.RGB, **mixed}


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def _views(recipe: Recipe, decode: Decode, dtype: torch.dtype) -> Any:
    encoded = _source("encoded")
    image = fn.decoders.image(encoded, **_decoder_options()) if decode == "once" else None
    return tuple(_view(recipe, dtype, encoded, image, number) for number in range(2))


def _view(recipe: Recipe, dtype: torch.dtype, encoded: Any, image: Any, number: int) -> Any:
    def take(name: str) -> Any:
        return _source(f"{name}_{number}")

    resize = {"size": [recipe.size] * 2, "interp_type": types.INTERP_LINEAR, "antialias": True}
    start, extent = take("start"), take("extent")
    if image is None:
        window = fn.decoders.image_slice(
            encoded, start, extent, axes=[0, 1], normalized_anchor=False, normalized_shape=False, **_decoder_options()
        )
        view = fn.resize(window, **resize)
    else:
        view = fn.resize(image, roi_start=start, roi_end=start + extent, **resize)

    for step in range(_STEPS):
        view = _affine_if(view, take(f"used{step}"), take(f"matrix{step}"), take(f"offset{step}"))
    hued, shift = take("hued"), take("shift")
    if hued:
        view = _turn_hue(view, shift)
    for step in range(_STEPS, 2 * _STEPS):
        view = _affine_if(view, take(f"used{step}"), take(f"matrix{step}"), take(f"offset{step}"))

    grey = take("grey")
    if grey:
        view = fn.coord_transform(view, M=_LUMA_ROWS, dtype=types.UINT8)
    blurred, sigma = take("blurred"), take("sigma")
    if blurred:
        view = _blur(view, sigma)
    return _normalise(view, recipe, dtype, mirror=take("flip"))


def _affine_if(view: Any, used: Any, matrix: Any, offset: Any) -> Any:
    if used:
        mean = fn.coord_transform(fn.reductions.mean(view, axes=[0, 1], keep_dims=True), M=_LUMA_ROWS)
        turned = fn.coord_transform(view, M=matrix)
        view = fn.cast(turned + _on_device(offset) * mean, dtype=types.UINT8)
    return view


def _turn_hue(view: Any, shift: Any) -> Any:
    """Turn the hue in HSV; see `synco_fast.data.augment.ops` for the same formula."""
    pixels = fn.cast(view, dtype=types.FLOAT)
    red, green, blue = pixels[:, :, 0:1], pixels[:, :, 1:2], pixels[:, :, 2:3]
    top = math.max(math.max(red, green), blue)
    low = math.min(math.min(red, green), blue)
    chroma = top - low
    at_red = fn.cast(top == red, dtype=types.FLOAT)
    at_green = (1.0 - at_red) * fn.cast(top == green, dtype=types.FLOAT)
    at_blue = 1.0 - at_red - at_green
    along = at_red * (green - blue) + at_green * (blue - red) + at_blue * (red - green)
    corner = (along / math.max(chroma, 1e-6) + at_green * 2.0 + at_blue * 4.0) / 6.0 + _on_device(shift)
    corner = (corner - math.floor(corner)) * 6.0
    share = _constant([1, -1, -1]) * math.abs(corner - _constant([3, 2, 4])) + _constant([-1, 2, 2])
    return fn.cast(low + chroma * math.clamp(share, 0.0, 1.0), dtype=types.UINT8)


def _blur(view: Any, sigma: Any) -> Any:
    window = fn.cast(2.0 * math.ceil(float(BLUR_SIGMAS) * sigma) + 1.0, dtype=types.INT32)
    return fn.gaussian_blur(view, sigma=sigma, window_size=window)


def _normalise(view: Any, recipe: Recipe, dtype: torch.dtype, **options: Any) -> Any:
    if dtype != torch.uint8:
        options |= {"mean": [255 * mean for mean in recipe.mean], "std": [255 * std for std in recipe.std]}
    return fn.crop_mirror_normalize(view, dtype=_TYPES[dtype], output_layout="HWC", **options)


@pipeline_def  # type: ignore[untyped-decorator]
def _central_crops(recipe: Recipe, dtype: torch.dtype) -> Any:
    image = fn.decoders.image(_source("encoded"), **_decoder_options())
    image = fn.resize(image, size=_source("resized"), interp_type=types.INTERP_LINEAR, antialias=True)
    size = [recipe.size, recipe.size]
    view = fn.slice(image, _source("start"), size, axes=[0, 1], out_of_bounds_policy="pad")
    return _normalise(view, recipe, dtype)
