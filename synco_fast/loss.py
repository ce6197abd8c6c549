"""The contrastive loss as a module, for your own training loop."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from synco_fast.kernels import STREAM, Backend, Contrast, Negatives, Statistics, synthetic_contrast
from synco_fast.kernels.checks import check_arguments, check_backend
from synco_fast.methods import with_queue
from synco_fast.models.queue import KeyQueue
from synco_fast.runtime.distributed import gather_rows, rank, world

__all__ = ["SynthContrastLoss"]

#: PyTorch's name for the part of a state that is neither parameter nor buffer.
_EXTRA = "_extra_state"


class SynthContrastLoss(nn.Module):
    """InfoNCE with a queue and synthetic hard negatives: MoCo v2, MoCHi (arXiv 2010.01028), SynCo (arXiv 2410.02401).

    Call it with the embeddings of two views. It holds the queue and the step count. Move it to the device of the
    embeddings. The keys of a training step enter the queue after its loss is computed. If any of them is not finite,
    none enters. In evaluation mode and under ``torch.no_grad()`` the queue and the count do not change. If
    `torch.distributed` is initialised, the keys of all ranks enter each rank's queue. Their batches must have the same
    size; the ranks compare sizes in every training step.

    ``state_dict`` has the queue, the count and, in ``_extra_state``, the settings below except the backend. Loading
    raises ValueError if the settings differ. Without that entry, only queue and count are loaded.

    Args:
        method: The name of a method with a queue, such as ``"synco"``, for its published counts, or a `Negatives` of
            your own. The published counts belong to 65,536 keys: for K of them, use
            ``Negatives.synco().scaled(K / 65536)``.
        dim: D, width of the embeddings.
        queue: K, past keys; at least the keys of a step.
        temperature: T.
        seed: Seed of the queue's random initial rows and of the draws; the same on all ranks.
        backend: Backend of the loss.
        queue_dtype: Dtype of the queue, and of query and key in the loss; loss and gradient are float32. Use
            ``torch.bfloat16`` on a GPU.

    Attributes:
        queue: The `KeyQueue`.
        negatives: The synthetic negatives; may be replaced at any time, such as after a warm-up. ``state_dict`` has
            those of ``method``: the training loop knows which are on in which step.
        statistics: Statistics of the last call, one value per row; None before the first.

    Raises:
        TypeError: The method is neither a name nor a `Negatives`, or the queue would not hold floating-point numbers.
        ValueError: The method's name is unknown, N is larger than the queue, or another argument is out of range.
    """

    step: Tensor

    def __init__(
        self,
        method: str | Negatives = "synco",
        *,
        dim: int = 128,
        queue: int = 65536,
        temperature: float = 0.2,
        seed: int = 0,
        backend: Backend = "auto",
        queue_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.negatives = self._made_with = _negatives_of(method)
        for name, value in (("dim", dim), ("queue", queue)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: found {value!r}, expected a whole number from 1 up")
        if self.negatives.hard > queue:
            raise ValueError(f"queue: found {queue}, expected {self.negatives.hard} or more, the hard negatives N")
        if not isinstance(queue_dtype, torch.dtype) or not queue_dtype.is_floating_point:
            raise TypeError(f"queue_dtype: found {queue_dtype!r}, expected a floating-point dtype of PyTorch")
        check_backend(backend)
        row, rows = (torch.empty(length, dim, device="meta") for length in (1, queue))
        check_arguments(
            row,
            row,
            rows,
            self.negatives,
            temperature=temperature,
            seed=seed,
            step=0,
            first_row=0,
            image_ids=None,
            queue_ids=None,
        )
        self.queue = KeyQueue(queue, dim, seed=seed, dtype=queue_dtype)
        self.temperature, self.seed, self.backend = temperature, seed, backend
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.statistics: Statistics | None = None
        self._awaits_backward = self._has_warned = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        images: Tensor | None = None,
        *,
        swapped: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The mean loss of a batch; the gradient reaches the queries alone.

        Args:
            query: Embeddings of one view by the encoder that learns, (B, D); normalised here.
            key: Embeddings of the other view by the momentum encoder, (B, D); normalised here.
            images: The image of each row, (B,) int64, -1 if unknown. If given, queue keys of the same image are
                excluded from the negatives: for sets smaller than the queue.
            swapped: Query and key of the other direction, (B, D) each, for a symmetric loss:
                ``loss(q1, k2, swapped=(q2, k1))``. Both directions use the same queue, then both sets of keys enter.
                The loss is the mean of all 2 B rows. In two calls without ``images``, the second would take the keys
                of the first for negatives, though they are of the same images.

        Raises:
            TypeError: An argument has a wrong type or device.
            ValueError: A shape is wrong, the ranks have batches of different sizes, or a step has more keys than the
                queue.
            RuntimeError: The call is inside a backward pass, or the backend does not support the derivative.
        """
        pairs = [(query, key)] if swapped is None else [(query, key), swapped]
        self._check(pairs, images)
        enters = self.training and torch.is_grad_enabled()
        if enters:
            self._check_step(len(pairs), query)
        unit = [tuple(normalize(part.float(), dim=1) for part in (q, k.detach())) for q, k in pairs]
        # The reference keeps the queue for its backward pass, but the keys enter before that.
        rows = self.queue.rows.clone() if self.backend == "reference" and enters else self.queue.rows
        found: list[Contrast] = [
            synthetic_contrast(
                q,
                k,
                rows,
                self.negatives,
                temperature=self.temperature,
                seed=self.seed,
                step=self.step,
                first_row=(direction * world() + rank()) * len(q),
                image_ids=images,
                queue_ids=None if images is None else self.queue.image_ids,
                backend=self.backend,
                operand_dtype=rows.dtype if rows.element_size() == 2 else None,
            )
            for direction, (q, k) in enumerate(unit)
        ]
        by_name = zip(*(contrast.statistics for contrast in found), strict=True)
        self.statistics = Statistics(*(_joined(*parts) for parts in by_name))
        loss = _joined(*(contrast.loss for contrast in found)).mean()
        if enters:
            self._enqueue([k for _, k in unit], images)
            self._note_repetition(loss, images)
        return loss

    def _check(self, pairs: list[tuple[Tensor, Tensor]], images: Tensor | None) -> None:
        """Check the arguments under their names in this module."""
        names, width = ("query", "key", "swapped[0]", "swapped[1]"), self.queue.rows.shape[1]
        if len(pairs) == 2 and not (isinstance(pairs[1], tuple | list) and len(pairs[1]) == 2):
            raise TypeError(f"swapped: found {type(pairs[1]).__name__}, expected a pair of query and key")
        device, query = self.queue.rows.device, pairs[0][0]
        for name, tensor in zip(names, (part for pair in pairs for part in pair), strict=False):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name}: found {found}, expected a floating-point tensor")
            if tensor.dim() != 2 or tensor.shape[1] != width or not tensor.shape[0]:
                raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected (B, {width}), as wide as dim")
            if tensor.shape != query.shape:
                raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {tuple(query.shape)}, as query")
            if tensor.device != device:
                raise TypeError(f"{name}: found on {tensor.device}, expected {device}, where the queue is")
        if images is None:
            return
        if not isinstance(images, Tensor) or images.dtype != torch.int64 or images.device != device:
            other = f"{images.dtype} on {images.device}" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: found {other}, expected an int64 tensor on {device}")
        if images.shape != query.shape[:1]:
            raise ValueError(f"images: found shape {tuple(images.shape)}, expected ({query.shape[0]},)")

    def _check_step(self, directions: int, query: Tensor) -> None:
        """Refuse a step that would leave the queue wrong; with several ranks the host waits for an exchange."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "SynthContrastLoss: found a call inside a backward pass, as torch.utils.checkpoint makes it, expected "
                "one call a step: the queue would move between them"
            )
        if world() > 1:
            sizes = gather_rows(torch.tensor([len(query)], device=query.device)).tolist()
            if len(set(sizes)) > 1:
                raise ValueError(f"query: found batches of {sizes} rows on the ranks, expected as many on each")
        keys = directions * world() * len(query)
        if keys > len(self.queue):
            raise ValueError(f"queue: found {len(self.queue)}, expected {keys} or more, the keys of a step")

    @torch.no_grad()
    def _enqueue(self, keys: list[Tensor], images: Tensor | None) -> None:
        owners = self.queue.image_ids.new_full((len(keys[0]),), -1) if images is None else images
        entering, owners = [gather_rows(part) for part in keys], gather_rows(owners)
        finite = torch.stack([part.isfinite().all() for part in entering]).all()
        for part in entering:
            self.queue.enqueue(part, owners, finite)
        self.step.add_(1)

    def _note_repetition(self, loss: Tensor, images: Tensor | None) -> None:
        """Warn once if a second call in the same step takes the keys of the first for negatives."""
        if torch.compiler.is_compiling() or not loss.requires_grad:
            return
        if self._awaits_backward and images is None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "SynthContrastLoss: found a second call before the backward pass of the first; where both have views "
                "of the same images, expected one call with `swapped`, or `images`: keys of the first are negatives "
                "of the second",
                stacklevel=5,
            )
        self._awaits_backward = True
        loss.register_hook(self._see_backward)

    def _see_backward(self, _: Tensor) -> None:
        self._awaits_backward = False

    def _settings(self) -> dict[str, Any]:
        """Settings that a state and the module that loads it must share, as plain values."""
        length, width = self.queue.rows.shape
        drawn = {"stream": STREAM} if self._made_with.synthetic else {}
        own = {"dim": width, "queue": length, "temperature": self.temperature, "seed": self.seed}
        plain: dict[str, Any] = json.loads(json.dumps({**own, **asdict(self._made_with), **drawn}))
        return plain

    def get_extra_state(self) -> Tensor:
        """The settings as JSON in a uint8 tensor: states hold tensors only."""
        return torch.frombuffer(bytearray(json.dumps(self._settings()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: loading compares the settings and does not change them."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        if prefix + _EXTRA in state_dict:
            self._compare(state_dict[prefix + _EXTRA])
        elif prefix + "step" in state_dict:
            warnings.warn("SynthContrastLoss: found a state without settings: they are not compared", stacklevel=2)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if prefix + _EXTRA in missing:
            missing.remove(prefix + _EXTRA)

    def _compare(self, state: object) -> None:
        try:
            theirs, own = dict(json.loads(bytes(state.tolist()))), self._settings()  # type: ignore[attr-defined]
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"settings: found {_EXTRA} that cannot be read, expected what state_dict made") from error
        differ = [name for name in dict.fromkeys([*theirs, *own]) if theirs.get(name) != own.get(name)]
        if differ:
            found, expected = (", ".join(f"{name} {some.get(name)}" for name in differ) for some in (theirs, own))
            raise ValueError(
                f"settings: found {found} in the state, expected {expected}, as in this module; without the entry "
                f"{_EXTRA} the state loads nevertheless"
            )

    def extra_repr(self) -> str:
        """Settings in `repr`."""
        return f"{self.negatives}, temperature={self.temperature}, seed={self.seed}"


def _joined(*parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _negatives_of(method: str | Negatives) -> Negatives:
    known = with_queue()
    if isinstance(method, Negatives):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method: found {type(method).__name__}, expected {', '.join(known)} or Negatives")
    if method not in known:
        raise ValueError(f"method: found {method!r}, expected {', '.join(known)} or Negatives")
    return known[method]()
