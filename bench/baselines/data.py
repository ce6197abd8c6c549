"""The plain two-crop loader of MoCo v2's and SynCo's released code, rewritten from its description.

Pillow decodes a file once, torchvision's transforms run twice on the Pillow image, and each view becomes a normalised
float tensor in the worker.
"""

from __future__ import annotations

import random

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from synco_fast.data.augment.recipe import Recipe

__all__ = ["TwoCrops", "two_crop_loader"]


class _Blur:
    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


class TwoCrops(Dataset[tuple[Tensor, Tensor]]):
    """Two normalised views of each file, (3, size, size) float32.

    Args:
        files: Their paths.
        recipe: The augmentation.
    """

    def __init__(self, files: list[str], recipe: Recipe) -> None:
        self.files = files
        jitter = transforms.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(recipe.size, scale=recipe.area, ratio=recipe.ratio),
                transforms.RandomApply([jitter], p=recipe.jitter_probability),
                transforms.RandomGrayscale(recipe.grayscale_probability),
                transforms.RandomApply([_Blur(recipe.blur_sigma)], p=recipe.blur_probability),
                transforms.RandomSolarize(128, recipe.solarize_probability),
                transforms.RandomHorizontalFlip(recipe.flip_probability),
                transforms.ToTensor(),
                transforms.Normalize(recipe.mean, recipe.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Image.Image:
        """The decoded file."""
        with open(self.files[index], "rb") as file, Image.open(file) as opened:  # noqa: PTH123
            return opened.convert("RGB")

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Both views of a file."""
        image = self.read(index)
        return self.transform(image), self.transform(image)


def two_crop_loader(files: list[str], recipe: Recipe, *, batch: int, workers: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled batches of two normalised views, (batch, 3, size, size) float32 each."""
    return DataLoader(
        TwoCrops(files, recipe),
        batch,
        shuffle=True,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
        persistent_workers=workers > 0,
    )
