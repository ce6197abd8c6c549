"""The trainer: steps, logs, checkpoints, evaluations and stops of any task's run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console

from synco_fast.runtime.checkpoint import keep_best, newest_checkpoint, save_checkpoint, set_aside
from synco_fast.runtime.console import open_console, say
from synco_fast.runtime.distributed import lost_process
from synco_fast.runtime.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    LostProcessError,
    UserError,
    first_line,
)
from synco_fast.runtime.files import UNWRITABLE
from synco_fast.training.run.progress import Reporter
from synco_fast.training.run.resuming import find_start
from synco_fast.training.run.run_folder import describe_run, refuse_run
from synco_fast.training.run.run_lock import RunLock
from synco_fast.training.run.stopping import StopSignals
from synco_fast.training.run.task import Task
from synco_fast.training.run.throughput import Throughput
from synco_fast.training.run.writers import MetricLog, open_log

__all__ = ["Trainer"]

SummaryT = TypeVar("SummaryT")

#: What a part of a checkpoint that is missing or of another type leads to.
_DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError)


class Trainer(Generic[SummaryT]):
    """One run of a task: trains, evaluates, and writes a self-describing run folder.

    In a job of several processes each has a trainer. All of them train; only rank 0 evaluates, writes and prints.

    Args:
        task: The task.
        folder: The run folder; created when the run starts.
        resume: A checkpoint or run folder to resume, also from another number of processes.
        console: Where progress is shown.
        before_step, after_step: Called with the trainer around every step. Before a step `step` is the number of the
            step to come, counted from 0; after it, the number of steps done.

    Attributes:
        step: Completed steps.
        steps: Length of the run in steps.

    Raises:
        UserError: The checkpoint does not fit, or another trainer uses the folder.
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
        self.env = self.control.env
        self.console = (console or open_console()) if self.env.is_main else Console(quiet=True)
        self.step, self.steps = 0, task.settings.steps
        self.evaluated_at = -1
        #: Score and step of the best checkpoint, and the score at `evaluated_at`, on rank 0.
        self._best: dict[str, Any] | None = None
        self._score: float | None = None
        self._before_step, self._after_step = before_step, after_step
        self._save_due = False
        self.throughput = Throughput(task.settings.batch, task.settings.settling, task.device)
        end = task.settings.end
        self.stopping = StopSignals(self.control, task.settings.max_time, end if end < self.steps else None)
        #: Notes for the log, which is opened when the run starts.
        self._unlogged: list[str] = []
        # Printed at once until the progress bar takes over: the first use of a GPU takes a while.
        task.note.show_by(self._print)
        self._lock, self._fresh = RunLock(folder, task.note), resume is None
        try:
            if resume is not None:
                self._take_folder()
                self._load(resume)
            task.begin(folder, fresh=self.step == 0)
        except BaseException:
            self._lock.release()
            raise

    def _print(self, line: str, style: str | None) -> None:
        self._unlogged.append(line)
        say(self.console, line, style)

    # -- the run ------------------------------------------------------------------------------------------------

    def run(self) -> SummaryT:
        """Train to the end, or until SIGTERM, SIGINT or a limit of this start; then write a checkpoint and the summary.

        Raises:
            DivergedError: Too many consecutive steps had non-finite gradients, or what they led to is not finite; the
                last good checkpoint is kept.
            DataError: More images are corrupt than the configuration allows.
            LostProcessError: Another process of the job is gone.
            ConfigError: Another trainer uses the folder.
            UserError: The folder was moved or removed, or a file in it cannot be written.
        """
        try:
            self._take_folder()
            return self._run()
        finally:
            self._lock.release()

    def _take_folder(self) -> None:
        """Lock the run folder on rank 0; every rank raises if that fails."""

        def take() -> None:
            self._lock.take()
            if self._fresh:
                refuse_run(self.folder)

        self.control.from_main(take)

    def _run(self) -> SummaryT:
        task, settings = self.task, self.task.settings
        if self.env.is_main:
            describe_run(self.folder, task.config, task.facts, task.device)
        config = task.config.model_dump(mode="json")
        evaluated = self.evaluated_at == self.step
        self.log: MetricLog = open_log(
            self.folder, self.step, config, evaluated=evaluated, trackers=settings.trackers, writes=self.env.is_main
        )
        log = self.folder / "train.log" if self.env.is_main else None
        self.reporter = Reporter(self.console, settings.end, self.step, log)
        while self._unlogged:
            self.reporter.write(self._unlogged.pop(0))
        task.note.show_by(self.reporter.note)
        self.control.last_words = self._last_words
        try:
            self._train()
        except BaseException as error:
            self.reporter.write(f"{type(error).__name__}: {error}")
            if self._is_in_place():  # elsewhere a thread of TensorBoard would say so by a traceback
                with suppress(OSError):  # TensorBoard raises what it could not write once more
                    self.log.close()
            raise
        finally:
            task.close()
            self.reporter.close()
        summary = task.summary(
            self.step, finished=not self.stopping.agreed, throughput=self.throughput, best=self._best
        )
        self.control.broadcast(None)
        return summary

    def _say_stopping(self, line: str) -> None:
        with suppress(ValueError):  # the run has ended meanwhile, and closed its log
            self.reporter.note(line)

    def _train(self) -> None:
        """Train, evaluate and save to the end of the run, or until it is asked to stop."""
        try:
            with self.stopping.on_signals(self._say_stopping):
                self.stopping.begin(self.step)
                # Without this save, every later resume from the same checkpoint would repeat the evaluation.
                if (self._evaluate_if_due() and self.step) or not self.task.settings.end:
                    self._save()
                while self.step < self.steps and not self.stopping.agreed:
                    self._train_round()
                    self._close_round()
                self.log.close()
        except RuntimeError as error:
            if self.env.world > 1 and lost_process(error):
                raise self._lost(error) from error
            raise
        except OSError as error:
            self._check_place()
            if error.errno in UNWRITABLE:
                raise self._unwritten(error) from error
            raise
        self.reporter.write(f"stopped on request at step {self.step:,}" if self.stopping.agreed else "finished")

    def _close_round(self) -> None:
        """Evaluate and save where that is due after a round.

        A run that stops at the end of a round is evaluated there when it resumes. So is one that ends in the
        evaluation, which may take minutes: the round is saved before.
        """
        if not self.stopping.agree():
            if self._evaluation_due() and self._checkpoint_due():
                self._save()
            self._evaluate_if_due()
        if self._save_due or self.stopping.agreed or self._checkpoint_due():
            self._save()

    def _train_round(self) -> None:
        """Train to the end of the round, the end of the run, or a stop."""
        task, title = self.task, self.task.title(self.step)
        end = min(self.steps, task.round_end(self.step))
        batches = iter(task.batches(self.step))
        self.throughput.begin(task.view_size(self.step))
        while self.step < end and not self.stopping.agreed:
            with self.throughput.waiting():
                batch = next(batches)
            self._train_step(batch)
            self.throughput.step()
            self.reporter.step(self.step, title)
            log_due = self.step % task.settings.log_every == 0 or self.step == self.steps
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

    def _is_in_place(self) -> bool:
        return not self.env.is_main or (self.folder / "metrics.jsonl").exists()

    def _check_place(self) -> None:
        """Check that the run folder was not moved: a checkpoint would make another folder of its name.

        Raises:
            UserError: It was moved or removed.
        """
        if not self._is_in_place():
            raise UserError(
                f"run: found {self.folder} moved or removed at step {self.step}, expected it to stay to the end; "
                "--resume takes it where it is, from its newest checkpoint"
            )

    def _write_figures(self, title: str) -> None:
        self._check_place()
        values, words = self.task.figures(self.step, self.throughput.pop())
        if words:
            self.reporter.line(self.step, title, *words)
        self.log.write("train", self.step, values)

    def _evaluation_due(self) -> bool:
        return self.task.evaluation_due(self.step) and self.evaluated_at != self.step

    def _evaluate_if_due(self) -> bool:
        """Evaluate at the start, at the end of rounds, and at the end; never twice at one step."""
        if self.env.is_main:
            self.task.artifacts(self.step)
        due = self._evaluation_due()
        if due:
            self.evaluated_at = self.step
            self.reporter.stage("evaluation")
            self._score = self.task.evaluate(self.step, self.log)
            self.control.broadcast(None)
        return due

    # -- steps that were skipped --------------------------------------------------------------------------------

    def _check_skipped(self) -> int:
        """The number of consecutive skipped steps up to now.

        Raises:
            DivergedError: More steps were skipped than the limit, a parameter is non-finite, or the run ends with many
                skipped steps.
        """
        settings = self.task.settings
        _, row, first = self.task.skipped.read()
        limit, name = settings.max_skipped, settings.max_skipped_key
        allowed = f"{name}={limit}"
        if self.step == self.steps and limit > max(1, self.step // 4):
            # A skipped step changes nothing: one at the very end costs nothing. A last quarter of them is divergence.
            limit = max(1, self.step // 4)
            allowed = f"{limit} at the end of the run"
        if not row or (row <= limit and self.task.not_finite() is None):
            return row
        raise self._diverged(
            f"non-finite gradients from step {self.task.describe_step(first)}, {row} "
            f"step{'s' if row > 1 else ''} skipped (limit {allowed})"
        )

    def _diverged(self, how: str) -> DivergedError:
        newest = newest_checkpoint(self.folder)
        last = f"last good checkpoint: {newest}" if newest else "no checkpoint was written"
        return DivergedError(f"training diverged: {how}; {last}; try {self.task.advice()}")

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        return self.step == self.steps or self.task.checkpoint_due(self.step)

    def _save(self) -> None:
        """Write a checkpoint; after a skipped step, wait for a good one, except at the end of the run and at a stop.

        Raises:
            DivergedError: As `_check_skipped`, or a weight or statistic is not finite.
            CheckpointError: The checkpoint cannot be written, such as on a full disk.
        """
        row = self._check_skipped()
        self._save_due = row > 0 and self.step < self.steps and not self.stopping.agreed
        if row and self.step == self.steps and not self._evaluation_due():
            self.task.note(f"skipped steps at the end of the run: {row}, with non-finite gradients")
        self._check_agreement()
        if self._save_due:
            return
        state = {
            **self.task.state_dict(),
            **self.throughput.state_dict(),
            "evaluated_at": self.evaluated_at,
            "best": self._best_now(),
        }
        bad = self.task.not_finite()  # after the statistics were averaged, so that all processes find the same
        if bad is not None:
            raise self._diverged(f"found NaN or infinity in {bad} after step {self.task.describe_step(self.step - 1)}")
        if self.env.is_main:
            self._check_place()
            saved = save_checkpoint(self.folder / "checkpoints", self.step, state, keep=self.task.settings.keep)
            self._keep_best(state["best"], saved)
        self.control.broadcast(None)

    def _best_now(self) -> dict[str, Any] | None:
        """Score and step of the best checkpoint, the one about to be written included."""
        if not self.task.settings.keep_best or self._score is None or self.evaluated_at != self.step:
            return self._best
        if self._best is not None and self._score <= self._best["score"]:
            return self._best
        return {"score": self._score, "step": self.step}

    def _keep_best(self, best: dict[str, Any] | None, checkpoint: Path) -> None:
        """Keep a checkpoint as ``best.pt`` if it is the best one; on rank 0."""
        self._best = best
        if best is not None and best["step"] == self.step and self.task.settings.keep_best:
            keep_best(checkpoint)

    def _check_agreement(self) -> None:
        """Check that replicated modules are equal on all processes."""
        if self.env.world == 1:
            return
        found = self.control.gather(self.task.replica_hash())
        other = [rank for rank, value in enumerate(found) if value != found[0]]
        if other:
            raise LostProcessError(
                f"rank {other[0]} is out of sync with rank 0 at step {self.step} (weights or queue differ); "
                f"{self._how_to_resume()}"
            )

    def _load(self, resume: Path) -> None:
        loaded = find_start(self.control, resume, self._take_over)
        if loaded is None:
            self.task.note(f"{resume} holds no checkpoint yet: starting at the first step")
            return
        state, path, problems = loaded
        for problem in problems:
            self.task.note(f"{problem}; resuming from an older one")
        self.step = state["step"]
        self.evaluated_at = state.get("evaluated_at", self.step)
        # The best checkpoint lies in the run folder; a run that goes on in another one begins without.
        if self.env.is_main and path.resolve().parent == (self.folder / "checkpoints").resolve():
            if problems:  # the others have read by now
                for moved in set_aside(path.parent, self.step):
                    self.task.note(f"renamed {moved.name} to {moved.name}.damaged: later resumes do not try it")
            # A process that was killed between the two files left an older best.pt.
            self._keep_best(state.get("best"), path)
        end = self.task.settings.end
        if self.step > end:
            raise ConfigError(
                f"resume: found {path} of step {self.step}, beyond the {end} steps that are asked for, expected at "
                "least as many; give the run more epochs or steps"
            )
        left = "" if self.step < end else ": nothing is left to train"
        self.task.note(f"resumed from {path} at step {self.step} of {end}{left}")

    def _take_over(self, state: dict[str, Any], path: Path) -> None:
        """Load what decides the steps to come.

        Raises:
            CheckpointError: A part is missing or is not what it should be.
            UserError: Something else is in the way, such as settings of the run that wrote it, which cannot change.
            OutOfMemoryError, AcceleratorError: The device has too little free memory, or fails.
        """
        try:
            self.task.load_state_dict(state, path)
            self.throughput.load_state_dict(state)
        except (UserError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # of the data, the settings or the device; an older checkpoint would change nothing
        except _DAMAGE as error:
            reason = f"{type(error).__name__}: {first_line(error, 120)}"
            raise CheckpointError(f"{path}: found a damaged part ({reason})") from error

    def _how_to_resume(self) -> str:
        newest = newest_checkpoint(self.folder)
        if newest is None:
            return "no checkpoint was written"
        return f"the newest checkpoint is {newest}: resume with --resume {self.folder}"

    def _last_words(self) -> str:
        return f" at step {self.step + 1}, expected all {self.env.world} to the end; {self._how_to_resume()}"

    def _unwritten(self, error: OSError) -> UserError:
        """What to do where a file of the run cannot be written."""
        newest = newest_checkpoint(self.folder)
        needed = f"; a checkpoint takes {newest.stat().st_size / 2**20:,.1f} MiB" if newest else ""
        where = error.filename or self.folder
        return UserError(
            f"{where}: found no way to write it at step {self.step} ({error.strerror}){needed}; {self._how_to_resume()}"
        )

    def _lost(self, error: RuntimeError) -> LostProcessError:
        return LostProcessError(
            f"rank {self.env.rank} lost the connection to the other processes at step {self.step + 1} "
            f"({first_line(error)}), expected all {self.env.world} to the end; {self._how_to_resume()}"
        )
