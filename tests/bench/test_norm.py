"""The benchmark of norm, add and ReLU: what it measures agrees, and the counted bytes and launches are as aimed at."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import nn

from synco_fast.bench.norm import measure_norm, prepare_norm, totals, unavailable
from synco_fast.bench.norm_model import FORMS, Layer, layers_of, passes, step_work
from synco_fast.bench.norm_step import measure_norm_steps
from synco_fast.bench.subjects import NORM_SETTINGS, NORMS
from synco_fast.cli import main
from synco_fast.config import ModelConfig

CPU = torch.device("cpu")
SMALL = Layer(8, 5, 4, True, True, 2)


@pytest.fixture(scope="module")
def counted():
    return {form: step_work(form) for form in FORMS}


def test_bytes_and_launches_of_a_resnet50_step(counted):
    """224 pixels, batch 256, eight groups, bfloat16."""
    grouped, plain, kernels = (counted[form] for form in ("grouped", "plain", "triton"))
    assert kernels.bytes <= 0.6 * grouped.bytes
    assert kernels.bytes <= 0.75 * plain.bytes
    assert kernels.launches <= grouped.launches / 5
    assert kernels.launches < plain.launches


def test_the_count_is_that_of_the_layers(counted):
    """What is counted call by call are the passes of each layer, and the sums where a block's input goes two ways."""
    layers = layers_of()
    assert sum(layer.times for layer in layers) == 53
    blocks = [layer for layer in layers if layer.residual]
    assert sum(layer.times for layer in blocks) == 16
    for form, work in counted.items():
        expected = 0
        for layer in layers:
            forward, backward = passes(layer, form)
            size = 256 * layer.channels * layer.height * layer.width * 2
            expected += layer.times * size * (2 * forward + backward)
        assert 0 <= work.bytes - expected < 0.13 * expected, "the sums are an eighth of the kernels' at most"


def test_the_page_has_these_counts(counted):
    """Passes by layer, bytes and launches by form, in docs/norm.md."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "norm.md").read_text(encoding="utf-8")
    for form, work in counted.items():
        name = "kernels" if form == "triton" else form
        (cells,) = re.findall(rf"^\| {name} \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d,]+) \|$", page, re.M)
        shares = [work.bytes / counted[other].bytes for other in ("grouped", "plain")]
        expected = f"{work.bytes / 1e9:.1f}", *(f"{share:.2f}" for share in shares), f"{work.launches:,}"
        assert cells == expected
    printed = {}
    for times, maps, after, *passed in re.findall(
        r"^\| ([\d, ]+) \| ([\d,]+ x [^|]+) \| ([^|]*?) ?\| ([\d +]+) \| ([\d +]+) \| ([\d +]+) \|$", page, re.M
    ):
        channels, _, sides = maps.partition(" x ")
        for many, side in zip(times.split(", "), sides.split(", "), strict=True):
            height, width = map(int, side.split(" x "))
            layer = Layer(int(channels.replace(",", "")), height, width, "ReLU" in after, "add" in after, int(many))
            printed[layer] = passed
    expected = {
        layer: [" + ".join(map(str, passes(layer, form))) for form in ("triton", "plain", "grouped")]
        for layer in layers_of()
    }
    assert printed == expected


def test_launches_do_not_grow_with_the_groups():
    small = {"backbone": "resnet18", "batch": 16, "size": 64}
    assert step_work("triton", groups=8, **small).launches == step_work("triton", groups=1, **small).launches
    assert step_work("grouped", groups=8, **small).launches > 3 * step_work("grouped", groups=1, **small).launches


@pytest.mark.parametrize("layer", [SMALL, SMALL._replace(residual=False), SMALL._replace(relu=False, residual=False)])
def test_every_form_computes_the_same(layer):
    expected = prepare_norm("grouped", layer, 6, 3, CPU, torch.float32)()
    assert len(expected) == 1 + layer.residual
    for subject in ("native", "split", "folded"):
        found = prepare_norm(subject, layer, 6, 3, CPU, torch.float32)()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    whole = prepare_norm("plain", layer, 6, 1, CPU, torch.float32)()
    torch.testing.assert_close(whole, prepare_norm("native", layer, 6, 1, CPU, torch.float32)())


class ApexNorm(nn.BatchNorm2d):
    """What apex's `BatchNorm2d_NHWC` takes and gives, by PyTorch's own calls."""

    def __init__(self, num_features, fuse_relu=False, bn_group=1):
        super().__init__(num_features)
        self.fuse_relu = fuse_relu

    def forward(self, x, z=None):
        assert x.is_contiguous()
        assert x.shape[3] == self.num_features, "(B, H, W, C)"
        assert z is None or (self.fuse_relu and z.is_contiguous())
        y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = y if z is None else y + z
        return y.relu() if self.fuse_relu else y


@pytest.mark.parametrize("layer", [SMALL, SMALL._replace(residual=False), SMALL._replace(relu=False, residual=False)])
def test_apex_where_it_is_installed(monkeypatch, layer):
    """Its module is called as it is to be, and computes what the plain form does."""
    gpu, half = torch.device("cuda"), torch.float16
    assert "apex's contrib.groupbn cannot be imported" in unavailable("apex", gpu, half)
    stand_in = SimpleNamespace(BatchNorm2d_NHWC=ApexNorm)
    monkeypatch.setitem(sys.modules, "apex.contrib.groupbn.batch_norm", stand_in)
    assert unavailable("apex", gpu, half) is None
    assert "found torch.bfloat16 on cuda" in unavailable("apex", gpu, torch.bfloat16)
    found, expected = (prepare_norm(name, layer, 6, 3, CPU, torch.float32)() for name in ("apex", "plain"))
    torch.testing.assert_close(found, expected)


def test_steps_take_turns(tiny):
    values = tiny({"training.batch": 8, "training.device": "cpu", "method.warmup_epochs": 0}).model_dump(mode="json")
    done = []
    plain, auto = measure_norm_steps(values, ["plain", "auto"], rounds=3, advance=lambda: done.append(1))
    assert len(done) == 3
    assert (plain["norm"], auto["norm"]) == ("plain", "auto")
    assert plain["of_first"] == plain["cpu_of_first"] == [1, 1, 1]
    assert plain["loss"] == auto["loss"], "on a CPU the bits of the plain form, after six steps as well"
    for name in ("seconds", "cpu_seconds"):
        ratios = sorted(one / other for one, other in zip(auto[name], plain[name], strict=True))
        assert auto[f"{name.removesuffix('seconds')}of_first"][1] == pytest.approx(ratios[1])
        assert len(auto[name]) == 3
    assert set(get_args(ModelConfig.model_fields["norm"].annotation)) == set(NORM_SETTINGS)


def test_figures():
    subjects = ["grouped", "native"]
    sizes = {"batch": 6, "groups": 3, "device": CPU, "dtype": torch.float32}
    found = list(measure_norm(subjects, [SMALL], **sizes, bandwidth=1e9, repeats=2, rounds=2))
    by_name = {result["subject"]: result for result in found}
    assert by_name.keys() == set(subjects)
    assert "x is on cpu" in unavailable("triton", CPU, torch.float32)
    assert "float16 on a GPU" in unavailable("apex", CPU, torch.float32)
    grouped = by_name["grouped"]
    assert len(grouped["seconds"]) == 4
    size = 6 * 8 * 5 * 4 * 4
    assert grouped["gb_s"] == pytest.approx(20 * size / grouped["median_s"] / 1e9)
    assert grouped["floor"] == pytest.approx(11 * size / 1e9 / grouped["median_s"])
    assert totals(found)["grouped"] == pytest.approx(2 * grouped["median_s"])


def test_what_cannot_be_measured_says_why():
    assert set(NORMS) == {"grouped", "split", "plain", "compiled", "folded", "native", "triton", "apex"}
    assert unavailable("native", CPU, torch.bfloat16) is None
    assert "the kernels run on CUDA devices" in unavailable("triton", CPU, torch.bfloat16)


def test_compiled_on_a_cpu_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert (
        unavailable("compiled", CPU, torch.float32) == "torch.compile needs a C++ compiler, found no no-such-compiler"
    )
    assert unavailable("compiled", torch.device("cuda"), torch.float32) is None
    monkeypatch.setenv("CXX", sys.executable)
    assert unavailable("compiled", CPU, torch.float32) is None


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    words = ["bench", "norm", "--backbone", "resnet18", "--size", "32", "--batch", "4", "--groups", "2"]
    words += ["--subjects", "grouped", "native", "--repeats", "1", "--rounds", "1", "--device", "cpu"]
    assert main([*words, "--json", str(tmp_path / "norm.json")]) == 0
    report = json.loads((tmp_path / "norm.json").read_text())
    assert {result["subject"] for result in report["results"]} == {"grouped", "native"}
    assert report["counted"]["triton"]["launches"] < report["counted"]["grouped"]["launches"]
    assert "counted, not measured" in capsys.readouterr().out
    words = ["bench", "norm", "--dry", "--backbone", "resnet18", "--size", "32", "--batch", "8", "--groups", "2"]
    assert main([*words, "--device", "cpu"]) == 0
    assert (
        main([*words, "--part", "step", "--dtype", "float32", "--device", "cpu", "--json", str(tmp_path / "step.json")])
        == 0
    )
    report = json.loads((tmp_path / "step.json").read_text())
    assert [row["norm"] for row in report["steps"]] == ["plain", "auto"]
    assert len(report["load"]) == 3
    assert "whole steps in turn; ratio to plain in the same round; rounds: 1" in capsys.readouterr().out
    assert main(["bench", "norm", "--batch", "7", "--device", "cpu"]) == 2
    assert "batch: found 7, expected a multiple of 8 (groups)" in capsys.readouterr().err
