"""Tuning variants of the launches: tiles of the scan, programs of the mix, blocks of rows on streams of their own.

All must give equal results.

``python -m synco_fast.bench.variants`` prints a line of JSON for each. The chosen values are tables and constants of
`synco_fast.kernels.triton`. A variant changes one of them, and a measurement may justify making the change permanent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from synco_fast.bench.launches import add_shape, shape_of, time_all, time_launches
from synco_fast.bench.loss import TEMPERATURE, Shape, bare, failure
from synco_fast.bench.subjects import DTYPES
from synco_fast.kernels.blockwise import Outputs
from synco_fast.kernels.triton import contrast_and_gradient
from synco_fast.kernels.validation import exact_inputs

__all__ = ["PARTS", "Variant", "applied", "in_parts", "variants_of"]


#: The scan's tile: rows, keys, columns per step, warps and stages.
_TILES = (
    (64, 64, 128, 4, 3),
    (64, 64, 128, 4, 4),
    (64, 128, 128, 4, 2),
    (128, 64, 128, 8, 2),
    (128, 64, 128, 8, 3),
    (128, 64, 128, 8, 4),
    (128, 128, 128, 8, 3),
)


#: The mix: programs for each row, pieces of a vector, warps of a program, and stages.
_MIXES = (
    (4, 4, 1, 3),
    (4, 4, 1, 2),
    (4, 4, 1, 1),
    (8, 4, 1, 1),
    (8, 2, 1, 1),
    (2, 4, 4, 1),
    (2, 2, 4, 1),
    (1, 2, 8, 1),
)


#: Launch, constant, its meaning and its values.
_WARPS = (
    ("reduce", "REDUCE_WARPS", "warps", (2, 4, 8, 16)),
    ("rank", "RANK_PER_WARP", "keys a warp", (256, 512, 1024, 2048)),
    ("select", "SELECT_PER_WARP", "places a warp", (512, 1024, 2048, 4096)),
)


#: Blocks of rows that run side by side.
PARTS = (2, 4)


@dataclass(frozen=True)
class Variant:
    """A changed value in the launch configuration.

    Attributes:
        name: Name of the variant.
        launch: The launch that it changes; None for all.
        holder: Module or dictionary that holds the value.
        key: Attribute or key.
        value: The changed value.
    """

    name: str
    launch: str | None
    holder: Any
    key: Any
    value: Any


@contextlib.contextmanager
def applied(variant: Variant | None) -> Iterator[None]:
    """Context in which the launcher uses the variant."""
    if variant is None:
        yield
        return
    values = variant.holder if isinstance(variant.holder, dict) else vars(variant.holder)
    absent = object()
    before = values.get(variant.key, absent)
    values[variant.key] = variant.value
    try:
        yield
    finally:
        if before is absent:
            del values[variant.key]
        else:
            values[variant.key] = before


def variants_of(shape: Shape, device: torch.device) -> list[Variant]:
    """The variants for a shape."""
    from synco_fast.kernels.triton import config
    from synco_fast.kernels.triton.overlap import EARLY, LATE

    found = [
        Variant(f"{launch} with {value} {what}", launch, config, key, value)
        for launch, key, what, values in _WARPS
        for value in values
        if value != getattr(config, key)
    ]
    generation, dtype = config.generation_of(device), shape.torch_dtype
    text = "mix in {} parts, {} pieces, {} warps, {} stages"
    found += [
        Variant(text.format(*mix), "mix", config.MIXES, dtype, mix) for mix in _MIXES if mix != config.MIXES[dtype]
    ]
    name, narrow = config.tile_key(dtype, shape.dim, generation, masked=False)
    key = (generation, name, narrow)
    present = config.TILES_OF.get(key, config.TILES[name, narrow])
    for tile in _TILES:
        rows, keys, piece, warps, stages = tile
        other = config.Tile(rows, keys, present.chunk, min(present.piece, piece), warps, stages)
        if other != present and dtype != torch.float32:
            name = f"scan {other.rows} x {other.keys}, {other.warps} warps, {other.stages} stages"
            found.append(Variant(name, "scan", config.TILES_OF, key, other))
    if generation >= 9:
        found += [
            Variant(f"programmatic dependent launch {name}", None, config, "OVERLAP", value)
            for name, value in (("off", 0), ("early", EARLY.value), ("late", LATE.value))
            if value != config.OVERLAP
        ]
    return found


def in_parts(shape: Shape, device: torch.device, parts: int) -> Callable[[], list[Outputs]]:
    """The operator on blocks of rows, each on a stream of its own.

    The device may run the scan of one block beside the selection and the mixtures of another. On a CPU the blocks
    follow one another.

    Args:
        shape: The shape of the whole.
        device: The device.
        parts: Number of blocks.
    """
    inputs = exact_inputs(shape.rows, shape.length, shape.dim, shape.torch_dtype).to(device=device)
    # On the device, as `bare` has it, so that each variant is compiled once.
    step = torch.tensor(7, device=device)
    settings: dict[str, Any] = {"temperature": TEMPERATURE, "seed": 3, "step": step}
    blocks = list(torch.arange(shape.rows).tensor_split(parts))
    streams = [torch.cuda.Stream(device) if device.type == "cuda" and parts > 1 else None for _ in blocks]

    def run() -> list[Outputs]:
        here = torch.cuda.current_stream(device) if device.type == "cuda" else None
        found = []
        for block, stream in zip(blocks, streams, strict=True):
            some = slice(int(block[0]), int(block[-1]) + 1)
            if stream is not None and here is not None:
                stream.wait_stream(here)
            with torch.cuda.stream(stream):
                found.append(
                    contrast_and_gradient(
                        inputs.q[some], inputs.k[some], inputs.queue, shape.negatives, **settings, first_row=some.start
                    )
                )
        for stream in streams:
            if stream is not None and here is not None:
                here.wait_stream(stream)
        return found

    return run


def _outputs(shape: Shape, device: torch.device, parts: int = 1) -> tuple[torch.Tensor, ...]:
    found = in_parts(shape, device, parts)()
    return tuple(torch.cat(blocks) for blocks in zip(*found, strict=True))


def _agree(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Whether two results are equal up to the order of additions."""
    pairs = zip(found, expected, strict=True)
    return all(
        torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-4, equal_nan=True) for one, other in pairs
    )


def main() -> None:
    """Check and time every variant at one shape."""
    parser = argparse.ArgumentParser(description="Time variants of the loss kernels' launches.")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--most", type=int, help="most variants to try (default: all)")
    add_shape(parser)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = shape_of(options, options.dtype)
    expected = _outputs(shape, device)

    def report(name: str, launch: str | None, run: Callable[[], object], *, parts: int = 1, each: bool = True) -> None:
        begun = time.monotonic()
        line: dict[str, Any] = {"variant": name, "dtype": shape.dtype}
        try:
            line["agrees"] = _agree(_outputs(shape, device, parts), expected)
            line |= time_all(run, device, repeats=options.repeats)
            if each and device.type == "cuda":
                timed = time_launches(run, device, repeats=options.repeats, only=launch)
                line["launches"] = {one["launch"]: one["microseconds"] for one in timed}
        except Exception as error:
            # A tile that does not fit on the device must not stop the others.
            line |= failure(error)
        line["wall_s"] = round(time.monotonic() - begun, 1)
        print(json.dumps(line), flush=True)

    report("as it is", None, bare("triton", shape, device))
    for parts in PARTS if shape.rows >= max(PARTS) else ():
        run = in_parts(shape, device, parts)
        report(f"rows in {parts} parts, each on its stream", None, run, parts=parts, each=False)
    for variant in variants_of(shape, device)[: options.most]:
        with applied(variant):
            report(variant.name, variant.launch, bare("triton", shape, device), each=variant.launch is not None)


if __name__ == "__main__":
    main()
