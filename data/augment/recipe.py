"""The augmentation as one typed description, from which every pipeline is built."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Recipe"]


class Recipe(BaseModel):
    """How a view is made from an image. The defaults are MoCo v2's (arXiv 2003.04297) at ImageNet's size.

    The operations run in this order, each view on its own: random crop resized to ``size``; colour jitter in a random
    order of its four parts; greyscale; Gaussian blur; horizontal flip; normalisation.

    Attributes:
        size: Side of a view in pixels.
        area: Range of the crop's share of the image's area.
        ratio: Range of the crop's width divided by its height, log-uniform.
        jitter_probability, brightness, contrast, saturation, hue: Colour jitter; the factor of each of the first three
            is uniform in [1 - x, 1 + x], the hue shift uniform in [-x, x] turns of the colour circle.
        greyscale_probability: Three equal channels of the image's luma.
        blur_probability, blur_sigma: Gaussian blur with sigma uniform in the range, in pixels of the view.
        flip_probability: Left and right exchanged.
        mean, std: Of the three channels, for values in [0, 1]. The defaults are ImageNet's.
        evaluation_resize: Length of the short side before the central crop of ``size`` in evaluation; the default
            keeps ImageNet's ratio of 256 to 224.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(224, ge=8, le=4096)
    area: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter_probability: float = Field(0.8, ge=0, le=1)
    brightness: float = Field(0.4, ge=0)
    contrast: float = Field(0.4, ge=0)
    saturation: float = Field(0.4, ge=0)
    hue: float = Field(0.1, ge=0, le=0.5)
    greyscale_probability: float = Field(0.2, ge=0, le=1)
    blur_probability: float = Field(0.5, ge=0, le=1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    flip_probability: float = Field(0.5, ge=0, le=1)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    evaluation_resize: int | None = Field(None, ge=8)

    @model_validator(mode="after")
    def _ranges(self) -> Recipe:
        for name in ("area", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: found ({low}, {high}), expected 0 < low <= high")
        if self.area[1] > 1:
            raise ValueError(f"area: found up to {self.area[1]}, expected up to 1")
        if min(self.std) <= 0:
            raise ValueError(f"std: found {self.std}, expected numbers above 0")
        if self.evaluation_resize is not None and self.evaluation_resize < self.size:
            raise ValueError(f"evaluation_resize: found {self.evaluation_resize}, expected {self.size} (size) or more")
        return self

    @property
    def resize(self) -> int:
        """Length of the short side before the central crop, in pixels."""
        return self.evaluation_resize or round(self.size * 256 / 224)
