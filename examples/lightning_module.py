"""SynCo in PyTorch Lightning: a module with `SynthContrastLoss`, and a data module with this package's pipelines.

    pip install lightning
    python examples/lightning_module.py --data /data/photos

Lightning owns the loop, the devices and the checkpoints. The queue is part of the module's state, so Lightning's own
checkpoints hold it. Sources, pipelines and views are those of ``synco-fast pretrain``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torchvision import models

from synco_fast import SynthContrastLoss
from synco_fast.config import EvaluationConfig
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import Batch, Pipeline, normalise
from synco_fast.data.pipelines.build import build_pipeline
from synco_fast.data.sources.open import open_source
from synco_fast.evaluation.knn import periodic_knn
from synco_fast.kernels import Negatives


class Views(lightning.LightningDataModule):
    """Two views of each training image.

    Args:
        data: Any source of ``data.source``: a folder, ``tar:FOLDER``, ``demo``.
        size: Side of a view in pixels.
        batch: Images per step, over all devices.
        seed: Seed of order and views.
        workers: Decoding processes; None for one per core.
    """

    def __init__(
        self, data: str, *, size: int = 96, batch: int = 64, seed: int = 0, workers: int | None = None
    ) -> None:
        super().__init__()
        self.data, self.batch, self.seed, self.workers = data, batch, seed, workers
        self.recipe = Recipe(size=size)
        self.pipeline: Pipeline | None = None

    def setup(self, stage: str) -> None:
        """Open the images; each device gets its own share of every batch."""
        if self.pipeline is None:
            trainer = self.trainer
            self.source = open_source(self.data)
            self.pipeline = build_pipeline(
                self.source.train,
                self.recipe,
                batch=self.batch,
                seed=self.seed,
                device=trainer.strategy.root_device,
                workers=self.workers,
                rank=trainer.global_rank,
                world=trainer.world_size,
            )

    def train_dataloader(self) -> Views:
        """The data module itself, which iterates over the batches of the trainer's epoch."""
        return self

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.pipeline)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of an epoch, whose order and views follow from seed and epoch."""
        self.pipeline.set_epoch(self.trainer.current_epoch)
        return iter(self.pipeline)

    def teardown(self, stage: str) -> None:
        """End the decoding processes."""
        if self.pipeline is not None:
            self.pipeline.close()
            self.pipeline = None


class SynCo(lightning.LightningModule):
    """Encoder, momentum encoder, and the loss with its queue.

    Args:
        method: ``synco``, ``mochi`` or ``moco``.
        dim: D, width of the embeddings.
        queue: K, past keys.
        temperature: T.
        momentum: EMA momentum of the momentum encoder.
        lr: Learning rate at the start; it falls to 0 as a cosine.
    """

    def __init__(
        self,
        method: str = "synco",
        *,
        dim: int = 128,
        queue: int = 4096,
        temperature: float = 0.2,
        momentum: float = 0.996,
        lr: float = 0.03,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = models.resnet18()
        width = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_head = copy.deepcopy(self.head).requires_grad_(False)
        # The published counts belong to a queue of 65,536.
        negatives = getattr(Negatives, method)().scaled(queue / 65536)
        self.criterion = SynthContrastLoss(negatives, dim=dim, queue=queue, temperature=temperature)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 512) of normalised images (B, 3, H, W)."""
        return self.backbone(images)

    @torch.no_grad()
    def embed_key(self, images: Tensor) -> Tensor:
        """Update the momentum encoder, and embed with it."""
        for slow, fast in ((self.momentum_backbone, self.backbone), (self.momentum_head, self.head)):
            for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                old.lerp_(new, 1 - self.hparams.momentum)
        return self.momentum_head(self.momentum_backbone(images))

    def training_step(self, batch: Batch, number: int) -> Tensor:
        """The loss of a batch. Keys of the very same image are no negatives: a small set is shorter than the queue."""
        recipe = self.trainer.datamodule.recipe
        key = self.embed_key(normalise(batch.second, recipe))
        query = self.head(self.backbone(normalise(batch.first, recipe)))
        loss = self.criterion(query, key, batch.image_ids)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the kNN accuracy of the backbone on the held-out images, if there are any."""
        data = self.trainer.datamodule
        if data.source.validation is not None and self.trainer.is_global_zero:
            settings = EvaluationConfig(k=min(20, len(data.source.train)))
            found = periodic_knn(
                self.backbone, data.source, data.recipe, settings, device=self.device, workers=data.workers
            )
            self.log("knn", found.accuracy, prog_bar=True, rank_zero_only=True)

    def configure_optimizers(self) -> Any:
        """SGD with a cosine over the run, as in MoCo v2."""
        learning = [*self.backbone.parameters(), *self.head.parameters()]
        optimizer = torch.optim.SGD(learning, lr=self.hparams.lr, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(words: list[str] | None = None, **settings: Any) -> lightning.Trainer:
    """Train; returns the trainer. ``settings`` are further arguments of `lightning.Trainer`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--queue", type=int, default=4096)
    parser.add_argument("--workers", type=int)
    options = parser.parse_args(words)
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(max_epochs=options.epochs, **settings)
    data = Views(options.data, size=options.size, batch=options.batch, workers=options.workers)
    trainer.fit(SynCo(queue=options.queue), datamodule=data)
    return trainer


if __name__ == "__main__":
    main()
