"""What is built from a configuration, and what is refused before memory is allocated for it."""

from __future__ import annotations

import os

import pytest
import torch

from synco_fast.config import build_config
from synco_fast.methods import build
from synco_fast.methods.base import RunInfo
from synco_fast.methods.build import build_encoder, build_method
from synco_fast.models.batch_norm import FusedBatchNorm2d, SplitBatchNorm2d
from synco_fast.models.encoder import build_backbone, check_input, parameters_of
from synco_fast.runtime import memory
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.memory import memory_of

from ..conftest import TINY

WIDE = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 4096]}


def refused(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        build_method(build_config(TINY, changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_machine_has_some_memory():
    assert 1 << 28 < memory_of(torch.device("cpu")) < 1 << 60


def test_a_queue_beyond_memory_is_refused_with_the_figure():
    said = refused(**{"method.queue": 1 << 22, "model.dim": 1 << 16})
    assert said.startswith(
        "method.queue: found 4,194,304 keys of 65,536 numbers (model.dim), which takes 1,024.0 GiB or more, expected "
    )
    assert said.endswith(" GiB, all the machine has")


LARGER = {"augment.size": 64, "augment.evaluation_resize": 64}


@pytest.mark.parametrize(
    ("changes", "room", "says"),
    [
        (
            {"model.dim": 4096, "method.queue": 16},
            1 << 19,
            "model.dim: found 4,096 behind 16 (model.hidden) and 16 features",
        ),
        ({"model.hidden": 4096}, 1 << 19, "model.dim: found 16 behind 4,096 (model.hidden) and 16 features"),
        (
            {"augment.size": 64, "augment.evaluation_resize": 64},
            1 << 19,
            "training.batch: found 8 images of 64 pixels (augment.size) for timm/resnet18",
        ),
        ({"model.backbone_args": WIDE}, 1 << 28, f"model.backbone_args: found {WIDE}, which takes 1.1 GiB or more"),
    ],
)
def test_a_network_or_a_batch_beyond_memory(monkeypatch, changes, room, says):
    monkeypatch.setattr(memory, "memory_of", lambda device: room)
    assert refused(**changes).startswith(says)


def test_each_group_of_images_needs_more_than_one_value_a_channel():
    few = {
        "model.backbone": "resnet18",
        "model.backbone_args": {},
        "augment.size": 32,
        "training.batch": 8,
        "model.batch_norm_groups": 8,
    }
    assert refused(**few).startswith("augment.size: found 32, at which a batch norm of resnet18 gets one value a chan")
    assert build_method(build_config(TINY, few | {"model.batch_norm_groups": 4}))


def test_micro_batches_and_formats_take_less(monkeypatch):
    """The least size: inputs of convolutions and linear layers, an image's times the images at a time."""
    needed = []
    monkeypatch.setattr(build, "check_memory", lambda size, device, found: needed.append((found.split(":")[0], size)))
    for changes in ({}, {"training.accumulate": 2}, {"training.precision": "bf16"}):
        build_method(build_config(TINY, changes))
    whole, half, narrow = (size for key, size in needed if key == "training.batch")
    assert (whole, whole) == (2 * half, 2 * narrow)
    backbone, width = build_backbone("resnet18")
    # Seen once, by hand: conv1, then (a block's two convolutions) x 8, and the downsampling ones share an input.
    pixels = [3 * 64**2, *[64 * 16**2] * 5, *[128 * 8**2] * 4, *[256 * 4**2] * 4, *[512 * 2**2] * 3]
    assert check_input(backbone, 64, "resnet18", width) == sum(pixels)


def test_weights_are_counted_without_making_them():
    assert parameters_of("resnet18", {}) == 11_176_512
    assert parameters_of("resnet18", {"layers": [1]}) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layers": [1]}, "timm/resnet18 does not take them (ZeroDivisionError: "),
        ({"wings": 2}, "timm/resnet18 does not take them (TypeError: "),
        ({"layers": "many"}, "timm/resnet18 does not take them ("),
    ],
)
def test_arguments_that_a_backbone_does_not_take(arguments, says):
    assert refused(**{"model.backbone_args": arguments}).startswith(f"model.backbone_args: {says}")


def test_arguments_that_make_no_backbone():
    arguments = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1], "in_chans": 5}
    assert f"which timm/resnet18 with {arguments} cannot take (" in refused(**{"model.backbone_args": arguments})
    arguments = {"layers": [0, 0, 0, 0]}
    said = refused(**{"model.backbone_args": arguments})
    assert said.endswith(f"found timm/resnet18 with {arguments}, whose output has shape (1, 64), expected (B, 512)")


@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter serves a CPU")
def test_kernels_that_are_not_there_are_refused():
    method = build_method(build_config(TINY, {"method.backend": "triton"}))
    with pytest.raises(ConfigError, match="found triton, expected auto, blockwise or reference here: "):
        method.prepare(RunInfo(torch.device("cpu"), 4))
    build_method(build_config(TINY)).prepare(RunInfo(torch.device("cpu"), 4))


@pytest.mark.parametrize(("norm", "kind"), [("plain", SplitBatchNorm2d), ("auto", FusedBatchNorm2d)])
def test_the_encoder_is_that_of_the_configuration(norm, kind):
    """In every micro-batch a part of the groups, or a query could find its key by the statistics that they share."""
    changes = {"model.norm": norm, "model.hidden": 24, "model.small_stem": True, "model.batch_norm_groups": 8}
    encoder = build_encoder(build_config(TINY, {**changes, "training.accumulate": 2}), processes=2)
    assert encoder.head[0].out_features == 24
    assert encoder.backbone.conv1.kernel_size == (3, 3)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(type(module), module.groups) for module in norms} == {(kind, 2)}
    assert len(norms) > 8
