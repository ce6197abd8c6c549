"""Baseline of the training step with the cost of the released single-file training loops.

It does what such loops do: float32 in PyTorch's default layout, a momentum update of one parameter at a time, a key
batch permuted on the host, a loss of whole tensors with loops over negatives, and a queue pointer and a loss that the
host reads in every step. `synco_fast.bench.step` lets cuDNN choose algorithms by trial, as facebookresearch/moco does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from synco_fast.bench.baselines.loss import baseline_loss
from synco_fast.config import Config
from synco_fast.methods.build import build_encoder

__all__ = ["plain_step"]


def plain_step(config: Config, device: torch.device) -> Callable[[Tensor, Tensor], float]:
    """A function that trains on two normalised views, (B, 3, H, W) float32, and returns the loss.

    Args:
        config: Encoder, queue, negatives and optimizer. It always uses SGD, and batch norm over the whole batch.
        device: Device to train on.
    """
    whole = config.model.model_copy(update={"batch_norm_groups": 1})
    encoder = build_encoder(config.model_copy(update={"model": whole})).to(device)
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    queue = normalize(torch.randn(config.method.queue, config.model.dim, device=device), dim=1)
    pointer = torch.zeros(1, dtype=torch.int64, device=device)
    negatives, momentum = config.method.negatives(), config.model.momentum
    optimizer = torch.optim.SGD(
        encoder.parameters(),
        config.learning_rate,
        config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
    )

    def step(first: Tensor, second: Tensor) -> float:
        q = normalize(encoder(first), dim=1)
        with torch.no_grad():
            for slow, fast in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
                slow.data = slow.data * momentum + fast.data * (1 - momentum)
            order = torch.randperm(len(second)).to(device)
            k = normalize(key_encoder(second[order]), dim=1)[torch.argsort(order)]
        if negatives.synthetic:
            loss = baseline_loss(q, k, queue, negatives, temperature=config.method.temperature).mean()
        else:
            logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.clone().T], dim=1)
            target = torch.zeros(len(q), dtype=torch.int64, device=device)
            loss = torch.nn.functional.cross_entropy(logits / config.method.temperature, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        begin = int(pointer)
        places = torch.arange(begin, begin + len(k), device=device) % len(queue)
        queue[places] = k
        pointer[0] = (begin + len(k)) % len(queue)
        return loss.item()

    return step
