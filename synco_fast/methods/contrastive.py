"""MoCo v2, MoCHi and SynCo: one method with three settings of the negatives.

A step:

1. Update the key encoder, the EMA of the query encoder (MoCo, arXiv 1911.05722 eq. 2).
2. Compute queries from one view and keys from the other.
3. Contrast each query with its key, the queue and the synthetic negatives.
4. After the optimizer's step, enqueue the keys, so that a key is never a negative of its own query.

In a job of several processes the keys of all are enqueued, in the order of the global batch, so that every process
holds the same queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from synco_fast.config import Config
from synco_fast.data.transfer import to_device
from synco_fast.kernels import FAMILIES, STREAM, Backend, Contrast, synthetic_contrast
from synco_fast.kernels.ops import unserved_by_triton
from synco_fast.kernels.proof import loss_shapes
from synco_fast.methods.base import Encoders, Method, Recent, RunInfo, StepInputs, StepOutput, Views
from synco_fast.methods.build import build_encoder
from synco_fast.methods.schedule import NegativeSchedule
from synco_fast.models.ema import ema_update, make_ema_copy
from synco_fast.models.encoder import Encoder
from synco_fast.models.queue import KeyQueue
from synco_fast.models.shuffle import key_order
from synco_fast.runtime.distributed import exchange_rows, gather_rows, rank, world
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.phases import phase
from synco_fast.runtime.precision import QUEUE_DTYPES, resolve_device, resolve_queue_dtype

__all__ = ["ContrastSettings", "MomentumContrast", "build"]

#: K / N as published: 65,536 and 1,024.
_KEYS_A_HARD = 64


@dataclass(frozen=True)
class ContrastSettings:
    """The settings of the contrastive loss.

    Attributes:
        queue: K.
        dim: D, the encoder's output width.
        schedule: The negatives by epoch.
        temperature: T.
        symmetric: Use each view as query and as key: the loss is the mean of both directions, and both sets of keys
            enter the queue.
        mask_same_image: Exclude queue keys of the query's own image; for sets smaller than the queue.
        seed: Seed of queue, shuffles and draws.
        backend: Backend of the loss.
        queue_dtype: Dtype of the queue, and of q and k in the loss; loss and gradient are float32.
    """

    queue: int
    dim: int
    schedule: NegativeSchedule
    temperature: float = 0.2
    symmetric: bool = False
    mask_same_image: bool = False
    seed: int = 0
    backend: Backend = "auto"
    queue_dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, config: Config) -> ContrastSettings:
        """The settings of a configuration."""
        method = config.method
        return cls(
            queue=method.queue,
            dim=config.model.dim,
            schedule=NegativeSchedule.of(config),
            temperature=method.temperature,
            symmetric=method.symmetric,
            mask_same_image=method.mask_same_image,
            seed=config.seed,
            backend=method.backend,
            queue_dtype=resolve_queue_dtype(method.queue_dtype, resolve_device(config.training.device)),
        )


def build(config: Config, processes: int) -> MomentumContrast:
    """Build the method of a configuration, on the CPU."""
    return MomentumContrast(build_encoder(config, processes=processes), ContrastSettings.of(config))


class MomentumContrast(Method):
    """Momentum contrast with a queue (MoCo v2, arXiv 2003.04297) and, by schedule, synthetic hard negatives.

    Args:
        encoder: The query encoder.
        settings: Settings of the contrastive loss.
    """

    headline: Mapping[str, str] = {"loss": "loss {:.3f}", "queue_top1": "acc {:.1%}"}

    def __init__(self, encoder: Encoder, settings: ContrastSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = encoder
        self.key_encoder = make_ema_copy(encoder)
        self.queue = KeyQueue(settings.queue, settings.dim, seed=settings.seed, dtype=settings.queue_dtype)
        #: By direction, this step's keys of the global batch, (B, D), and their image ids, (B,).
        self._keys: list[tuple[Tensor, Tensor]] = []
        self._queued = 0
        #: By graph key, queries and image ids of the last step: each CUDA graph writes to tensors of its own.
        self._queries: dict[int, tuple[Tensor, Tensor]] = {}
        self._slow_path = SlowPathMonitor()

    @property
    def target(self) -> nn.Module:
        """The key encoder."""
        return self.key_encoder

    @property
    def replicated(self) -> Mapping[str, nn.Module]:
        """Both encoders and the queue."""
        return {**super().replicated, "queue": self.queue}

    def prepare(self, run: RunInfo) -> None:
        """Check that what computes the loss is there.

        Raises:
            ConfigError: ``method.backend`` is triton, and the kernels do not serve this device or these shapes.
        """
        if self.settings.backend == "triton":
            rows = self.queue.rows
            reason = unserved_by_triton(rows[:0].float(), rows, self.settings.temperature)
            if reason:
                raise ConfigError(f"method.backend: found triton, expected auto, blockwise or reference here: {reason}")

    def shard(self, views: Views, *, step: int) -> StepInputs:
        """Permute the key views over the global batch, across processes (ShuffleBN)."""
        pairs = [(views.first, views.second), (views.second, views.first)][: 1 + self.settings.symmetric]
        device, rows = views.image_ids.device, world() * len(views.image_ids)
        # With several processes the host needs the order, since the sizes of what is sent follow from it.
        host = device if world() == 1 else torch.device("cpu")
        orders = [
            key_order(rows, seed=self.settings.seed, step=step, direction=way, device=host) for way in range(len(pairs))
        ]
        return StepInputs(
            queries=tuple(query for query, _ in pairs),
            keys=tuple(exchange_rows(key, order) for (_, key), order in zip(pairs, orders, strict=True)),
            orders=tuple(to_device(order, device) for order in orders),
            image_ids=views.image_ids,
        )

    @torch.no_grad()
    def begin_step(
        self, inputs: StepInputs, encode: Encoders, *, momentum: float | Tensor, micro_batches: int = 1
    ) -> None:
        """Update the key encoder and compute the keys of the global batch, (B, D), the same on every process."""
        with phase("EMA update"):
            ema_update(self.key_encoder, self.encoder, momentum, backend=self.momentum_backend)
        self._keys.clear()
        with phase("key forward"):
            for views, order in zip(inputs.keys, inputs.orders, strict=True):
                shuffled = _joined([encode.key(part).float() for part in views.chunk(micro_batches)])
                keys, image_ids = _gather(normalize(shuffled, dim=1), inputs.image_ids)
                self._keys.append((torch.empty_like(keys).index_copy_(0, order, keys), image_ids))

    def loss(
        self,
        inputs: StepInputs,
        encode: Encoders,
        *,
        step: int | Tensor,
        epoch: int,
        micro_batch: int = 0,
        micro_batches: int = 1,
    ) -> StepOutput:
        """The mean loss of one micro-batch over both directions, after `begin_step`."""
        part = micro_batch, micro_batches
        found = [self._direction(inputs, encode, way, step, epoch, *part) for way in range(len(self._keys))]
        loss = _joined([contrast.loss for contrast in found]).mean()
        return StepOutput(loss, _metrics(loss, found))

    def _direction(
        self,
        inputs: StepInputs,
        encode: Encoders,
        direction: int,
        step: int | Tensor,
        epoch: int,
        micro_batch: int = 0,
        micro_batches: int = 1,
    ) -> Contrast:
        settings, views = self.settings, inputs.queries[direction].chunk(micro_batches)[micro_batch]
        with phase("query forward"):
            q = normalize(encode.query(views).float(), dim=1)
        keys, _ = self._keys[direction]
        begin = rank() * len(inputs.image_ids) + micro_batch * len(views)
        image_ids = inputs.image_ids.chunk(micro_batches)[micro_batch]
        self._queries[self.graph_key(epoch)] = q.detach(), image_ids
        with phase("loss"), torch.autocast(q.device.type, enabled=False):
            return synthetic_contrast(
                q,
                keys[begin : begin + len(views)],
                self.queue.rows,
                settings.schedule.at(epoch),
                temperature=settings.temperature,
                seed=settings.seed,
                step=step,
                first_row=direction * len(keys) + begin,
                image_ids=image_ids if settings.mask_same_image else None,
                queue_ids=self.queue.image_ids if settings.mask_same_image else None,
                backend=settings.backend,
                operand_dtype=self.operand_dtype,
            )

    @property
    def operand_dtype(self) -> torch.dtype | None:
        """Dtype to which the loss rounds queries and keys, that of the queue; None for float32."""
        dtype = self.settings.queue_dtype
        return None if dtype == torch.float32 else dtype

    def after_step(self, step_ok: Tensor | None = None) -> None:
        """Enqueue the step's keys, unless ``step_ok``, a bool scalar, is false."""
        with phase("enqueue"):
            for keys, image_ids in self._keys:
                self.queue.enqueue(keys, image_ids, step_ok)
        self._queued = sum(len(keys) for keys, _ in self._keys) or self._queued
        self._keys.clear()

    @property
    def stream(self) -> int:
        """The version of the kernels' draws if synthetic negatives are drawn."""
        return STREAM if self.settings.schedule.negatives.synthetic else 1

    def kernel_shapes(self, rows: int) -> dict[str, dict[str, Any]]:
        """Shapes of the loss."""
        settings, schedule = self.settings, self.settings.schedule
        last = schedule.epochs - 1
        return {
            "loss": loss_shapes(
                calls=self.calls_of_step(rows),
                length=settings.queue,
                dim=settings.dim,
                negatives=[schedule.at(epoch) for epoch in sorted({0, min(schedule.warmup, last), last})],
                temperature=settings.temperature,
                dtype=settings.queue_dtype,
            )
        }

    def calls_of_step(self, rows: int) -> list[tuple[int, bool]]:
        """For each call of the loss in a step of ``rows`` images: B, and whether the same image is masked."""
        return [(rows, self.settings.mask_same_image)]

    def use_backend(self, kernel: str, backend: str) -> None:
        """As in `Method.use_backend`."""
        super().use_backend(kernel, backend)
        if kernel == "loss":
            self.settings = replace(self.settings, backend=cast(Backend, backend))

    def adapt_state(self, state: dict[str, Any], *, keep: bool) -> list[str]:
        """Take over the dtype of the checkpoint's queue, or convert that queue."""
        rows, wanted = state.get("queue.rows"), self.settings.queue_dtype
        if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.dtype == wanted:
            return []
        found, now = (str(dtype).removeprefix("torch.") for dtype in (rows.dtype, wanted))
        if keep and rows.dtype in QUEUE_DTYPES:
            self.settings = replace(self.settings, queue_dtype=rows.dtype)
            self.queue.rows = self.queue.rows.to(rows.dtype)
            return [f"method.queue_dtype: the run keeps {found}; a new run would use {now} here"]
        state["queue.rows"] = rows.to(wanted)
        return [
            f"method.queue_dtype: converting the checkpoint's queue from {found} to {now}; "
            "the run is no longer equal bit for bit"
        ]

    def graph_key(self, epoch: int) -> int:
        """The first epoch with the same negatives."""
        return self.settings.schedule.graph_key(epoch)

    def recent(self, epoch: int) -> Recent | None:
        """The queries of the last direction and micro-batch, and the queue.

        N is that of the synthetic negatives; without them K / 64, the published proportion.
        """
        kept = self._queries.get(self.graph_key(epoch))
        if kept is None:
            return None
        hard = self.settings.schedule.negatives.hard or max(1, len(self.queue) // _KEYS_A_HARD)
        return Recent(*kept, self.queue.rows, self.queue.image_ids, hard)

    def figures(self, values: dict[str, float], step: int) -> tuple[dict[str, float], list[str]]:
        """``queue_age``, the age of the oldest key in steps; a warning if the slow path is taken all the time."""
        warnings = self._slow_path.look(values.get("slow_path", 0.0))
        return {"queue_age": min(float(step), len(self.queue) / max(1, self._queued))}, warnings


class SlowPathMonitor:
    """Warns once if most queries took the slow path of the selection at ``lines`` consecutive log lines."""

    def __init__(self, *, lines: int = 5) -> None:
        self._lines, self._row, self._warned = lines, 0, False

    def look(self, share: float) -> list[str]:
        """Take the share of queries at the next log line, in [0, 1]; returns a warning if one is due."""
        self._row = self._row + 1 if share > 0.5 else 0
        if self._warned or self._row < self._lines:
            return []
        self._warned = True
        return [
            f"slow path: {share:.0%} of the queries selected their hard negatives from all similarities at "
            f"{self._lines} consecutive log lines, which is slower; the keys are nearly equal or repeated "
            "(docs/curves.md)"
        ]


def _gather(keys: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, (b, D) float32, and image ids, (b,) int64, of all processes, in one exchange."""
    if world() == 1:
        return keys, image_ids
    both = gather_rows(torch.cat([keys, image_ids[:, None].view(torch.float32)], dim=1))
    return both[:, :-2].contiguous(), both[:, -2:].contiguous().view(torch.int64).squeeze(1)


def _metrics(loss: Tensor, directions: list[Contrast]) -> dict[str, Tensor]:
    """Means over the rows of both directions; NaN for negatives that no row has."""
    rows = []
    for part in (contrast.statistics for contrast in directions):
        nearest = (torch.stack([part.rank, part.queue_rank], dim=1) == 0).to(part.positive.dtype)
        others = (part.fallback.to(part.positive.dtype), part.positive, part.hard)
        rows.append(torch.cat([nearest, *(column[:, None] for column in others), part.synthetic], dim=1))
    names = ["top1", "queue_top1", "slow_path", "similarity/positive", "similarity/hard"]
    names += [f"similarity/{family.name}" for family in FAMILIES]
    # All columns at once: the mean of each alone would be three times the launches.
    means = _joined(rows).nanmean(dim=0)
    return {"loss": loss.detach(), **dict(zip(names, means.unbind(), strict=True))}


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenated parts, without a copy where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
