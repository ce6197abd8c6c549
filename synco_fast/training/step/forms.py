"""The implementation of each part of a step: validated fused kernels, or portable fallbacks.

An explicit setting is used without validation. With ``auto``, a fused kernel is used on a CUDA device after its
validation there (`synco_fast.runtime.first_use`), and a resumed run keeps its implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from synco_fast.data.pipelines.base import Pipeline
from synco_fast.data.pipelines.fused import FusedViews
from synco_fast.kernels.proof import KERNELS, augment_shapes, momentum_shapes, norm_shapes
from synco_fast.kernels.views import make_views
from synco_fast.models.batch_norm import FusedBatchNorm2d, SplitBatchNorm2d
from synco_fast.runtime.distributed import HostGroup
from synco_fast.runtime.first_use import Outcome, Prover, device_facts

if TYPE_CHECKING:
    from synco_fast.training.step.engine import Engine

__all__ = ["Form", "choose_forms", "choose_views", "chosen_here", "forms_state"]

_ASKED_NORM = {"auto": "auto", "fused": "triton", "plain": "plain"}


@dataclass(frozen=True)
class Form:
    """The implementation of a part of a step.

    Attributes:
        name: Its name, such as ``triton`` or ``blockwise``.
        why: Why it was chosen.
    """

    name: str
    why: str


def forms_state(engine: Engine) -> dict[str, Any]:
    """State for a checkpoint: the names of an engine's forms, and the device they were chosen on."""
    return {"device": _device_name(engine.device), "names": {part: form.name for part, form in engine.forms.items()}}


def chosen_here(kept: Mapping[str, Any], device: torch.device) -> bool:
    """Whether the `forms_state` of a checkpoint is of this kind of device; true if it does not say."""
    return bool(kept.get("device", _device_name(device)) == _device_name(device))


def choose_forms(
    engine: Engine, control: HostGroup, *, kept: Mapping[str, Any] | None = None, prover: Prover | None = None
) -> None:
    """Choose loss, batch norm and EMA update for all processes, and set ``engine.forms``.

    All processes call it before the first step. One line is shown for each fused kernel that cannot be used, and for
    each form that a resumed run cannot keep.

    Args:
        engine: The engine; its method is configured.
        control: Communication between the processes.
        kept: `forms_state` of the resumed checkpoint, empty if it has none; None for a new run.
        prover: Validates kernels; by default on this process's CUDA device.
    """
    engine.forms = _choose(engine, control, _shapes(engine), kept, prover, partial(_use, engine))


def choose_views(
    engine: Engine,
    control: HostGroup,
    pipeline: Pipeline,
    *,
    kept: Mapping[str, Any] | None = None,
    prover: Prover | None = None,
) -> None:
    """Choose what makes a pipeline's views, as `choose_forms` chooses; all processes call it before its first batch.

    ``engine.forms`` names it as ``augment``, or has no such part where the pipeline has no use for kernels.

    Args:
        engine, control, kept, prover: As in `choose_forms`.
        pipeline: The pipeline.
    """
    shapes = {}
    if isinstance(pipeline, FusedViews) and pipeline.kernel_input is not None:
        shapes["augment"] = augment_shapes(**pipeline.kernel_input)

    def use(part: str, backend: str) -> None:
        assert isinstance(pipeline, FusedViews)
        pipeline.use_kernels(make_views)

    others = {part: form for part, form in engine.forms.items() if part != "augment"}
    engine.forms = others | _choose(engine, control, shapes, kept, prover, use)


def _choose(
    engine: Engine,
    control: HostGroup,
    shapes: Mapping[str, dict[str, Any]],
    kept: Mapping[str, Any] | None,
    prover: Prover | None,
    use: Callable[[str, str], None],
) -> dict[str, Form]:
    """The form of each part; ``use`` is called with each part and backend that was validated."""
    begun = kept.get("names", {}) if kept is not None and chosen_here(kept, engine.device) else None
    prover = prover or _prover_of(engine)
    wanted, forms = {}, {}
    for part, given in shapes.items():
        form = _without_proof(engine, part, given, begun)
        if form is None and prover is None:
            form = Form(KERNELS[part].portable, "the fused kernels run on CUDA devices")
        if form is None:
            wanted[part] = given
        else:
            forms[part] = form
    for part, outcome in _agreed(control, prover, wanted).items():
        kernel = KERNELS[part]
        if outcome.passed:
            forms[part] = Form(kernel.fused, "validated on this device")
            use(part, kernel.fused)
        else:
            forms[part] = Form(kernel.portable, outcome.reason)
            engine.note(f"{part}: using {kernel.portable} instead of the fused kernel: {outcome.reason}")
    for part, name in (kept or {}).get("names", {}).items():
        found = forms.get(part)
        if part in KERNELS and found is not None and found.name != name:
            engine.note(
                f"{part}: the run used {name} and continues with {found.name} ({found.why}); "
                "it is no longer equal bit for bit"
            )
    return forms


def _prover_of(engine: Engine) -> Prover | None:
    if engine.device.type != "cuda":
        return None
    index = engine.device.index or 0
    return Prover(f"cuda:{index}", device_facts(index), say=engine.note)


def _without_proof(engine: Engine, part: str, shapes: dict[str, Any], begun: Mapping[str, str] | None) -> Form | None:
    """The form if it needs no validation, else None."""
    kernel, config = KERNELS[part], engine.config
    asked = {"loss": config.method.backend, "norm": _ASKED_NORM[config.model.norm]}.get(part, "auto")
    if part == "norm" and not shapes:
        return Form("sync" if config.model.sync_batch_norm else "plain", "no layer is fused")
    reason = kernel.unserved(shapes, engine.device) if asked in ("auto", kernel.fused) else None
    if reason:
        # A fused kernel is expected on a GPU only.
        if engine.device.type == "cuda":
            engine.note(f"{part}: using {kernel.portable} instead of the fused kernel: {reason}")
        return Form(kernel.portable, reason)
    if asked != "auto":
        return Form(asked, "set explicitly")
    if config.training.fused == "none":
        return Form(kernel.portable, "training.fused=none")
    if begun is not None and begun.get(part) != kernel.fused:
        if part not in begun and engine.device.type == "cuda":
            engine.note(
                f"{part}: the checkpoint has no record of its implementation, continuing with {kernel.portable}"
            )
        return Form(kernel.portable, "kept from the start of the run")
    return None


def _shapes(engine: Engine) -> dict[str, dict[str, Any]]:
    """Shapes for each part of `KERNELS` that the method has; empty for batch norm without a fused layer."""
    config, method = engine.config, engine.method
    rows = config.training.batch // (engine.env.world * config.training.accumulate)
    found = method.kernel_shapes(rows)
    layers = [layer for side in config.augment.sides for layer in _layers(method.encoder.backbone, side)]
    images = rows * method.views_at_once
    found["norm"] = norm_shapes(images=images, dtype=engine.precision.dtype, layers=layers) if layers else {}
    if method.target is not None:
        found["momentum"] = momentum_shapes(list(method.target.parameters()), config.model.momentum)
    return found


@torch.no_grad()
def _layers(backbone: nn.Module, size: int) -> list[tuple[int, int, int, int, bool, bool]]:
    """(C, H, W, groups, relu, residual) of each norm with several implementations."""
    found = []

    def look(norm: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(norm, SplitBatchNorm2d)
        relu = isinstance(norm, FusedBatchNorm2d) and norm.relu
        found.append((*given[0].shape[1:], norm.groups, relu, len(given) > 1 and given[1] is not None))

    norms = [
        part
        for part in backbone.modules()
        if isinstance(part, SplitBatchNorm2d) and (part.groups > 1 or isinstance(part, FusedBatchNorm2d))
    ]
    if not norms:
        return []
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    was_training, device = backbone.training, next(backbone.parameters()).device
    try:
        backbone.eval()(torch.zeros(1, 3, size, size, device=device))
    finally:
        backbone.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def _use(engine: Engine, part: str, backend: str) -> None:
    engine.method.use_backend(part, backend)
    if part == "norm":
        for module in engine.method.modules():
            if isinstance(module, SplitBatchNorm2d) and module.backend == "auto":
                module.backend = "triton"


def _agreed(control: HostGroup, prover: Prover | None, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Outcome]:
    """The same outcomes on all processes; one process for each kind of device validates."""
    keys = {} if prover is None else {part: prover.key(part, shapes) for part, shapes in wanted.items()}
    everyone = control.gather(keys)
    if not any(everyone):
        return {}
    proved_before = {key for other in everyone[: control.env.rank] for key in other.values()}
    mine = {part: wanted[part] for part, key in keys.items() if key not in proved_before}
    found = {} if prover is None else {keys[part]: outcome for part, outcome in prover.prove(mine).items()}
    outcomes = {key: outcome for part in control.gather(found) for key, outcome in part.items()}
    agreed = {}
    for part in keys:
        known = [outcomes[other[part]] if part in other else _ELSEWHERE for other in everyone]
        agreed[part] = next((outcome for outcome in known if not outcome.passed), known[0])
    return agreed


_ELSEWHERE = Outcome(False, "not supported on another process")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
