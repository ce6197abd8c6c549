"""A fused backbone computes what the plain one does, and its weights go in and out by the same names."""

from __future__ import annotations

import copy
import itertools
import runpy
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from synco_fast.kernels.norm import native, ops
from synco_fast.methods.build import build_encoder
from synco_fast.models.batch_norm import FusedBatchNorm2d, SplitBatchNorm2d, split_batch_norm
from synco_fast.models.encoder import build_backbone
from synco_fast.models.fusion import fuse_batch_norm
from synco_fast.runtime.errors import ConfigError

from ..support.job import CONTEXT
from ..support.rotation import todays

MODELS = ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "timm/resnet50"]
#: By model: norm + add + ReLU, norm + ReLU, norm alone.
COUNTS = {
    "resnet18": (8, 9, 3),
    "resnet50": (16, 33, 4),
    "wide_resnet50_2": (16, 33, 4),
    "resnext50_32x4d": (16, 33, 4),
    "timm/resnet50": (16, 33, 4),
}
#: What torchvision builds them from.
BUILT_FROM = {
    "resnet18": (BasicBlock, {}),
    "resnet50": (Bottleneck, {}),
    "wide_resnet50_2": (Bottleneck, {"width_per_group": 128}),
    "resnext50_32x4d": (Bottleneck, {"groups": 32, "width_per_group": 4}),
}
SETTINGS = (
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"momentum": None},
)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    # Large maps here go group by group, small ones all together, as they do at full size.
    monkeypatch.setattr(native, "CACHED", 1 << 16)
    monkeypatch.setattr(native, "APART", 1 << 18)
    ops._note.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the batch norm uses the PyTorch formula")
        yield
    ops._note.cache_clear()


def build(name, **arguments):
    """A backbone; with ``layers`` given, without the last two stages, whose blocks are of no other kind."""
    if "layers" not in arguments or "channels" in arguments:
        return build_backbone(name, arguments=arguments)[0]
    if name in BUILT_FROM:
        block, others = BUILT_FROM[name]
        made = ResNet(block, **others, **arguments)
        made.fc = nn.Identity()
    else:
        made, _ = build_backbone(name, arguments=arguments)
    made.layer3 = made.layer4 = nn.Identity()
    return made


def pair(name, groups, backend="auto", dtype=torch.float64, **arguments):
    """The plain and the fused backbone with the same weights."""
    torch.manual_seed(0)
    plain = build(name, **arguments)
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


GROUPS = (1, 2, 8)
BACKENDS = ("auto", "triton")
#: All models with one number of groups after the other.
CASES = [(name, groups) for groups in GROUPS for name in MODELS]


def compare(name, groups, size, backends=BACKENDS, **arguments):
    """Both forms against the plain modules: in float64 to 1e-12, in bfloat16 within twice the modules' own error.

    On a CPU "triton" is the operators with the formula: the wiring of the kernels, not the kernels.
    """
    torch.manual_seed(1)
    batch = max(4, 2 * groups)
    x, up = images(batch, *size, torch.float64).bfloat16(), torch.randn(batch, 1)
    found = {}
    for backend, dtype in itertools.product(backends, (torch.float64, torch.float32)):
        plain, fused, _ = pair(name, groups, backend, dtype, **arguments)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            if backend == backends[0]:
                found["plain", dtype] = step(plain, x.to(dtype), up)
            found[backend, dtype] = step(fused, x.to(dtype), up)
    exact, modules = found["plain", torch.float64], found["plain", torch.float32]
    for backend in backends:
        same, rounded = found[backend, torch.float64], found[backend, torch.float32]
        assert same.keys() == rounded.keys() == exact.keys()
        for key, value in exact.items():
            size = value.double().norm().item()
            error = (same[key] - value).double().norm().item()
            assert error <= 1e-12 * max(1.0, size), (backend, key, error)
            own, theirs = ((other[key].double() - value).norm().item() for other in (rounded, modules))
            assert own <= 2 * theirs + 1e-6 * size, (backend, key, own, theirs)


@pytest.mark.parametrize(("name", "groups"), todays(CASES, 5))
def test_each_kind_of_block_computes_what_the_plain_one_does(name, groups):
    """Stem and two stages, with every kind of block: a number of groups each day."""
    compare(name, groups, (17, 23), layers=[1, 2, 1, 1])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "groups", "backend"), todays([(*case, form) for form in BACKENDS for case in CASES]))
def test_a_whole_model_computes_what_the_plain_one_does(name, groups, backend):
    """One a day. The last maps are 2 x 2, so that a group has no fewer than eight values a channel."""
    compare(name, groups, (33, 39), (backend,))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_norm_is_pytorchs_module(backend, settings):
    """Without parameters, without running statistics, with a cumulative mean: training, then evaluation."""
    plain = nn.BatchNorm2d(5, **settings).double()
    fused = FusedBatchNorm2d.of(copy.deepcopy(plain), 1, backend=backend)
    for _ in range(3):
        x = torch.randn(4, 5, 3, 2).double().to(memory_format=torch.channels_last)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_gradients_of_two_processes_and_parts_are_those_of_one(tmp_path):
    """In `DistributedDataParallel` over gloo with accumulation; the worker compares evaluation as well."""
    worker = str(Path(__file__).with_name("ddp_worker.py"))
    runpy.run_path(worker, {"RANK": 0, "WORLD": 1, "PARTS": 1, "FOLDER": tmp_path})
    expected = torch.load(tmp_path / "gradients-1-0.pt")
    processes = []
    for rank in range(2):
        given = {"RANK": rank, "WORLD": 2, "PARTS": 2, "FOLDER": tmp_path}
        processes.append(CONTEXT.Process(target=runpy.run_path, args=(worker, given)))
        processes[-1].start()
    try:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients-2-{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


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
    assert "not fused" not in str(report)
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
    assert str(report).startswith("nothing fused" if "act_layer" in arguments else "fused ")


def test_unknown_models_keep_plain_modules():
    for groups, kind in ((1, nn.BatchNorm2d), (2, SplitBatchNorm2d)):
        backbone, _ = build_backbone("vgg11_bn")
        report = fuse_batch_norm(backbone, groups)
        assert {type(part) for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)} == {kind}
        assert str(report) == "nothing fused: none of its blocks is a ResNet block of torchvision or timm"


def test_a_block_of_another_class_is_left_alone():
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
