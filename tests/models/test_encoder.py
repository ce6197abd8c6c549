import pytest
import torch
from torch import nn

from synco_fast.models.ema import ema_update, make_ema_copy
from synco_fast.models.encoder import Encoder, build_backbone, check_input
from synco_fast.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("resnet18", 512),
        ("timm/resnet10t", 512),
        ("mobilenet_v3_small", 1024),
        ("timm/mobilenetv3_small_050", 1024),  # a layer behind the pooling
        ("vit_b_32", 768),
    ],
)
def test_backbones_of_both_libraries_give_flat_features(name, width):
    backbone, features = build_backbone(name)
    size = 224 if name.startswith("vit") else 64
    check_input(backbone, size, name, width)
    assert features == width
    assert backbone.eval()(torch.zeros(2, 3, size, size)).shape == (2, width)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_the_small_stem_keeps_resolution(name):
    sizes = []
    for small in (False, True):
        backbone, _ = build_backbone(name, small_stem=small)
        backbone.layer1.register_forward_hook(lambda module, given, result: sizes.append(result.shape[-1]))
        backbone.eval()(torch.zeros(1, 3, 32, 32))
    assert sizes == [8, 32]


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("resnet51", {}, r"model\.backbone: found 'resnet51'.*nearest: resnet"),
        ("hub/resnet50", {}, r"model\.backbone: found 'hub/resnet50'"),
        ("torchvision/resnet10t", {}, r"model\.backbone: found 'torchvision/resnet10t'"),
        ("resnet18", {"arguments": {"wings": 2}}, r"model\.backbone_args: resnet18 does not take them"),
        ("vit_b_32", {"small_stem": True}, r"model\.small_stem: found true"),
    ],
)
def test_what_cannot_be_built(name, changes, says):
    with pytest.raises(ConfigError, match=says):
        build_backbone(name, **changes)


def test_a_size_that_the_backbone_cannot_take():
    backbone, _ = build_backbone("vit_b_32")
    with pytest.raises(ConfigError, match=r"augment\.size: found 64, which vit_b_32 cannot take"):
        check_input(backbone, 64, "vit_b_32", 768)


def test_a_batch_norm_needs_two_values_a_channel():
    backbone, width = build_backbone("resnet18")
    assert check_input(backbone, 32, "resnet18", width, together=2)
    assert check_input(backbone, 64, "resnet18", width, together=1)
    with pytest.raises(ConfigError, match=r"augment\.size: found 32, at which a batch norm of resnet18 gets one value"):
        check_input(backbone, 32, "resnet18", width, together=1)


def test_the_head_is_that_of_moco_v2():
    encoder = Encoder(nn.Identity(), 2048, 128)
    shapes = [tuple(layer.weight.shape) for layer in encoder.head if isinstance(layer, nn.Linear)]
    assert shapes == [(2048, 2048), (128, 2048)]
    assert Encoder(nn.Identity(), 8, 4, hidden=6)(torch.zeros(2, 8)).shape == (2, 4)


def test_the_key_encoder_follows_and_learns_nothing():
    query = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    key = make_ema_copy(query)
    assert not any(parameter.requires_grad for parameter in key.parameters())
    start = [parameter.clone() for parameter in key.parameters()]
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.add_(torch.randn_like(parameter))
    query[1].running_mean.add_(1)
    ema_update(key, query, 0.9)
    for now, before, leader in zip(key.parameters(), start, query.parameters(), strict=True):
        assert torch.allclose(now, 0.9 * before + 0.1 * leader)
    assert (key[1].running_mean == 0).all(), "statistics come from the key encoder's own passes"
