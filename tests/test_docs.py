"""The commands and lines of the pages on evaluation and export, as they are printed there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torchvision

from synco_fast import Run
from synco_fast.cli import _parser, main
from synco_fast.commands.overrides import overrides_of
from synco_fast.presets import PRESETS
from tests.conftest import TINY
from tests.support.rotation import in_turn
from tests.support.runs import STOCK, published

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)


@pytest.fixture
def workspace(told_run, image_folder, tmp_path, monkeypatch):
    """A folder in which the pages' names mean something."""
    inside = tmp_path / "workspace"
    (inside / "datasets").mkdir(parents=True)
    told_run(name="workspace/runs/demo")
    told_run({"seed": 1}, "workspace/runs/other")
    shutil.copytree(image_folder, inside / "datasets" / "demo")
    monkeypatch.chdir(inside)
    return inside


def run(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] == "synco-fast"
    assert main(words[1:]) == 0, line


def printed_commands() -> list[str]:
    """Every line of a shell example on any page that calls ``synco-fast``, continued lines joined."""
    found = []
    for page in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))):
        for block in re.findall(r"```(?:sh|text)\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            found += [line for line in lines if re.search(r"^(?:synco-fast|torchrun|srun) ", line)]
    return found


def test_every_printed_command_parses():
    """Subcommands, options and keys of the configuration, also of examples that no test can run."""
    from synco_fast.config import Config
    from synco_fast.explain import known_keys
    from synco_fast.generated.config import GeneratorConfig

    commands, keys = printed_commands(), {*known_keys(Config), *known_keys(GeneratorConfig)}
    assert len(commands) > 50
    for line in commands:
        words = shlex.split(
            re.sub(r"^(?:torchrun|srun) .*?(?:-m synco_fast|synco-fast)", "synco-fast", line), comments=True
        )
        options, rest = _parser().parse_known_args(words[1:])
        assert options.overrides or not rest, line
        assert set(overrides_of(rest)) <= keys, line


def test_every_key_that_a_page_names_is_there():
    """In the text, where no command is parsed; `method.base` is named as an older one."""
    from synco_fast.config import SECTIONS, Config
    from synco_fast.explain import known_keys

    known, count = {*known_keys(Config), "method.base"}, 0
    for page in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))):
        for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            named = re.findall(rf"(?:^|\s|--)((?:{'|'.join(SECTIONS)})\.[a-z_0-9]+)(?![\w./])", span)
            unknown = [key for key in named if key not in known and not key.endswith((".safetensors", ".png"))]
            assert not unknown, f"{page.name}: {span}"
            count += len(named)
    assert count > 150


def test_the_yaml_that_a_page_shows_is_read(tmp_path):
    from synco_fast.presets import load_config

    (block,) = blocks("training.md", "yaml")
    (tmp_path / "mine.yaml").write_text(block)
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.preset, config.training.batch, config.method.cooldown_epochs) == ("synco-r50-200", 512, 20)
    assert config.evaluation.train_images == 128_000, "that of the preset"


@pytest.mark.slow
@in_turn(1, 3)
def test_evaluation(workspace, voc):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pyarrow")
    shutil.copytree(voc, workspace / "datasets" / "voc")
    (workspace / "datasets/voc/VOCdevkit/VOC2007/ImageSets/Main/test.txt").write_text("000008\n")
    (workspace / "subset.txt").write_text("class0/1.jpg\nclass1/2.jpg\nclass2/3.jpg\n")
    lines = [line for block in blocks("evaluation.md", "sh") for line in block.splitlines() if line]
    for line in lines:
        run(line)
    names = (path.name for path in (workspace / "runs/demo/evaluation").glob("*.json"))
    assert {re.sub(r"-[0-9a-f]{8}\.", "-NUMBER.", name) for name in names} == {
        "knn.json",
        "knn-on-demo-NUMBER.json",
        "linear.json",
        "linear_fast.json",
        "finetune_10.json",
        "finetune_subset.json",
        "detection_voc.json",
    }
    for name in ("features.npz", "features.parquet", "comparison.png", "runs/demo/report.html"):
        assert (workspace / name).stat().st_size > 0


@pytest.mark.slow
@in_turn(0, 3)
def test_export(workspace, make_run):
    pytest.importorskip("onnxruntime")
    make_run({**STOCK, "model.backbone": "resnet50"}, "workspace/runs/synco-r50")
    torch.save(published(mlp=True), workspace / "moco_v2_800ep_pretrain.pth.tar")
    torch.save(torchvision.models.resnet18().state_dict(), workspace / "backbone.pth")
    lines = [line for block in blocks("export.md", "sh") for line in block.splitlines() if line]
    for line in lines:
        run(line)
    for name in ("torchvision", "safetensors", "moco", "detectron2"):
        assert (workspace / "runs/synco-r50/export" / name / "README.md").is_file()
    for block in blocks("export.md", "python"):
        exec(block, {})


@pytest.mark.slow
@in_turn(2, 3)
def test_methods(workspace):
    """Every line as it is printed, at two steps."""
    pytest.importorskip("torchmetrics")
    pairs = "--generated.batch 4 --generated.width 4 --generated.latent 8"
    few = {
        "pretrain-generator": "--steps 2 --batch 4 --width 4 --latent 8 --kid_images 8 --workers 0",
        "pretrain": f"--training.batch 8 --training.max_steps 2 --method.queue 256 {pairs} --data.workers 0"
        " --evaluation.every 0",
    }
    lines = [line for block in blocks("methods.md", "sh") for line in block.splitlines() if line]
    assert [line.split()[1] for line in lines] == ["pretrain", "pretrain", "pretrain-generator", "pretrain"]
    for line in lines:
        run(f"{line} {few[line.split()[1]]}")
    assert list((workspace / "runs").glob("*/plots/generated.png"))


@pytest.mark.slow
@in_turn(2, 3)
def test_python(workspace, monkeypatch, capsys):
    """Every block as it is printed, one after the other, with the small set's configuration as the demo's."""
    monkeypatch.setitem(PRESETS, "demo", {key: value for key, value in TINY.items() if key != "preset"})
    names: dict = {"__name__": __name__}  # timm looks up the module of an encoder
    *first, resumed, used, features, encoder, trainer, loss = blocks("python.md", "python")
    for block in first:
        exec(block, names)
    assert names["run"].finished
    assert names["run"].config.method.name == "mochi"
    assert "training.epoch: found an unknown key; did you mean training.epochs?" in capsys.readouterr().out
    settings = {name: Run(f"runs/{name}").config.to_yaml() for name in ("one", "two", "three")}
    assert len(set(settings.values())) == 1
    assert not Run("runs/one").finished
    exec(resumed, names)
    assert names["run"].finished
    assert names["run"].summary["epochs"] == 3
    exec(used, names)
    assert (names["run"].folder / "report.html").is_file()
    exec(features, names)
    assert names["features"].values.shape == (len(names["images"]), 16)
    exec(encoder, names)
    assert (names["run"].folder / "export" / "safetensors" / "backbone.safetensors").is_file()
    exec(trainer, names)
    assert len(names["rates"]) == names["summary"].steps == 4
    exec(loss, names)
    assert int(names["criterion"].step) == 3


def test_the_code_that_methods_names_is_there():
    """Files and names in the tables of equations."""
    import importlib

    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    files = {name for row in rows for name in re.findall(r"`((?:kernels|data|synco_fast)/[\w/]+\.py)`", row)}
    assert len(files) > 20
    for file in files:
        assert (DOCS.parent / file).is_file(), file
    for file, names in re.findall(r"`((?:kernels|synco_fast)/[\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", page):
        dotted = file.removesuffix(".py").replace("/", ".")
        module = importlib.import_module(dotted if dotted.startswith("synco_fast") else f"synco_fast.{dotted}")
        for name in re.findall(r"`([\w.]+)`", names):
            found = module
            for part in name.split("."):
                assert hasattr(found, part), f"{name} in {file}"
                found = getattr(found, part)
