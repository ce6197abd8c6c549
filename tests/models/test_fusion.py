"""A fused backbone computes what the plain one does, and its weights go in and out by the same names."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

from synco_fast.kernels.norm import ops
from synco_fast.methods.build import build_encoder
from synco_fast.models.batch_norm import FusedBatchNorm2d, SplitBatchNorm2d, split_batch_norm
from synco_fast.models.encoder import build_backbone
from synco_fast.models.fusion import fuse_batch_norm
from synco_fast.runtime.errors import ConfigError

MODELS = ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "timm/resnet50"]
#: By model: norm + add + ReLU, norm + ReLU, norm alone.
COUNTS = {
    "resnet18": (8, 9, 3),
    "resnet50": (16, 33, 4),
    "wide_resnet50_2": (16, 33, 4),
    "resnext50_32x4d": (16, 33, 4),
    "timm/resnet50": (16, 33, 4),
}


@pytest.fixture(autouse=True)
def _quiet():
    ops._note.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the formula computes the batch norm")
        yield
    ops._note.cache_clear()


def pair(name, groups, backend="auto", dtype=torch.float64, **arguments):
    """The plain and the fused backbone with the same weights."""
    torch.manual_seed(0)
    plain, _ = build_backbone(name, arguments=arguments)
    for part in plain.modules():
        # Zero weights (timm's last norms) and the usual 1 and 0 would hide much.
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    fused = copy.deepcopy(plain)
    split_batch_norm(plain, groups)
    report = fuse_batch_norm(fused, groups, backend)
    layout = torch.channels_last
    return plain.to(dtype, memory_format=layout), fused.to(dtype, memory_format=layout), report


def step(model, images, up):
    """Output, gradients and buffers of a step in training, and the output in evaluation."""
    model.zero_grad()
    y = model(images)
    y.backward((up * torch.linspace(-1, 1, y.shape[1])).to(y.dtype))
    names = {f"gradient of {name}": value.grad for name, value in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        evaluated = model.eval()(images)
    model.train()
    return {"output": y.detach(), **names, **buffers, "evaluation": evaluated}


def images(batch, height, width, dtype):
    return torch.randn(batch, 3, height, width).to(dtype, memory_format=torch.channels_last)


CASES = [
    *(pytest.param(name, 2, (4, 33, 47), id=f"{name}-2") for name in MODELS),
    pytest.param("resnet18", 1, (3, 40, 32), id="resnet18-1"),
    pytest.param("resnet18", 8, (16, 64, 64), id="resnet18-8"),
    pytest.param("timm/resnet50", 8, (16, 33, 39), id="timm/resnet50-8", marks=pytest.mark.slow),
    pytest.param("resnet50", 1, (2, 65, 33), id="resnet50-1", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "groups", "shape"), CASES)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_equal_in_float64(name, groups, shape, backend):
    """On a CPU "triton" is the operators with the formula: the wiring of the kernels, not the kernels."""
    plain, fused, _ = pair(name, groups, backend)
    x, up = images(*shape, torch.float64), torch.randn(shape[0], 1).double()
    expected, found = step(plain, x, up), step(fused, x, up)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        difference = (found[key] - value).double().norm().item()
        assert difference <= 1e-12 * max(1.0, value.double().norm().item()), key


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize(("name", "groups", "shape"), [("resnet18", 2, (8, 48, 48)), ("timm/resnet50", 1, (4, 40, 40))])
def test_within_twice_the_modules_own_error_in_bfloat16(name, groups, shape, backend):
    x = images(*shape, torch.float64).bfloat16()
    up = torch.randn(shape[0], 1)
    results = []
    for kind in ("exact", "plain", "fused"):
        plain, fused, _ = pair(name, groups, backend, torch.float64 if kind == "exact" else torch.float32)
        model = fused if kind == "fused" else plain
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "exact"):
            results.append(step(model, x.double() if kind == "exact" else x.float(), up))
    exact, plain, fused = results
    for key in exact:
        own, theirs = ((value[key].double() - exact[key]).norm().item() for value in (fused, plain))
        assert own <= 2 * theirs + 1e-6 * exact[key].double().norm().item(), key


@pytest.mark.parametrize("name", MODELS)
def test_what_is_fused(name):
    with torch.device("meta"):
        backbone, _ = build_backbone(name)
    before = {key: value.shape for key, value in backbone.state_dict().items()}
    modules = [key for key, _ in backbone.named_modules()]
    report = fuse_batch_norm(backbone, 8)
    counts = tuple(report.counts[kind] for kind in ("norm + add + ReLU", "norm + ReLU", "norm alone"))
    assert counts == COUNTS[name]
    assert report.whole
    assert "norms plain" not in str(report)
    assert {key: value.shape for key, value in backbone.state_dict().items()} == before
    assert [key for key, _ in backbone.named_modules()] == modules


def test_weights_go_in_and_out_by_name():
    plain, fused, _ = pair("resnet18", 4)
    plain(images(8, 32, 32, torch.float64))
    fused.load_state_dict(plain.state_dict())
    other, _ = build_backbone("resnet18")
    other.double().load_state_dict(fused.state_dict())
    x = images(2, 32, 32, torch.float64)
    torch.testing.assert_close(fused.eval()(x), other.eval()(x), rtol=1e-12, atol=1e-12)


def test_a_copy_is_fused_and_apart():
    _, fused, _ = pair("resnet18", 2)
    twin = copy.deepcopy(fused)
    x = images(4, 32, 32, torch.float64)
    assert torch.equal(fused(x), twin(x))
    assert not any(one is other for one, other in zip(fused.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {"stem_type": "deep", "avg_down": True},
        {"drop_path_rate": 0.1},
        {"block_args": {"attn_layer": "se"}},
        {"aa_layer": timm.layers.BlurPool2d},
        {"act_layer": nn.SiLU},
        {"replace_stem_pool": True},
        {"drop_block_rate": 0.1},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_variants_of_timms_resnet_are_fused_as_far_as_they_can_be(arguments):
    small = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    plain, fused, report = pair("timm/resnet18", 2, **small, **arguments)
    x, up = images(4, 64, 64, torch.float64), torch.randn(4, 1).double()
    torch.manual_seed(1)
    expected = step(plain, x, up)
    torch.manual_seed(1)
    found = step(fused, x, up)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-11, atol=1e-11)
    assert report.whole == (not arguments.keys() & {"act_layer", "drop_block_rate"})
    assert str(report).startswith("no part fused" if "act_layer" in arguments else "fused ")


def test_unknown_models_keep_plain_modules():
    for groups, kind in ((1, nn.BatchNorm2d), (2, SplitBatchNorm2d)):
        backbone, _ = build_backbone("vgg11_bn")
        report = fuse_batch_norm(backbone, groups)
        assert {type(part) for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)} == {kind}
        assert str(report) == ("no part fused, 8 norms plain: its blocks are not torchvision's or timm's ResNet blocks")


def test_a_block_of_another_class_is_left_alone():
    from torchvision.models.resnet import BasicBlock, ResNet

    class Own(BasicBlock):
        def forward(self, x):
            return super().forward(x) * 2

    model = ResNet(Own, [1, 1, 1, 1])
    report = fuse_batch_norm(model)
    assert dict(report.counts) == {"norm + ReLU": 1}, "the stem"
    assert report.plain == 11
    assert {type(block) for block in model.layer1} == {Own}


def test_another_norm_in_groups_is_refused():
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(ConfigError, match=r"model\.batch_norm_groups: found 2, expected 1 .* Own"):
        fuse_batch_norm(nn.Sequential(Own(3)), 2)


def test_the_settings_of_a_norm_are_kept():
    norm = nn.BatchNorm2d(4, eps=1e-3, momentum=None, affine=False).eval()
    made = FusedBatchNorm2d.of(norm, 2, relu=True)
    assert (made.eps, made.momentum, made.affine, made.training) == (1e-3, None, False, False)
    assert made.running_mean is norm.running_mean
    bare = FusedBatchNorm2d.of(nn.BatchNorm2d(4, track_running_stats=False), 2)
    x = torch.randn(4, 4, 3, 3)
    assert bare.state_dict().keys() == {"weight", "bias"}
    assert torch.equal(bare.eval()(x), bare.train()(x)), "statistics of the batch, as PyTorch's module takes them"


@pytest.mark.parametrize("norm", ["auto", "plain", "fused"])
def test_the_setting(tiny, norm):
    encoder = build_encoder(tiny({"model.norm": norm}))
    kinds = {type(part) for part in encoder.modules() if isinstance(part, nn.BatchNorm2d)}
    assert kinds == ({SplitBatchNorm2d} if norm == "plain" else {FusedBatchNorm2d})
    assert {part.groups for part in encoder.modules() if isinstance(part, SplitBatchNorm2d)} == {2}
    assert (encoder.remark is None) == (norm != "fused")
    if norm == "fused":
        assert encoder.remark == "model.norm: timm/resnet18: fused 4 norm + add + ReLU, 5 norm + ReLU, 4 norm alone"


def test_every_setting_starts_from_the_same_weights_and_trains_alike(tiny):
    torch.manual_seed(0)
    x, results = torch.randn(8, 3, 32, 32), []
    for norm in ("auto", "plain"):
        encoder = build_encoder(tiny({"model.norm": norm}))
        y = encoder(x)
        y.square().sum().backward()
        results.append([y, *(value.grad for value in encoder.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other), "on a CPU bit for bit"
