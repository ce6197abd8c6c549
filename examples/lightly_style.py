"""SynCo in lightly's style: only the criterion differs from lightly's own MoCo example.

The module takes lightly's batches, ``(views, targets, file names)``, and keeps lightly's order of a step: update the
momentum networks, embed the query, embed the key, call the criterion. With lightly installed:

    from lightly.data import LightlyDataset
    from lightly.transforms import MoCoV2Transform

    dataset = LightlyDataset("/data/photos", transform=MoCoV2Transform(input_size=96))
    train(SynCo(torchvision.models.resnet18()), torch.utils.data.DataLoader(dataset, 64, drop_last=True), epochs=10)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from synco_fast import SynthContrastLoss
from synco_fast.kernels import Negatives


class SynCo(nn.Module):
    """Backbone, projection head, their momentum copies, and the criterion."""

    def __init__(self, resnet: models.ResNet, *, queue: int = 4096) -> None:
        super().__init__()
        width = resnet.fc.in_features
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.projection_head_momentum = copy.deepcopy(self.projection_head).requires_grad_(False)
        # lightly: NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128)). SynCo's T is 0.2, and its counts belong to
        # a queue of 65,536.
        negatives = Negatives.synco().scaled(queue / 65536)
        self.criterion = SynthContrastLoss(negatives, dim=128, queue=queue, temperature=0.2)

    def training_step(self, batch: tuple[list[Tensor], Any, Any], batch_idx: int) -> Tensor:
        """The loss of one of lightly's batches."""
        (x_query, x_key), _, _ = batch
        update_momentum(self.backbone, self.backbone_momentum, m=0.996)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.996)
        query = self.projection_head(self.backbone(x_query).flatten(start_dim=1))
        with torch.no_grad():
            key = self.projection_head_momentum(self.backbone_momentum(x_key).flatten(start_dim=1))
        loss: Tensor = self.criterion(query, key)
        return loss


@torch.no_grad()
def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """What ``lightly.models.utils.update_momentum`` does."""
    for slow, fast in zip(model_ema.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - m)


def train(model: SynCo, loader: Iterable[Any], *, epochs: int) -> list[float]:
    """The loop that a Lightning trainer would run; returns the loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    losses = []
    for _ in range(epochs):
        for number, batch in enumerate(loader):
            loss = model.training_step(batch, number)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses
