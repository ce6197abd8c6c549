"""The typed configuration: every key with its meaning, range and default."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.dali.settings import DaliSettings
from synco_fast.data.pipelines.names import Decode, PipelineName
from synco_fast.data.section import Section
from synco_fast.data.sources.decode import Limits
from synco_fast.data.sources.stream import StreamSettings
from synco_fast.explain import explain_error, nearest_key, nearest_name
from synco_fast.kernels.backends import Backend
from synco_fast.kernels.negatives import FAMILIES, Extrapolation, Negatives
from synco_fast.methods import METHODS, extra_of, with_queue
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.files import check_text
from synco_fast.runtime.migrations import migrate_config
from synco_fast.runtime.names import Device, EngineName, Format, OptimizerName, QueueDtype
from synco_fast.runtime.strict_yaml import read_yaml

__all__ = ["SECTIONS", "Config", "Section", "build_config", "read_mapping"]

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
"""Momentum of a moving average."""
Count = Annotated[int, Field(ge=0, le=65_536)]
"""Negatives of one kind per query."""
Strength = Annotated[float, Field(ge=0, le=10)]
Epochs = Annotated[float, Field(ge=0, le=100_000)]


class DataConfig(Section):
    """Source of the images, and data loading."""

    source: str = Field(
        "demo",
        description="A folder, tar:FOLDER, list:FILE, parquet:FOLDER, hf:NAME, stream:SHARDS, idx:FOLDER, "
        "cifar:FOLDER, stl10:FOLDER, or demo",
    )
    fraction: float = Field(1.0, gt=0, le=1, description="Fraction of the training images to use")
    pipeline: PipelineName = Field(
        "auto",
        description="Data pipeline; auto: by the device; a long run measures which one keeps up with the training step",
    )
    decode: Decode = Field(
        "once", description="DALI: decode the whole image once for both views, or the region of each view"
    )
    hw_decoder_load: float | None = Field(
        None, ge=0, le=1, description="DALI: fraction of the JPEG files for the GPU's JPEG decoder; null: by the GPU"
    )
    preallocate_width_hint: int | None = Field(
        None, ge=0, le=65_535, description="DALI: width of images to allocate decoder memory for; null: by the GPU"
    )
    preallocate_height_hint: int | None = Field(
        None, ge=0, le=65_535, description="DALI: height of images to allocate decoder memory for; null: by the GPU"
    )
    jpeg_fancy_upsampling: bool = Field(True, description="DALI: interpolate chroma as Pillow does")
    dali_threads: int | None = Field(None, ge=1, le=1024, description="DALI: threads per rank; null: by the GPU")
    workers: int | None = Field(
        None, ge=0, le=1024, description="Decoding processes per rank; null: one per core that it has, 0: none"
    )
    images: int | None = Field(
        None, ge=1, lt=1 << 48, description="Stream: images per epoch; null: as many as an index counts"
    )
    shuffle_buffer: int = Field(
        8192, ge=1, le=1 << 24, description="Stream: images in the shuffle buffers of all readers together"
    )
    readers: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Stream: shards read in parallel, over all processes and workers; null: up to 16, by the batch",
    )
    max_corrupt: Fraction = Field(0.01, description="Fraction of corrupt images above which the run stops")
    max_file_bytes: int = Field(
        512 << 20, ge=1, le=1 << 40, description="Bytes above which an image file counts as corrupt"
    )
    max_pixels: int = Field(
        178_956_970,
        ge=1,
        le=178_956_970,
        description="Pixels above which an image counts as corrupt; at most Pillow's limit",
    )

    @property
    def stream(self) -> StreamSettings:
        """How a stream is read."""
        return StreamSettings(self.images, self.shuffle_buffer, self.readers)

    @property
    def limits(self) -> Limits:
        """The size limits of an image."""
        return Limits(self.max_file_bytes, self.max_pixels)

    @property
    def dali(self) -> DaliSettings:
        """The settings of DALI's decoder."""
        return DaliSettings(
            self.hw_decoder_load,
            self.preallocate_width_hint,
            self.preallocate_height_hint,
            self.jpeg_fancy_upsampling,
            self.dali_threads,
        )


class ModelConfig(Section):
    """The encoder (MoCo v2's by default)."""

    backbone: str = Field("resnet50", description="Backbone: a torchvision model, or timm/NAME")
    backbone_args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the backbone's constructor"
    )
    init: str | None = Field(
        None,
        min_length=1,
        description="Weights to start from: a run, a checkpoint, a file, torchvision/NAME or timm/NAME",
    )
    init_head: bool = Field(True, description="Start from the projection head as well, where those weights have one")
    small_stem: bool = Field(False, description="Stride-1 stem without max-pooling, for images of about 32 x 32")
    dim: int = Field(128, ge=2, le=65_536, description="D, dimension of the embedding")
    hidden: int | None = Field(
        None, ge=1, le=65_536, description="Width of the projection head's hidden layer; null: that of the features"
    )
    momentum: Fraction = Field(0.999, description="EMA momentum of the key encoder")
    momentum_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="EMA momentum over the run; cosine: rises to 1"
    )
    norm: Literal["auto", "plain", "fused"] = Field(
        "auto",
        description="Batch norm with the add and ReLU after it; plain: modules, fused: Triton kernels on a GPU, "
        "auto: fused blocks, by Triton kernels where they are validated",
    )
    batch_norm_groups: int = Field(
        8, ge=1, le=65_536, description="Groups of the global batch, each with its own batch-norm statistics"
    )
    sync_batch_norm: bool = Field(False, description="SyncBN: batch-norm statistics over all processes, on GPUs")


class _MethodChoice(Section):
    name: str = Field(
        "synco", description=f"The method: {', '.join(f'{name} ({spec.title})' for name, spec in METHODS.items())}"
    )
    queue: int = Field(65536, ge=1, le=1 << 22, description="K, length of the queue of past keys")
    temperature: float = Field(0.2, ge=1e-4, le=100, description="T, temperature of the loss")
    count_scale: float = Field(
        1.0, ge=0, le=64, description="Factor on the published counts, for the counts below that are null; 0: none"
    )
    hard: Count | None = Field(None, description="N, size of Q^N: hard negatives that the synthetic ones are made from")


if TYPE_CHECKING:
    _MethodCounts = _MethodChoice
else:
    # Fields for each synthetic family, so that a new family needs only a row of the kernels' table.
    _OF_FAMILIES = {
        family.name: (Count | None, Field(None, description=f"{family.title}; SynCo's count is {family.published}"))
        for family in FAMILIES
    }
    _OF_FAMILIES |= {
        family.strength[0]: (
            Strength,
            Field(family.strength[1], description=f"Strength of type {family.number}: {family.formula}"),
        )
        for family in FAMILIES
        if family.strength
    }
    _MethodCounts = create_model("_MethodCounts", __base__=_MethodChoice, **_OF_FAMILIES)


class MethodConfig(_MethodCounts):
    """The method and its negatives. A count of null is the published one times count_scale."""

    extrapolation: Extrapolation = Field(
        "released", description="Formula of type 2: the released code's or the paper's"
    )
    warmup_epochs: int = Field(10, ge=0, le=100_000, description="First epochs without synthetic negatives")
    cooldown_epochs: int = Field(0, ge=0, le=100_000, description="Last epochs without synthetic negatives")
    symmetric: bool = Field(False, description="Use each view as query and as key")
    mask_same_image: bool = Field(False, description="Exclude queue keys of the query's own image from its negatives")
    backend: Backend = Field(
        "auto", description="Backend of the loss; auto: triton where it is validated, else blockwise"
    )
    queue_dtype: QueueDtype = Field(
        "auto", description="Dtype of the queue, and of q and k in the loss; auto: bfloat16 on a GPU, else float32"
    )

    @model_validator(mode="after")
    def _known(self) -> MethodConfig:
        if self.name not in METHODS:
            *names, last = (repr(name) for name in METHODS)
            raise ValueError(
                f"name: found {self.name!r}, expected {', '.join(names)} or {last}{nearest_name(self.name, METHODS)}"
            )
        return self

    def negatives(self) -> Negatives:
        """The negatives that the loss takes.

        Raises:
            ConfigError: The counts contradict one another, or the method has no queue.
        """
        known = with_queue()
        if self.name not in known:
            raise ConfigError(f"method.name: found {self.name}, expected one with a queue: {', '.join(known)}")
        names = ("hard", *(family.name for family in FAMILIES))
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        own |= {family.strength[0]: getattr(self, family.strength[0]) for family in FAMILIES if family.strength}
        try:
            found = known[self.name]().scaled(self.count_scale, **own, extrapolation=self.extrapolation)
        except ValueError as error:
            raise ConfigError(f"method.{error}") from error
        # Where nothing is made from Q^N, a preset's N is dropped with its synthetic negatives.
        return found if found.synthetic else replace(found, hard=0)


class GeneratedConfig(Section):
    """Pairs of generated images as further positives, after Wu et al. (arXiv 2202.06464)."""

    pair: Literal["joint", "frozen", "none"] = Field(
        "none", description="joint: generators learn with the encoder; frozen: fixed generators; none: no pairs"
    )
    checkpoint: str | None = Field(None, description="Run of pretrain-generator that both generators start from")
    latent: int = Field(128, ge=1, le=65_536, description="Length of a latent vector, as in that run")
    width: int = Field(32, ge=1, le=4096, description="Channels at full size, as in that run")
    batch: int = Field(64, ge=2, le=1 << 20, description="Generated pairs per step")
    weight: float = Field(0.5, ge=0, le=1e6, description="w_syn, weight of generated pairs in the encoder's loss")
    hardness: float = Field(
        0.05,
        ge=0,
        le=1e6,
        description="Final w_hard: weight of the contrastive loss across a pair, which the generators maximise",
    )
    ramp_epochs: Epochs = Field(10, description="Epochs over which w_hard rises from 0")
    floor: float = Field(0.9, ge=-1, le=1, description="Cosine similarity below which a pair is pulled together")
    floor_weight: float = Field(10, ge=0, le=1e6, description="Weight of the term that pulls such pairs together")
    lr: float = Field(2e-4, gt=0, le=1e6, description="Learning rate of generators and discriminator (Adam)")
    betas: tuple[Beta, Beta] = Field((0.0, 0.99), description="Adam's betas for generators and discriminator")
    r1: float = Field(0.1, ge=0, le=1e6, description="Weight of the R1 gradient penalty")
    r1_every: int = Field(16, ge=1, le=1 << 31, description="Steps between two gradient penalties")
    collapse: float = Field(
        0.2,
        ge=0,
        le=100,
        description="Warn of mode collapse below this fraction of the real images' diversity",
    )

    @property
    def on(self) -> bool:
        """Whether pairs are made."""
        return self.pair != "none"


class OptimizerConfig(Section):
    """The optimizer: SGD as in MoCo v2, or another by name."""

    name: OptimizerName = Field(
        "sgd", description="Optimizer: PyTorch's, LARS and LAMB for large batches, or NVIDIA apex's if installed"
    )
    lr: float = Field(0.03, gt=0, le=1e6, description="Peak learning rate at a batch of 256; scaled with the batch")
    momentum: Beta = Field(0.9, description="Momentum of sgd and lars")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Betas of adamw, lamb, and apex's Adam and LAMB")
    weight_decay: float = Field(1e-4, ge=0, le=100, description="Weight decay; all but SGD exempt biases and norms")
    warmup_epochs: Epochs = Field(0, description="Epochs over which the learning rate rises from 0")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Learning-rate schedule after the warm-up")
    clip: float | None = Field(None, gt=0, le=1e6, description="Clip the gradient to this norm; null: no clipping")


class TrainingConfig(Section):
    """The training run."""

    epochs: int = Field(200, ge=1, le=100_000, description="Length of the run in epochs")
    batch: int = Field(256, ge=1, le=1 << 20, description="Images per step, over all processes")
    accumulate: int = Field(1, ge=1, le=65_536, description="Micro-batches per step (gradient accumulation)")
    max_steps: int | None = Field(
        None, ge=0, lt=1 << 31, description="Stop after this many steps; 0 saves the untrained encoder"
    )
    max_time: float | None = Field(None, gt=0, le=1e6, description="Stop after this many minutes, with a checkpoint")
    max_skipped: int = Field(
        16,
        ge=0,
        le=1_000_000,
        description="Abort after more than this many consecutive steps with non-finite gradients",
    )
    device: Device = Field("auto", description="auto: a GPU if there is one")
    precision: Format = Field(
        "auto",
        description="Number format of the encoders; auto: bf16 where the device computes it at full speed, else fp32",
    )
    channels_last: bool = Field(True, description="Channels-last memory layout")
    fused: Literal["auto", "none"] = Field(
        "auto",
        description="Fused kernels on a GPU where their own key is auto: those that pass validation there, or none",
    )
    engine: EngineName = Field(
        "auto",
        description="How a step runs: eager, as one CUDA graph, under torch.compile, or both; auto: the fastest as "
        "measured, if the run is long enough, else eager",
    )
    cudnn_benchmark: bool = Field(True, description="cuDNN chooses convolution algorithms by trial, on a GPU")
    timeout: float = Field(300, gt=0, le=604_800, description="Seconds to wait for the other processes")
    log_every: int = Field(20, ge=1, lt=1 << 31, description="Steps between lines of metrics.jsonl")
    wandb: str | None = Field(None, min_length=1, description="Weights & Biases project to log to")
    mlflow: str | None = Field(None, min_length=1, description="MLflow experiment to log to")
    checkpoint_every: int | None = Field(
        None, ge=1, lt=1 << 31, description="Steps between checkpoints; null: one epoch"
    )
    keep: int = Field(2, ge=1, le=1_000_000, description="Checkpoints to keep")
    keep_best: bool = Field(False, description="Keep the checkpoint of the highest kNN as best.pt as well")


class EvaluationConfig(Section):
    """The periodic kNN on the held-out split."""

    every: int = Field(10, ge=0, le=100_000, description="Epochs between evaluations; 0: never")
    source: str | None = Field(
        None, min_length=1, description="Labelled images to evaluate on, also after the run; null: data.source"
    )
    k: int = Field(200, ge=1, le=1 << 24, description="k, number of neighbours that vote")
    temperature: float = Field(0.07, ge=1e-4, le=100, description="Temperature of the votes")
    train_images: int | None = Field(None, ge=1, lt=1 << 31, description="Training images that can vote; null: all")
    images: int | None = Field(None, ge=1, lt=1 << 31, description="Held-out images to classify; null: all")
    batch: int = Field(256, ge=1, le=65_536, description="Batch size of feature extraction")


class Config(Section):
    """Everything that decides a run."""

    preset: str = Field("custom", description="The preset it started from")
    about: str = Field("", description="Purpose")
    seed: int = Field(0, ge=0, lt=1 << 31, description="Seed of weights, order, views and draws")
    data: DataConfig = DataConfig()
    augment: Recipe = Recipe()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    generated: GeneratedConfig = GeneratedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        method, batch = self.method, self.training.batch
        if method.name in with_queue():
            hard, keys = method.negatives().hard, batch * (1 + method.symmetric)
            if method.queue < keys:
                raise ConfigError(f"method.queue: found {method.queue}, expected {keys} or more, the keys of one step")
            if hard > method.queue:
                raise ConfigError(f"method.hard: found {hard}, expected up to {method.queue}, the queue")
        groups = self.model.batch_norm_groups
        if batch % groups:
            raise ConfigError(
                f"training.batch: found {batch}, expected a multiple of {groups} (model.batch_norm_groups)"
            )
        if self.model.sync_batch_norm and groups > 1:
            raise ConfigError(f"model.batch_norm_groups: found {groups}, expected 1 with model.sync_batch_norm")
        if self.augment.grows and self.augment.end_ramp >= self.training.epochs:
            raise ConfigError(
                f"augment.end_ramp: found {self.augment.end_ramp}, expected below {self.training.epochs} "
                "(training.epochs), or augment.min_size null: the last epochs must see views of full size"
            )
        extra = extra_of(self)
        if extra is not None:
            extra.check(self)
        return self

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: that of a batch of 256, scaled linearly."""
        return self.optimizer.lr * self.training.batch / 256

    def to_yaml(self) -> str:
        """The resolved configuration, as `read_mapping` and `build_config` read it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


SECTIONS = tuple(name for name, field in Config.model_fields.items() if isinstance(field.default, Section))
"""The names of the sections."""


def build_config(values: dict[str, Any], overrides: dict[str, Any] | None = None) -> Config:
    """A configuration from nested values and dotted overrides.

    Args:
        values: By section and key, as in a YAML file; older names are understood. A section of null has its defaults.
        overrides: By dotted name, such as ``{"method.name": "mochi"}``.

    Raises:
        ConfigError: An unknown key (with the nearest one), or a value outside its range.
    """
    empty: dict[str, Any] = {name: {} for name in SECTIONS if name in values and values[name] is None}
    merged = _copy(migrate_config({**values, **empty}))
    for dotted, value in (overrides or {}).items():
        *path, last = dotted.split(".")
        inside = merged
        for part in path:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise ConfigError(f"{dotted}: found no section of that name{nearest_key(dotted, Config)}")
        inside[last] = value
    _check_texts(merged)
    try:
        return Config.model_validate(migrate_config(merged, older_wins=True))
    except ValidationError as error:
        raise ConfigError(explain_error(error, Config)) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The sections and keys of a YAML file.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"config: found {type(values).__name__} in {path}, expected sections and keys")
    return values


def _check_texts(values: dict[str, Any], prefix: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _check_texts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            check_text(value, f"{prefix}{key}")


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in values.items()}
