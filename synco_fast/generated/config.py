"""The configuration of stage one, the training of a generator, and what stage two asks of a configuration."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from synco_fast.config import Config, Section
from synco_fast.generated.generator import check_size
from synco_fast.methods import with_queue
from synco_fast.runtime.errors import ConfigError

__all__ = ["GeneratorConfig", "build_generator_config", "check_pairs"]


class GeneratorConfig(Section):
    """Everything that decides a run of ``pretrain-generator``."""

    source: str = Field("demo", description="A folder, idx:FOLDER, or demo")
    share: float = Field(1.0, gt=0, le=1, description="Share of the training images that is learned from")
    workers: int | None = Field(None, ge=0, description="Decoding processes; one a core by default, 0 for none")
    max_broken: float = Field(0.01, ge=0, le=1, description="Share of unreadable images above which nothing begins")
    seed: int = Field(0, ge=0, lt=1 << 31)
    size: int = Field(32, description="Side of the images in pixels, 32 or 64")
    latent: int = Field(128, ge=1, description="Length of a latent vector")
    width: int = Field(32, ge=1, description="Channels at full size")
    steps: int = Field(20_000, ge=1)
    batch: int = Field(64, ge=2, description="Real images a step, and as many generated ones")
    lr: float = Field(1e-3, gt=0, description="Of generator and discriminator, by Adam")
    betas: tuple[float, float] = (0.0, 0.99)
    r1: float = Field(0.1, ge=0, description="Weight of R1")
    r1_every: int = Field(16, ge=1, description="Steps between two computations of R1")
    augment: bool = Field(True, description="DiffAugment's colour, translation and cutout before the discriminator")
    average: float = Field(0.999, ge=0, le=1, description="Momentum of the generator's moving average")
    collapse: float = Field(0.2, ge=0, description="Diversity, as a share of the real images', that is warned of below")
    quality_every: int = Field(2000, ge=0, description="Steps between figures of quality; 0 for none")
    quality_images: int = Field(1000, ge=4, description="Images of each kind that the figure compares")
    encoder: str | None = Field(None, description="Checkpoint whose features the figure takes; random ones if unset")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field("auto", description="bf16 where the device has it")
    channels_last: bool = True
    max_time: float | None = Field(None, gt=0, description="Stop after this many minutes, with a checkpoint")
    max_skipped: int = Field(16, ge=0, description="Steps in a row without a finite gradient that a run puts up with")
    log_every: int = Field(50, ge=1, description="Steps between lines of metrics.jsonl")
    sample_every: int = Field(1000, ge=1, description="Steps between sheets of samples")
    checkpoint_every: int = Field(1000, ge=1, description="Steps between checkpoints")
    keep: int = Field(2, ge=1, description="How many checkpoints are kept")

    @model_validator(mode="after")
    def _fits(self) -> GeneratorConfig:
        check_size(self.size, "size")
        return self

    def to_yaml(self) -> str:
        """Readable by `build_generator_config` again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def build_generator_config(values: dict[str, Any]) -> GeneratorConfig:
    """A configuration from its keys.

    Raises:
        ConfigError: An unknown key (with the nearest one), or a value that is not allowed.
    """
    for name in values:
        if name not in GeneratorConfig.model_fields:
            near = difflib.get_close_matches(name, GeneratorConfig.model_fields, n=1, cutoff=0.5)
            raise ConfigError(f"{name}: found an unknown key" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        return GeneratorConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        said = first["msg"].replace("Input should be ", "")
        raise ConfigError(f"{name}: found {first['input']!r}, expected {said}") from error


def check_pairs(config: Config) -> None:
    """Raise where pairs of generated images cannot be had beside the rest of a configuration.

    Raises:
        ConfigError: As its line says.
    """
    training, known = config.training, with_queue()
    if config.method.name not in known:
        raise ConfigError(
            f"generated.pair: found {config.generated.pair}, expected none beside method.name {config.method.name}, "
            f"since pairs need the queue of {', '.join(known)}"
        )
    check_size(config.augment.size, "augment.size")
    for name, found, expected in (
        ("training.accumulate", training.accumulate, 1),
        ("training.cuda_graph", training.cuda_graph, False),
        ("training.compile", training.compile, "none"),
    ):
        if found != expected:
            raise ConfigError(f"{name}: found {found}, expected {expected} beside generated pairs")
    keys = training.batch * (1 + config.method.symmetric) + config.generated.batch
    if config.method.queue < keys:
        raise ConfigError(f"method.queue: found {config.method.queue}, expected {keys} or more, the keys of one step")
