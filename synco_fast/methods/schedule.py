"""When the synthetic negatives are on."""

from __future__ import annotations

from dataclasses import dataclass

from synco_fast.kernels import Negatives

__all__ = ["NegativeSchedule"]


@dataclass(frozen=True)
class NegativeSchedule:
    """The description of the negatives by epoch: synthetic ones between warm-up and cool-down, the queue alone outside.

    Attributes:
        negatives: What is on in between.
        epochs: Length of the run.
        warmup: First epochs without synthetic negatives (10 in SynCo and MoCHi on ImageNet).
        cooldown: Last epochs without them.
    """

    negatives: Negatives
    epochs: int
    warmup: int = 0
    cooldown: int = 0

    def at(self, epoch: int) -> Negatives:
        """The negatives of an epoch, counted from 0."""
        on = self.warmup <= epoch < self.epochs - self.cooldown
        return self.negatives if on else self.negatives.without_synthetic()

    def like(self, epoch: int) -> int:
        """The first epoch with the negatives of ``epoch``."""
        return next(number for number in range(epoch + 1) if self.at(number) == self.at(epoch))
