"""Pairs of generated images as hard positives beside the real ones, after Wu et al. (arXiv 2202.06464).

Built without the paper's equations; ``docs/methods.md`` describes this project's reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from synco_fast.config import Config
from synco_fast.data.seeding import derive_seed
from synco_fast.data.sources.splits import Split
from synco_fast.generated.adversarial import check_networks
from synco_fast.generated.adversarial_update import AdversarialUpdate, Clock, GeneratedBatch
from synco_fast.generated.augment import draw_views, view
from synco_fast.generated.discriminator import Discriminator
from synco_fast.generated.generator import Generator
from synco_fast.generated.plots import draw_pair_curves, draw_samples
from synco_fast.generated.real_images import ResidentImages
from synco_fast.kernels import synthetic_contrast
from synco_fast.methods.base import Encoders, RunInfo, StepInputs, StepOutput
from synco_fast.methods.build import build_encoder
from synco_fast.methods.contrastive import ContrastSettings, MomentumContrast
from synco_fast.models.encoder import Encoder
from synco_fast.runtime.checkpoint import find_checkpoint, load_weights
from synco_fast.runtime.errors import CheckpointError, ConfigError
from synco_fast.runtime.phases import phase
from synco_fast.runtime.precision import resolve_device
from synco_fast.training.run.metrics import read_metrics

__all__ = ["GENERATED", "Generated", "build", "load_stage_one"]

#: The image id of a generated key in the queue; distinct from every image and from random rows (-1).
GENERATED = -2
#: Noise on the second generator at the start, relative to each tensor's standard deviation.
_NOISE = 0.02
_SHEET_PAIRS = 32
_SHEET_SEED = 1 << 40


def build(config: Config, processes: int) -> Generated:
    """Build the method of a configuration with pairs of generated images, on the CPU."""
    encoder = build_encoder(config, processes=processes)
    pair, device = config.generated, resolve_device(config.training.device)
    check_networks(config.augment.size, pair.latent, pair.width, device, "generated.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Generated(encoder, ContrastSettings.of(config), config)


class Generated(MomentumContrast):
    """Momentum contrast on real images and on pairs of images from two generators that share a latent vector.

    The encoder minimises L(real) + w_syn L(generated). Each generated pair gives four views, a query and a key of each
    image; the loss on generated pairs is the mean over both queries against both keys. One key of each pair enters the
    queue too; otherwise generated positives could be recognised as generated. Unless the pair is frozen, the generators
    and a discriminator are trained in `extra_step`.

    Args:
        encoder: The query encoder.
        settings: Settings of the contrastive loss.
        config: Section ``generated``, the recipe of real and generated views, the batch, and the seed.
    """

    rates: Sequence[str] = ("optimizer.lr", "generated.lr")

    def __init__(self, encoder: Encoder, settings: ContrastSettings, config: Config) -> None:
        super().__init__(encoder, settings)
        pair, size = config.generated, config.augment.size
        self.pair, self.recipe, self.batch = pair, config.augment, config.training.batch
        self.generators = nn.ModuleList(Generator(size, latent=pair.latent, width=pair.width) for _ in range(2))
        self.discriminator = Discriminator(size, width=pair.width)
        self.images: ResidentImages | None = None
        self._views: Tensor | None = None
        self._generated_keys: Tensor | None = None
        self._steps = 0
        self._make_optimizers(RunInfo(torch.device("cpu"), steps_per_epoch=1))

    @property
    def replicated(self) -> Mapping[str, nn.Module]:
        """Encoders, queue, generators and discriminator."""
        return {**super().replicated, "generators": self.generators, "discriminator": self.discriminator}

    @property
    def learns(self) -> bool:
        """Whether generators and discriminator are trained."""
        return self.pair.pair == "joint"

    def calls_of_step(self, rows: int) -> list[tuple[int, bool]]:
        """The real images, and both queries of each pair against both keys."""
        return [*super().calls_of_step(rows), (4 * self.pair.batch, False)]

    # -- the run around the steps -------------------------------------------------------------------------------

    def prepare(self, run: RunInfo) -> None:
        """Create the optimizers of generators and discriminator.

        Raises:
            ConfigError: There are several processes, or as in `MomentumContrast`.
        """
        super().prepare(run)
        self._make_optimizers(run)

    def _make_optimizers(self, run: RunInfo) -> None:
        if run.processes > 1:
            raise ConfigError(f"processes: found {run.processes}, expected 1 with generated pairs")
        self.device = run.device
        self.clock = Clock(run.device)
        self.adversarial_update = AdversarialUpdate(self.pair, self.generators, self.discriminator, run, self.clock)

    def begin_run(self, split: Split, workers: int | None, *, fresh: bool) -> list[str]:
        """Load stage one into a new run, and read the real images.

        Raises:
            ConfigError, CheckpointError: There is no stage one, or its size or architecture differs.
            DataError: No image can be read.
        """
        notes = [load_stage_one(self)] if fresh else []
        if self.learns:
            self.images = ResidentImages(split, self.recipe.size, workers=workers, device=self.device)
        return notes

    def figures(self, values: dict[str, float], step: int) -> tuple[dict[str, float], list[str]]:
        """Add ``generators_time``, the generators' share of a step's time; warn of mode collapse."""
        further, warnings = super().figures(values, step)
        spent, steps, self._steps = self.clock.pop(), self._steps, 0
        if steps and "images_per_second" in values:
            further["generators_time"] = min(1.0, spent / steps * values["images_per_second"] / self.batch)
        found = values.get("generator/diversity")
        warning = None if found is None else self.adversarial_update.collapse.look(found, step)
        return further, [*warnings, *([warning] if warning else [])]

    @torch.no_grad()
    def artifacts(self, folder: Path, step: int, *, closing: bool = False) -> None:
        """Draw ``generated-STEP.png``, pairs of fixed latent vectors, and at the end ``generated.png``."""
        if closing:
            title = f"generated pairs, {self.pair.pair}, seed {self.settings.seed}"
            draw_pair_curves(read_metrics(folder.parent), folder / "generated.png", title=title, floor=self.pair.floor)
            return
        draws = torch.Generator().manual_seed(derive_seed(self.settings.seed, _SHEET_SEED))
        latents = torch.randn(_SHEET_PAIRS, self.pair.latent, generator=draws).to(self.device)
        draw_samples(self.generate(latents).transpose(0, 1).flatten(0, 1), folder / f"generated-{step:08d}.png")

    def extra_state(self) -> dict[str, Any]:
        """The optimizers of generators and discriminator."""
        return self.adversarial_update.state_dict()

    def load_extra_state(self, state: dict[str, Any], file: Path) -> None:
        """Load from the checkpoint ``file``."""
        self.adversarial_update.load_state_dict(state, file)

    # -- the encoder's step -------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_step(
        self, inputs: StepInputs, encode: Encoders, *, momentum: float | Tensor, micro_batches: int = 1
    ) -> None:
        """Compute the real keys; generate the pairs, their query views, and their keys."""
        super().begin_step(inputs, encode, momentum=momentum, micro_batches=micro_batches)
        with self.clock():
            images = self.generate(self.latents(inputs.image_ids.device))
            self._views = self._view(images)
            with phase("key forward"), _statistics_kept(self.key_encoder):
                # ShuffleBN, as for real keys.
                order = torch.randperm(2 * self.pair.batch, device=images.device)
                shuffled = encode.key(self._view(images)[order]).float()
                self._generated_keys = torch.empty_like(shuffled).index_copy_(0, order, normalize(shuffled, dim=1))

    def loss(
        self,
        inputs: StepInputs,
        encode: Encoders,
        *,
        step: int | Tensor,
        epoch: int,
        micro_batch: int = 0,
        micro_batches: int = 1,
    ) -> StepOutput:
        """L(real) + w_syn L(generated), and the metrics of both."""
        real = super().loss(
            inputs, encode, step=step, epoch=epoch, micro_batch=micro_batch, micro_batches=micro_batches
        )
        assert self._views is not None
        assert self._generated_keys is not None
        with phase("query forward"), _statistics_kept(self.encoder):
            q = normalize(encode.query(self._views).float(), dim=1)
        generated = self._contrast(q, self._generated_keys, inputs, step, epoch).mean()
        metrics = {"generated/loss": generated.detach()}
        return StepOutput(real.loss + self.pair.weight * generated, real.metrics | metrics)

    def after_step(self, step_ok: Tensor | None = None) -> None:
        """Enqueue the real keys, then one key of each generated pair."""
        super().after_step(step_ok)
        if self._generated_keys is not None:
            keys = self._generated_keys[: self.pair.batch]
            self.queue.enqueue(keys, torch.full((len(keys),), GENERATED, device=keys.device), step_ok)
            self._queued += len(keys)
        self._views = self._generated_keys = None

    def extra_step(
        self, inputs: StepInputs, encode: Encoders, *, step: int | Tensor, epoch: int, step_ok: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Train the generators and the discriminator, unless the pair is frozen."""
        self._steps += 1
        if not self.learns:
            return step_ok, {}
        images = self.images
        assert images is not None
        return self.adversarial_update.step(
            lambda: self.generator_batch(self.latents(self.device), inputs, encode, step=step, epoch=epoch),
            lambda: images.take(inputs.image_ids[: 2 * self.pair.batch]),
            int(step),
            step_ok,
        )

    # -- the generators' side -----------------------------------------------------------------------------------

    def latents(self, device: torch.device) -> Tensor:
        """Latent vectors of a step's pairs, (n, latent), from the global generator."""
        return torch.randn(self.pair.batch, self.pair.latent, device=device)

    def generate(self, latents: Tensor) -> Tensor:
        """Both images of each pair, (2, n, 3, H, W) in [0, 1], from shared latent vectors, (n, latent)."""
        return torch.stack([generator(latents) for generator in self.generators])

    @torch.no_grad()
    def break_symmetry(self, seed: int) -> None:
        """Set the second generator to the first plus noise of 2 % of each tensor's standard deviation.

        Identical generators receive identical gradients; noise breaks the symmetry.
        """
        draws = torch.Generator().manual_seed(seed)
        first, second = (list(generator.parameters()) for generator in self.generators)
        for parameter, start in zip(second, first, strict=True):
            noise = torch.randn(start.shape, generator=draws).to(start.device)
            parameter.copy_(start + _NOISE * start.std(correction=0) * noise)

    def generator_batch(
        self, latents: Tensor, inputs: StepInputs, encode: Encoders, *, step: int | Tensor, epoch: int
    ) -> GeneratedBatch:
        """Pairs and their hardness, with the autograd graph from generators through augmentation and query encoder.

        The encoders run in evaluation mode, so that their statistics do not change. Both images of a pair get the same
        augmentation, so that only the generators lower the similarity.
        """
        images = self.generate(latents)
        with _evaluating(self.encoder), _evaluating(self.key_encoder):
            q = normalize(encode.query(self._view(images, shared=True)).float(), dim=1)
            with torch.no_grad():
                keys = normalize(encode.key(self._view(images.detach(), shared=True)).float(), dim=1)
        losses = self._contrast(q, keys, inputs, step, epoch).view(4, -1)
        first, second = q.chunk(2)
        return GeneratedBatch(images, (losses[1] + losses[2]) / 2, (first * second).sum(dim=1))

    def _view(self, images: Tensor, *, shared: bool = False) -> Tensor:
        """One view of each image of pairs (2, n, 3, H, W): (2 n, 3, size, size) in [0, 255]."""
        flat = images.flatten(0, 1)
        draws = draw_views(images.shape[1] if shared else len(flat), self.recipe, flat.device)
        if shared:
            draws = type(draws)(*(torch.cat([part, part]) for part in draws))
        with torch.autocast(flat.device.type, enabled=False):
            return view(flat, draws, self.recipe) * 255

    def _contrast(self, q: Tensor, keys: Tensor, inputs: StepInputs, step: int | Tensor, epoch: int) -> Tensor:
        """The loss of both queries of each pair against both keys, (4 n,), ordered by query, then key, then pair."""
        (one, two), (here, there) = q.chunk(2), keys.chunk(2)
        rows = len(inputs.queries) * len(inputs.image_ids)
        with phase("loss"), torch.autocast(q.device.type, enabled=False):
            return synthetic_contrast(
                torch.cat([one, one, two, two]),
                torch.cat([here, there, here, there]),
                self.queue.rows,
                self.settings.schedule.at(epoch),
                temperature=self.settings.temperature,
                seed=self.settings.seed,
                step=step,
                first_row=rows,  # behind the real rows, so that the draws differ
                backend=self.settings.backend,
                operand_dtype=self.operand_dtype,
            ).loss


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Normalise by the batch without updating the running statistics, which belong to the real images."""
    norms = [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _check_stage_one(state: dict[str, Any], path: Path) -> None:
    """Raise where a checkpoint lacks what stage two begins with."""
    parts = {"generator_config": dict, "average": dict, "discriminator": dict, "images": int}
    if not all(isinstance(state.get(name), kind) for name, kind in parts.items()):
        raise CheckpointError(f"{path}: found no generator in it, expected a checkpoint of pretrain-generator")


def load_stage_one(method: Generated) -> str:
    """Load both generators from the moving average of a run of stage one, and its discriminator.

    Noise is added to the second generator; see `Generated.break_symmetry`.

    Returns:
        A line for the log.

    Raises:
        ConfigError: No checkpoint is named, or its images have another size.
        CheckpointError: It cannot be read, is not of stage one, or has another architecture.
    """
    checkpoint, size = method.pair.checkpoint, method.recipe.size
    if checkpoint is None:
        raise ConfigError(
            "generated.checkpoint: found none, expected a run of 'synco-fast pretrain-generator', or "
            "generated.pair none"
        )
    state, path, _ = find_checkpoint(Path(checkpoint), _check_stage_one)
    found = state["generator_config"].get("size")
    if found != size:
        raise ConfigError(f"generated.checkpoint: found a generator of {found} pixels, expected {size} (augment.size)")
    for generator in method.generators:
        load_weights(generator, state["average"], path)
    load_weights(method.discriminator, state["discriminator"], path)
    method.break_symmetry(method.settings.seed)
    return f"generators from {path}, step {state['step']}, which learned from {state['images']:,} images"
