"""Synthetic negatives from scalars: similarity and gradient of every family without forming its vectors.

In the general form x = a q + b n_i + c n_j + sigma e + eta sign(q), |x|^2 and q.x are sums of coefficients times inner
products of at most five vectors. Most of these are already known: q.n_i is a similarity of the queue. Only n_i.n_j,
n_i.sign(q) and the products with e have to be computed.

If the terms of |x|^2 cancel, the sum of products loses digits that the sum of vectors keeps; near x = 0 so does the
gradient. Such slots are computed from their vectors. They are very rare on real features.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from synco_fast.kernels.negatives import Affine, Family, Negatives
from synco_fast.kernels.rng import Draw

__all__ = ["Along", "ByScalars", "ByVectors", "Hard", "Mixed"]

#: |x|^2 counts as cancelled below this fraction of the sum of its squared terms.
_CANCELLED = 0.1

#: Smallest divisor, as in `torch.nn.functional.normalize`.
_SMALLEST = 1e-12

#: Bytes of keys gathered at a time for inner products. They should fit into a core's cache.
_GATHERED = 1 << 20

#: Cancelled slots computed from their vectors at a time.
_AT_ONCE = 4096


class Hard(NamedTuple):
    """R queries and their hard negatives.

    Attributes:
        q: (R, D).
        similarity: q.n over Q^N, (R, N).
        indices: Queue indices of Q^N, (R, N) int64.
        queue: (K, D), in its own dtype.
        squared: |n|^2 of every queue key, (K,).
    """

    q: Tensor
    similarity: Tensor
    indices: Tensor
    queue: Tensor
    squared: Tensor

    def vectors(self, index: Tensor) -> Tensor:
        """Queue keys by queue index, (*index.shape, D), in the dtype of q."""
        return self.queue.index_select(0, index.reshape(-1)).view(*index.shape, -1).to(self.q.dtype)


class Along(NamedTuple):
    """A part of the gradient that is a weighted sum of queue keys: their indices and weights, (R, m) each."""

    indices: Tensor
    weight: Tensor


class Mixed(Protocol):
    """The negatives of one family for R queries, n for each."""

    #: q.s, (R, n).
    similarity: Tensor

    def add_gradient(self, weight: Tensor, total: Tensor) -> list[Along]:
        """Add sum_s weight_s s to ``total`` (R, D) in place, except for the returned parts; weight is (R, n)."""


class ByVectors:
    """Every slot from its vector, (R, n, D). No size depends on the data, so it never waits for a device."""

    def __init__(self, family: Family, negatives: Negatives, hard: Hard, drawn: Draw) -> None:
        """Compute vectors and similarities; the arguments are those of `ByScalars`."""
        first = hard.vectors(hard.indices.gather(1, drawn.first))
        second = None if drawn.second is None else hard.vectors(hard.indices.gather(1, drawn.second))
        t = None if drawn.coefficient is None else drawn.coefficient[..., None]
        x = family.vector(hard.q[:, None], first, second, t, drawn.noise, negatives)
        self._vectors = normalize(x, dim=-1)
        self.similarity = torch.einsum("rd,rnd->rn", hard.q, self._vectors)

    def add_gradient(self, weight: Tensor, total: Tensor) -> list[Along]:
        """See `Mixed`."""
        total += torch.bmm(weight[:, None], self._vectors).squeeze(1)
        return []


class ByScalars:
    """Every slot from scalars, except for slots that cancel. CPU only: which slots cancel depends on the data."""

    def __init__(self, family: Family, negatives: Negatives, hard: Hard, drawn: Draw) -> None:
        """Compute the similarities.

        Args:
            family: The family.
            negatives: The description that ``drawn`` was made for.
            hard: The queries and their hard negatives.
            drawn: The family's draws for these rows.
        """
        self._family, self._negatives, self._hard, self._drawn = family, negatives, hard, drawn
        self._index = {"first": hard.indices.gather(1, drawn.first)}
        if drawn.second is not None:
            self._index["second"] = hard.indices.gather(1, drawn.second)
        mixture = negatives.mixture(family)
        self._terms: dict[str, Tensor | float] = {
            name: _affine(getattr(mixture, name), drawn.coefficient)
            for name in ("q", "first", "second")
            if getattr(mixture, name) != Affine()
        }
        self._terms |= {name: getattr(mixture, name) for name in ("noise", "sign") if getattr(mixture, name)}

        inner = _inner_products(hard, drawn, self._index, list(self._terms))
        zero = torch.zeros_like(drawn.first, dtype=hard.q.dtype)
        own = sum((c * c * inner[name, name] for name, c in self._terms.items()), zero)
        squared = own.clone()
        for (one, c), (other, d) in combinations(self._terms.items(), 2):
            squared += 2 * c * d * inner[one, other]
        product = sum((c * inner["q", name] for name, c in self._terms.items()), zero)
        self._inverse = squared.clamp(min=0).sqrt().clamp(min=_SMALLEST).reciprocal()
        self.similarity = product * self._inverse
        self._cancelled = (squared < _CANCELLED * own).nonzero()
        for rows, slots in self._blocks():
            self.similarity[rows, slots] = torch.linalg.vecdot(hard.q[rows], self._vectors(rows, slots))

    def add_gradient(self, weight: Tensor, total: Tensor) -> list[Along]:
        """See `Mixed`."""
        scaled = weight * self._inverse
        for rows, slots in self._blocks():
            scaled[rows, slots] = 0
            total.index_add_(0, rows, self._vectors(rows, slots) * weight[rows, slots][:, None])
        along = []
        for name, c in self._terms.items():
            part = scaled * c
            if name in self._index:
                along.append(Along(self._index[name], part))
            elif name == "noise":
                assert self._drawn.noise is not None
                total += torch.bmm(part[:, None], self._drawn.noise).squeeze(1)
            else:
                total += part.sum(dim=1, keepdim=True) * (self._hard.q if name == "q" else self._hard.q.sign())
        return along

    def _blocks(self) -> list[tuple[Tensor, Tensor]]:
        """Row and slot numbers of the cancelled slots, in blocks of bounded size."""
        return [(block[:, 0], block[:, 1]) for block in torch.split(self._cancelled, _AT_ONCE) if len(block)]

    def _vectors(self, rows: Tensor, slots: Tensor) -> Tensor:
        """The unit vectors of single slots, (len(rows), D)."""
        drawn = self._drawn
        first = self._hard.vectors(self._index["first"][rows, slots])
        second = self._hard.vectors(self._index["second"][rows, slots]) if "second" in self._index else None
        t = None if drawn.coefficient is None else drawn.coefficient[rows, slots, None]
        noise = None if drawn.noise is None else drawn.noise[rows, slots]
        x = self._family.vector(self._hard.q[rows], first, second, t, noise, self._negatives)
        return normalize(x, dim=-1)


def _affine(affine: Affine, t: Tensor | None) -> Tensor | float:
    if t is None or not affine.slope:
        return affine.constant
    return affine.constant + affine.slope * t


def _inner_products(
    hard: Hard, drawn: Draw, index: dict[str, Tensor], names: list[str]
) -> dict[tuple[str, str], Tensor]:
    """The inner products of q with each named vector, and of each pair of these, broadcastable to (R, n).

    Args:
        hard: The queries and their hard negatives.
        drawn: The draws.
        index: Queue indices of ``first`` and ``second``, (R, n).
        names: The vectors that the family uses of q, first, second, noise, sign, in this order.
    """
    makers: dict[str, Callable[[slice], Tensor]] = {
        "q": lambda rows: hard.q[rows, None],
        "sign": lambda rows: hard.q[rows, None].sign(),
        "noise": lambda rows: cast(Tensor, drawn.noise)[rows],
        "first": lambda rows: hard.vectors(index["first"][rows]),
        "second": lambda rows: hard.vectors(index["second"][rows]),
    }

    def product(one: str, other: str) -> Tensor:
        if one == "q" and other in index:
            return hard.similarity.gather(1, drawn.first if other == "first" else cast(Tensor, drawn.second))
        if one == other and one in index:
            return hard.squared[index[one]]
        if one == other == "noise":
            length: Tensor = torch.linalg.vector_norm(cast(Tensor, drawn.noise), dim=-1)
            return length.square_()
        if index.keys() & {one, other}:
            # Gather the keys of a few rows at a time.
            step = max(1, _GATHERED // (drawn.first.shape[1] * hard.q.shape[1] * hard.q.dtype.itemsize))
            slices = [slice(begin, begin + step) for begin in range(0, len(hard.q), step)]
            return torch.cat([_dot(makers[one](rows), makers[other](rows)) for rows in slices])
        return _dot(makers[one](slice(None)), makers[other](slice(None)))

    pairs = {("q", name) for name in names} | {(name, name) for name in names} | set(combinations(names, 2))
    return {pair: product(*pair) for pair in sorted(pairs)}


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Inner products along the last dimension, of (R, n, D) or (R, 1, D) with either of them."""
    few, many = (one, other) if one.shape[1] < other.shape[1] else (other, one)
    if few.shape[1] == 1:
        return torch.bmm(many, few.transpose(1, 2)).squeeze(2)
    found: Tensor = torch.linalg.vecdot(one, other)
    return found
