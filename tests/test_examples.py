"""The examples run as they are printed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torchvision

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_plain_pytorch(image_folder, tmp_path):
    torch.manual_seed(0)
    words = ["--data", image_folder / "train", "--epochs", 2, "--batch", 8, "--size", 32, "--queue", 1024]
    losses = load("plain_pytorch").main([str(word) for word in [*words, "--out", tmp_path / "backbone.pth"]])
    assert len(losses) == 2 * (33 // 8)
    assert losses[-1] < losses[0]
    model = torchvision.models.resnet18()
    found = model.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=False)
    assert set(found.missing_keys) == {"fc.weight", "fc.bias"}


@pytest.mark.slow
def test_lightly_style():
    torch.manual_seed(0)
    example = load("lightly_style")
    views = torch.randn(2, 4, 8, 3, 32, 32)
    batches = [([first, second], torch.zeros(8), ["name"] * 8) for first, second in zip(*views, strict=True)]
    model = example.SynCo(torchvision.models.resnet18(), queue=1024)
    losses = example.train(model, batches, epochs=2)
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert int(model.criterion.step) == 8


@pytest.mark.slow
def test_lightly_itself(image_folder):
    data = pytest.importorskip("lightly.data", reason="lightly is not installed")
    transforms = pytest.importorskip("lightly.transforms")
    dataset = data.LightlyDataset(str(image_folder / "train"), transform=transforms.MoCoV2Transform(input_size=32))
    loader = torch.utils.data.DataLoader(dataset, 8, drop_last=True)
    example = load("lightly_style")
    assert len(example.train(example.SynCo(torchvision.models.resnet18(), queue=1024), loader, epochs=1)) == 4
