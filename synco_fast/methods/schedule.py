"""The negatives by epoch, and a note for a run whose epochs never reach the synthetic ones; importing it is cheap."""

from __future__ import annotations

from dataclasses import dataclass

from synco_fast.config import Config
from synco_fast.kernels.negatives import Negatives
from synco_fast.methods import with_queue

__all__ = ["NegativeSchedule", "note_without_synthetic"]


@dataclass(frozen=True)
class NegativeSchedule:
    """The negatives by epoch: synthetic ones between warm-up and cool-down, the queue alone outside.

    Attributes:
        negatives: The negatives in between.
        epochs: Length of the run in epochs.
        warmup: First epochs without synthetic negatives (10 in SynCo and MoCHi on ImageNet).
        cooldown: Last epochs without them.
    """

    negatives: Negatives
    epochs: int
    warmup: int = 0
    cooldown: int = 0

    @classmethod
    def of(cls, config: Config) -> NegativeSchedule:
        """The schedule of a configuration, whose method has a queue."""
        method = config.method
        return cls(method.negatives(), config.training.epochs, method.warmup_epochs, method.cooldown_epochs)

    def reached_in(self, epochs: int) -> bool:
        """Whether the first ``epochs`` epochs include one between warm-up and cool-down."""
        return self.warmup < min(epochs, self.epochs - self.cooldown)

    def at(self, epoch: int) -> Negatives:
        """The negatives of an epoch, counted from 0."""
        on = self.warmup <= epoch < self.epochs - self.cooldown
        return self.negatives if on else self.negatives.without_synthetic()

    def graph_key(self, epoch: int) -> int:
        """The first epoch with the same negatives as ``epoch``."""
        return next(number for number in range(epoch + 1) if self.at(number) == self.at(epoch))


def note_without_synthetic(config: Config, epochs: int | None = None) -> str | None:
    """A line for a run that makes no synthetic negative though its method has them; None for any other.

    It is no error: the first part of a longer run looks like this.

    Args:
        config: The configuration of the whole run.
        epochs: Epochs that the run begins, where its steps are limited; all by default. Of none, nothing is said.
    """
    if config.method.name not in with_queue():
        return None
    schedule = NegativeSchedule.of(config)
    begun = schedule.epochs if epochs is None else min(epochs, schedule.epochs)
    if not begun or schedule.reached_in(begun) or not schedule.negatives.synthetic:
        return None
    keys = f"method.warmup_epochs={schedule.warmup}"
    keys += f" and method.cooldown_epochs={schedule.cooldown}" if schedule.cooldown else ""
    length = f"{begun} epoch" if begun == 1 else f"{begun} epochs"
    if begun < schedule.epochs:
        length += " that training.max_steps leaves"
    return (
        f"{config.method.name}: no synthetic negatives in the whole run of {length} ({keys}), so that it trains as "
        "moco does; lower method.warmup_epochs"
    )
