"""One typed configuration: what each key means, its default, and what it may be."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import Decode, PipelineName
from synco_fast.generated.generator import check_size
from synco_fast.kernels import FAMILIES, Backend, Negatives
from synco_fast.kernels.negatives import Extrapolation
from synco_fast.runtime.errors import ConfigError

__all__ = ["Config", "build_config", "read_config"]


class Section(BaseModel):
    """A part of the configuration: frozen, and strict about the names of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Where images come from."""

    source: str = Field("demo", description="A folder, tar:FOLDER, list:FILE, idx:FOLDER, or demo")
    share: float = Field(1.0, gt=0, le=1, description="Share of the training images that is learned from")
    pipeline: PipelineName = Field("auto", description="What makes the views")
    decode: Decode = Field("once", description="DALI: decode an image once, or each view's window")
    workers: int | None = Field(None, ge=0, description="Decoding processes; one a core by default, 0 for none")
    max_broken: float = Field(0.01, ge=0, le=1, description="Share of unreadable images above which the run stops")


class ModelConfig(Section):
    """The encoder (MoCo v2's by default)."""

    backbone: str = Field("resnet50", description="A torchvision model, or timm/NAME")
    backbone_args: dict[str, Any] = Field(default_factory=dict, description="Passed to the backbone's constructor")
    small_stem: bool = Field(False, description="Stride-1 stem without max-pooling, for images of about 32 x 32")
    dim: int = Field(128, ge=2, description="D, width of the embedding")
    hidden: int | None = Field(
        None, ge=1, description="Width of the head's hidden layer; that of the features if unset"
    )
    momentum: float = Field(0.999, ge=0, le=1, description="Of the key encoder")
    momentum_schedule: Literal["constant", "cosine"] = Field("constant", description="cosine rises to 1 over the run")
    batch_norm_groups: int = Field(8, ge=1, description="Groups in which a batch is normalised, over all processes")
    sync_batch_norm: bool = Field(False, description="Normalise over all processes at once, on GPUs")


class MethodConfig(Section):
    """Which negatives. A count that is not set takes the method's published value times ``count_scale``."""

    name: Literal["moco", "mochi", "synco", "generated"] = Field("synco", description="MoCo v2, MoCHi, SynCo or pairs")
    base: Literal["moco", "mochi", "synco"] = Field("moco", description="Whose synthetic negatives `generated` takes")
    queue: int = Field(65536, ge=1, description="K, past keys")
    temperature: float = Field(0.2, gt=0, description="T")
    count_scale: float = Field(1.0, gt=0, description="Share of the published counts that the unset ones take")
    hard: int | None = Field(None, ge=0, description="N, size of Q^N")
    interpolated: int | None = Field(None, ge=0, description="Type 1, MoCHi's s'")
    extrapolated: int | None = Field(None, ge=0, description="Type 2")
    mixed: int | None = Field(None, ge=0, description="Type 3, MoCHi's s")
    noisy: int | None = Field(None, ge=0, description="Type 4")
    perturbed: int | None = Field(None, ge=0, description="Type 5")
    adversarial: int | None = Field(None, ge=0, description="Type 6")
    extrapolation: Extrapolation = Field("released", description="Type 2's formula: released, or paper")
    warmup_epochs: int = Field(10, ge=0, description="First epochs without synthetic negatives")
    cooldown_epochs: int = Field(0, ge=0, description="Last epochs without synthetic negatives")
    symmetric: bool = Field(False, description="Each view serves as query and as key")
    mask_same_image: bool = Field(False, description="Keys of the query's own image are no negatives")
    backend: Backend = Field("auto", description="What computes the head")

    def negatives(self) -> Negatives:
        """The description that the head takes.

        Raises:
            ConfigError: The counts contradict one another.
        """
        whose = self.base if self.name == "generated" else self.name
        published = {"moco": Negatives.moco, "mochi": Negatives.mochi, "synco": Negatives.synco}[whose]()
        counts = {}
        for name in ("hard", *(family.name for family in FAMILIES)):
            own = getattr(self, name)
            counts[name] = round(getattr(published, name) * self.count_scale) if own is None else own
        if not any(counts[family.name] for family in FAMILIES):
            counts["hard"] = 0  # nothing is made from Q^N: a preset's N is left out with its synthetic negatives
        try:
            return Negatives(**counts, extrapolation=self.extrapolation)
        except ValueError as error:
            raise ConfigError(f"method.{error}") from error


class GeneratedConfig(Section):
    """The pair of generators of `generated`, after Wu et al. (arXiv 2202.06464)."""

    pair: Literal["joint", "frozen", "none"] = Field(
        "joint", description="Learned with the encoder, fixed, or left out"
    )
    checkpoint: str | None = Field(None, description="The run of pretrain-generator that both generators start from")
    latent: int = Field(128, ge=1, description="As in that run")
    width: int = Field(32, ge=1, description="As in that run")
    batch: int = Field(64, ge=2, description="Pairs a step")
    weight: float = Field(0.5, ge=0, description="w_syn, of the loss on generated pairs in the encoder's loss")
    hardness: float = Field(0.05, ge=0, description="w_hard at its end, of that loss in the generators' loss, negated")
    ramp_epochs: float = Field(10, ge=0, description="Epochs over which w_hard rises from 0")
    floor: float = Field(0.9, ge=-1, le=1, description="Similarity of a pair below which it is pushed together")
    floor_weight: float = Field(10, ge=0, description="Weight of what lies below the floor")
    lr: float = Field(2e-4, gt=0, description="Of generators and discriminator, by Adam")
    betas: tuple[float, float] = (0.0, 0.99)
    r1: float = Field(0.1, ge=0, description="Weight of R1")
    r1_every: int = Field(16, ge=1, description="Steps between two computations of R1")
    collapse: float = Field(0.2, ge=0, description="Diversity, as a share of the real images', that is warned of below")


class OptimizerConfig(Section):
    """SGD as in MoCo v2, or another by name."""

    name: Literal["sgd", "adamw", "lars", "lamb", "apex_sgd", "apex_lamb"] = Field(
        "sgd", description="PyTorch's, timm's for large batches, or NVIDIA apex's where it is installed"
    )
    lr: float = Field(0.03, gt=0, description="At a batch of 256; scaled with the batch")
    momentum: float = Field(0.9, ge=0, lt=1, description="Of sgd and lars")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Of adamw and lamb")
    weight_decay: float = Field(1e-4, ge=0)
    warmup_epochs: float = Field(0, ge=0, description="Epochs over which the learning rate rises from 0")
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float | None = Field(None, gt=0, description="Largest norm of the whole gradient; no limit if unset")


class TrainingConfig(Section):
    """The run."""

    epochs: int = Field(200, ge=1)
    batch: int = Field(256, ge=1, description="Images a step, over all processes")
    accumulate: int = Field(1, ge=1, description="Parts in which each process computes its share of a batch")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many steps, whatever the epochs")
    max_time: float | None = Field(None, gt=0, description="Stop after this many minutes, with a checkpoint")
    max_skipped: int = Field(16, ge=0, description="Steps in a row without a finite gradient that a run puts up with")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        "auto", description="bf16 where the device has it"
    )
    channels_last: bool = True
    compile: Literal["none", "encoders", "step"] = Field("none", description="What torch.compile translates")
    cuda_graph: bool = Field(False, description="Replay the whole step as one CUDA graph")
    timeout: float = Field(300, gt=0, description="Seconds that a process waits for the others")
    log_every: int = Field(20, ge=1, description="Steps between lines of metrics.jsonl")
    wandb: str | None = Field(None, description="Project of Weights & Biases that gets the figures as well")
    checkpoint_every: int | None = Field(None, ge=1, description="Steps between checkpoints; an epoch by default")
    keep: int = Field(2, ge=1, description="How many checkpoints are kept")


class EvaluationConfig(Section):
    """The periodic kNN on the held-out split."""

    every: int = Field(10, ge=0, description="Epochs between evaluations; 0 for none at all")
    neighbours: int = Field(200, ge=1, description="k")
    temperature: float = Field(0.07, gt=0, description="Of the neighbours' weights")
    train_images: int | None = Field(
        None, ge=1, description="How many training images serve as neighbours; all if unset"
    )
    images: int | None = Field(None, ge=1, description="How many held-out images are classified; all if unset")
    batch: int = Field(256, ge=1)


class Config(Section):
    """Everything that decides a run."""

    preset: str = "custom"
    about: str = ""
    seed: int = Field(0, ge=0, lt=1 << 31)
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
        negatives, batch = self.method.negatives(), self.training.batch
        keys = self.keys_per_step
        if self.method.queue < keys:
            raise ConfigError(f"method.queue: found {self.method.queue}, expected {keys} or more, the keys of one step")
        if negatives.hard > self.method.queue:
            raise ConfigError(f"method.hard: found {negatives.hard}, expected up to {self.method.queue}, the queue")
        groups = self.model.batch_norm_groups
        if batch % groups:
            raise ConfigError(
                f"training.batch: found {batch}, expected a multiple of {groups} (model.batch_norm_groups)"
            )
        if self.model.sync_batch_norm and groups > 1:
            raise ConfigError(f"model.batch_norm_groups: found {groups}, expected 1 beside model.sync_batch_norm")
        if self.generates:
            self._generates_here()
        return self

    def _generates_here(self) -> None:
        training = self.training
        check_size(self.augment.size, "augment.size")
        for name, found, expected in (
            ("training.accumulate", training.accumulate, 1),
            ("training.cuda_graph", training.cuda_graph, False),
            ("training.compile", training.compile, "none"),
        ):
            if found != expected:
                raise ConfigError(f"{name}: found {found}, expected {expected} beside generated pairs")

    @property
    def keys_per_step(self) -> int:
        """How many keys enter the queue in a step."""
        return self.training.batch * (1 + self.method.symmetric) + self.generates * self.generated.batch

    @property
    def generates(self) -> bool:
        """Whether pairs of generated images are positives beside the real ones."""
        return self.method.name == "generated" and self.generated.pair != "none"

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: that of a batch of 256, scaled linearly."""
        return self.optimizer.lr * self.training.batch / 256

    def to_yaml(self) -> str:
        """The resolved configuration, readable by `read_config`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def build_config(values: dict[str, Any], overrides: dict[str, Any] | None = None) -> Config:
    """A configuration from nested values and dotted overrides.

    Args:
        values: By section and key, as in a YAML file.
        overrides: By dotted name, such as ``{"method.name": "mochi"}``.

    Raises:
        ConfigError: An unknown key (with the nearest one), or a value that is not allowed.
    """
    merged = _copy(values)
    for dotted, value in (overrides or {}).items():
        *path, last = dotted.split(".")
        inside = merged
        for part in path:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise ConfigError(f"{dotted}: found no section of that name{_nearest(dotted)}")
        inside[last] = value
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def read_config(path: Path, overrides: dict[str, Any] | None = None) -> Config:
    """A configuration from a YAML file.

    Raises:
        ConfigError: The file is missing or is no mapping, or as `build_config` says.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config: cannot read {path} ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config: found {type(values).__name__} in {path}, expected sections and keys")
    return build_config(values, overrides)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key by its dotted name."""
    keys = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in values.items()}


def _nearest(dotted: str) -> str:
    keys = known_keys()
    last = dotted.rpartition(".")[2]
    near = difflib.get_close_matches(dotted, keys, n=1, cutoff=0.75)
    near = near or [key for key in keys if key.rpartition(".")[2] == last][:1]
    near = near or difflib.get_close_matches(dotted, keys, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-")))
    if first["type"] == "extra_forbidden":
        return f"{dotted}: found an unknown key{_nearest(dotted)}"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return f"{dotted}.{message}" if dotted else message
    said = first["msg"].replace("Input should be ", "")
    return f"{dotted}: found {first['input']!r}, expected {said}"
