"""The training loop: epochs, evaluations, checkpoints and logs around the engine's steps."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from synco_fast.config import Config
from synco_fast.data.pipelines.base import Batch
from synco_fast.data.pipelines.build import build_pipeline
from synco_fast.data.sources.open import Source, open_source
from synco_fast.data.sources.splits import share_of
from synco_fast.evaluation.protocol import evaluate_backbone
from synco_fast.runtime.checkpoint import checkpoints_in, find_checkpoint, load_weights, save_checkpoint
from synco_fast.runtime.distributed import Control, Place, lost_process
from synco_fast.runtime.errors import CheckpointError, DivergedError, LostProcessError
from synco_fast.runtime.precision import resolve_device
from synco_fast.training.bad_images import BrokenImages
from synco_fast.training.checks import check_evaluation
from synco_fast.training.engine import Engine
from synco_fast.training.metrics import MetricLog, open_log
from synco_fast.training.monitors import monitors
from synco_fast.training.plots import draw_pairs
from synco_fast.training.progress import Reporter
from synco_fast.training.run_folder import Summary, close_run, describe_run
from synco_fast.training.stopping import Stopping
from synco_fast.training.throughput import Throughput

__all__ = ["Trainer"]


class Trainer:
    """One run: builds everything from a configuration, trains, evaluates, leaves a self-describing folder.

    In a job of several processes each builds a trainer. All of them train; the first alone evaluates, writes, speaks.

    Args:
        config: What to do.
        folder: The run folder; made when the run begins.
        resume: A checkpoint or a run folder to go on from, also one that another number of processes wrote.
        console: Where progress is shown.
        control: What the processes of the job agree by; by default there is one.

    Raises:
        UserError: Anything in the configuration, the data or the checkpoint that cannot work; before the
            first step wherever it can be known by then.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        resume: Path | None = None,
        console: Console | None = None,
        control: Control | None = None,
    ) -> None:
        self.config, self.folder = config, folder
        self.control = control or Control(Place())
        self.place = self.control.place
        self.console = (console or Console()) if self.place.first else Console(quiet=True)
        resolve_device(config.training.device)  # before a source is read, which can take long
        self.source: Source = open_source(config.data.source, config.data.limits)
        check_evaluation(config.evaluation, self.source)
        train = share_of(self.source.train, config.data.share)
        steps_per_epoch = len(train) // config.training.batch
        self._notes: list[str] = self.source.notes
        self.reporter: Reporter
        self.engine = Engine(config, steps_per_epoch, self.place, note=self._warn)
        self.device, self.method = self.engine.device, self.engine.method
        self.pipeline = build_pipeline(
            train,
            config.augment,
            batch=config.training.batch,
            seed=config.seed,
            name=config.data.pipeline,
            device=self.device,
            dtype=self.engine.precision.dtype,
            workers=config.data.workers,
            decode=config.data.decode,
            rank=self.place.rank,
            world=self.place.world,
        )
        self.steps_per_epoch = len(self.pipeline)
        self.steps = self.steps_per_epoch * config.training.epochs
        if config.training.max_steps is not None:
            self.steps = min(self.steps, config.training.max_steps)
        self.step = 0
        self.evaluated_at = -1
        self._save_due = False
        self.broken = BrokenImages(len(train), config.data.max_broken, self._warn)
        self.throughput = Throughput(config.training.batch, self.engine.settling)
        self.stopping = Stopping(self.control, config.training.max_time)
        if resume is not None:
            self._load(resume)
        if self.engine.game is not None:
            self._notes += self.engine.game.prepare(train, config.data.workers, fresh=self.step == 0)

    # -- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Summary:
        """Train to the end, or until SIGTERM, SIGINT or the budget asks to stop; then write a checkpoint and pictures.

        Raises:
            DivergedError: Too many steps in a row had no finite gradient; the last good checkpoint is kept.
            DataError: More images are broken than ``data.max_broken`` allows.
            LostProcessError: Another process of the job is gone.
        """
        if self.place.first:
            describe_run(self.folder, self.config)
        self.log: MetricLog = open_log(self.folder, self.step, self.config, writes=self.place.first)
        self.reporter = Reporter(self.console, self.steps, self.step)
        for note in self._notes:
            self._warn(note)
        try:
            with self.stopping.on_signals():
                self._evaluate_if_due()
                while self.step < self.steps and not self.stopping.agreed:
                    self._train_epoch(self.step // self.steps_per_epoch)
                    # A run stopped right at the end of an epoch is evaluated there when it goes on.
                    if not self.stopping.agree():
                        self._evaluate_if_due()
                    self._save()
        except RuntimeError as error:
            if self.place.world > 1 and lost_process(error):
                raise self._lost(error) from error
            raise
        finally:
            self.pipeline.close()
            self.reporter.close()
            self.log.close()
        return self._finish()

    def _train_epoch(self, epoch: int) -> None:
        """Train from the current step to the end of its epoch, the end of the run, or a stop."""
        training = self.config.training
        self.pipeline.set_epoch(epoch, self.step - epoch * self.steps_per_epoch)
        self.method.module().train()
        title = f"epoch {epoch + 1}/{training.epochs}"
        pairs = self.folder / "plots" / "pairs.png"
        undrawn = self.place.first and not pairs.exists()
        batches = iter(self.pipeline)
        self.throughput.begin()
        while self.step < min(self.steps, (epoch + 1) * self.steps_per_epoch) and not self.stopping.agreed:
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            self.broken.replaced(batch.corrupt)
            if undrawn:
                draw_pairs(batch.as_pixels(self.config.augment), pairs)
                undrawn = False
            self._train_step(batch, epoch)
            self.throughput.step(waited)
            self.reporter.step(self.step, title)
            log_due = self.step % training.log_every == 0 or self.step == self.steps
            if log_due or self.device.type == "cpu":
                self._check_skipped()
            if log_due:
                self._write_figures(title)
            self.stopping.after_step(self.step)
            every = training.checkpoint_every
            if self._save_due or (every and self.step % every == 0):
                paused = time.perf_counter()
                self._save()
                self.throughput.pause(time.perf_counter() - paused)
        self.throughput.take()

    def _train_step(self, batch: Batch, epoch: int) -> None:
        self.engine.step(batch, self.step, epoch)
        self.step += 1

    def _warn(self, line: str) -> None:
        if hasattr(self, "reporter"):
            self.reporter.note(line, "yellow")
        else:
            self._notes.append(line)

    # -- figures ------------------------------------------------------------------------------------------------

    def _write_figures(self, title: str) -> None:
        speed = self.throughput.take()
        values = self.engine.means.take()
        values |= {"epoch": self.step / self.steps_per_epoch, "lr": self.engine.rate(self.step - 1), **speed}
        values |= monitors(self.engine, self.step)
        if "images_per_second" in values and "loss" in values:
            self.reporter.figures(self.step, title, values)
        warning = self.engine.game.figures(values, self.step) if self.engine.game is not None else None
        if warning:
            self._warn(warning)
        self.log.write("train", self.step, values)

    def _check_skipped(self) -> int:
        """How many steps in a row were left out up to now.

        Raises:
            DivergedError: Leaving them out no longer helps: they are more than allowed, a weight is no number, or the
                run ends with them.
        """
        _, row, first = self.engine.skipped.read()
        allowed = row <= self.config.training.max_skipped and self.step < self.steps
        if not row or (allowed and self.engine.finite()):
            return row
        newest = checkpoints_in(self.folder / "checkpoints")
        kept = f"the last good checkpoint is {newest[0]}" if newest else "no checkpoint had been written"
        epoch = first // self.steps_per_epoch + 1
        rates = "optimizer.lr or generated.lr" if self.config.method.name == "generated" else "optimizer.lr"
        raise DivergedError(
            f"loss: found a gradient that is not finite at step {first + 1} (epoch {epoch}) and {row - 1} more after "
            f"it, expected {self.config.training.max_skipped} in a row (training.max_skipped), none at the end, and "
            f"weights that are numbers; {kept}; try a lower {rates}, or optimizer.clip"
        )

    # -- evaluation ---------------------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> None:
        """Evaluate before the first step, every so many epochs, and at the end; never twice at one step."""
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        if self.engine.game is not None and self.place.first:
            self.engine.game.draw(self.folder / "plots", self.step)
        every = self.config.evaluation.every
        due = self.step == self.steps or (rest == 0 and epoch % max(1, every) == 0)
        if every and due and self.evaluated_at != self.step:
            self._evaluate()

    def _evaluate(self) -> None:
        """The kNN accuracy of the query encoder's backbone on the held-out split, into the log."""
        self.engine.statistics.average()
        self.evaluated_at, epochs = self.step, self.step / self.steps_per_epoch
        if self.place.first:
            result = evaluate_backbone(
                self.method.encoder.backbone,
                self.source,
                self.config.augment,
                self.config.evaluation,
                device=self.device,
                workers=self.config.data.workers,
            )
            self.broken.left_out(result.broken)
            self.log.write("evaluation", self.step, {"epoch": epochs, "knn": result.accuracy})
            self.reporter.note(f"epoch {epochs:g}: kNN {result.accuracy:.1%} on {result.queries:,} held-out images")
        self.control.of_first(None)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write everything that decides the future of the run; where the last step was left out, after a better one."""
        self._save_due = self._check_skipped() > 0
        self._check_agreement()
        if self._save_due:
            return
        self.broken.share(self.control)
        state = {
            "config": self.config.model_dump(mode="json"),
            **self.engine.state_dict(),
            **self.throughput.state_dict(),
            "steps_per_epoch": self.steps_per_epoch,
            "evaluated_at": self.evaluated_at,
            "broken": self.broken.state_dict(),
        }
        if self.place.first:
            save_checkpoint(self.folder / "checkpoints", self.step, state, keep=self.config.training.keep)
        self.control.of_first(None)

    def _check_agreement(self) -> None:
        """Queue and weights must be the same on every process."""
        if self.place.world == 1:
            return
        found = self.control.everyone(self.engine.fingerprint())
        other = [rank for rank, value in enumerate(found) if value != found[0]]
        if other:
            raise LostProcessError(
                f"processes: found another queue or other weights on rank {other[0]} than on rank 0 at step "
                f"{self.step}, expected the same on all; {self._how_to_go_on()}"
            )

    def _load(self, resume: Path) -> None:
        if resume.is_dir() and (resume / "config.yaml").exists() and not checkpoints_in(resume / "checkpoints"):
            self._notes.append(f"{resume} holds no checkpoint yet: starting at the first step")
            return
        state, path, problems = find_checkpoint(resume)
        self._notes += [f"{problem}; going on from an older one" for problem in problems]
        load_weights(self.method.module(), state["method"], path)
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise CheckpointError(
                f"{path}: found {state['steps_per_epoch']} steps an epoch, expected {self.steps_per_epoch}: a run goes "
                "on with the batch and the number of images that it began with"
            )
        self.engine.load_state_dict(state)
        self.step, self.evaluated_at = state["step"], state["evaluated_at"]
        self.broken.load_state_dict(state["broken"])
        self.throughput.load_state_dict(state)
        self._notes.append(f"resumed from {path} at step {self.step} of {self.steps}")

    # -- end ----------------------------------------------------------------------------------------------------

    def _how_to_go_on(self) -> str:
        newest = checkpoints_in(self.folder / "checkpoints")
        return (
            f"the newest checkpoint is {newest[0]}: go on with --resume {self.folder}"
            if newest
            else "no checkpoint had been written"
        )

    def _lost(self, error: RuntimeError) -> LostProcessError:
        reason = str(error).strip().splitlines()[0][:160]
        return LostProcessError(
            f"processes: rank {self.place.rank} lost the others at step {self.step + 1} ({reason}), expected all "
            f"{self.place.world} to the end; {self._how_to_go_on()}"
        )

    def _finish(self) -> Summary:
        if self.engine.game is not None and self.place.first:
            self.engine.game.draw_curves(self.folder)
        summary = close_run(
            self.folder,
            self.config,
            self.source,
            steps_per_epoch=self.steps_per_epoch,
            step=self.step,
            finished=not self.stopping.agreed,
            throughput=self.throughput,
            broken=len(self.broken),
            writes=self.place.first,
        )
        self.control.of_first(None)
        return summary
