"""The training loop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from synco_fast.config import Config
from synco_fast.data.build import build_pipeline
from synco_fast.data.pipeline import Batch, normalise
from synco_fast.data.sources import Source, open_source
from synco_fast.errors import CheckpointError, DivergedError
from synco_fast.evaluation.protocol import evaluate_backbone
from synco_fast.methods.base import Views
from synco_fast.methods.build import build_method
from synco_fast.training.broken import BrokenImages
from synco_fast.training.checkpoint import checkpoints_in, find_checkpoint, load_weights, save_checkpoint
from synco_fast.training.checks import check_evaluation
from synco_fast.training.metrics import MetricLog, RunningMeans, read_metrics
from synco_fast.training.plots import draw_curves, draw_pairs
from synco_fast.training.precision import Precision, memory_format, resolve_device
from synco_fast.training.progress import Reporter
from synco_fast.training.run import Summary, describe_run, write_json
from synco_fast.training.schedule import learning_rate

__all__ = ["Trainer"]

#: Steps that compile kernels and fill caches; no throughput is counted in them.
_SETTLING_STEPS = 3


class Trainer:
    """One run: builds everything from a configuration, trains, evaluates, leaves a self-describing folder.

    Args:
        config: What to do.
        folder: The run folder; made when the run begins.
        resume: A checkpoint or a run folder to go on from.
        console: Where progress is shown.

    Raises:
        UserError, DataError: Anything in the configuration, the data or the checkpoint that cannot work; before the
            first step wherever it can be known by then.
    """

    def __init__(
        self, config: Config, folder: Path, *, resume: Path | None = None, console: Console | None = None
    ) -> None:
        self.config, self.folder = config, folder
        self.console = console or Console()
        self.device = resolve_device(config.training.device)
        self.precision = Precision(config.training.precision, self.device)
        self.source: Source = open_source(config.data.source)
        check_evaluation(config.evaluation, self.source)
        self.pipeline = build_pipeline(
            self.source.train,
            config.augment,
            batch=config.training.batch,
            seed=config.seed,
            name=config.data.pipeline,
            device=self.device,
            dtype=self.precision.dtype,
            workers=config.data.workers,
            decode=config.data.decode,
        )
        self.method = build_method(config).to(self.device)
        self.layout = memory_format(self.method, config.training.channels_last)
        optimizer = config.optimizer
        self.optimizer = torch.optim.SGD(
            self.method.encoder.parameters(),
            lr=config.learning_rate,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.steps_per_epoch = len(self.pipeline)
        self.steps = self.steps_per_epoch * config.training.epochs
        if config.training.max_steps is not None:
            self.steps = min(self.steps, config.training.max_steps)
        self.step = 0
        self.evaluated_at = -1
        self.broken = BrokenImages(len(self.source.train), config.data.max_broken, self._warn)
        self.means = RunningMeans()
        #: The first step whose loss was no number, on the device so that no step waits for it; -1 while there is none.
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.seconds = {"training": 0.0, "data": 0.0}
        self.images_timed = 0
        self._stop: int | None = None
        self._notes: list[str] = self.source.notes
        # For backbones with dropout or stochastic depth; everything else has generators of its own.
        torch.manual_seed(config.seed)
        if resume is not None:
            self._load(resume)

    # -- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Summary:
        """Train to the end, or until SIGTERM or SIGINT asks to stop; then write a checkpoint and the pictures.

        Raises:
            DivergedError: The loss was no number; the last good checkpoint is kept.
            DataError: More images are broken than ``data.max_broken`` allows.
        """
        describe_run(self.folder, self.config)
        self.log = MetricLog(self.folder, self.step)
        self.reporter = Reporter(self.console, self.steps, self.step)
        self._settled_at = self.step + _SETTLING_STEPS
        for note in self._notes:
            self._warn(note)
        try:
            with self._stop_on_signals():
                self._evaluate_if_due()
                while self.step < self.steps and self._stop is None:
                    self._train_epoch(self.step // self.steps_per_epoch)
                    # A run stopped right at the end of an epoch is evaluated there when it goes on.
                    if self._stop is None:
                        self._evaluate_if_due()
                    self._save()
        finally:
            self.pipeline.close()
            self.reporter.close()
            self.log.close()
        return self._finish()

    def _train_epoch(self, epoch: int) -> None:
        """Train from the current step to the end of its epoch, the end of the run, or a signal."""
        start = self.step - epoch * self.steps_per_epoch
        self.pipeline.set_epoch(epoch, start)
        self.method.train()
        timed_from, waited, timed_steps = time.perf_counter(), 0.0, 0
        title = f"epoch {epoch + 1}/{self.config.training.epochs}"
        pairs = self.folder / "plots" / "pairs.png"
        undrawn = not pairs.exists()
        batches = iter(self.pipeline)
        while self.step < min(self.steps, (epoch + 1) * self.steps_per_epoch) and self._stop is None:
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self.broken.replaced(batch.broken)
            if undrawn:
                draw_pairs(batch.as_pixels(self.config.augment), pairs)
                undrawn = False
            self._train_step(batch, epoch)
            timed_steps += 1
            if self.step <= self._settled_at:
                timed_from, waited, timed_steps = time.perf_counter(), 0.0, 0
            self.reporter.step(self.step, title)
            log_due = self.step % self.config.training.log_every == 0 or self.step == self.steps
            if log_due or self.device.type == "cpu":
                self._check_loss()
            if log_due:
                self._write_figures(title, timed_from, waited, timed_steps)
                timed_from, waited, timed_steps = time.perf_counter(), 0.0, 0
            every = self.config.training.checkpoint_every
            if every and self.step % every == 0:
                paused = time.perf_counter()
                self._save()
                timed_from += time.perf_counter() - paused
        self._count_time(timed_from, waited, timed_steps)

    def _train_step(self, batch: Batch, epoch: int) -> None:
        training, optimizer = self.config.training, self.config.optimizer
        rate = learning_rate(
            self.step,
            peak=self.config.learning_rate,
            steps=self.steps_per_epoch * training.epochs,
            warmup=round(optimizer.warmup_epochs * self.steps_per_epoch),
            schedule=optimizer.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(self.device)
        first, second = (normalise(view, self.config.augment, self.layout) for view in (batch.first, batch.second))
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast():
            output = self.method.training_step(Views(first, second, batch.images), step=self.step, epoch=epoch)
        self.precision.step(output.loss, self.optimizer)
        self.method.after_step()
        unfit = ~torch.isfinite(output.loss.detach()) & (self.bad_step < 0)
        self.bad_step.masked_fill_(unfit, self.step)
        self.means.add(output.metrics)
        self.step += 1

    def _warn(self, line: str) -> None:
        self.reporter.note(line, "yellow")

    # -- figures ------------------------------------------------------------------------------------------------

    def _write_figures(self, title: str, timed_from: float, waited: float, steps: int) -> None:
        spent = max(time.perf_counter() - timed_from, 1e-9)
        self._count_time(timed_from, waited, steps)
        values = self.means.take()
        values |= {
            "epoch": self.step / self.steps_per_epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "data_wait": waited / spent,
        }
        if steps:
            values["images_per_second"] = steps * self.config.training.batch / spent
            self.reporter.figures(self.step, title, values)
        self.log.write("train", self.step, values)

    def _count_time(self, timed_from: float, waited: float, steps: int) -> None:
        if steps:
            self.seconds["training"] += time.perf_counter() - timed_from
            self.seconds["data"] += waited
            self.images_timed += steps * self.config.training.batch

    def _check_loss(self) -> None:
        bad = int(self.bad_step)
        if bad < 0:
            return
        newest = checkpoints_in(self.folder / "checkpoints")
        kept = f"the last good checkpoint is {newest[0]}" if newest else "no checkpoint had been written"
        epoch = bad // self.steps_per_epoch + 1
        raise DivergedError(
            f"loss: found a value that is not finite at step {bad + 1} (epoch {epoch}), allowed finite ones; {kept}; "
            "try a lower optimizer.lr"
        )

    # -- evaluation ---------------------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> None:
        """Evaluate before the first step, every so many epochs, and at the end; never twice at one step."""
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        every = self.config.evaluation.every
        due = self.step == self.steps or (rest == 0 and epoch % max(1, every) == 0)
        if every and due and self.evaluated_at != self.step:
            self._evaluate()

    def _evaluate(self) -> None:
        """The kNN accuracy of the query encoder's backbone on the held-out split, into the log."""
        result = evaluate_backbone(
            self.method.encoder.backbone,
            self.source,
            self.config.augment,
            self.config.evaluation,
            device=self.device,
            workers=self.config.data.workers,
        )
        self.broken.left_out(result.broken)
        self.evaluated_at, epochs = self.step, self.step / self.steps_per_epoch
        self.log.write("evaluation", self.step, {"epoch": epochs, "knn": result.accuracy})
        self.reporter.note(f"epoch {epochs:g}: kNN {result.accuracy:.1%} on {result.queries:,} held-out images")

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _save(self) -> Path:
        """Write everything that decides the future of the run, unless the loss has stopped being a number."""
        self._check_loss()
        generators: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "config": self.config.model_dump(mode="json"),
            "method": self.method.module().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.precision.state_dict(),
            "generators": generators,
            "means": self.means.state_dict(),
            "steps_per_epoch": self.steps_per_epoch,
            "evaluated_at": self.evaluated_at,
            "broken": self.broken.state_dict(),
            "seconds": self.seconds,
            "images_timed": self.images_timed,
        }
        return save_checkpoint(self.folder / "checkpoints", self.step, state, keep=self.config.training.keep)

    def _load(self, resume: Path) -> None:
        if resume.is_dir() and (resume / "config.yaml").exists() and not checkpoints_in(resume / "checkpoints"):
            self._notes.append(f"{resume} holds no checkpoint yet: starting at the first step")
            return
        state, path, problems = find_checkpoint(resume)
        self._notes += [f"{problem}; going on from an older one" for problem in problems]
        load_weights(self.method.module(), state["method"], path)
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise CheckpointError(
                f"{path}: found {state['steps_per_epoch']} steps an epoch, allowed {self.steps_per_epoch}: a run goes "
                "on with the batch and the number of images that it began with"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.load_state_dict(state["precision"])
        torch.set_rng_state(state["generators"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["generators"]:
            torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)
        self.means.load_state_dict(state["means"])
        self.step, self.evaluated_at = state["step"], state["evaluated_at"]
        self.broken.load_state_dict(state["broken"])
        self.seconds, self.images_timed = dict(state["seconds"]), state["images_timed"]
        self._notes.append(f"resumed from {path} at step {self.step} of {self.steps}")

    # -- beginning and end --------------------------------------------------------------------------------------

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the current step; a second one ends it at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop = number

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _finish(self) -> Summary:
        lines = read_metrics(self.folder)
        knn = [line["knn"] for line in lines if line["kind"] == "evaluation"]
        classes = self.source.validation.classes if self.source.validation else None
        chance = 1 / len(classes) if classes and knn else None
        curves = self.folder / "plots" / "curves.png"
        config = self.config
        draw_curves(
            lines,
            curves,
            title=f"{config.method.name} on {config.data.source}, {config.model.backbone}, seed {config.seed}",
            steps_per_epoch=self.steps_per_epoch,
            chance=chance,
        )
        training = max(self.seconds["training"], 1e-9)
        newest = checkpoints_in(self.folder / "checkpoints")
        summary = Summary(
            method=config.method.name,
            source=config.data.source,
            epochs=self.step / self.steps_per_epoch,
            steps=self.step,
            finished=self._stop is None,
            knn_before=knn[0] if knn else None,
            knn_after=knn[-1] if len(knn) > 1 else None,
            chance=chance,
            images_per_second=self.images_timed / training,
            data_wait=self.seconds["data"] / training,
            training_seconds=self.seconds["training"],
            broken_images=len(self.broken),
            run=str(self.folder),
            checkpoint=str(newest[0]) if newest else "",
            curves=str(curves),
            pairs=str(self.folder / "plots" / "pairs.png"),
        )
        write_json(self.folder / "summary.json", summary.as_dict())
        return summary
