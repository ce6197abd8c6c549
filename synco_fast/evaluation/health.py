"""Health of a representation: alignment, uniformity, RankMe, and the signs of contraction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from synco_fast.runtime.errors import ConfigError

__all__ = [
    "age_gap",
    "alignment",
    "best_window",
    "class_share",
    "collapse",
    "contraction",
    "rankme",
    "rows_for_health",
    "uniformity",
]

#: Rows compared at a time in `uniformity`: 16 MiB of squared distances at the default number of rows.
_BLOCK = 1024
#: Rows above which `uniformity` and `rankme` cost seconds and change in the third digit only.
_ROWS = 4096


def rows_for_health(features: Tensor, rows: int = _ROWS) -> Tensor:
    """At most ``rows`` rows of (n, F), evenly spread, so that a set sorted by class contributes every class."""
    if len(features) <= rows:
        return features
    return features[torch.arange(rows, device=features.device) * len(features) // rows]


def alignment(first: Tensor, second: Tensor, *, power: float = 2.0) -> float:
    """How far apart the two views of an image lie (Wang and Isola, arXiv 2005.10242, section 4.1.1).

    The mean of ||f(x) - f(y)||^power over positive pairs, of features on the unit sphere: 0 is perfect. For a power of
    2 it equals 2 - 2 c, where c is the mean cosine of the pairs.

    Args:
        first, second: Features of the two views, (n, F); normalised here.
        power: alpha of the paper.

    Raises:
        ConfigError: The shapes differ, or there is no row.
    """
    if first.shape != second.shape or first.dim() != 2 or not len(first):
        raise ConfigError(
            f"alignment: found features of shape {tuple(first.shape)} and {tuple(second.shape)}, expected two equal "
            "ones (n, F) with n of 1 or more"
        )
    one, other = normalize(first.double(), dim=1), normalize(second.double(), dim=1)
    return float((one - other).norm(dim=1).pow(power).mean())


def uniformity(features: Tensor, *, scale: float = 2.0) -> float:
    """How evenly features cover the unit sphere (Wang and Isola, arXiv 2005.10242, section 4.1.2).

    The logarithm of the mean of exp(-scale ||f(x) - f(y)||^2) over all pairs of distinct images: 0 where all features
    are one point, lower where they spread; about -2 scale for independent directions in many dimensions. A feature of
    length 0 has no direction; all of them count as one point, as a network gives them whose units are all dead.

    Args:
        features: (n, F); normalised here. The cost is quadratic in n.
        scale: t of the paper.

    Raises:
        ConfigError: There are fewer than two rows.
    """
    _check_rows("uniformity", features, 2)
    rows = normalize(features.double(), dim=1)
    rows[:, 0] += (rows == 0).all(dim=1)
    # The n pairs of a row with itself are exactly 1 each; they are taken out of the sum.
    total = sum(float(torch.exp(-scale * (2 - 2 * block @ rows.T).clamp_min(0)).sum()) for block in rows.split(_BLOCK))
    pairs = len(rows) * (len(rows) - 1)
    mean = max((total - len(rows)) / pairs, torch.finfo(torch.float64).tiny)
    return float(torch.tensor(mean, dtype=torch.float64).log())


def rankme(features: Tensor, *, epsilon: float = 1e-7) -> float:
    """The effective rank of features (RankMe, Garrido et al., arXiv 2210.02885, equation 1).

    exp of the entropy of the singular values divided by their sum: 1 where one direction holds everything, min(n, F)
    where all directions hold the same. As in the paper the features are neither centred nor normalised.

    Args:
        features: (n, F). Compare only values of equal n and F.
        epsilon: Added to each share.

    Raises:
        ConfigError: There is no row, or a feature is not finite.
    """
    _check_rows("rankme", features, 1)
    if not bool(torch.isfinite(features).all()):
        raise ConfigError("rankme: found a feature that is not finite, expected numbers")
    values = torch.linalg.svdvals(features.double())
    total = values.sum()
    if float(total) == 0.0:
        return 1.0
    shares = values / total + epsilon
    return float(torch.exp(-(shares * shares.log()).sum()))


def class_share(query_labels: Tensor, hard_labels: Tensor) -> float:
    """The share of false negatives among the hard negatives: those of the query's class, by labels unseen in training.

    Args:
        query_labels: (B,) int64.
        hard_labels: Labels of each query's N hard negatives, (B, N) int64; -1 where a row has no label, which is
            skipped.

    Returns:
        In [0, 1]; NaN where no hard negative has a label.

    Raises:
        ConfigError: The shapes do not fit.
    """
    if query_labels.dim() != 1 or hard_labels.dim() != 2 or len(query_labels) != len(hard_labels):
        raise ConfigError(
            f"class_share: found labels of shape {tuple(query_labels.shape)} and {tuple(hard_labels.shape)}, expected "
            "(B,) and (B, N)"
        )
    known = hard_labels >= 0
    same = (hard_labels == query_labels[:, None]) & known
    return float(same.sum().double() / known.sum())


def age_gap(queries: Tensor, queue: Tensor, pointer: int | Tensor, count: int) -> Tensor:
    """How much nearer queries are to the newest keys of the queue than to the oldest.

    About 0 if the key encoder moves slowly over the length of the queue. Far above 0, age alone identifies the
    positive, which is newer than every negative. The loss is then low for the wrong reason, and it rises once the
    learning rate falls.

    Args:
        queries: Unit rows, (B, D).
        queue: Unit rows, (K, D), all of them real keys.
        pointer: The row of the next key, which holds the oldest one.
        count: Keys at each end, at most half of K; the number of one step is a good choice.

    Returns:
        Mean cosine to the newest minus mean cosine to the oldest: of no dimensions, on the device.

    Raises:
        ConfigError: ``count`` is below 1 or above half of K.
    """
    length = len(queue)
    if not 1 <= count <= length // 2:
        raise ConfigError(f"age_gap: found a count of {count}, expected 1 to {length // 2}, half of the queue")
    places = torch.arange(count, device=queue.device)
    mean = queries.mean(dim=0)
    oldest, newest = queue[(pointer + places) % length], queue[(pointer - 1 - places) % length]
    return (newest.mean(dim=0) - oldest.mean(dim=0)) @ mean


def best_window(values: Sequence[float], window: int, before: int | None = None) -> int | None:
    """The window of the highest mean among those that end where the last window begins, or sooner.

    Args:
        values: Figures in order of time.
        window: Number of figures in a mean.
        before: The result without the last figure, which leaves one window to compare; None compares all.

    Returns:
        Where it begins, the earliest of equal ones; None if there are fewer figures than two windows.
    """
    last = len(values) - 2 * window
    if last < 0:
        return None
    return max(range(last + 1) if before is None else (before, last), key=lambda start: _mean(values, start, window))


def contraction(
    top1: Sequence[float],
    similarity: Sequence[float],
    *,
    window: int = 5,
    fall: float = 0.5,
    rise: float = 0.2,
    best: int | None = None,
) -> str | None:
    """Detect a contracting run: top-1 against the queue keeps falling while similarities rise.

    Compares the mean of the last ``window`` figures with the best mean of ``window`` earlier ones in a row. Both signs
    are needed: top-1 alone falls for a while when harder negatives begin, and similarities alone rise at the start of
    a run.

    Args:
        top1: The run's share of queries whose key is nearer than the whole queue, in [0, 1], in order of time.
        similarity: The mean cosine of queries to their hard negatives at the same times, in [-1, 1]. MoCo v2 has none;
            there that of queries to their keys, which rises with it in a run that contracts.
        window: Number of figures in a mean, one per log line or epoch.
        fall: Fraction of its best mean that top-1 must have lost.
        rise: How much the similarity must have risen since then.
        best: `best_window` of ``top1`` where it is known.

    Returns:
        A warning of one line; None if there is no such sign or the run is shorter than two windows.

    Raises:
        ConfigError: The two have different lengths.
    """
    if len(top1) != len(similarity):
        raise ConfigError(f"contraction: found {len(top1)} and {len(similarity)} figures, expected equal numbers")
    best = best_window(top1, window) if best is None else best
    if best is None:
        return None
    then, now = (_mean(top1, start, window) for start in (best, len(top1) - window))
    near, nearer = (_mean(similarity, start, window) for start in (best, len(similarity) - window))
    if now > (1 - fall) * then or nearer < near + rise:
        return None
    return (
        f"top-1 against the queue fell from {then:.0%} to {now:.0%} while similarities rose from {near:.2f} to "
        f"{nearer:.2f}: the embeddings contract; try a lower optimizer.lr, a higher model.momentum, a smaller "
        "method.count_scale or a higher method.temperature"
    )


def collapse(
    ranks: Sequence[float],
    *,
    window: int = 5,
    fall: float = 0.7,
    name: str = "effective rank",
    best: int | None = None,
) -> str | None:
    """Detect a collapsing representation: its effective rank has lost most of what it had.

    Compares the mean of the last ``window`` figures with the best mean of ``window`` earlier ones in a row.

    Args:
        ranks: From `rankme`, always of equally many features, in order of time.
        window: Number of figures in a mean.
        fall: Fraction of its best mean that the rank must have lost.
        name: The figure's name in the warning.
        best: `best_window` of ``ranks`` where it is known.

    Returns:
        A warning of one line; None if there is no such sign or the run is shorter than two windows.
    """
    best = best_window(ranks, window) if best is None else best
    if best is None:
        return None
    then, now = (_mean(ranks, start, window) for start in (best, len(ranks) - window))
    if now > (1 - fall) * then:
        return None
    return (
        f"{name} fell from {then:.1f} to {now:.1f}: the representation collapses; try a lower optimizer.lr, "
        "a longer optimizer.warmup_epochs or a higher model.momentum"
    )


def _mean(values: Sequence[float], start: int, window: int) -> float:
    return sum(values[start : start + window]) / window


def _check_rows(name: str, features: Tensor, least: int) -> None:
    if features.dim() != 2 or len(features) < least:
        raise ConfigError(
            f"{name}: found features of shape {tuple(features.shape)}, expected (n, F) with n of {least} or more"
        )
