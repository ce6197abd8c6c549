"""A call of the batch norm with parameters and statistics of other strides, beside one of contiguous tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from synco_fast.kernels.norm import NormBackend, batch_norm


def results_by_strides(backend: NormBackend, *, training: bool) -> tuple[list[Tensor], list[Tensor]]:
    """y, the gradients and the running statistics: of contiguous tensors, and of columns and an expanded number."""
    settings = {"groups": 2 if training else 1, "training": training, "relu": True}
    x = torch.randn(6, 5, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    affine, shared, up = torch.randn(5, 2, requires_grad=True), torch.randn(1, requires_grad=True), torch.randn(x.shape)
    before = torch.rand(5, 2) + 0.5

    def results(in_order: bool) -> list[Tensor]:
        table = before.clone()
        given = affine[:, 1], shared.expand(5), table[:, 0], table[:, 1]
        weight, bias, mean, variance = (value.contiguous() for value in given) if in_order else given
        y = batch_norm(x, weight, bias, mean, variance, **settings, backend=backend)
        gradients = torch.autograd.grad(y, [x, affine, shared], up)
        assert training != torch.equal(torch.stack((mean, variance), dim=1), before)
        return [y.detach(), *gradients, mean, variance]

    return results(True), results(False)
