"""Configuration of stage one (generator training), and the checks of stage two."""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from synco_fast.config import Beta, Config, Fraction, Section
from synco_fast.explain import explain_error
from synco_fast.generated.generator import check_size
from synco_fast.methods import with_queue
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.migrations import migrate_generator_config
from synco_fast.runtime.names import Device

__all__ = ["GeneratorConfig", "build_generator_config", "check_pairs"]


class GeneratorConfig(Section):
    """The configuration of ``pretrain-generator``."""

    source: str = Field(
        "demo",
        description="A folder, tar:FOLDER, list:FILE, parquet:FOLDER, hf:NAME, idx:FOLDER, cifar:FOLDER, "
        "stl10:FOLDER, or demo",
    )
    fraction: float = Field(1.0, gt=0, le=1, description="Fraction of the training images to use")
    workers: int | None = Field(None, ge=0, le=1024, description="Decoding processes; null: one per core, 0: none")
    max_corrupt: Fraction = Field(0.01, description="Fraction of corrupt images above which the run does not start")
    seed: int = Field(0, ge=0, lt=1 << 31, description="Seed of weights, order and latent vectors")
    size: int = Field(32, ge=32, le=64, description="Side of the images in pixels, 32 or 64")
    latent: int = Field(128, ge=1, le=65_536, description="Length of a latent vector")
    width: int = Field(32, ge=1, le=4096, description="Channels at full size")
    steps: int = Field(20_000, ge=1, lt=1 << 31, description="Length of the run in steps")
    batch: int = Field(64, ge=2, le=1 << 20, description="Real images per step, and as many generated ones")
    lr: float = Field(1e-3, gt=0, le=1e6, description="Learning rate of generator and discriminator (Adam)")
    betas: tuple[Beta, Beta] = Field((0.0, 0.99), description="Betas of that Adam")
    r1: float = Field(0.1, ge=0, le=1e6, description="Weight of the R1 gradient penalty")
    r1_every: int = Field(16, ge=1, le=1 << 31, description="Steps between two gradient penalties")
    augment: bool = Field(True, description="DiffAugment (colour, translation, cutout) before the discriminator")
    average: Fraction = Field(0.999, description="EMA momentum of the generator's moving average")
    collapse: float = Field(
        0.2, ge=0, le=100, description="Warn of mode collapse below this fraction of the real images' diversity"
    )
    kid_every: int = Field(2000, ge=0, lt=1 << 31, description="Steps between KID measurements; 0: never")
    kid_images: int = Field(1000, ge=4, lt=1 << 31, description="Real and generated images, each, that KID compares")
    encoder: str | None = Field(
        None, description="Checkpoint whose backbone gives KID's features; null: a random network"
    )
    device: Device = Field("auto", description="auto: a GPU if there is one")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto", description="Number format; auto: bf16 where the device has it at full speed, else fp32"
    )
    channels_last: bool = Field(True, description="Channels-last memory layout")
    max_time: float | None = Field(None, gt=0, le=1e6, description="Stop after this many minutes, with a checkpoint")
    max_skipped: int = Field(
        16,
        ge=0,
        le=1_000_000,
        description="Abort after more than this many consecutive steps with non-finite gradients",
    )
    log_every: int = Field(50, ge=1, lt=1 << 31, description="Steps between lines of metrics.jsonl")
    sample_every: int = Field(1000, ge=1, lt=1 << 31, description="Steps between sheets of samples")
    checkpoint_every: int = Field(1000, ge=1, lt=1 << 31, description="Steps between checkpoints")
    keep: int = Field(2, ge=1, le=1_000_000, description="Checkpoints to keep")

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
        ConfigError: An unknown key (with the nearest one), or a value outside its range.
    """
    try:
        return GeneratorConfig.model_validate(migrate_generator_config(values))
    except ValidationError as error:
        raise ConfigError(explain_error(error, GeneratorConfig)) from error


def check_pairs(config: Config) -> None:
    """Raise if pairs of generated images do not work with the rest of a configuration.

    Raises:
        ConfigError: As its line says.
    """
    training, known = config.training, with_queue()
    if config.method.name not in known:
        raise ConfigError(
            f"generated.pair: found {config.generated.pair}, expected none with method.name {config.method.name}, "
            f"since pairs need the queue of {', '.join(known)}"
        )
    check_size(config.augment.size, "augment.size")
    if config.augment.grows:
        raise ConfigError(
            f"augment.min_size: found {config.augment.min_size}, expected null with generated pairs, whose images "
            "have one size"
        )
    if training.accumulate != 1:
        raise ConfigError(f"training.accumulate: found {training.accumulate}, expected 1 with generated pairs")
    if training.engine not in ("auto", "eager"):
        raise ConfigError(f"training.engine: found {training.engine}, expected auto or eager with generated pairs")
    keys = training.batch * (1 + config.method.symmetric) + config.generated.batch
    if config.method.queue < keys:
        raise ConfigError(f"method.queue: found {config.method.queue}, expected {keys} or more, the keys of one step")
