"""The engine of a training step: wrapped encoders, gradients, optimizer, batch-norm statistics, extra step."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from synco_fast.config import Config
from synco_fast.data.pipelines.base import Batch, normalise
from synco_fast.data.seeding import derive_seed
from synco_fast.methods.base import Encoders, Method, RunInfo, StepInputs, Views
from synco_fast.methods.build import build_method
from synco_fast.models.encoder import Encoder
from synco_fast.runtime.checkpoint import load_optimizer
from synco_fast.runtime.distributed import DistEnv
from synco_fast.runtime.finite import not_finite
from synco_fast.runtime.names import EngineName
from synco_fast.runtime.optim_step import OptimStep, SkippedSteps
from synco_fast.runtime.phases import phase
from synco_fast.runtime.precision import Precision, memory_format, resolve_device
from synco_fast.training.run.metrics import RunningMeans
from synco_fast.training.step.compiled import GRAPH_WARMUP, Compiled, GraphedStep, allow_shapes, keep_compile_cache
from synco_fast.training.step.forms import Form
from synco_fast.training.step.optimizer import build_optimizer, key_momentum, learning_rate
from synco_fast.training.step.parallel import DDP_GRAPH_WARMUP, on_all_processes, works_on_all
from synco_fast.training.step.statistics import RunningStatistics

__all__ = ["Engine"]

_SETTLING_STEPS = 3
_MIB = 1 << 20


class Engine:
    """Everything that a training step updates, built from a configuration.

    Args:
        config: The configuration.
        steps_per_epoch: Steps per epoch.
        env: Rank of this process; its process group must be initialised.
        note: Called with a line about each setting that is not available here.

    Attributes:
        device: The device.
        method: All networks, and the queue where there is one.
        encode: The method's wrapped networks.
        means: Metrics averaged since the last `RunningMeans.pop`.
        note: Called with a line about each setting that is not available here.
        skipped: Counts the steps that were skipped.
        forms: Implementations of loss, batch norm and EMA update, set by `choose_forms`.

    Raises:
        ConfigError: The configuration does not work here.
    """

    def __init__(
        self,
        config: Config,
        steps_per_epoch: int,
        env: DistEnv = DistEnv(),  # noqa: B008 - frozen
        *,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        training, optimizer = config.training, config.optimizer
        self.config, self.env, self.note = config, env, note
        self.forms: dict[str, Form] = {}
        self.device = resolve_device(training.device)
        self.precision = Precision(training.precision, self.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = training.cudnn_benchmark
        self.method: Method = build_method(config, processes=env.world).to(self.device)
        self.layout = memory_format(self.method, training.channels_last)
        self.method.prepare(
            RunInfo(self.device, steps_per_epoch, processes=env.world, autocast=self.precision.autocast_unscaled)
        )
        self.trainable = self.method.trainable
        for part in self.trainable.modules():
            if isinstance(part, Encoder) and part.remark:
                note(part.remark)
        self.optimizer = build_optimizer(self.trainable, optimizer, lr=config.learning_rate, device=self.device)
        self.update = OptimStep(self.optimizer, scaled=self.precision.scaled, clip=optimizer.clip, device=self.device)
        self.statistics = RunningStatistics(*self.method.statistics)
        self.skipped = SkippedSteps(self.device)
        self.means = RunningMeans()
        #: What is infinite from the start, such as a mask, is no sign of divergence.
        self._unbounded = {name for name, value in self._named() if not_finite([(name, value)])}
        self.steps = steps_per_epoch * training.epochs
        self.warmup = round(optimizer.warmup_epochs * steps_per_epoch)
        self._query = on_all_processes(
            self.trainable, self.device, processes=env.world, micro_batches=training.accumulate
        )
        self._compiled: tuple[Compiled, Compiled] | None = None
        self._run: Callable[[StepInputs, int, int, float], None] = self._compute
        self.use(training.engine)

    # -- how a step runs ----------------------------------------------------------------------------------------

    def use(self, name: EngineName) -> None:
        """Switch to another engine from the next step on; ``auto`` is eager until something else is chosen.

        If it does not work here, one line says so and the step runs without it. A CUDA graph is captured again.
        """
        compiled, graph = name.startswith("compile"), name.endswith("graph")
        query: Callable[..., Tensor] = self._query
        key: Callable[..., Tensor] = _no_target if self.method.target is None else self.method.target
        if compiled:
            if self._compiled is None:
                keep_compile_cache()
                allow_shapes(len(self.config.augment.sides))
                self._compiled = (
                    Compiled(query, "the query encoder", lambda line: self.note(line)),
                    Compiled(key, "the key encoder", lambda line: self.note(line)),
                )
            query, key = self._compiled
        self._bare = query, key
        self.encode = Encoders(query=self._from_pixels(query), key=self._from_pixels(key))
        self._run, self.graphed = self._compute, False
        if graph:
            reason = self.uncapturable()
            if reason:
                self.note(f"CUDA graph disabled: {reason}")
                return
            self.graphed = True
            self._run = GraphedStep(
                self._compute,
                self.device,
                self.note,
                warmup=self._graph_warmup,
                agree=lambda works: works_on_all(works, self.device),
            )
            self._rates_on_device()

    def release(self) -> None:
        """Free the captured steps: NCCL waits, without end, for graphs of its exchanges before it closes."""
        if isinstance(self._run, GraphedStep):
            self._run.release()

    @property
    def form(self) -> EngineName:
        """The engine in use: the requested one without what failed or is not available."""
        compiled = self._bare[0] is not self._query and all(part.works for part in self._compiled or ())
        graphed = isinstance(self._run, GraphedStep) and self._run.works
        if compiled:
            return "compile+graph" if graphed else "compile"
        return "graph" if graphed else "eager"

    @property
    def _graph_warmup(self) -> int:
        return GRAPH_WARMUP if self.env.world == 1 else DDP_GRAPH_WARMUP

    def uncapturable(self) -> str | None:
        """Why a step cannot be captured as a CUDA graph; None if it can."""
        if self.device.type != "cuda":
            return "no GPU"
        if self.update.waits:
            return f"{self.config.optimizer.name} decides on the host whether to skip a step"
        return None

    @property
    def _rates_are_tensors(self) -> bool:
        """Whether the optimizer reads its rate on the device: in a captured step, or always."""
        return self.graphed or isinstance(self.optimizer.defaults["lr"], Tensor)

    def _rates_on_device(self) -> None:
        """Keep the learning rate on the device, where a captured step reads it."""
        for group in self.optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(self.device)

    def _from_pixels(self, network: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def embed(views: Tensor) -> Tensor:
            return network(normalise(views, self.config.augment, self.layout, self.precision.dtype))

        return embed

    @property
    def settling(self) -> int:
        """First steps that compile, capture and fill caches; excluded from throughput."""
        may = self.config.training.engine == "auto" and self.device.type == "cuda"
        return self.settling_of("graph" if self.graphed or may else "eager")

    def settling_of(self, name: EngineName) -> int:
        """The settling steps of an engine."""
        return _SETTLING_STEPS + (self._graph_warmup + 1 if name.endswith("graph") else 0)

    # -- a step -------------------------------------------------------------------------------------------------

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(
            step,
            peak=self.config.learning_rate,
            steps=self.steps,
            warmup=self.warmup,
            schedule=self.config.optimizer.schedule,
        )

    def momentum(self, step: int) -> float:
        """The EMA momentum at a step."""
        model = self.config.model
        return key_momentum(step, base=model.momentum, steps=self.steps, schedule=model.momentum_schedule)

    def _set_rate(self, step: int) -> None:
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            if self._rates_are_tensors:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self, batch: Batch, step: int, epoch: int) -> None:
        """Train on this process's part of a batch; never waits for a GPU.

        Args:
            batch: Views, uint8 or normalised.
            step, epoch: Counted from 0.
        """
        self._set_rate(step)
        # Seeding by step and rank: dropout and stochastic depth then have no state to save.
        torch.manual_seed(derive_seed(self.config.seed, step, self.env.rank))
        batch = batch.to(self.device)
        inputs = self.method.shard(Views(batch.first, batch.second, batch.image_ids), step=step)
        self._run(inputs, step, self.method.graph_key(epoch), self.momentum(step))

    def _compute(self, inputs: StepInputs, step: int | Tensor, epoch: int, momentum: float | Tensor) -> None:
        """The step from views on the device to updated weights; always the same launches."""
        micro_batches = self.config.training.accumulate
        before = self.statistics.copy()
        if self.config.model.momentum_schedule == "constant":
            momentum = self.config.model.momentum
        with self.precision.autocast():
            self.method.begin_step(inputs, self.encode, momentum=momentum, micro_batches=micro_batches)
        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, Tensor] = {}
        for number in range(micro_batches):
            with self._without_exchange(number < micro_batches - 1):
                with self.precision.autocast():
                    output = self.method.loss(
                        inputs, self.encode, step=step, epoch=epoch, micro_batch=number, micro_batches=micro_batches
                    )
                with phase("backward"):
                    self.update.backward(output.loss if micro_batches == 1 else output.loss / micro_batches)
            if micro_batches == 1:
                metrics = output.metrics
                continue
            for name, value in output.metrics.items():
                metrics[name] = metrics[name] + value / micro_batches if number else value / micro_batches
        with phase("optimizer"):
            step_ok, norm = self.update.step()
            self.statistics.restore(before, step_ok)
        self.method.after_step(step_ok)
        step_ok, further = self.method.extra_step(inputs, self.encode, step=step, epoch=epoch, step_ok=step_ok)
        self.means.add({**metrics, **further, "gradient_norm": norm}, step_ok)
        self.skipped.add(step_ok, step)

    def encoders_alone(self, first: Tensor, second: Tensor) -> None:
        """The lower bound of a step: queries forward and backward, keys forward, nothing else.

        Args:
            first, second: Normalised views, (b, 3, H, W).
        """
        with self.precision.autocast():
            q = self._bare[0](first)
            if self.method.target is not None:
                with torch.no_grad():
                    self._bare[1](second)
        self.optimizer.zero_grad(set_to_none=True)
        q.float().square().mean().backward()

    def _without_exchange(self, without: bool) -> AbstractContextManager[None]:
        if without and isinstance(self._query, DistributedDataParallel):
            return self._query.no_sync()
        return nullcontext()

    # -- figures ------------------------------------------------------------------------------------------------

    def not_finite(self) -> str | None:
        """The first parameter, buffer or optimizer state that holds NaN or infinity; waits for the device."""
        return not_finite(pair for pair in self._named() if pair[0] not in self._unbounded)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that a step updates, by name."""
        yield from self.method.state_dict().items()
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.trainable.named_parameters()}
        for parameter, kept in self.optimizer.state.items():
            for what, value in kept.items():
                if isinstance(value, Tensor):
                    yield f"{what} of {names.get(parameter, 'a parameter')}", value.to(self.device)

    def figures(self, step: int) -> dict[str, float]:
        """Further values of a log line; waits for the device.

        Args:
            step: Completed steps.

        Returns:
            ``parameter_norm`` of the trainable parameters; ``key_momentum`` with an EMA; ``skipped`` steps since the
            start; ``loss_scale`` with loss scaling; on a GPU ``memory_mib``, the peak of allocated memory since the
            last call, and ``memory_reserved_mib``; on a CPU ``memory_mib``, the peak of the process.
        """
        values = {"parameter_norm": float(torch.nn.utils.get_total_norm(list(self.trainable.parameters())))}
        if self.method.target is not None:
            values["key_momentum"] = self.momentum(step - 1)
        values["skipped"] = float(self.skipped.read()[0])
        if self.update.scale is not None:
            values["loss_scale"] = float(self.update.scale)
        if self.device.type == "cuda":
            values["memory_mib"] = torch.cuda.max_memory_allocated(self.device) / _MIB
            values["memory_reserved_mib"] = torch.cuda.max_memory_reserved(self.device) / _MIB
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            values["memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return values

    # -- state --------------------------------------------------------------------------------------------------

    def replica_hash(self) -> int:
        """A hash of everything in `Method.replicated`, equal on two processes only if all bits agree."""
        local = {id(buffer) for module in self.method.statistics for buffer in module.buffers()}
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for module in self.method.replicated.values():
            for tensor in [*module.parameters(), *(buffer for buffer in module.buffers() if id(buffer) not in local)]:
                kind = torch.int16 if tensor.element_size() == 2 else torch.int32
                words = tensor.detach().contiguous().reshape(-1).view(kind).to(torch.int64)
                places = torch.arange(1, 2 * len(words), 2, device=self.device)
                total = total * 31 + (words * places).sum()
        return int(total)

    def state_dict(self) -> dict[str, Any]:
        """The state of training, independent of the number of processes; called by all at the same step."""
        self.statistics.average()
        extra = self.method.extra_state()
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.update.state_dict(),
            "means": self.means.state_dict(),
            "skipped": self.skipped.state_dict(),
            **({"extra": extra} if extra else {}),
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Load the checkpoint at ``path``, except the method's weights, which the caller loads.

        Raises:
            CheckpointError: The optimizer's state is that of another optimizer or of other parameters.
        """
        load_optimizer(self.optimizer, state["optimizer"], path)
        if self._rates_are_tensors:
            self._rates_on_device()
        if state["step"]:
            self._set_rate(state["step"] - 1)  # a checkpoint that is written before the next step holds it
        self.update.load_state_dict(state["precision"])
        self.means.load_state_dict(state["means"], self.device)
        if "extra" in state:
            self.method.load_extra_state(state["extra"], path)
        if "skipped" in state:
            self.skipped.load_state_dict(state["skipped"])


def _no_target(views: Tensor) -> Tensor:
    raise RuntimeError("encode.key: this method has no target network")
