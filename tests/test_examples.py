"""The examples run as they are printed."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import torchvision
from matplotlib import pyplot as plt

from synco_fast.presets import PRESETS
from tests.conftest import TINY
from tests.support.rotation import in_turn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_plain_pytorch(image_folder, tmp_path):
    torch.manual_seed(0)
    words = ["--data", image_folder / "train", "--epochs", 6, "--batch", 8, "--size", 32, "--queue", 64]
    losses = load("plain_pytorch").main([str(word) for word in [*words, "--out", tmp_path / "backbone.pth"]])
    assert len(losses) == 6 * (33 // 8)
    assert sum(losses[-4:]) < 4 * max(losses) - 0.5, "it rises while keys fill the queue, then falls"
    model = torchvision.models.resnet18()
    found = model.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=False)
    assert set(found.missing_keys) == {"fc.weight", "fc.bias"}


@pytest.mark.slow
def test_lightly_style():
    torch.manual_seed(0)
    example = load("lightly_style")
    images = torch.randn(4, 8, 3, 32, 32)
    batches = [([some, some + 0.1 * torch.randn_like(some)], torch.zeros(8), ["name"] * 8) for some in images]
    model = example.SynCo(torchvision.models.resnet18(), queue=64)
    losses = example.train(model, batches, epochs=7)
    assert len(losses) == int(model.criterion.step) == 28
    assert max(losses[-4:]) < max(losses) - 0.5, "it rises while keys fill the queue, and falls as they are told apart"


@pytest.mark.slow
def test_lightly_itself(image_folder):
    data = pytest.importorskip("lightly.data", reason="lightly is not installed")
    transforms = pytest.importorskip("lightly.transforms")
    dataset = data.LightlyDataset(str(image_folder / "train"), transform=transforms.MoCoV2Transform(input_size=32))
    loader = torch.utils.data.DataLoader(dataset, 8, drop_last=True)
    example = load("lightly_style")
    assert len(example.train(example.SynCo(torchvision.models.resnet18(), queue=1024), loader, epochs=1)) == 4


@pytest.mark.slow
@in_turn(0, 3)
def test_lightning(image_folder, tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    example = load("lightning_module")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    words = ["--data", image_folder, "--epochs", 2, "--batch", 8, "--size", 32, "--queue", 1024, "--workers", 0]
    trainer = example.main(
        [str(word) for word in words], accelerator="cpu", default_root_dir=tmp_path, log_every_n_steps=1, **quiet
    )
    assert trainer.global_step == 2 * (33 // 8)
    assert torch.isfinite(trainer.callback_metrics["loss"])
    assert 0 <= trainer.callback_metrics["knn"] <= 1
    module = trainer.lightning_module
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    again = example.SynCo.load_from_checkpoint(checkpoint).eval()
    assert int(again.criterion.step) == 8
    assert torch.equal(again.criterion.queue.rows, module.criterion.queue.rows.cpu())
    assert torch.equal(again(torch.ones(1, 3, 32, 32)), module.cpu().eval()(torch.ones(1, 3, 32, 32)))


def notebook() -> list[dict]:
    cells = json.loads((EXAMPLES / "pretrain.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_shows_what_it_printed_in_order():
    cells = notebook()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 2
    assert "<progress" in "".join(cells[1]["outputs"][0]["data"]["text/html"])
    said = "".join(line for cell in cells for output in cell["outputs"] for line in output.get("text", ()))
    assert "equal features: True" in said
    last = re.findall(r"kNN (\d+\.\d)%", said)[-1]
    assert f"kNN accuracy {last}%" in said, "the run's own and that by hand"


@pytest.mark.slow
def test_the_notebook_runs(image_folder, tmp_path, monkeypatch, capsys):
    """Every cell, the parameters replaced as papermill does it: by those of a small set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "tiny", {key: value for key, value in TINY.items() if key != "preset"})
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    cells, names = notebook(), {}
    assert cells[0]["metadata"]["tags"] == ["parameters"]
    for cell in cells:
        exec("".join(cell["source"]), names)
        if cell is cells[0]:
            assert set(names) - {"__builtins__"} == {"preset", "data", "epochs"}
            names |= {"preset": "tiny", "data": image_folder, "epochs": 1}
    said = capsys.readouterr().out
    assert f"kNN accuracy {names['run'].knn:.1%}" in said
    assert "equal features: True" in said
    assert len(plt.gcf().axes) == 3 * 6
    plt.close("all")
