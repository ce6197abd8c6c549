"""LARS and LAMB for batches in the thousands; they can skip a step on the device, so a CUDA graph can capture them.

Each update is a few launches over all parameters. If `found_inf` is not 0, weights and state do not change, without a
host synchronisation. The arithmetic is that of timm's classes of the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Lamb", "Lars"]

Groups = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class _SkipsOnDevice(Optimizer):
    """Shared by LARS and LAMB: skipping a step on the device.

    Attributes:
        found_inf: Float tensor of one element on the parameters' device, not 0 if the gradients are not finite; None if
            every step is taken.
        grad_scale: Must be None: the gradients are unscaled already.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def _with_gradients(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        return parameters, [cast(Tensor, parameter.grad) for parameter in parameters]

    def _taken(self, gradients: list[Tensor]) -> Tensor | None:
        """1 if the step is taken, else 0, a float32 scalar; the gradients are then set to 0."""
        if self.found_inf is None or not gradients:
            return None
        taken = self.found_inf.reshape(()) == 0
        # Bit-cast to int32 so that multiplying by 0 also clears NaNs.
        torch._foreach_mul_([gradient.view(torch.int32) for gradient in gradients], taken.to(torch.int32))
        return taken.float()

    def _states(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """The state tensor of each parameter; initially zeros."""
        found = []
        for parameter in parameters:
            state = self.state[parameter]
            if name not in state:
                state[name] = torch.zeros_like(parameter)
            found.append(state[name])
        return found


class Lars(_SkipsOnDevice):
    """LARS (arXiv 1708.03888): SGD with momentum and a learning rate per tensor.

    g <- t |w| / (|g| + d |w| + e) (g + d w), if both norms are above 0; b <- m b + g; w <- w - lr b. Groups without
    weight decay are not adapted.

    Args:
        params: Parameters in float32, or groups of them.
        lr: Number, or a tensor on their device for a captured step.
        momentum: m.
        weight_decay: d, of groups that have none of their own.
        trust_coeff: t.
        eps: e.
    """

    def __init__(
        self,
        params: Groups,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coeff: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        settings = {"momentum": momentum, "weight_decay": weight_decay, "trust_coeff": trust_coeff, "eps": eps}
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the weights; ``closure`` is not called."""
        for group in self.param_groups:
            weights, gradients = self._with_gradients(group)
            if not weights:
                continue
            taken, decay = self._taken(gradients), group["weight_decay"]
            if decay:
                w, g = (torch.stack(torch._foreach_norm(part)) for part in (weights, gradients))
                ratio = group["trust_coeff"] * w / (g + w * decay + group["eps"])
                ratio = torch.where((w > 0) & (g > 0), ratio, 1.0)
                if taken is not None:
                    ratio = ratio * taken
                gradients = list(torch._foreach_add(gradients, weights, alpha=decay))
                torch._foreach_mul_(gradients, list(ratio.unbind()))
            buffers, momentum = self._states(weights, "momentum_buffer"), group["momentum"]
            torch._foreach_mul_(buffers, momentum if taken is None else torch.where(taken > 0, momentum, 1.0))
            torch._foreach_add_(buffers, gradients)
            _descend(weights, buffers, group["lr"], taken)


class Lamb(_SkipsOnDevice):
    """LAMB (arXiv 1904.00962): Adam with a learning rate per tensor.

    Groups without weight decay are not adapted. The gradient's norm over all parameters is clipped to 1 first.

    Args:
        params: Parameters in float32, or groups of them.
        lr: Number, or a tensor on their device for a captured step.
        betas: Of the means of gradient and squared gradient.
        eps: Added to the root of the second.
        weight_decay: Of groups that have none of their own.
        max_grad_norm: The limit of the gradient's norm.
    """

    def __init__(
        self,
        params: Groups,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the weights; ``closure`` is not called."""
        parts = [self._with_gradients(group) for group in self.param_groups]
        everything = [gradient for _, gradients in parts for gradient in gradients]
        if not everything:
            return
        taken = self._taken(everything)
        norm = torch.nn.utils.get_total_norm(everything)
        for group, (weights, gradients) in zip(self.param_groups, parts, strict=True):
            if not weights:
                continue
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            step = group["step"] = _on_device(group.get("step", 0.0), weights[0].device)
            step.add_(1.0 if taken is None else taken)
            gradients = list(torch._foreach_div(gradients, (norm / group["max_grad_norm"]).clamp(min=1.0)))
            first, second = self._states(weights, "exp_avg"), self._states(weights, "exp_avg_sq")
            for means, beta in ((first, beta1), (second, beta2)):
                torch._foreach_mul_(means, beta if taken is None else torch.where(taken > 0, beta, 1.0))
            torch._foreach_add_(first, gradients, alpha=1 - beta1)
            torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
            # In double: 1 - beta ** step is small at first. A skipped first step must not divide by 0.
            past = step.double().clamp(min=1.0)
            below = list(torch._foreach_sqrt(second))
            torch._foreach_div_(below, (1 - beta2**past).sqrt().float())
            torch._foreach_add_(below, group["eps"])
            update = list(torch._foreach_div(first, (1 - beta1**past).float()))
            torch._foreach_div_(update, below)
            if decay:
                torch._foreach_add_(update, weights, alpha=decay)
                w, u = (torch.stack(torch._foreach_norm(part)) for part in (weights, update))
                torch._foreach_mul_(update, list(torch.where((w > 0) & (u > 0), w / u, 1.0).unbind()))
            _descend(weights, update, group["lr"], taken)


def _on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """A step count from a checkpoint, a number or a tensor, as a float32 scalar on the device."""
    return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(())


def _descend(weights: list[Tensor], update: list[Tensor], lr: float | Tensor, taken: Tensor | None) -> None:
    """W <- w - lr u; the rate is on the device if the step can be skipped or captured."""
    if taken is None and not isinstance(lr, Tensor):
        torch._foreach_add_(weights, update, alpha=-lr)
        return
    rate = -lr if taken is None else -lr * taken
    torch._foreach_add_(weights, torch._foreach_mul(update, rate))
