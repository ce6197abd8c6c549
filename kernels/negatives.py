"""The negatives of a query, and the table of the families of synthetic negatives.

Every family is a case of one general form, normalised to unit length::

    x = a q + b n_i + c n_j + sigma e + eta sign(q),      s = x / |x|

where ``n_i`` and ``n_j`` are picked from the query's hard negatives Q^N, ``e`` is standard normal, and a, b, c
depend linearly on one drawn coefficient t. A row of the table states its family twice: as the papers write it, for the
reference, and as coefficients of the general form, for the fast backends. A test checks that the two agree.

A new family is a new row. The fields of `Negatives`, the operator's schema, the draws, the statistics and the widths of
the kernels follow from the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, make_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

__all__ = ["FAMILIES", "Affine", "Extrapolation", "Family", "Mixture", "Negatives"]

Extrapolation = Literal["released", "paper"]


class Affine(NamedTuple):
    """A linear function of the drawn coefficient t: ``constant + slope * t``."""

    constant: float = 0.0
    slope: float = 0.0


_NOTHING = Affine()


@dataclass(frozen=True)
class Mixture:
    """A family in the general form: the factors of q, n_i, n_j, e and sign(q)."""

    q: Affine = _NOTHING
    first: Affine = _NOTHING
    second: Affine = _NOTHING
    noise: float = 0.0
    sign: float = 0.0


@dataclass(frozen=True)
class Family:
    """One family of synthetic negatives.

    Attributes:
        name: The field of `Negatives` that holds its count; also its name in configurations and metrics.
        number: SynCo's type number, 1 to 6; for a further family, any other number below 2**32. It is a word of the
            Philox counter, so it must never change.
        title: One-line description.
        formula: The vector before normalisation, in the papers' notation.
        vector: The formula on tensors, called with (q, n_i, n_j, t, e, negatives): q (B, 1, D), n_i, n_j and e
            (B, n, D), t (B, n, 1). Arguments that the family does not use are None.
        mixture: The family in the general form, called with the `Negatives`.
        published: Its count in SynCo; 0 for a family that SynCo does not have.
        range: Default half-open range [low, high) of the coefficient t, also a field ``NAME_range`` of `Negatives`;
            None for a family without t.
        strength: Name and default of its strength, also a field of `Negatives`; None for a family without one.
        paired: Whether it picks a second hard negative n_j.
        noisy: Whether it draws a normal vector e.
    """

    name: str
    number: int
    title: str
    formula: str
    vector: Callable[..., Any]
    mixture: Callable[[Negatives], Mixture]
    published: int = 0
    range: tuple[float, float] | None = None
    strength: tuple[str, float] | None = None
    paired: bool = False
    noisy: bool = False

    @property
    def ranged(self) -> bool:
        """Whether it draws a coefficient t from a range (`Negatives.range_of`)."""
        return self.range is not None


def _extrapolated(q: Any, n_i: Any, n_j: Any, t: Any, e: Any, negatives: Negatives) -> Any:
    return (q if negatives.extrapolation == "released" else n_i) + t * (n_i - q)


def _extrapolated_mixture(negatives: Negatives) -> Mixture:
    if negatives.extrapolation == "released":
        return Mixture(q=Affine(1, -1), first=Affine(0, 1))
    return Mixture(q=Affine(0, -1), first=Affine(1, 1))


#: SynCo (arXiv 2410.02401), types 1 to 6. MoCHi (arXiv 2010.01028) uses `mixed` (s) and `interpolated` (s'). The
#: gradient of q.n with respect to n is q, which gives types 5 and 6 their short form.
FAMILIES: tuple[Family, ...] = (
    Family(
        "interpolated",
        1,
        "Type 1, MoCHi's s': between the query and a hard negative",
        "t q + (1 - t) n_i",
        vector=lambda q, n_i, n_j, t, e, negatives: t * q + (1 - t) * n_i,
        mixture=lambda negatives: Mixture(q=Affine(0, 1), first=Affine(1, -1)),
        published=256,
        range=(0.0, 0.5),
    ),
    Family(
        "extrapolated",
        2,
        "Type 2: on the line from the query to a hard negative, beyond the latter",
        "q + t (n_i - q), or n_i + t (n_i - q)",
        vector=_extrapolated,
        mixture=_extrapolated_mixture,
        published=256,
        range=(1.0, 1.5),
    ),
    Family(
        "mixed",
        3,
        "Type 3, MoCHi's s: between two hard negatives",
        "t n_i + (1 - t) n_j",
        vector=lambda q, n_i, n_j, t, e, negatives: t * n_i + (1 - t) * n_j,
        mixture=lambda negatives: Mixture(first=Affine(0, 1), second=Affine(1, -1)),
        published=256,
        range=(0.0, 1.0),
        paired=True,
    ),
    Family(
        "noisy",
        4,
        "Type 4: a hard negative with Gaussian noise of standard deviation sigma",
        "n_i + sigma e",
        vector=lambda q, n_i, n_j, t, e, negatives: n_i + negatives.sigma * e,
        mixture=lambda negatives: Mixture(first=Affine(1, 0), noise=negatives.sigma),
        published=64,
        strength=("sigma", 0.01),
        noisy=True,
    ),
    Family(
        "perturbed",
        5,
        "Type 5: a hard negative moved along the gradient of its similarity by delta",
        "n_i + delta q",
        vector=lambda q, n_i, n_j, t, e, negatives: n_i + negatives.delta * q,
        mixture=lambda negatives: Mixture(first=Affine(1, 0), q=Affine(negatives.delta, 0)),
        published=64,
        strength=("delta", 0.01),
    ),
    Family(
        "adversarial",
        6,
        "Type 6: a hard negative moved along the sign of that gradient by eta",
        "n_i + eta sign(q)",
        vector=lambda q, n_i, n_j, t, e, negatives: n_i + negatives.eta * q.sign(),
        mixture=lambda negatives: Mixture(first=Affine(1, 0), sign=negatives.eta),
        published=64,
        strength=("eta", 0.01),
    ),
)


if TYPE_CHECKING:

    @dataclass(frozen=True)
    class _Fields:
        """The fields as type checkers and editors see them. A test compares them with the table."""

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

else:
    _Fields = make_dataclass(
        "_Fields",
        [
            ("hard", int, 0),
            *((family.name, int, 0) for family in FAMILIES),
            ("extrapolation", Extrapolation, "released"),
            *((f"{family.name}_range", tuple[float, float], family.range) for family in FAMILIES if family.range),
            *((family.strength[0], float, family.strength[1]) for family in FAMILIES if family.strength),
        ],
        frozen=True,
    )


@dataclass(frozen=True)
class Negatives(_Fields):
    """The synthetic negatives of a query: how many of each family, and their settings. Frozen and hashable.

    Use the constructors `moco`, `mochi` and `synco`; `replace(negatives, mixed=0)` changes one field, and `scaled` fits
    all counts to a shorter queue.

    Attributes:
        hard: N, the size of Q^N: the number of most similar queue keys that synthetic negatives are made from.
        interpolated, extrapolated, mixed, noisy, perturbed, adversarial: Count of each family per query, 0 for none.
        extrapolation: The formula of type 2: ``"released"`` is q + t (n - q), used for the published checkpoints;
            ``"paper"`` is n + t (n - q).
        interpolated_range, extrapolated_range, mixed_range: Half-open range [low, high) of the coefficient t.
        sigma, delta, eta: Strength of types 4, 5 and 6.

    Raises:
        TypeError: A count is not a whole number.
        ValueError: A count is negative, there are synthetic negatives but ``hard=0``, a range is empty or not finite, a
            strength is not finite, or the formula's name is unknown.
    """

    def __post_init__(self) -> None:
        for name in ("hard", *(family.name for family in FAMILIES)):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name}: found {count!r}, expected a whole number from 0 up")
            if count < 0:
                raise ValueError(f"{name}: found {count}, expected a whole number from 0 up")
        if self.synthetic and not self.hard:
            raise ValueError(f"hard: found 0, expected 1 or more, to make {self.synthetic} synthetic negatives")
        if self.extrapolation not in ("released", "paper"):
            raise ValueError(f"extrapolation: found {self.extrapolation!r}, expected 'released' or 'paper'")
        for family in FAMILIES:
            if family.ranged:
                low, high = self.range_of(family)
                if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                    raise ValueError(f"{family.name}_range: found ({low}, {high}), expected finite low <= high")
            if family.strength and not math.isfinite(self.strength_of(family)):
                name = family.strength[0]
                raise ValueError(f"{name}: found {self.strength_of(family)}, expected a finite number")

    @classmethod
    def moco(cls) -> Negatives:
        """MoCo v2: the queue only."""
        return cls()

    @classmethod
    def mochi(cls, hard: int = 1024, s: int = 512, s_prime: int = 256) -> Negatives:
        """MoCHi (N, s, s'): s mixtures of two hard negatives, s' mixtures of a hard negative and the query."""
        return cls(hard=hard, mixed=s, interpolated=s_prime)

    @classmethod
    def synco(cls, hard: int = 1024, **changes: Any) -> Negatives:
        """SynCo: all six types with the published counts, 960 in all.

        Args:
            hard: N.
            changes: Fields to change, by name: counts, ``extrapolation``, ranges and strengths.
        """
        published: dict[str, Any] = {family.name: family.published for family in FAMILIES}
        return cls(hard, **published | changes)

    @property
    def synthetic(self) -> int:
        """M, the number of synthetic negatives per query over all families."""
        return sum(self.count_of(family) for family in FAMILIES)

    def scaled(self, factor: float, **changes: Any) -> Negatives:
        """The same with N and every count multiplied by a factor and rounded: ``scaled(K / 65536)`` for a queue of K.

        The published counts belong to a queue of 65,536 keys. Beside a shorter one they would outweigh its keys.

        Args:
            factor: The factor, at least 0.
            changes: Fields to set instead, by name, such as ``hard``.

        Raises:
            ValueError: The factor is negative or not finite, or there would be synthetic negatives but no Q^N.
        """
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"factor: found {factor}, expected a finite number from 0 up")
        counts: dict[str, Any] = {
            name: round(getattr(self, name) * factor) for name in ("hard", *(family.name for family in FAMILIES))
        }
        return replace(self, **counts | changes)

    def without_synthetic(self) -> Negatives:
        """The same with every family's count 0 (warm-up and cool-down). N stays, for its statistic."""
        counts: dict[str, Any] = {family.name: 0 for family in FAMILIES}
        return replace(self, **counts)

    def count_of(self, family: Family) -> int:
        """The number of negatives of this family for each query."""
        count: int = getattr(self, family.name)
        return count

    def active(self) -> Iterator[Family]:
        """The families with a nonzero count, in the order of the table."""
        return (family for family in FAMILIES if self.count_of(family))

    def range_of(self, family: Family) -> tuple[float, float]:
        """The half-open range of the coefficient t; only for a family with a ``range``."""
        low, high = getattr(self, f"{family.name}_range")
        return float(low), float(high)

    def strength_of(self, family: Family) -> float:
        """The family's strength; only for a family with a ``strength``."""
        assert family.strength is not None
        return float(getattr(self, family.strength[0]))

    def mixture(self, family: Family) -> Mixture:
        """The family in the general form."""
        return family.mixture(self)
