"""Launcher of the loss kernels: allocates the buffers and launches the five steps in order.

Every decision depends on shapes, dtypes and the description of the negatives, never on values on the device. So the
host never waits, a CUDA graph can capture the whole loss, and the same inputs always take the same path.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math

import torch
from torch import Tensor

from synco_fast.kernels.blockwise import Outputs
from synco_fast.kernels.negatives import FAMILIES, Negatives
from synco_fast.kernels.sizes import cdiv, next_power_of_2
from synco_fast.kernels.triton import config
from synco_fast.kernels.triton.config import (
    SAMPLES,
    TILE,
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
            _launch(
                q[some], k[some], queue, negatives, temperature, seed, step, first_row + begin, ids, queue_ids, part
            )
    return outputs


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
    """Memory for a kernel to fill. Tests replace this to fill it with poison values."""
    return torch.empty(shape, dtype=dtype, device=device)


def _launch(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    negatives: Negatives,
    temperature: float,
    seed: int,
    step: int | Tensor,
    first_row: int,
    image_ids: Tensor | None,
    queue_ids: Tensor | None,
    outputs: Outputs,
) -> None:
    """Launch all kernels in order, for up to `_ROWS` rows."""
    (rows, dim), length, hard, device = q.shape, len(queue), negatives.hard, q.device
    images = queue_images = available = None
    if masked := image_ids is not None:
        assert queue_ids is not None
        images, queue_images, available = compact_ids(image_ids, queue_ids)
    wide = next_power_of_2(max(dim, TILE))
    scale = math.log2(math.e) / temperature
    generation = generation_of(device)
    form, overlap = form_of(q.dtype, dim, generation, masked), overlap_of(generation)
    common = {"D": dim, "PIECE": form.piece, "DOT": form.dot, "PRECISION": form.precision, "MASKED": masked}
    common |= {"THREE": form.three, **overlap}

    # Step 1: sample. The shift needs the sample even where no threshold is estimated.
    sampling = sampling_of(length, hard) if hard else None
    stride, wanted, capacity = sampling or (cdiv(length, SAMPLES[0]), 0, 0)
    size = cdiv(length, stride)
    similarities = empty(rows, max(size, capacity), device=device)
    threshold, shift = empty(rows, device=device), empty(rows, device=device)
    height, keys = min(form.rows, TILE), min(form.keys, TILE)
    grid = (cdiv(rows, height), cdiv(size, keys))
    sample[grid](
        q,
        queue,
        images,
        queue_images,
        similarities,
        rows,
        size,
        stride,
        **common,
        ROWS=height,
        KEYS=keys,
        num_warps=8,
    )
    width = next_power_of_2(size)
    dims = {"D": dim, "DIM": wide}
    # A program of the scan that holds whole rows of q takes them as halves.
    halves = None
    if form.three and form.piece >= dim:
        halves = empty(2, rows, dim, dtype=torch.float16, device=device)
    rank[(rows,)](
        q,
        k,
        similarities,
        threshold,
        outputs.positive,
        shift,
        halves,
        size,
        wanted,
        **dims,
        WIDTH=width,
        ESTIMATE=capacity > 0,
        DEVICE=not interpreted(),
        **overlap,
        num_warps=max(1, min(width // config.RANK_PER_WARP, 8)),
    )

    # Step 2: scan.
    splits = splits_of(rows, length, form, device)
    tiles = cdiv(cdiv(length, form.keys), splits)
    splits = cdiv(cdiv(length, form.keys), tiles)
    # A mask and a short split together would need more registers than there are on compute capability 8.0.
    short = splits * tiles * form.keys > length
    even = rows % form.rows == 0 and length % form.keys == 0 and not (short and masked)
    lists = splits * LANES
    many, segment = segments_of(capacity, lists, tiles * form.keys // LANES) if capacity else (0, 0)
    room = lists * segment + form.keys + OVERHANG if capacity else 0
    # The slow path starts after the candidates have been read, so both share one buffer.
    at_once = rows_at_once(rows, length) if hard else 0
    both = empty(max(rows * room, -(-at_once * length // 2)), dtype=torch.int64, device=device)
    found = both[: rows * room].view(rows, room) if capacity else None
    count = empty(rows, lists, dtype=torch.int32, device=device) if capacity else None
    scan_sum = empty(splits, rows, device=device)
    scan_total = empty(splits, rows, dim, device=device)
    scan_rank = empty(splits, rows, dtype=torch.int32, device=device)
    scan[(cdiv(rows, form.rows), splits, cdiv(dim, form.chunk))](
        q if halves is None else halves,
        queue,
        images,
        queue_images,
        threshold,
        outputs.positive,
        shift,
        found,
        count,
        scan_sum,
        scan_total,
        scan_rank,
        rows,
        length,
        splits,
        tiles,
        room,
        scale,
        **common,
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

    # Step 3: select. It reuses the buffer of the sample's similarities.
    chosen = empty(rows, hard, dtype=torch.int64, device=device)
    if not capacity:
        outputs.fallback.zero_()
    if hard:
        if capacity:
            flag = outputs.fallback
            sums = (
                empty(1, rows, device=device),
                empty(1, rows, dtype=torch.int32, device=device),
                empty(1, rows, dim, device=device),
            )
            select[(rows,)](
                q,
                queue,
                found,
                count,
                similarities.view(torch.int32),
                threshold,
                shift,
                available,
                scan_sum,
                scan_rank,
                scan_total,
                chosen,
                flag,
                *sums,
                rows,
                length,
                hard,
                lists,
                room,
                LISTS=many,
                SEGMENT=segment,
                CAPACITY=capacity,
                MASKED=masked,
                **dims,
                # Of scans in three products one key or two are near the N-th.
                KEYS=max(1, (4096 if form.every else 1024) // wide),
                MARGIN=form.margin,
                EVERY=form.every,
                SPLITS=splits,
                STEP=step_of(splits, wide),
                DEVICE=not interpreted(),
                **overlap,
                num_warps=max(1, min(many * segment // config.SELECT_PER_WARP, 32)),
            )
            (scan_sum, scan_rank, scan_total), splits = sums, 1
        else:
            flag = torch.ones(rows, dtype=torch.int32, device=device)
        scratch = both.view(torch.int32)[: at_once * length].view(at_once, length)
        full_select(q, queue, images, queue_images, available, flag, scratch, chosen, form, overlap, not capacity)

    # Step 4: mix.
    families = table(negatives)
    tile = mix_of(queue.dtype, wide)
    parts = tile.parts if families else 0
    mix_total = empty(rows, parts, dim, device=device)
    similarities = empty(rows, negatives.synthetic, device=device)
    if parts:
        on_device = isinstance(step, Tensor)
        width = sum(cdiv(int(family[1]), parts) for family in families)
        mix[(rows, parts)](
            q,
            queue,
            chosen,
            shift,
            available,
            step if on_device else None,
            empty(rows, parts, DRAWN, width, device=device),
            mix_total,
            similarities,
            length,
            hard,
            scale,
            seed,
            0 if on_device else step,
            first_row,
            TABLE=families,
            D=dim,
            PIECE=wide // tile.pieces,
            PIECES=tile.pieces,
            SLOTS=tile.slots,
            PARTS=parts,
            WIDTH=width,
            STAGES=tile.stages,
            MASKED=masked,
            STEP_ON_DEVICE=on_device,
            DEVICE=not interpreted(),
            **overlap,
            num_warps=tile.warps,
        )

    # Step 5: reduce.
    reduce[(rows,)](
        k,
        outputs.positive,
        shift,
        scan_sum,
        scan_total,
        scan_rank,
        mix_total,
        similarities,
        chosen,
        outputs.loss,
        outputs.gradient,
        outputs.hard,
        outputs.synthetic,
        outputs.rank,
        outputs.queue_rank,
        rows,
        hard,
        temperature,
        scale,
        COUNTS=tuple((family[-1], family[1]) for family in families),
        COLUMNS=len(FAMILIES),
        WIDTH=next_power_of_2(len(FAMILIES)),
        **dims,
        SPLITS=splits,
        STEP=step_of(max(splits, parts), wide),
        PARTS=parts,
        HARD=hard > 0,
        BLOCK=256,
        **overlap,
        # At D = 64, four warps keep 8 bytes on the stack on compute capability 10.0.
        num_warps=config.REDUCE_WARPS if TILE < wide <= 256 else 8,
    )
