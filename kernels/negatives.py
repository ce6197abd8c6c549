"""Which negatives a query is contrasted with: the declarative table of the synthetic families.

Every family is a case of one general form, normalised to unit length::

    x = a q + b n_i + c n_j + sigma e + eta sign(q),      s = x / |x|

where ``n_i`` and ``n_j`` are picked from the query's hard negatives Q^N, ``e`` is standard normal, and a, b, c
depend linearly on one drawn coefficient t. The table below is that form in numbers; `reference.py` writes the same
families the way the papers do, and a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

__all__ = ["FAMILIES", "Extrapolation", "Family", "Mixture", "Negatives"]

Extrapolation = Literal["released", "paper"]


@dataclass(frozen=True)
class Family:
    """One kind of synthetic negative.

    Attributes:
        name: The field of `Negatives` that holds its count.
        number: SynCo's type number, 1 to 6; it is also the family word of the Philox counter, so it never changes.
        formula: The vector before normalising, in the papers' notation.
        ranged: Whether it draws a coefficient from a range (`Negatives.range_of`).
        paired: Whether it picks a second hard negative n_j.
        noisy: Whether it draws a normal vector e.
    """

    name: str
    number: int
    formula: str
    ranged: bool = False
    paired: bool = False
    noisy: bool = False


#: SynCo (arXiv 2410.02401), types 1 to 6. MoCHi (arXiv 2010.01028) uses `mixed` (s) and `interpolated` (s').
FAMILIES: tuple[Family, ...] = (
    Family("interpolated", 1, "t q + (1 - t) n_i", ranged=True),
    Family("extrapolated", 2, "q + t (n_i - q), or n_i + t (n_i - q)", ranged=True),
    Family("mixed", 3, "t n_i + (1 - t) n_j", ranged=True, paired=True),
    Family("noisy", 4, "n_i + sigma e", noisy=True),
    Family("perturbed", 5, "n_i + delta q"),
    Family("adversarial", 6, "n_i + eta sign(q)"),
)


class Affine(NamedTuple):
    """A number that depends on the drawn coefficient t as ``constant + slope * t``."""

    constant: float = 0.0
    slope: float = 0.0


_NOTHING = Affine()


@dataclass(frozen=True)
class Mixture:
    """A family in the general form: what multiplies q, n_i, n_j, e and sign(q)."""

    q: Affine = _NOTHING
    first: Affine = _NOTHING
    second: Affine = _NOTHING
    noise: float = 0.0
    sign: float = 0.0


@dataclass(frozen=True)
class Negatives:
    """How many negatives of which kind a query meets beside the queue. Frozen and hashable.

    Use the constructors `moco`, `mochi` and `synco`; `replace(negatives, mixed=0)` changes one field.

    Attributes:
        hard: N, the size of Q^N: how many of the most similar queue keys the synthetic ones are made from.
        interpolated, extrapolated, mixed, noisy, perturbed, adversarial: Count of each family per query, 0 for none.
        extrapolation: The formula of type 2: ``"released"`` is q + t (n - q), from which the published checkpoints
            come; ``"paper"`` is n + t (n - q).
        interpolated_range, extrapolated_range, mixed_range: Half-open range [low, high) of the coefficient t.
        sigma, delta, eta: Strength of types 4, 5 and 6.

    Raises:
        TypeError: A count is not a whole number.
        ValueError: A count is negative, a synthetic count is asked for with ``hard=0``, a range is empty or not
            finite, a strength is not finite, or the formula's name is unknown.
    """

    hard: int = 0
    interpolated: int = 0
    extrapolated: int = 0
    mixed: int = 0
    noisy: int = 0
    perturbed: int = 0
    adversarial: int = 0
    extrapolation: Extrapolation = "released"
    interpolated_range: tuple[float, float] = (0.0, 0.5)
    extrapolated_range: tuple[float, float] = (1.0, 1.5)
    mixed_range: tuple[float, float] = (0.0, 1.0)
    sigma: float = 0.01
    delta: float = 0.01
    eta: float = 0.01

    def __post_init__(self) -> None:
        for name in ("hard", *(family.name for family in FAMILIES)):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name}: found {count!r}, expected a whole number from 0 up")
            if count < 0:
                raise ValueError(f"{name}: found {count}, expected a whole number from 0 up")
        if self.synthetic and not self.hard:
            raise ValueError(f"hard: found 0, expected 1 or more where {self.synthetic} synthetic negatives are made")
        if self.extrapolation not in ("released", "paper"):
            raise ValueError(f"extrapolation: found {self.extrapolation!r}, expected 'released' or 'paper'")
        for family in FAMILIES:
            if family.ranged:
                low, high = self.range_of(family)
                if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                    raise ValueError(f"{family.name}_range: found ({low}, {high}), expected finite low <= high")
        for name in ("sigma", "delta", "eta"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a finite number")

    @classmethod
    def moco(cls) -> Negatives:
        """MoCo v2: the queue alone."""
        return cls()

    @classmethod
    def mochi(cls, hard: int = 1024, s: int = 512, s_prime: int = 256) -> Negatives:
        """MoCHi (N, s, s'): s mixtures of two hard negatives, s' mixtures of a hard negative and the query."""
        return cls(hard=hard, mixed=s, interpolated=s_prime)

    @classmethod
    def synco(
        cls,
        hard: int = 1024,
        *,
        interpolated: int = 256,
        extrapolated: int = 256,
        mixed: int = 256,
        noisy: int = 64,
        perturbed: int = 64,
        adversarial: int = 64,
        extrapolation: Extrapolation = "released",
    ) -> Negatives:
        """SynCo: all six types with the published counts, 960 in all."""
        return cls(hard, interpolated, extrapolated, mixed, noisy, perturbed, adversarial, extrapolation)

    @property
    def synthetic(self) -> int:
        """M, the number of synthetic negatives per query over all families."""
        return sum(self.count_of(family) for family in FAMILIES)

    def without_synthetic(self) -> Negatives:
        """The same description with every family's count 0 (warm-up and cool-down); N stays, for its statistic."""
        counts: dict[str, Any] = {family.name: 0 for family in FAMILIES}
        return replace(self, **counts)

    def count_of(self, family: Family) -> int:
        """How many negatives of this family each query meets."""
        count: int = getattr(self, family.name)
        return count

    def active(self) -> Iterator[Family]:
        """The families whose count is not 0, in the order of the table."""
        return (family for family in FAMILIES if self.count_of(family))

    def range_of(self, family: Family) -> tuple[float, float]:
        """The half-open range of the family's coefficient t; only for a family with ``ranged``."""
        low, high = getattr(self, f"{family.name}_range")
        return float(low), float(high)

    def mixture(self, family: Family) -> Mixture:
        """The family's place in the general form."""
        released = self.extrapolation == "released"
        return {
            "interpolated": Mixture(q=Affine(0, 1), first=Affine(1, -1)),
            "extrapolated": Mixture(q=Affine(1, -1), first=Affine(0, 1))
            if released
            else Mixture(q=Affine(0, -1), first=Affine(1, 1)),
            "mixed": Mixture(first=Affine(0, 1), second=Affine(1, -1)),
            "noisy": Mixture(first=Affine(1, 0), noise=self.sigma),
            "perturbed": Mixture(first=Affine(1, 0), q=Affine(self.delta, 0)),
            "adversarial": Mixture(first=Affine(1, 0), sign=self.eta),
        }[family.name]
