"""Augmentation settings, from which every pipeline is built."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from pydantic import Field, model_validator

from synco_fast.data.section import Section

__all__ = ["Recipe"]

#: Times the view's side; beyond it an evaluation enlarges images by gigabytes to see a few of their pixels.
_LARGEST_RESIZE = 8

Area = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0.01, le=100)]
Sigma = Annotated[float, Field(gt=0, le=100)]
Mean = Annotated[float, Field(ge=-10, le=10)]
Deviation = Annotated[float, Field(gt=0, le=10)]


class Recipe(Section):
    """The augmentation of a view. The defaults are MoCo v2's (arXiv 2003.04297) at ImageNet's size.

    The operations and their order are those of `synco_fast.data.augment.draw.OPERATIONS`; each view is drawn
    independently.
    """

    size: int = Field(224, ge=8, le=4096, description="Side of a view in pixels; the last and largest of a ramp")
    min_size: int | None = Field(
        None, ge=8, le=4096, description="Progressive resizing: side of a view before the ramp; null: always size"
    )
    start_ramp: int = Field(0, ge=0, le=100_000, description="Progressive resizing: epoch at which views begin to grow")
    end_ramp: int = Field(1, ge=1, le=100_000, description="Progressive resizing: first epoch of views of full size")
    size_step: int = Field(
        32, ge=1, le=1024, description="Progressive resizing: sides within the ramp are multiples of this"
    )
    area: tuple[Area, Area] = Field((0.2, 1.0), description="Range of the crop's share of the image's area")
    ratio: tuple[Ratio, Ratio] = Field((3 / 4, 4 / 3), description="Range of the crop's width / height, log-uniform")
    jitter_probability: float = Field(0.8, ge=0, le=1, description="Probability of colour jitter, in random order")
    brightness: float = Field(0.4, ge=0, le=10, description="Colour jitter x: brightness times [1 - x, 1 + x]")
    contrast: float = Field(0.4, ge=0, le=10, description="Colour jitter x: contrast times [1 - x, 1 + x]")
    saturation: float = Field(0.4, ge=0, le=10, description="Colour jitter x: saturation times [1 - x, 1 + x]")
    hue: float = Field(0.1, ge=0, le=0.5, description="Colour jitter x: hue shifted by [-x, x] turns")
    grayscale_probability: float = Field(0.2, ge=0, le=1, description="Probability of three equal channels of luma")
    blur_probability: float = Field(0.5, ge=0, le=1, description="Probability of a Gaussian blur")
    blur_sigma: tuple[Sigma, Sigma] = Field((0.1, 2.0), description="Range of the blur's sigma in pixels of the view")
    solarize_probability: float = Field(
        0.0, ge=0, le=1, description="Probability of inverting pixels of 128 or more (BYOL, arXiv 2006.07733)"
    )
    flip_probability: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip")
    mean: tuple[Mean, Mean, Mean] = Field(
        (0.485, 0.456, 0.406), description="Channel means to subtract, for values in [0, 1]; ImageNet's"
    )
    std: tuple[Deviation, Deviation, Deviation] = Field(
        (0.229, 0.224, 0.225), description="Channel standard deviations to divide by, for values in [0, 1]; ImageNet's"
    )
    evaluation_resize: int | None = Field(
        None, ge=8, le=16_384, description="Evaluation: short side before the central crop; size * 256 / 224 if unset"
    )

    @model_validator(mode="after")
    def _ranges(self) -> Recipe:
        for name in ("area", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: found ({low}, {high}), expected low <= high")
        resize, most = self.evaluation_resize, _LARGEST_RESIZE * self.size
        if resize is not None and not self.size <= resize <= most:
            raise ValueError(f"evaluation_resize: found {resize}, expected {self.size} (size) to {most}")
        if self.min_size is not None and self.min_size > self.size:
            raise ValueError(f"min_size: found {self.min_size}, expected up to {self.size} (size)")
        if self.min_size is not None and self.start_ramp >= self.end_ramp:
            raise ValueError(f"start_ramp: found {self.start_ramp}, expected below {self.end_ramp} (end_ramp)")
        return self

    @property
    def grows(self) -> bool:
        """Whether the views of later epochs are larger."""
        return self.min_size is not None and self.min_size < self.size

    def size_at(self, epoch: int) -> int:
        """Side of the views of an epoch, counted from 0; an evaluation's is always ``size``.

        Between ``start_ramp`` and ``end_ramp`` it rises linearly, rounded to multiples of ``size_step``, as in FFCV's
        training recipe for ImageNet.
        """
        if self.min_size is None or epoch >= self.end_ramp:
            return self.size
        if epoch <= self.start_ramp:
            return self.min_size
        rise, length = self.size - self.min_size, self.end_ramp - self.start_ramp
        # Whole numbers: every process and every resumed run finds the same side.
        exact = self.min_size * length + rise * (epoch - self.start_ramp)
        rounded = (2 * exact + self.size_step * length) // (2 * self.size_step * length) * self.size_step
        return min(max(rounded, self.min_size), self.size)

    @property
    def sides(self) -> list[int]:
        """All sides of the views in training, smallest first."""
        return sorted({self.size_at(epoch) for epoch in range(self.end_ramp + 1)}) if self.grows else [self.size]

    def ramp(self, epochs: int) -> dict[int, int]:
        """Epochs by side of the views, smallest first, of a run of so many epochs."""
        return dict(Counter(self.size_at(epoch) for epoch in range(epochs)))

    def at(self, epoch: int) -> Recipe:
        """The recipe of an epoch's views."""
        return self.model_copy(update={"size": self.size_at(epoch), "min_size": None}) if self.grows else self

    @property
    def resize(self) -> int:
        """Length of the short side before the central crop, in pixels."""
        return self.evaluation_resize or round(self.size * 256 / 224)
