"""What one step does: encoders as they are wrapped, gradients, weights, statistics, queue."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from synco_fast.config import Config
from synco_fast.data.pipelines.base import Batch, normalise
from synco_fast.data.seeding import derive_seed
from synco_fast.generated.game import Game
from synco_fast.generated.method import Generated
from synco_fast.methods.base import Arranged, Method, Networks, StepOutput, Views
from synco_fast.methods.build import build_method
from synco_fast.runtime.distributed import Place
from synco_fast.runtime.optim_step import SkippedSteps, Update
from synco_fast.runtime.phases import phase
from synco_fast.runtime.precision import Precision, memory_format, resolve_device
from synco_fast.training.compiled import Compiled, keep_compile_cache
from synco_fast.training.graph import GRAPH_WARMUP, GraphedStep
from synco_fast.training.means import RunningMeans
from synco_fast.training.optimizer import build_optimizer
from synco_fast.training.schedule import key_momentum, learning_rate
from synco_fast.training.statistics import RunningStatistics

__all__ = ["Engine"]


#: `RunningStatistics.average` brings them together where they are read. The argument was renamed after PyTorch 2.11.
_LEAVE_BUFFERS = {
    next(
        name
        for name in ("forward_sync_buffers", "broadcast_buffers")
        if name in signature(DistributedDataParallel.__init__).parameters
    ): False
}

_SETTLING_STEPS = 3


class Engine:
    """Everything that moves in a step, built from a configuration.

    Args:
        config: What to do.
        steps_per_epoch: Turns the configuration's epochs into steps.
        place: Where this process stands in its job, whose network must be joined already.
        note: Takes a line about each setting that cannot be had here.

    Attributes:
        device: Where it computes.
        method: With both encoders and the queue.
        means: The figures of the steps since they were last taken.
        skipped: Counts the steps that were left out.

    Raises:
        ConfigError: Anything in the configuration that cannot work here.
    """

    def __init__(
        self,
        config: Config,
        steps_per_epoch: int,
        place: Place = Place(),  # noqa: B008 - frozen
        *,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        training, optimizer = config.training, config.optimizer
        self.config, self.place = config, place
        self.device = resolve_device(training.device)
        self.precision = Precision(training.precision, self.device)
        self.method: Method = build_method(config, processes=place.world).to(self.device)
        self.layout = memory_format(self.method.module(), training.channels_last)
        self.optimizer = build_optimizer(self.method.encoder, optimizer, lr=config.learning_rate, device=self.device)
        self.update = Update(self.optimizer, scaled=self.precision.scaled, clip=optimizer.clip, device=self.device)
        self.statistics = RunningStatistics(*self._encoders())
        self.game: Game | None = None
        if isinstance(self.method, Generated):
            self.game = Game(
                config,
                self.method,
                self.device,
                steps_per_epoch=steps_per_epoch,
                processes=place.world,
                autocast=self.precision.autocast_unscaled,
            )
        self.skipped = SkippedSteps(self.device)
        self.means = RunningMeans()
        self.steps = steps_per_epoch * training.epochs
        self.warmup = round(optimizer.warmup_epochs * steps_per_epoch)
        self._query = self._on_all_processes(self.method.encoder)
        query: Callable[..., Tensor] = self._query
        key: Callable[..., Tensor] = self._encoders()[1]
        self._loss: Callable[..., StepOutput] = self.method.loss
        if training.compile != "none":
            keep_compile_cache()
            query, key = Compiled(query, "the query encoder", note), Compiled(key, "the key encoder", note)
        if training.compile == "step":
            self._loss = Compiled(self._loss, "the loss", note)
        self._bare = query, key
        self.method.networks = Networks(query=self._from_pixels(query), key=self._from_pixels(key))
        self._run: Callable[[Arranged, int, int, float], None] = self._compute
        self.graphed = False
        if training.cuda_graph:
            reason = self._uncapturable()
            if reason:
                note(f"training.cuda_graph: steps run one launch at a time, since {reason}")
            else:
                self.graphed = True
                self._run = GraphedStep(self._compute, self.device, note)
                self._rates_on_device()

    def _uncapturable(self) -> str | None:
        """Why no step can be captured as a CUDA graph, if so."""
        if self.device.type != "cuda":
            return "there is no GPU"
        if self.place.world > 1:
            return "the gradients of several processes are exchanged in it"
        if self.update.waits:
            return f"the host decides in it whether {self.config.optimizer.name} moves the weights"
        return None

    def _rates_on_device(self) -> None:
        """Keep the learning rate where a captured step can read it."""
        for group in self.optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(self.device)

    def _encoders(self) -> tuple[nn.Module, ...]:
        module = self.method.module()
        return tuple(module.get_submodule(name) for name in ("encoder", "key_encoder"))

    def _on_all_processes(self, encoder: nn.Module) -> nn.Module:
        """The query encoder, whose gradient becomes the mean over the processes."""
        if self.place.world == 1:
            return encoder
        return DistributedDataParallel(
            encoder,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            **_LEAVE_BUFFERS,  # type: ignore[arg-type]
            gradient_as_bucket_view=True,
            static_graph=self.config.training.accumulate == 1,
        )

    def _from_pixels(self, network: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def embed(views: Tensor) -> Tensor:
            return network(normalise(views, self.config.augment, self.layout))

        return embed

    @property
    def settling(self) -> int:
        """Steps that compile, capture and fill caches, and belong into no figure of speed."""
        return _SETTLING_STEPS + (GRAPH_WARMUP + 1 if self.graphed else 0)

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
        """The momentum of the key encoder at a step."""
        model = self.config.model
        return key_momentum(step, base=model.momentum, steps=self.steps, schedule=model.momentum_schedule)

    def step(self, batch: Batch, step: int, epoch: int) -> None:
        """Train on this process's share of a batch; nothing here waits for a GPU.

        Args:
            batch: Its views, uint8 or normalised.
            step, epoch: Counted from 0.
        """
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            if self.graphed:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        # Dropout and stochastic depth draw by step and rank: there is no state of theirs to keep.
        torch.manual_seed(derive_seed(self.config.seed, step, self.place.rank))
        batch = batch.to(self.device)
        arranged = self.method.arrange(Views(batch.first, batch.second, batch.images), step=step)
        self._run(arranged, step, self.method.like(epoch), self.momentum(step))

    def _compute(self, arranged: Arranged, step: int | Tensor, epoch: int, momentum: float | Tensor) -> None:
        """The step from views on the device to moved weights: launches alone, the same ones every time."""
        parts = self.config.training.accumulate
        before = self.statistics.copy()
        if self.config.model.momentum_schedule == "constant":
            momentum = self.config.model.momentum
        if self.config.training.compile == "step" and not isinstance(step, Tensor):
            # A number would be translated anew in every step.
            step = torch.full((), step, dtype=torch.int64, device=self.device)
        with self.precision.autocast():
            self.method.begin_step(arranged, momentum=momentum, parts=parts)
        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, Tensor] = {}
        for part in range(parts):
            with self._without_exchange(part < parts - 1):
                with self.precision.autocast():
                    output = self._loss(arranged, step=step, epoch=epoch, part=part, parts=parts)
                with phase("backward"):
                    self.update.backward(output.loss if parts == 1 else output.loss / parts)
            if parts == 1:
                metrics = output.metrics
                continue
            for name, value in output.metrics.items():
                metrics[name] = metrics[name] + value / parts if part else value / parts
        with phase("optimiser"):
            accept, norm = self.update.step()
            self.statistics.put_back(before, accept)
        self.method.after_step(accept)
        if self.game is not None:
            accept, played = self.game.step(arranged, int(step), epoch, accept)
            metrics |= played
        self.means.add({**metrics, "gradient_norm": norm}, accept)
        self.skipped.add(accept, step)

    def encoders_alone(self, first: Tensor, second: Tensor) -> None:
        """The limit that a step is measured against: queries forward and backward, keys forward, and nothing else.

        Args:
            first, second: Normalised views, (b, 3, H, W).
        """
        with self.precision.autocast():
            q = self._bare[0](first)
            with torch.no_grad():
                self._bare[1](second)
        self.optimizer.zero_grad(set_to_none=True)
        q.float().square().mean().backward()

    def _without_exchange(self, without: bool) -> AbstractContextManager[None]:
        if without and isinstance(self._query, DistributedDataParallel):
            return self._query.no_sync()
        return nullcontext()

    # -- state --------------------------------------------------------------------------------------------------

    def fingerprint(self) -> int:
        """A number that two processes share only if queue and weights agree to the bit."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        module = self.method.module()
        for tensor in [*module.parameters(), *module.get_submodule("queue").buffers()]:
            words = tensor.detach().contiguous().reshape(-1).view(torch.int32).to(torch.int64)
            places = torch.arange(1, 2 * len(words), 2, device=self.device)
            total = total * 31 + (words * places).sum()
        return int(total)

    def finite(self) -> bool:
        """Whether every weight is a number; waits for the device."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.method.module().parameters())

    def parameter_norm(self) -> float:
        """The norm of all weights of the query encoder; waits for the device."""
        return float(torch.nn.utils.get_total_norm(list(self.method.encoder.parameters())))

    def state_dict(self) -> dict[str, Any]:
        """What decides the steps to come, whatever the number of processes; called by all of them at the same step."""
        self.statistics.average()
        return {
            "method": self.method.module().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.update.state_dict(),
            "means": self.means.state_dict(),
            "skipped": self.skipped.state_dict(),
            **({} if self.game is None else {"game": self.game.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from a checkpoint, but for the method's weights, which the caller has loaded."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.graphed:
            self._rates_on_device()
        self.update.load_state_dict(state["precision"])
        self.means.load_state_dict(state["means"], self.device)
        if self.game is not None and "game" in state:
            self.game.load_state_dict(state["game"])
        if "skipped" in state:
            self.skipped.load_state_dict(state["skipped"])
