"""Pretraining as a task: source, pipeline, engine, and periodic evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from synco_fast.config import Config, TrainingConfig, build_config
from synco_fast.data.pipelines.base import Batch, Pipeline
from synco_fast.data.sources.open import Source, open_source
from synco_fast.data.sources.splits import share_of
from synco_fast.data.workers import machine_cores
from synco_fast.export.initial import load_initial, read_initial
from synco_fast.methods.schedule import note_without_synthetic
from synco_fast.runtime.checkpoint import load_weights
from synco_fast.runtime.distributed import DistEnv, HostGroup
from synco_fast.runtime.errors import CheckpointError, ConfigError, DataError
from synco_fast.runtime.files import read_json, write_json
from synco_fast.runtime.migrations import OldLayoutWarning
from synco_fast.runtime.precision import resolve_device
from synco_fast.training.bad_images import CorruptImages
from synco_fast.training.changes import explain_changes
from synco_fast.training.observers import Evaluate, Monitor
from synco_fast.training.run.metrics import read_metrics
from synco_fast.training.run.plots import draw_pairs, is_whole
from synco_fast.training.run.run_folder import Summary, close_run
from synco_fast.training.run.task import Notes, TrainerSettings
from synco_fast.training.run.throughput import Throughput
from synco_fast.training.run.writers import TRACKERS, MetricLog
from synco_fast.training.same_images import SameImages
from synco_fast.training.step.engine import Engine
from synco_fast.training.step.forms import Form, choose_forms, chosen_here, forms_state
from synco_fast.training.tuning.autotune import Auto
from synco_fast.training.tuning.trials import try_largest

__all__ = ["Pretraining"]

#: More would hang a machine before the first batch; a network disk that is slow is read well by fewer.
_WORKERS_A_CORE = 32


class Pretraining:
    """Pretraining of an encoder by the method of a configuration.

    Args:
        config: The configuration.
        control: Communication between the processes; one process by default.
        evaluate: The periodic evaluation, such as `synco_fast.evaluation.knn.PeriodicKnn`; without one,
            nothing is evaluated, regardless of ``evaluation.every``.
        monitor: Adds figures to the log and warns, such as `synco_fast.evaluation.monitor.HealthMonitor`.
        limits: Its ``max_steps`` and ``max_time`` apply to this start of the run alone; the configuration's by default.

    Attributes:
        source: All images.
        engine: The engine of the steps.

    Raises:
        UserError: The configuration or the data does not work; raised before the first step wherever possible.
    """

    def __init__(
        self,
        config: Config,
        *,
        control: HostGroup | None = None,
        evaluate: Evaluate | None = None,
        monitor: Monitor | None = None,
        limits: TrainingConfig | None = None,
    ) -> None:
        training = config.training
        self.config, self.control = config, control or HostGroup(DistEnv())
        self.env = self.control.env
        self.note = Notes()
        resolve_device(training.device)  # before a source is read, which can take long
        self.source: Source = open_source(config.data.source, config.data.limits, config.data.stream)
        self._evaluate = evaluate if config.evaluation.every else None
        other = config.evaluation.source if self._evaluate is not None else None
        #: The images that the periodic evaluation takes.
        self._labelled = self.source if other is None else open_source(other, config.data.limits)
        self._monitor, self._resumed_at = monitor, 0
        if self._evaluate is not None:
            self._evaluate.check(config.evaluation, self._labelled)
        for line in self.source.notes:
            self.note(line)
        self._train = share_of(self.source.train, config.data.fraction)
        self._images = SameImages(self._train, config.data.source, self.control)
        self.engine = Engine(config, len(self._train) // training.batch, self.env, note=self.note)
        self.method, self.device, self.skipped = self.engine.method, self.engine.device, self.engine.skipped
        most = _WORKERS_A_CORE * machine_cores()
        if (config.data.workers or 0) > most:
            raise ConfigError(f"data.workers: found {config.data.workers}, expected up to {most} on this machine")
        self._auto = Auto(self.engine, self._train, self.control, self.note)
        self.steps_per_epoch = len(self.pipeline)
        steps, limits = self.steps_per_epoch * training.epochs, limits or training
        self.settings = TrainerSettings(
            steps=steps if training.max_steps is None else min(steps, training.max_steps),
            batch=training.batch,
            log_every=training.log_every,
            keep=training.keep,
            max_skipped=training.max_skipped,
            max_skipped_key="training.max_skipped",
            max_time=limits.max_time,
            settling=self.engine.settling,
            trackers={name: getattr(training, name) for name in TRACKERS},
            keep_best=training.keep_best,
            stop_at=limits.max_steps,
        )
        self.corrupt_images = CorruptImages(len(self._train), config.data.max_corrupt, self.note)
        self._kept: dict[str, Any] | None = None
        #: The highest kNN of a checkpoint so far.
        self._best_knn = 0.0
        #: The side of the views at hand, with progressive resizing.
        self._resized: int | None = None

    @property
    def pipeline(self) -> Pipeline:
        """The batches."""
        return self._auto.pipeline

    # -- the steps ----------------------------------------------------------------------------------------------

    def begin(self, folder: Path, *, fresh: bool) -> None:
        """Load the initial weights, choose the implementation of each part, and let the method read its data.

        Raises:
            CheckpointError: The initial weights cannot be read, or belong to another architecture.
        """
        self._folder = folder
        said = note_without_synthetic(self.config, -(-self.settings.steps // self.steps_per_epoch))
        if said is not None:
            self.note(said)
        model = self.config.model
        if fresh and model.init is not None:
            self.note(load_initial(self.method.encoder, read_initial(model.init, model), model), None)
            self.method.start_from_encoder()
        choose_forms(self.engine, self.control, kept=self._kept)
        self._auto.begin(self._kept)
        for line in self.method.begin_run(self._train, self.config.data.workers, fresh=fresh):
            self.note(line)
        if self._monitor is not None:
            lines = read_metrics(folder) if self._resumed_at and self.env.is_main else []
            self._monitor.begin(self._train.labels, [line for line in lines if line["step"] <= self._resumed_at])

    def round_end(self, step: int) -> int:
        """The end of the epoch."""
        return (step // self.steps_per_epoch + 1) * self.steps_per_epoch

    def view_size(self, step: int) -> int | None:
        """That of the epoch, with progressive resizing."""
        recipe = self.config.augment
        return recipe.size_at(step // self.steps_per_epoch) if recipe.grows else None

    def batches(self, step: int) -> Iterator[Batch]:
        """The batches from a step to the end of its epoch; plots the run's first pairs.

        Before the first ones of a long run, what its configuration leaves to ``auto`` is measured.
        """
        self.method.train()
        measured = self._auto.settle(self.settings.end - step, self._folder, whole=self.settings.steps - step)
        if measured and self.env.is_main:
            environment = self._folder / "environment.json"
            write_json(environment, {**read_json(environment), **self.facts})
        epoch, done = divmod(step, self.steps_per_epoch)
        if self._resized is None:
            try_largest(self.engine, step)
        if self._resized != self.view_size(step):
            self._resized = self.view_size(step)
            self.note(f"epoch {epoch + 1}: views of {self._resized} pixels", None)
        self.pipeline.set_epoch(epoch, done)
        pairs = self._folder / "plots" / "pairs.png"
        undrawn = self.env.is_main and not is_whole(pairs)
        for batch in self.pipeline:
            self.corrupt_images.replaced(batch.corrupt)
            if undrawn:
                draw_pairs(batch.as_pixels(self.config.augment), pairs)
                undrawn = False
            yield batch

    def train_step(self, batch: Batch, step: int) -> None:
        """One step of the engine.

        Raises:
            DataError: The batch has another size than this rank's share; collectives would abort.
        """
        share = self.settings.batch // self.env.world
        if len(batch.image_ids) != share:
            raise DataError(
                f"batch: found {len(batch.image_ids)} images on rank {self.env.rank} at step {step + 1}, expected "
                f"{share}, as on every rank"
            )
        self.engine.step(batch, step, step // self.steps_per_epoch)

    def not_finite(self) -> str | None:
        """The first parameter or buffer that holds NaN or infinity."""
        return self.engine.not_finite()

    def replica_hash(self) -> int:
        """That of the engine."""
        return self.engine.replica_hash()

    @property
    def facts(self) -> dict[str, Any]:
        """``forms``: the implementation of each part of a step, and why."""
        config = self.config
        forms = {
            **self.engine.forms,
            "precision": Form(self.engine.precision.name, f"training.precision={config.training.precision}"),
            "views": Form(self._auto.name, f"data.pipeline={config.data.pipeline}"),
            "engine": Form(self.engine.form, f"training.engine={config.training.engine}"),
        }
        return {"forms": {part: asdict(form) for part, form in forms.items()}}

    # -- what is shown and logged -------------------------------------------------------------------------------

    def title(self, step: int) -> str:
        """The epoch, and the side of its views with progressive resizing."""
        size = self.view_size(step)
        shown = "" if size is None else f", {size} px"
        return f"epoch {step // self.steps_per_epoch + 1}/{self.config.training.epochs}{shown}"

    def figures(self, step: int, speed: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """Means of the method's metrics, learning rate, throughput, and current values."""
        values = self.engine.means.pop()
        values |= {"epoch": step / self.steps_per_epoch, "lr": self.engine.rate(step - 1), **speed}
        size = self.view_size(step - 1)
        if size is not None:
            values["view_size"] = float(size)
        values |= self.engine.figures(step)
        further, warnings = self.method.figures(values, step)
        values |= further
        if self._monitor is not None:
            recent = self.method.recent((step - 1) // self.steps_per_epoch)
            values |= self._monitor.measure(values, recent)
            warnings += self._monitor.look(values)
        for line in warnings:
            self.note(line)
        if "images_per_second" not in values:
            return values, []
        words = [form.format(values[name]) for name, form in self.method.headline.items() if name in values]
        words += [f"{values['images_per_second']:,.0f} img/s", f"data wait {values['data_wait']:.0%}"]
        return values, words

    def artifacts(self, step: int) -> None:
        """Those of the method."""
        self.method.artifacts(self._folder / "plots", step)

    def evaluation_due(self, step: int) -> bool:
        """Before the first step, every ``evaluation.every`` epochs, and at the end."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        every = self.config.evaluation.every
        return self._evaluate is not None and (step == self.settings.steps or (rest == 0 and epoch % every == 0))

    def evaluate(self, step: int, log: MetricLog) -> float | None:
        """Log the accuracy of the encoder's backbone on the held-out split, which is the score of a checkpoint."""
        self.engine.statistics.average()
        if self._evaluate is None or not self.env.is_main:
            return None
        config, epochs = self.config, step / self.steps_per_epoch
        result = self._evaluate(
            self.method.encoder.backbone,
            self._labelled,
            config.augment,
            config.evaluation,
            device=self.device,
            pipeline=config.data.pipeline,
            workers=config.data.workers,
        )
        self.corrupt_images.excluded(result.corrupt)
        values = {"epoch": epochs, "knn": result.accuracy, **result.figures}
        if config.training.keep_best and step:
            values["best_knn"] = self._best_knn = max(self._best_knn, result.accuracy)
        log.write("evaluation", step, values)
        self.note(f"epoch {round(epochs, 2):g}: kNN {result.accuracy:.1%} on {result.queries:,} held-out images", None)
        for line in self._monitor.look(values) if self._monitor is not None else []:
            self.note(line)
        return result.accuracy

    def describe_step(self, step: int) -> str:
        """Number and epoch, counted from 1."""
        return f"{step + 1} (epoch {step // self.steps_per_epoch + 1})"

    def advice(self) -> str:
        """What to try if training diverges."""
        return f"a lower {' or '.join(self.method.rates)}, or optimizer.clip"

    # -- state --------------------------------------------------------------------------------------------------

    def checkpoint_due(self, step: int) -> bool:
        """At the end of every epoch, and every ``training.checkpoint_every`` steps."""
        every = self.config.training.checkpoint_every
        return step % self.steps_per_epoch == 0 or bool(every and step % every == 0)

    def state_dict(self) -> dict[str, Any]:
        """Configuration, engine, position in the epoch, and the corrupt images."""
        self.corrupt_images.share(self.control)
        return {
            "config": self.config.model_dump(mode="json"),
            **self.engine.state_dict(),
            "steps_per_epoch": self.steps_per_epoch,
            "stream": self.method.stream,
            "corrupt": self.corrupt_images.state_dict(),
            "training_images": self._images.state_dict(),
            "forms": forms_state(self.engine),
            **self._auto.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Load from a checkpoint.

        Raises:
            CheckpointError: It is damaged, or its architecture differs.
            ConfigError: A setting that cannot change during a run differs, the length of its epochs differs, or its
                synthetic negatives were drawn by an older version.
        """
        if "method" not in state:
            raise CheckpointError(f"{path}: found no encoder in it, expected a checkpoint of pretrain")
        changes = explain_changes(_settings(state, path), self.config.model_dump(mode="json"), path)
        # `auto` is for new runs; on the same device a resumed run keeps its dtype.
        keep = self.config.method.queue_dtype == "auto" and chosen_here(state.get("forms", {}), self.device)
        notes = self.method.adapt_state(state["method"], keep=keep) if isinstance(state["method"], dict) else []
        load_weights(self.method, state["method"], path)
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise ConfigError(
                f"{path}: found {state['steps_per_epoch']} steps an epoch, expected {self.steps_per_epoch}: resume "
                "with the training.batch and the number of images that the run started with"
            )
        if state.get("stream", 1) != self.method.stream:
            raise ConfigError(
                f"{path}: found synthetic negatives drawn by version {state.get('stream', 1)}, expected version "
                f"{self.method.stream}: start a new run; this one can be evaluated and exported"
            )
        self.engine.load_state_dict(state, path)
        self.corrupt_images.load_state_dict(state["corrupt"])
        self._resumed_at = state["step"]
        self._best_knn = (state.get("best") or {}).get("score", 0.0)
        forms = state.get("forms", {})
        self._kept = {**forms, "names": dict(forms.get("names", {}))}
        self._auto.load_state_dict(state)
        others = self._images.changes_since(state.get("training_images"), path)
        for line in [*notes, *(line for line in (changes, others) if line)]:
            self.note(line)

    def close(self) -> None:
        """Free what the engine captured, and close the pipeline."""
        self.engine.release()
        self.pipeline.close()

    def summary(
        self, step: int, *, finished: bool, throughput: Throughput, best: dict[str, Any] | None = None
    ) -> Summary:
        """Draw the curves and write ``summary.json``."""
        if self.env.is_main:
            self.method.artifacts(self._folder / "plots", step, closing=True)
        return close_run(
            self._folder,
            self.config,
            self._labelled,
            steps_per_epoch=self.steps_per_epoch,
            step=step,
            finished=finished,
            throughput=throughput,
            corrupt=len(self.corrupt_images),
            forms=self.facts["forms"],
            best=best,
            writes=self.env.is_main,
        )


def _settings(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint, with every key of today."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OldLayoutWarning)  # said already of config.yaml
            return build_config(state["config"]).model_dump(mode="json")
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: found settings in it that cannot be read ({error})") from error
