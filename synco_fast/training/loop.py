"""The trainer: steps, logs, checkpoints, evaluations and stops of a run, whatever it trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from synco_fast.runtime.checkpoint import checkpoints_in, find_checkpoint, save_checkpoint
from synco_fast.runtime.distributed import lost_process
from synco_fast.runtime.errors import DivergedError, LostProcessError
from synco_fast.training.metrics import MetricLog, open_log
from synco_fast.training.progress import Reporter
from synco_fast.training.run_folder import describe_run
from synco_fast.training.stopping import StopSignals
from synco_fast.training.task import Task
from synco_fast.training.throughput import Throughput

__all__ = ["Trainer"]

SummaryT = TypeVar("SummaryT")


class Trainer(Generic[SummaryT]):
    """One run of a task: trains, evaluates, leaves a self-describing folder.

    In a job of several processes each has a trainer. All of them train; rank 0 alone evaluates, writes and speaks.

    Args:
        task: What is trained.
        folder: The run folder; made when the run begins.
        resume: A checkpoint or a run folder to resume, also one that another number of processes wrote.
        console: Where progress is shown.
        before_step, after_step: Called with the trainer around every step. Before a step `step` is the number of the
            step to come, counted from 0; after it, the number of steps done.

    Attributes:
        step: Steps done.
        steps: Length of the run.

    Raises:
        UserError: Anything in the checkpoint that cannot work.
    """

    def __init__(
        self,
        task: Task[SummaryT],
        folder: Path,
        *,
        resume: Path | None = None,
        console: Console | None = None,
        before_step: Callable[[Trainer[SummaryT]], None] | None = None,
        after_step: Callable[[Trainer[SummaryT]], None] | None = None,
    ) -> None:
        self.task, self.folder, self.control = task, folder, task.control
        self.place = self.control.env
        self.console = (console or Console()) if self.place.is_main else Console(quiet=True)
        self.step, self.steps = 0, task.plan.steps
        self.evaluated_at = -1
        self._before_step, self._after_step = before_step, after_step
        self._save_due = False
        self.throughput = Throughput(task.plan.batch, task.plan.settling)
        self.stopping = StopSignals(self.control, task.plan.max_time)
        # What takes long from here on is told at once; the progress bar takes the lines over.
        task.note.show_by(self._print)
        if resume is not None:
            self._load(resume)
        task.begin(folder, fresh=self.step == 0)

    def _print(self, line: str, style: str | None) -> None:
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    # -- the run ------------------------------------------------------------------------------------------------

    def run(self) -> SummaryT:
        """Train to the end, or until SIGTERM, SIGINT or the time limit; then write a checkpoint and the summary.

        Raises:
            DivergedError: Too many consecutive steps had non-finite gradients; the last good checkpoint is kept.
            DataError: More images are corrupt than the configuration allows.
            LostProcessError: Another process of the job is gone.
        """
        task, plan = self.task, self.task.plan
        if self.place.is_main:
            describe_run(self.folder, task.config, task.facts)
        config = task.config.model_dump(mode="json")
        self.log: MetricLog = open_log(self.folder, self.step, config, wandb=plan.wandb, writes=self.place.is_main)
        self.reporter = Reporter(self.console, self.steps, self.step)
        task.note.show_by(self.reporter.note)
        try:
            with self.stopping.on_signals():
                self._evaluate_if_due()
                while self.step < self.steps and not self.stopping.agreed:
                    self._train_round()
                    # A run that stops right at the end of a round is evaluated there when it is resumed.
                    if not self.stopping.agree():
                        self._evaluate_if_due()
                    if self._save_due or self.stopping.agreed or self._checkpoint_due():
                        self._save()
        except RuntimeError as error:
            if self.place.world > 1 and lost_process(error):
                raise self._lost(error) from error
            raise
        finally:
            task.close()
            self.reporter.close()
            self.log.close()
        summary = task.summary(self.step, finished=not self.stopping.agreed, throughput=self.throughput)
        self.control.broadcast(None)
        return summary

    def _train_round(self) -> None:
        """Train from the current step to the end of its round, the end of the run, or a stop."""
        task, title = self.task, self.task.title(self.step)
        end = min(self.steps, task.round_end(self.step))
        batches = iter(task.batches(self.step))
        self.throughput.begin()
        while self.step < end and not self.stopping.agreed:
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            self._train_step(batch)
            self.throughput.step(waited)
            self.reporter.step(self.step, title)
            log_due = self.step % task.plan.log_every == 0 or self.step == self.steps
            if log_due or task.device.type == "cpu":
                self._check_skipped()
            if log_due:
                self._write_figures(title)
            stops = self.stopping.after_step(self.step)
            if self.step < end and not stops and (self._save_due or self._checkpoint_due()):
                paused = time.perf_counter()
                self._save()
                self.throughput.pause(time.perf_counter() - paused)
        self.throughput.pop()

    def _train_step(self, batch: Any) -> None:
        if self._before_step is not None:
            self._before_step(self)
        self.task.train_step(batch, self.step)
        self.step += 1
        if self._after_step is not None:
            self._after_step(self)

    def _write_figures(self, title: str) -> None:
        values, words = self.task.figures(self.step, self.throughput.pop())
        if words:
            self.reporter.line(self.step, title, *words)
        self.log.write("train", self.step, values)

    def _evaluate_if_due(self) -> None:
        """Evaluate at the start, at the end of rounds, and at the end; never twice at one step."""
        if self.place.is_main:
            self.task.artifacts(self.step)
        if self.task.evaluation_due(self.step) and self.evaluated_at != self.step:
            self.evaluated_at = self.step
            self.task.evaluate(self.step, self.log)
            self.control.broadcast(None)

    # -- steps that were skipped --------------------------------------------------------------------------------

    def _check_skipped(self) -> int:
        """How many consecutive steps were skipped up to now.

        Raises:
            DivergedError: Skipping no longer helps: there were more than allowed, a parameter is not finite, or the run
                ends with them.
        """
        plan = self.task.plan
        _, row, first = self.task.skipped.read()
        within = row <= plan.max_skipped and self.step < self.steps
        if not row or (within and self.task.finite()):
            return row
        newest = checkpoints_in(self.folder / "checkpoints")
        raise DivergedError(
            f"training diverged: non-finite gradients from step {self.task.describe_step(first)}, {row} "
            f"step{'s' if row > 1 else ''} skipped (limit {plan.max_skipped_key}={plan.max_skipped}); "
            + (f"last good checkpoint: {newest[0]}" if newest else "no checkpoint was written")
            + f"; try {self.task.advice()}"
        )

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        return self.step == self.steps or self.task.checkpoint_due(self.step)

    def _save(self) -> None:
        """Write everything that decides the future of the run; after a skipped step, wait for a good one."""
        self._save_due = self._check_skipped() > 0
        self._check_agreement()
        if self._save_due:
            return
        state = {
            **self.task.state_dict(),
            **self.throughput.state_dict(),
            "evaluated_at": self.evaluated_at,
        }
        if self.place.is_main:
            save_checkpoint(self.folder / "checkpoints", self.step, state, keep=self.task.plan.keep)
        self.control.broadcast(None)

    def _check_agreement(self) -> None:
        """What is replicated must be the same on every process."""
        if self.place.world == 1:
            return
        found = self.control.gather(self.task.fingerprint())
        other = [rank for rank, value in enumerate(found) if value != found[0]]
        if other:
            raise LostProcessError(
                f"rank {other[0]} is out of sync with rank 0 at step {self.step} (weights or queue differ); "
                f"{self._how_to_resume()}"
            )

    def _load(self, resume: Path) -> None:
        if resume.is_dir() and (resume / "config.yaml").exists() and not checkpoints_in(resume / "checkpoints"):
            self.task.note(f"{resume} holds no checkpoint yet: starting at the first step")
            return
        state, path, problems = find_checkpoint(resume)
        for problem in problems:
            self.task.note(f"{problem}; resuming from an older one")
        self.task.load_state_dict(state, path)
        self.throughput.load_state_dict(state)
        self.step = state["step"]
        self.evaluated_at = state.get("evaluated_at", self.step)
        self.task.note(f"resumed from {path} at step {self.step} of {self.steps}")

    def _how_to_resume(self) -> str:
        newest = checkpoints_in(self.folder / "checkpoints")
        if not newest:
            return "no checkpoint was written"
        return f"the newest checkpoint is {newest[0]}: resume with --resume {self.folder}"

    def _lost(self, error: RuntimeError) -> LostProcessError:
        reason = str(error).strip().splitlines()[0][:160]
        return LostProcessError(
            f"rank {self.place.rank} lost the connection to the other processes at step {self.step + 1} ({reason}), "
            f"expected all {self.place.world} to the end; {self._how_to_resume()}"
        )
