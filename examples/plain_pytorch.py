"""SynCo in your own training loop: `SynthContrastLoss` takes two embeddings, the rest is plain PyTorch.

    python examples/plain_pytorch.py --data /data/photos

Pretrains a ResNet-18 on a folder of class folders (`torchvision.datasets.ImageFolder`) and writes its backbone.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torchvision import datasets, models
from torchvision.transforms import v2

from synco_fast import SynthContrastLoss
from synco_fast.kernels import Negatives


class TwoViews:
    """Two random views of an image."""

    def __init__(self, transform: Callable[[Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Image) -> tuple[Tensor, Tensor]:
        """Both views, (3, size, size)."""
        return self.transform(image), self.transform(image)


def augmentation(size: int) -> v2.Transform:
    """MoCo v2's views without the blur."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def main(words: list[str] | None = None) -> list[float]:
    """Train; returns the loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--queue", type=int, default=4096)
    parser.add_argument("--out", default="backbone.pth")
    options = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    images = datasets.ImageFolder(options.data, TwoViews(augmentation(options.size)))
    loader = torch.utils.data.DataLoader(images, options.batch, shuffle=True, drop_last=True)

    encoder = models.resnet18(num_classes=128)
    encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), encoder.fc)  # type: ignore[assignment]
    encoder = encoder.to(device)
    momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
    # The published counts, 960 synthetic negatives of 1,024 hard ones, belong to a queue of 65,536.
    negatives = Negatives.synco().scaled(options.queue / 65536)
    criterion = SynthContrastLoss(negatives, dim=128, queue=options.queue, temperature=0.2).to(device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)

    losses = []
    for epoch in range(options.epochs):
        for (first, second), _ in loader:
            with torch.no_grad():
                for slow, fast in zip(momentum_encoder.parameters(), encoder.parameters(), strict=True):
                    slow.lerp_(fast, 0.004)
                key = momentum_encoder(second.to(device))
            loss = criterion(encoder(first.to(device)), key)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")

    encoder.fc = nn.Identity()  # type: ignore[assignment]
    torch.save(encoder.state_dict(), options.out)
    return losses


if __name__ == "__main__":
    main()
