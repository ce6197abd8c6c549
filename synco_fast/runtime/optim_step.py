"""Optimizer step: loss scaling, gradient clipping, skipping non-finite gradients."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OptimStep", "SkippedSteps", "build_sgd", "skips_on_device"]

#: Dynamic loss scaling as in mixed-precision training (arXiv 1710.03740 section 3.2), with PyTorch's constants.
_FIRST_SCALE, _GROWTH, _BACKOFF, _INTERVAL = 65536.0, 2.0, 0.5, 2000


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step can be skipped by a tensor on the device, without the host waiting for it."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def build_sgd(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    device: torch.device,
) -> torch.optim.SGD:
    """SGD, fused on a GPU, whose very first step can be skipped.

    Args:
        parameters: Parameters, or groups with their own learning rates.
        lr: Learning rate of groups without one.
        momentum, weight_decay: As PyTorch defines them.
        device: Device of the parameters.
    """
    cuda = device.type == "cuda"
    sgd = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=cuda)
    if cuda and momentum:
        # Fused SGD takes uninitialised memory for momentum when the very first step is skipped.
        for group in sgd.param_groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


class _Found:
    """The part of a gradient scaler that apex's capturable optimizers use: found_inf and the scale."""

    def __init__(self, found_inf: Tensor) -> None:
        self._found, self._scale = found_inf.reshape(1), torch.ones_like(found_inf.reshape(1))

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self._found.device: self._found}

    def _get_scale_async(self) -> Tensor:
        """1: the gradients are unscaled already."""
        return self._scale


class OptimStep:
    """An optimizer step on gradients that may be scaled or non-finite; never waits for a GPU.

    Args:
        optimizer: The optimizer. If it cannot skip a step by a tensor on the device, the host waits for the gradient
            norm.
        scaled: Whether losses are scaled, for fp16.
        clip: Clip the total gradient norm to this value; None for no clipping.
        device: Device of the parameters.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, scaled: bool, clip: float | None = None, device: torch.device
    ) -> None:
        self.optimizer, self.clip = optimizer, clip
        self._on_device = device.type == "cuda" and skips_on_device(optimizer)
        self._asks_a_scaler = "grad_scaler" in signature(optimizer.step).parameters
        self.scale: Tensor | None = torch.full((), _FIRST_SCALE, device=device) if scaled else None
        self._growth = torch.zeros((), dtype=torch.int32, device=device)

    @property
    def waits(self) -> bool:
        """Whether the host waits for the gradient norm in each step."""
        return not self._on_device

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a loss, with loss scaling if it is on."""
        (loss if self.scale is None else loss * self.scale).backward()

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor]:
        """Apply the accumulated gradients, unless their norm is non-finite.

        With several ranks the gradients are already averaged, so all ranks decide alike.

        Returns:
            Whether the step was taken, bool, and the total gradient norm before clipping, float32; both scalars on the
            device.
        """
        gradients = [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if self.scale is not None:
            torch._foreach_mul_(gradients, 1 / self.scale)
        norm = torch.nn.utils.get_total_norm(gradients).float()
        step_ok = torch.isfinite(norm)
        if self.scale is not None:
            torch._amp_update_scale_(self.scale, self._growth, (~step_ok).float(), _GROWTH, _BACKOFF, _INTERVAL)
        if self.clip is not None:
            torch._foreach_mul_(gradients, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        if self._on_device:
            optimizer: Any = self.optimizer
            found_inf = (~step_ok).float()
            if self._asks_a_scaler:
                optimizer.step(grad_scaler=_Found(found_inf))
            else:
                optimizer.grad_scale, optimizer.found_inf = None, found_inf
                optimizer.step()
        elif bool(step_ok):
            self.optimizer.step()
        return step_ok, norm

    def descend(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """A whole step on one loss: zero the gradients, backward, `step`; returns what `step` returns."""
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(loss)
        return self.step()

    def state_dict(self) -> dict[str, Any]:
        """The loss scale and the steps since it last changed; empty where losses are not scaled."""
        if self.scale is None:
            return {}
        return {"scale": float(self.scale), "growth": int(self._growth)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the loss scale; a state without one leaves it at its first value."""
        if self.scale is not None and "scale" in state:
            self.scale.fill_(state["scale"])
            self._growth.fill_(state.get("growth", state.get("_growth_tracker", 0)))


class SkippedSteps:
    """Counts the skipped steps, on the device.

    Args:
        device: Device of the counts.
    """

    def __init__(self, device: torch.device) -> None:
        #: Total, consecutive up to now, and the last step that was counted.
        self._counts = torch.tensor([0, 0, -1], dtype=torch.int64, device=device)
        self._zero, self._one = (torch.tensor(number, device=device) for number in (0, 1))

    def add(self, step_ok: Tensor, step: int | Tensor) -> None:
        """Count one step."""
        skipped = torch.where(step_ok, self._zero, self._one)
        self._counts[:2].add_(skipped)
        self._counts[1].mul_(skipped)
        self._counts[2].copy_(step) if isinstance(step, Tensor) else self._counts[2].fill_(step)

    def read(self) -> tuple[int, int, int]:
        """Total, consecutive up to now, and the first of the consecutive ones (-1 for none); waits for the device."""
        total, row, last = self._counts.tolist()
        return total, row, last - row + 1 if row else -1

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"counts": list(self.read())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from a checkpoint."""
        total, row, first = state["counts"]
        self._counts.copy_(torch.tensor([total, row, first + row - 1]))
