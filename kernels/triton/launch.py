"""Launcher of the loss kernels: allocates the buffers and launches the five steps in order.

Every decision depends on shapes, dtypes and the description of the negatives, never on values on the device. So the
host never waits, a CUDA graph can capture the whole loss, and the same inputs always take the same path.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from synco_fast.kernels.blockwise import Outputs
from synco_fast.kernels.negatives import FAMILIES, Negatives
from synco_fast.kernels.sizes import cdiv, next_power_of_2
from synco_fast.kernels.triton import config
from synco_fast.kernels.triton.config import (
    SAMPLES,
    TILE,
    Form,
    compact_ids,
    form_of,
    generation_of,
    interpreted,
    mix_of,
    overlap_of,
    sampling_of,
    segments_of,
    splits_of,
    step_of,
    table,
    unserved,
)
from synco_fast.kernels.triton.draws import DRAWN
from synco_fast.kernels.triton.full_select import full_select, rows_at_once
from synco_fast.kernels.triton.mix import mix
from synco_fast.kernels.triton.reduce import reduce
from synco_fast.kernels.triton.sample import rank, sample
from synco_fast.kernels.triton.scan import LANES, OVERHANG, scan
from synco_fast.kernels.triton.select import select

__all__ = ["contrast_and_gradient", "unserved"]

#: Most rows in one series of launches, which bounds the buffers that grow with B.
_ROWS = 1024


def contrast_and_gradient(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    negatives: Negatives,
    *,
    temperature: float,
    seed: int,
    step: int | Tensor,
    first_row: int = 0,
    image_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> Outputs:
    """Loss and gradient. The arguments must be checked already, and `unserved` must return None for them.

    Args:
        q, k, queue, negatives, temperature, seed, step, first_row, image_ids, queue_ids: As
            `synco_fast.kernels.synthetic_contrast` describes them.

    Returns:
        `Outputs`, in float32.
    """
    # Promote mixed dtypes first: a copy costs less than products of tiles of two dtypes.
    dtype = torch.promote_types(q.dtype, queue.dtype)
    q, k, queue = (tensor.to(dtype).contiguous() for tensor in (q, k, queue))
    image_ids = None if image_ids is None else image_ids.contiguous()
    queue_ids = None if queue_ids is None else queue_ids.contiguous()
    rows, dim = q.shape
    device = q.device
    outputs = Outputs(
        loss=empty(rows, device=device),
        gradient=empty(rows, dim, device=device),
        positive=empty(rows, device=device),
        hard=empty(rows, device=device),
        synthetic=empty(rows, len(FAMILIES), device=device),
        rank=empty(rows, dtype=torch.int64, device=device),
        queue_rank=empty(rows, dtype=torch.int64, device=device),
        fallback=empty(rows, dtype=torch.int32, device=device),
    )
    # Triton launches on the current device and stream, which may differ from those of q.
    with torch.cuda.device_of(q):
        for begin in range(0, rows, _ROWS):
            some = slice(begin, begin + _ROWS)
            ids = None if image_ids is None else image_ids[some]
            part = outputs if rows <= _ROWS else Outputs(*(output[some] for output in outputs))
            series = _series(q[some], k[some], queue, negatives.hard, temperature, ids, queue_ids, part)
            _launch(series, negatives, seed, step, first_row + begin)
    return outputs


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
    """Memory for a kernel to fill. Tests replace this to fill it with poison values."""
    return torch.empty(shape, dtype=dtype, device=device)


class _Series(NamedTuple):
    """Up to `_ROWS` rows, B of them, and what every step needs of them.

    Attributes:
        q, k: (B, D).
        queue: (K, D).
        images, queue_images, available: From `compact_ids`; None without a mask.
        outputs: Their rows of the outputs.
        rows, dim, length: B, D and K.
        hard: N.
        temperature: T.
        scale: log2(e) / T: the kernels take powers of two.
        wide: D rounded up to a power of two, 64 at least.
        form: Number formats and tile sizes of products with the queue.
        masked: Whether there is a mask.
        overlap: Launch options of `overlap_of`.
        product: Options of the kernels that multiply with the queue, `overlap` included.
        vector: Options of the kernels that hold whole rows of q, `overlap` included.
    """

    q: Tensor
    k: Tensor
    queue: Tensor
    images: Tensor | None
    queue_images: Tensor | None
    available: Tensor | None
    outputs: Outputs
    rows: int
    dim: int
    length: int
    hard: int
    temperature: float
    scale: float
    wide: int
    form: Form
    masked: bool
    overlap: dict[str, Any]
    product: dict[str, Any]
    vector: dict[str, Any]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory on the device of q."""
        return empty(*shape, dtype=dtype, device=self.q.device)


class _Sample(NamedTuple):
    """What step 1 leaves: similarities to a sample of keys, and what was estimated from them.

    Attributes:
        similarities: (B, at least `capacity`) float32.
        threshold: What candidates exceed, (B,).
        shift: m of exp((s - m) / T), (B,).
        halves: q as sums of two float16 numbers, (2, B, D), or None.
        capacity: Most candidates of a row. 0 where nothing is estimated, and step 2 writes no candidates.
    """

    similarities: Tensor
    threshold: Tensor
    shift: Tensor
    halves: Tensor | None
    capacity: int


class _Candidates(NamedTuple):
    """The candidates of Q^N, which step 2 writes and step 3 reads.

    Attributes:
        found: (B, places) int64, a segment for each list of a row and some places behind them; None without candidates.
        counts: (B, lists) int32; None without candidates.
        lists: Number of lists that the keys of a row are split into.
        many: This number rounded up to a power of two.
        segment: Places of a list.
        scratch: Memory for the slow path, (rows at a time, K) int32. It starts after the candidates have been read, so
            both share one buffer.
    """

    found: Tensor | None
    counts: Tensor | None
    lists: int
    many: int
    segment: int
    scratch: Tensor


class _Sums(NamedTuple):
    """What step 2 adds up over the keys of a split, and step 3 over the splits: (splits, B) and (splits, B, D)."""

    sum: Tensor
    rank: Tensor
    total: Tensor


class _Mixtures(NamedTuple):
    """What step 4 leaves: sums of vectors, (B, parts, D), and similarities, (B, M)."""

    total: Tensor
    similarities: Tensor


def _series(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    hard: int,
    temperature: float,
    image_ids: Tensor | None,
    queue_ids: Tensor | None,
    outputs: Outputs,
) -> _Series:
    """The `_Series` of some rows."""
    (rows, dim), generation = q.shape, generation_of(q.device)
    images = queue_images = available = None
    if image_ids is not None:
        assert queue_ids is not None
        images, queue_images, available = compact_ids(image_ids, queue_ids)
    masked, overlap, wide = images is not None, overlap_of(generation), next_power_of_2(max(dim, TILE))
    form = form_of(q.dtype, dim, generation, masked)
    formats = {"PIECE": form.piece, "DOT": form.dot, "PRECISION": form.precision, "THREE": form.three}
    return _Series(
        q,
        k,
        queue,
        images,
        queue_images,
        available,
        outputs,
        rows,
        dim,
        len(queue),
        hard,
        temperature,
        math.log2(math.e) / temperature,
        wide,
        form,
        masked,
        overlap,
        {"D": dim, "MASKED": masked, **formats, **overlap},
        {"D": dim, "DIM": wide, **overlap},
    )


def _launch(series: _Series, negatives: Negatives, seed: int, step: int | Tensor, first_row: int) -> None:
    """Launch all kernels in order."""
    sampled = _sample(series)
    candidates, sums = _scan(series, sampled)
    chosen, sums = _select(series, sampled, candidates, sums)
    families = table(negatives)
    mixtures = _mix(series, families, chosen, sampled.shift, seed, step, first_row)
    _reduce(series, families, chosen, sampled.shift, sums, mixtures)


def _sample(series: _Series) -> _Sample:
    """Step 1. The shift needs the sample even where no threshold is estimated."""
    q, queue, form = series.q, series.queue, series.form
    rows, dim, length = series.rows, series.dim, series.length
    sampling = sampling_of(length, series.hard) if series.hard else None
    stride, wanted, capacity = sampling or (cdiv(length, SAMPLES[0]), 0, 0)
    size = cdiv(length, stride)
    similarities = series.empty(rows, max(size, capacity))
    height, keys = min(form.rows, TILE), min(form.keys, TILE)
    sample[cdiv(rows, height), cdiv(size, keys)](
        q,
        queue,
        series.images,
        series.queue_images,
        similarities,
        rows,
        size,
        stride,
        **series.product,
        ROWS=height,
        KEYS=keys,
        num_warps=8,
    )
    # A program of the scan that holds whole rows of q takes them as halves.
    halves = series.empty(2, rows, dim, dtype=torch.float16) if form.three and form.piece >= dim else None
    threshold, shift = series.empty(rows), series.empty(rows)
    width = next_power_of_2(size)
    rank[(rows,)](
        q,
        series.k,
        similarities,
        threshold,
        series.outputs.positive,
        shift,
        halves,
        size,
        wanted,
        **series.vector,
        WIDTH=width,
        ESTIMATE=capacity > 0,
        DEVICE=not interpreted(),
        num_warps=max(1, min(width // config.RANK_PER_WARP, 8)),
    )
    return _Sample(similarities, threshold, shift, halves, capacity)


def _scan(series: _Series, sampled: _Sample) -> tuple[_Candidates, _Sums]:
    """Step 2."""
    q, queue, form, capacity = series.q, series.queue, series.form, sampled.capacity
    rows, dim, length = series.rows, series.dim, series.length
    splits = splits_of(rows, length, form, q.device)
    tiles = cdiv(cdiv(length, form.keys), splits)
    splits = cdiv(cdiv(length, form.keys), tiles)
    # A mask and a short split together would need more registers than there are on compute capability 8.0.
    short = splits * tiles * form.keys > length
    even = rows % form.rows == 0 and length % form.keys == 0 and not (short and series.masked)
    lists = splits * LANES
    many, segment = segments_of(capacity, lists, tiles * form.keys // LANES) if capacity else (0, 0)
    room = lists * segment + form.keys + OVERHANG if capacity else 0
    at_once = rows_at_once(rows, length) if series.hard else 0
    both = series.empty(max(rows * room, -(-at_once * length // 2)), dtype=torch.int64)
    candidates = _Candidates(
        both[: rows * room].view(rows, room) if capacity else None,
        series.empty(rows, lists, dtype=torch.int32) if capacity else None,
        lists,
        many,
        segment,
        both.view(torch.int32)[: at_once * length].view(at_once, length),
    )
    sums = _Sums(
        series.empty(splits, rows),
        series.empty(splits, rows, dtype=torch.int32),
        series.empty(splits, rows, dim),
    )
    scan[cdiv(rows, form.rows), splits, cdiv(dim, form.chunk)](
        q if sampled.halves is None else sampled.halves,
        queue,
        series.images,
        series.queue_images,
        sampled.threshold,
        series.outputs.positive,
        sampled.shift,
        candidates.found,
        candidates.counts,
        *sums,
        rows,
        length,
        splits,
        tiles,
        room,
        series.scale,
        **series.product,
        ROWS=form.rows,
        KEYS=form.keys,
        CHUNK=form.chunk,
        WEIGHT=form.weight,
        WEIGHT_PRECISION=form.weight_precision,
        WEIGHT_THREE=form.weight_three,
        EVEN=even,
        SHORT=even and short,
        SEGMENT=segment,
        DEVICE=not interpreted(),
        LANES=LANES,
        num_warps=form.warps,
        num_stages=form.stages,
    )
    return candidates, sums


def _select(series: _Series, sampled: _Sample, candidates: _Candidates, sums: _Sums) -> tuple[Tensor, _Sums]:
    """Step 3, which reuses the buffer of the sample's similarities. Returns Q^N, (B, N) int64, and the sums."""
    rows, dim, length, hard = series.rows, series.dim, series.length, series.hard
    capacity, flag, form = sampled.capacity, series.outputs.fallback, series.form
    chosen = series.empty(rows, hard, dtype=torch.int64)
    if capacity:
        assert candidates.found is not None
        added = _Sums(series.empty(1, rows), series.empty(1, rows, dtype=torch.int32), series.empty(1, rows, dim))
        splits = len(sums.sum)
        select[(rows,)](
            series.q,
            series.queue,
            candidates.found,
            candidates.counts,
            sampled.similarities.view(torch.int32),
            sampled.threshold,
            sampled.shift,
            series.available,
            *sums,
            chosen,
            flag,
            *added,
            rows,
            length,
            hard,
            candidates.lists,
            candidates.found.shape[1],
            LISTS=candidates.many,
            SEGMENT=candidates.segment,
            CAPACITY=capacity,
            MASKED=series.masked,
            **series.vector,
            # Of scans in three products one key or two are near the N-th.
            KEYS=max(1, (4096 if form.every else 1024) // series.wide),
            MARGIN=form.margin,
            EVERY=form.every,
            SPLITS=splits,
            STEP=step_of(splits, series.wide),
            DEVICE=not interpreted(),
            num_warps=max(1, min(candidates.many * candidates.segment // config.SELECT_PER_WARP, 32)),
        )
        sums = added
    else:
        flag.zero_()
    if hard:
        full_select(
            series.q,
            series.queue,
            series.images,
            series.queue_images,
            series.available,
            flag if capacity else torch.ones_like(flag),
            candidates.scratch,
            chosen,
            form,
            series.overlap,
            not capacity,
        )
    return chosen, sums


def _mix(
    series: _Series,
    families: tuple[Any, ...],
    chosen: Tensor,
    shift: Tensor,
    seed: int,
    step: int | Tensor,
    first_row: int,
) -> _Mixtures:
    """Step 4; without families, nothing."""
    rows, dim = series.rows, series.dim
    tile = mix_of(series.queue.dtype, series.wide)
    parts = tile.parts if families else 0
    mixtures = _Mixtures(series.empty(rows, parts, dim), series.empty(rows, sum(family[1] for family in families)))
    if parts:
        on_device = isinstance(step, Tensor)
        width = sum(cdiv(family[1], parts) for family in families)
        mix[rows, parts](
            series.q,
            series.queue,
            chosen,
            shift,
            series.available,
            step if on_device else None,
            series.empty(rows, parts, DRAWN, width),
            *mixtures,
            series.length,
            series.hard,
            series.scale,
            seed,
            0 if on_device else step,
            first_row,
            TABLE=families,
            D=dim,
            PIECE=series.wide // tile.pieces,
            PIECES=tile.pieces,
            SLOTS=tile.slots,
            PARTS=parts,
            WIDTH=width,
            STAGES=tile.stages,
            MASKED=series.masked,
            STEP_ON_DEVICE=on_device,
            DEVICE=not interpreted(),
            **series.overlap,
            num_warps=tile.warps,
        )
    return mixtures


def _reduce(
    series: _Series, families: tuple[Any, ...], chosen: Tensor, shift: Tensor, sums: _Sums, mixtures: _Mixtures
) -> None:
    """Step 5."""
    outputs, rows, splits, parts = series.outputs, series.rows, len(sums.sum), mixtures.total.shape[1]
    reduce[(rows,)](
        series.k,
        outputs.positive,
        shift,
        *sums,
        *mixtures,
        chosen,
        outputs.loss,
        outputs.gradient,
        outputs.hard,
        outputs.synthetic,
        outputs.rank,
        outputs.queue_rank,
        rows,
        series.hard,
        series.temperature,
        series.scale,
        COUNTS=tuple((family[-1], family[1]) for family in families),
        COLUMNS=len(FAMILIES),
        WIDTH=next_power_of_2(len(FAMILIES)),
        SPLITS=splits,
        STEP=step_of(max(splits, parts), series.wide),
        PARTS=parts,
        HARD=series.hard > 0,
        BLOCK=256,
        **series.vector,
        # At D = 64, four warps keep 8 bytes on the stack on compute capability 10.0.
        num_warps=config.REDUCE_WARPS if TILE < series.wide <= 256 else 8,
    )
