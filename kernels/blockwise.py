"""Blockwise contrastive loss: no large tensors, any device, any floating dtype. It computes loss and gradient together.

It works in three steps, like the fused kernels:

1. A sample of the queue gives each query a threshold, exceeded by slightly more than N similarities.
2. One pass over the queue, block by block, sums the softmax and its gradient and collects the candidates.
3. The synthetic negatives follow from scalars (`mixing.py`).

The gradient is computed with the loss, since autograd only has to multiply each of its rows by one number.

Temporary memory does not grow with B and K. It holds blocks of a fixed number of bytes (`Budget`), and the N hard
similarities and the candidates of up to 256 rows. On devices other than the CPU, sizes must not depend on data. There
whole rows are sorted instead of candidates, and vectors are formed instead of scalars, a few rows at a time. float64
does not fit into a candidate's packed integer, so it sorts whole rows too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from synco_fast.kernels.mixing import Along, ByScalars, ByVectors, Hard, Mixed
from synco_fast.kernels.negatives import FAMILIES, Negatives
from synco_fast.kernels.reference import mean_of_finite
from synco_fast.kernels.rng import draw
from synco_fast.kernels.topk import Candidates, count_marks, largest, select_whole_rows, stride_and_rank

__all__ = ["Outputs", "contrast_and_gradient"]

#: Queries processed together: enough for an efficient matrix product, few enough to bound the memory per query.
_ROWS = 256


class Budget(NamedTuple):
    """Memory limits of blocks, in bytes.

    Attributes:
        block: A block of similarities.
        vectors: A block of synthetic vectors or of their scalars.
        whole: Whole rows of similarities and their sort.
    """

    block: int
    vectors: int
    whole: int


#: A block of similarities should fit into a core's cache.
CPU = Budget(2 << 20, 8 << 20, 16 << 20)
#: Every PyTorch call costs a few microseconds of host time, so use few large blocks.
GPU = Budget(64 << 20, 256 << 20, 256 << 20)


class Outputs(NamedTuple):
    """Outputs of the operator, in the dtype of computation except for the integer counts.

    Attributes:
        loss: (B,).
        gradient: d loss_i / d q_i, (B, D).
        positive, hard, synthetic, rank, queue_rank, fallback: The fields of `Statistics`.
    """

    loss: Tensor
    gradient: Tensor
    positive: Tensor
    hard: Tensor
    synthetic: Tensor
    rank: Tensor
    queue_rank: Tensor
    fallback: Tensor


@dataclass
class _Sums:
    """A running (online) softmax over R rows. All sums are of exp((similarity - top) / T)."""

    top: Tensor
    rest: Tensor
    total: Tensor
    temperature: float

    def rise(self, similarity: Tensor) -> None:
        """Raise ``top`` to cover more similarities, (R, C), and rescale the sums."""
        top = torch.maximum(self.top, similarity.amax(dim=1, keepdim=True))
        shrink = ((self.top - top) / self.temperature).exp_()
        self.rest *= shrink
        self.total *= shrink
        self.top = top

    def weights(self, similarity: Tensor) -> Tensor:
        """exp((similarity - top) / T); overwrites ``similarity``."""
        # Subtract before dividing: the difference is exact for the largest terms.
        return similarity.sub_(self.top).div_(self.temperature).exp_()


@torch.no_grad()
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
    by_vectors: bool | None = None,
) -> Outputs:
    """Loss and gradient for checked arguments.

    Args:
        q, k, queue, negatives, temperature, seed, step, first_row, image_ids, queue_ids: As
            `synco_fast.kernels.synthetic_contrast` describes them.
        by_vectors: Use the form whose sizes do not depend on the data. None: use it unless q is on the CPU.

    Returns:
        `Outputs`, in the wider of the dtypes of q and the queue, at least float32.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, queue.dtype), torch.float32)
    by_vectors = q.device.type != "cpu" if by_vectors is None else by_vectors
    budget = CPU if q.device.type == "cpu" else GPU
    wide = (block.to(dtype) for block in torch.split(queue, _block(q.shape[1], dtype, budget.block)))
    squared = torch.cat([torch.linalg.vector_norm(block, dim=1) for block in wide]).square_()
    parts = []
    for begin in range(0, len(q), _ROWS):
        rows = slice(begin, begin + _ROWS)
        ids = None if image_ids is None else image_ids[rows]
        some = q[rows].to(dtype), k[rows].to(dtype)
        block = _Rows(*some, queue, squared, negatives, temperature, ids, queue_ids, budget)
        block.scan(by_vectors)
        parts.append(block.mix(seed, step, first_row + begin, by_vectors))
    return Outputs(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _block(width: int, dtype: torch.dtype, budget: int) -> int:
    """The number of rows of ``width`` numbers that fit into the budget, in bytes."""
    return max(1, budget // (width * dtype.itemsize))


class _Rows:
    """The state of up to `_ROWS` queries through the three steps."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        queue: Tensor,
        squared: Tensor,
        negatives: Negatives,
        temperature: float,
        image_ids: Tensor | None,
        queue_ids: Tensor | None,
        budget: Budget = CPU,
    ) -> None:
        self.q, self.k, self.queue, self.squared, self.budget = q, k, queue, squared, budget
        self.negatives, self.image_ids, self.queue_ids = negatives, image_ids, queue_ids
        self.positive = torch.linalg.vecdot(q, k)[:, None]
        self.sums = _Sums(self.positive, torch.zeros_like(self.positive), torch.zeros_like(q), temperature)
        self.rank = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        self.available = torch.full_like(self.rank, len(queue))
        self.fallback = torch.zeros(len(q), dtype=torch.int32, device=q.device)

    def similarities(self, rows: Tensor, begin: int, end: int, stride: int = 1) -> Tensor:
        """q.n of some rows to keys of the queue; -inf for keys of the same image."""
        width = _block(self.q.shape[1], self.q.dtype, self.budget.block)
        q, keys = self.q[rows], self.queue[begin:end:stride]
        # Convert a queue of a narrower dtype block by block.
        parts = [q @ block.to(q.dtype).T for block in (torch.split(keys, width) if keys.dtype != q.dtype else [keys])]
        similarity = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.image_ids is not None and self.queue_ids is not None:
            same = self.image_ids[rows, None] == self.queue_ids[begin:end:stride]
            similarity.masked_fill_(same, -torch.inf)
        return similarity

    def scan(self, by_vectors: bool) -> None:
        """The pass over the queue: softmax sums, ranks and Q^N."""
        hard, length = self.negatives.hard, len(self.queue)
        every = torch.arange(len(self.q), device=self.q.device)
        candidates = None
        packable = not by_vectors and self.q.dtype == torch.float32
        if hard and packable and (sampling := stride_and_rank(length, hard)):
            stride, rank = sampling
            sample = self.similarities(every, 0, length, stride)
            threshold = largest(sample, rank)
            candidates = Candidates(threshold, rank * stride)
        width = _block(len(self.q), self.q.dtype, self.budget.block)
        room = self.q.new_empty(len(self.q) * min(width, length))
        for begin in range(0, length, width):
            keys = self.queue[begin : begin + width].to(self.q.dtype)
            similarity = room[: len(self.q) * len(keys)].view(len(self.q), len(keys))
            torch.mm(self.q, keys.T, out=similarity)
            if self.image_ids is not None and self.queue_ids is not None:
                same = self.image_ids[:, None] == self.queue_ids[begin : begin + width]
                similarity.masked_fill_(same, -torch.inf)
                self.available -= same.sum(dim=1)
            if candidates is not None:
                candidates.add(similarity, begin)
            self.rank += count_marks(similarity > self.positive)
            self.sums.rise(similarity)
            p = self.sums.weights(similarity)
            self.sums.rest += p.sum(dim=1, keepdim=True)
            self.sums.total.addmm_(p, keys)
        if not hard:
            return
        again = every
        if candidates is not None:
            self.hard, self.index, failed = candidates.select(hard, self.available.clamp(max=hard))
            again = failed.nonzero().squeeze(1)
            self.fallback[again] = 1
        if len(again):
            values, index = select_whole_rows(self.similarities, again, length, hard, self.budget.whole)
            if len(again) == len(every):
                self.hard, self.index = values, index
            else:
                self.hard[again], self.index[again] = values, index

    def mix(self, seed: int, step: int | Tensor, first_row: int, by_vectors: bool) -> Outputs:
        """Add the synthetic negatives, and compute the outputs."""
        families = list(self.negatives.active())
        synthetic = torch.full((len(self.q), len(FAMILIES)), torch.nan, dtype=self.q.dtype, device=self.q.device)
        queue_rank = self.rank.clone()
        step_rows = max(1, self.budget.vectors // self._bytes_mixed(by_vectors))
        for begin in range(0, len(self.q) if families else 0, step_rows):
            rows = slice(begin, begin + step_rows)
            self._mix_block(rows, seed, step, first_row + begin, synthetic[rows], by_vectors)
        sums, temperature = self.sums, self.sums.temperature
        below = (self.positive - sums.top) / temperature
        loss = torch.log1p(sums.rest + below.expm1()) - below
        # p_0 - 1 is computed as minus the negatives' probability, which stays accurate when p_0 is close to 1.
        everything = sums.rest + below.exp()
        gradient = (sums.total - sums.rest * self.k) / (everything * temperature)
        return Outputs(
            loss=loss.squeeze(1),
            gradient=gradient,
            positive=self.positive.squeeze(1),
            hard=mean_of_finite(self.hard) if self.negatives.hard else torch.full_like(loss.squeeze(1), torch.nan),
            synthetic=synthetic,
            rank=self.rank,
            queue_rank=queue_rank,
            fallback=self.fallback,
        )

    def _bytes_mixed(self, by_vectors: bool) -> int:
        """Estimated bytes for the synthetic negatives of one row: draws, scalars of each slot, and vectors if any."""
        dim, size = self.q.shape[1], self.q.dtype.itemsize
        slots = vectors = 0
        for family in self.negatives.active():
            count = self.negatives.count_of(family)
            slots += count
            vectors = max(vectors, count if by_vectors or family.noisy else 0)
        # Philox needs a few 64-bit words for each slot, and for every four numbers of noise.
        return 64 * slots + (size + 12) * dim * vectors + size * dim

    def _mix_block(
        self, rows: slice, seed: int, step: int | Tensor, first_row: int, synthetic: Tensor, by_vectors: bool
    ) -> None:
        """Add the synthetic negatives of a few rows to the sums, and their means to ``synthetic``."""
        # If all keys of a query are masked, it mixes with key 0 at weight 0, and 0 times -inf would be NaN.
        similarity = self.hard[rows].masked_fill(self.hard[rows] == -torch.inf, 0)
        hard = Hard(self.q[rows], similarity, self.index[rows], self.queue, self.squared)
        draws = draw(
            self.negatives,
            len(hard.q),
            hard.q.shape[1],
            seed=seed,
            step=step,
            first_row=first_row,
            available=None if self.image_ids is None else self.available[rows],
            device=hard.q.device,
            dtype=hard.q.dtype,
        )
        form = ByVectors if by_vectors else ByScalars
        families = list(self.negatives.active())
        mixed: list[Mixed] = [form(family, self.negatives, hard, draws[family.name]) for family in families]
        for family, one in zip(families, mixed, strict=True):
            if self.image_ids is not None:
                one.similarity.masked_fill_(self.available[rows, None] == 0, -torch.inf)
            synthetic[:, FAMILIES.index(family)] = mean_of_finite(one.similarity)
        similarity = torch.cat([one.similarity for one in mixed], dim=1)
        self.rank[rows] += count_marks(similarity > self.positive[rows])
        sums = _Sums(self.sums.top[rows], self.sums.rest[rows], self.sums.total[rows], self.sums.temperature)
        sums.rise(similarity)
        p = sums.weights(similarity)
        sums.rest += p.sum(dim=1, keepdim=True)
        along: list[Along] = []
        for one, weight in zip(mixed, torch.split(p, [one.similarity.shape[1] for one in mixed], dim=1), strict=True):
            along += one.add_gradient(weight, sums.total)
        if along:
            sums.total += _weighted_keys(self.queue, along, self.budget.vectors)
        # rest and total are views changed in place; top is a new tensor.
        self.sums.top[rows] = sums.top


def _weighted_keys(queue: Tensor, along: list[Along], budget: int) -> Tensor:
    """sum_j weight_j n_j for each row, (R, D). Does not copy the keys if the dtypes agree."""
    index = torch.cat([part.indices for part in along], dim=1)
    weight = torch.cat([part.weight for part in along], dim=1)
    if queue.dtype == weight.dtype:
        return embedding_bag(index, queue, per_sample_weights=weight, mode="sum")
    step = _block(queue.shape[1] * len(index), weight.dtype, budget)
    total = weight.new_zeros(len(index), queue.shape[1])
    for some, weights in zip(torch.split(index, step, dim=1), torch.split(weight, step, dim=1), strict=True):
        keys = queue.index_select(0, some.reshape(-1)).view(*some.shape, -1).to(weight.dtype)
        total += torch.bmm(weights[:, None], keys).squeeze(1)
    return total
