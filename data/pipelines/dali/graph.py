"""DALI graphs: encoded images and drawn parameters in, views out, on a GPU or on the CPU.

Nothing in the graph is random: every operation takes its parameters as inputs. Conditions send an image only through
the operations drawn for it, so that images without jitter or blur cost nothing there. Operations of probability 0 are
not in the graph at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, math, pipeline_def, types

from synco_fast.data.augment.draw import JITTER, ViewParameters, operations_of
from synco_fast.data.augment.ops import BLUR_SIGMAS, LUMA
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import Decode

__all__ = ["APPLY", "INPUTS", "build_evaluation", "build_views", "evaluation_inputs", "view_inputs"]

_HUE = JITTER.index("hue")
_CONTRAST = JITTER.index("contrast")
_SATURATION = JITTER.index("saturation")
#: Steps before and after the hue: the three other parts of the jitter may all be on one side.
_STEPS = len(JITTER) - 1
_TYPES = {torch.uint8: types.UINT8, torch.float16: types.FLOAT16, torch.float32: types.FLOAT}
_LUMA_ROWS = [*LUMA, *LUMA, *LUMA]
#: Returns a view's input by name.
Take = Callable[[str], Any]


# -- inputs -----------------------------------------------------------------------------------------------------------


Inputs = dict[str, NDArray[Any]]


def view_inputs(views: list[ViewParameters], recipe: Recipe) -> Inputs:
    """The inputs of `build_views` beside ``encoded``, by name, with B rows each."""
    found: Inputs = {}
    for number, view in enumerate(views):
        for operation in operations_of(recipe, "dali"):
            for name, values in INPUTS[operation.name](view).items():
                found[f"{name}_{number}"] = np.ascontiguousarray(values)
    return found


def _crop_inputs(view: ViewParameters) -> Inputs:
    return {"start": view.crop[:, :2].astype(np.float32), "extent": view.crop[:, 2:].astype(np.float32)}


def _jitter_inputs(view: ViewParameters) -> Inputs:
    """Each view's order of the jitter, as up to three affine steps before its hue shift and three after.

    Brightness, contrast and saturation all have the form M x + offset * luma(mean of the view), with a matrix M over
    the channels.
    """
    used, matrix, offset = _affine_steps(view)
    shift = view.factors[:, _HUE]
    inputs: Inputs = {"hued": shift != 0, "shift": shift}
    for step in range(2 * _STEPS):
        inputs |= {f"used{step}": used[:, step], f"matrix{step}": matrix[:, step], f"offset{step}": offset[:, step]}
    return inputs


def _blur_inputs(view: ViewParameters) -> Inputs:
    # The operator checks every sigma, also of views that are not sent through it.
    return {"blurred": view.sigma > 0, "sigma": np.where(view.sigma > 0, view.sigma, 1).astype(np.float32)}


#: The graph's inputs by operation.
INPUTS: dict[str, Callable[[ViewParameters], Inputs]] = {
    "crop": _crop_inputs,
    "jitter": _jitter_inputs,
    "grayscale": lambda view: {"grayscale": view.grayscale},
    "blur": _blur_inputs,
    "solarize": lambda view: {"solarize": view.solarize},
    "flip": lambda view: {"flip": view.flip.astype(np.int32)},
}


def _affine_steps(view: ViewParameters) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    """Which of the six steps each view takes, (B, 6), their matrices (B, 6, 3, 3) and offsets (B, 6)."""
    rows = len(view)
    used = np.zeros((rows, 2 * _STEPS), dtype=bool)
    matrix = np.zeros((rows, 2 * _STEPS, 3, 3), dtype=np.float32)
    offset = np.zeros((rows, 2 * _STEPS), dtype=np.float32)
    after = np.zeros(rows, dtype=np.int64)
    taken = np.zeros((rows, 2), dtype=np.int64)
    identity, gray = np.eye(3, dtype=np.float32), np.tile(np.array(LUMA, dtype=np.float32), (3, 1))
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
            matrix[chosen, step] += (1 - factor)[:, None, None] * gray
        elif part == _CONTRAST:
            offset[chosen, step] = 1 - factor
    return used, matrix, offset


def evaluation_inputs(recipe: Recipe, sizes: NDArray[np.int64]) -> Inputs:
    """The inputs of `build_evaluation` beside ``encoded``: sizes and positions, rounded as in torchvision."""
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
        recipe: Size, normalisation and operations.
        batch: B.
        device: Number of the GPU, or None for the CPU backend.
        threads: Threads of DALI's pool.
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
    mixed = {} if _backend() == "cpu" else {"jpeg_fancy_upsampling": True}  # chroma upsampling as in Pillow
    return {"device": "cpu" if _backend() == "cpu" else "mixed", "output_type": types.RGB, **mixed}


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def _views(recipe: Recipe, decode: Decode, dtype: torch.dtype) -> Any:
    encoded = _source("encoded")
    image = fn.decoders.image(encoded, **_decoder_options()) if decode == "once" else None
    return tuple(_view(recipe, dtype, encoded, image, number) for number in range(2))


def _view(recipe: Recipe, dtype: torch.dtype, encoded: Any, image: Any, number: int) -> Any:
    def take(name: str) -> Any:
        return _source(f"{name}_{number}")

    view = _crop(encoded, image, take, recipe.size)
    mirror = {}
    for operation in operations_of(recipe, "dali"):
        if operation.name == "flip":
            mirror = {"mirror": take("flip")}
        elif operation.name != "crop":
            view = APPLY[operation.name](view, take)
    return _normalise(view, recipe, dtype, **mirror)


def _crop(encoded: Any, image: Any, take: Take, size: int) -> Any:
    resize = {"size": [size] * 2, "interp_type": types.INTERP_LINEAR, "antialias": True}
    start, extent = take("start"), take("extent")
    if image is None:
        window = fn.decoders.image_slice(
            encoded, start, extent, axes=[0, 1], normalized_anchor=False, normalized_shape=False, **_decoder_options()
        )
        return fn.resize(window, **resize)
    return fn.resize(image, roi_start=start, roi_end=start + extent, **resize)


def _jitter(view: Any, take: Take) -> Any:
    for step in range(_STEPS):
        view = _affine_if(view, take(f"used{step}"), take(f"matrix{step}"), take(f"offset{step}"))
    hued, shift = take("hued"), take("shift")
    if hued:
        view = _turn_hue(view, shift)
    for step in range(_STEPS, 2 * _STEPS):
        view = _affine_if(view, take(f"used{step}"), take(f"matrix{step}"), take(f"offset{step}"))
    return view


def _grayscale(view: Any, take: Take) -> Any:
    drawn = take("grayscale")
    if drawn:
        view = fn.coord_transform(view, M=_LUMA_ROWS, dtype=types.UINT8)
    return view


def _affine_if(view: Any, used: Any, matrix: Any, offset: Any) -> Any:
    if used:
        mean = fn.coord_transform(fn.reductions.mean(view, axes=[0, 1], keep_dims=True), M=_LUMA_ROWS)
        turned = fn.coord_transform(view, M=matrix)
        view = fn.cast(turned + _on_device(offset) * mean, dtype=types.UINT8)
    return view


def _turn_hue(view: Any, shift: Any) -> Any:
    """Shift the hue in HSV; the formula is that of `synco_fast.data.augment.ops`."""
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


def _blur(view: Any, take: Take) -> Any:
    drawn, sigma = take("blurred"), take("sigma")
    if drawn:
        window = fn.cast(2.0 * math.ceil(float(BLUR_SIGMAS) * sigma) + 1.0, dtype=types.INT32)
        view = fn.gaussian_blur(view, sigma=sigma, window_size=window)
    return view


def _solarize(view: Any, take: Take) -> Any:
    drawn = take("solarize")
    if drawn:
        view = fn.cast(math.min(view, 255 - view), dtype=types.UINT8)
    return view


#: The graph's operators by operation; the crop needs the encoded image, and the normalisation also flips.
APPLY: dict[str, Callable[[Any, Take], Any]] = {
    "jitter": _jitter,
    "grayscale": _grayscale,
    "blur": _blur,
    "solarize": _solarize,
}


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
