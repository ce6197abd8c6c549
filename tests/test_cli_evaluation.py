"""What the subcommands about finished runs say when they are given what they cannot use: one line, exit code 2."""

from __future__ import annotations

import shutil

import pytest
import torch

from synco_fast.cli import main
from tests.support.runs import Bomb


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> str:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr().err
        assert code == 2, said
        assert said.startswith("error: ")
        assert said.strip().count("\n") == 0, said
        return said

    return call


SUBCOMMANDS = (
    ["evaluate", "knn"],
    ["evaluate", "linear"],
    ["evaluate", "linear", "--fast"],
    ["evaluate", "finetune"],
    ["evaluate", "detection", "--data", "voc:nowhere"],
    ["export", "--format", "safetensors"],
    ["embed", "--out", "features.npz"],
)


@pytest.mark.parametrize("words", SUBCOMMANDS, ids=" ".join)
def test_checkpoints_that_cannot_be_used(refused, make_run, tmp_path, words):
    run = make_run()
    checkpoint = run / "checkpoints" / "step-00000008.pt"
    content = torch.load(checkpoint, weights_only=True)
    content["method"]["encoder.backbone.wings"] = content["method"].pop("encoder.backbone.bn1.bias")
    torch.save(content, tmp_path / "other.pt")
    torch.save({**content, "method": {}}, tmp_path / "empty.pt")
    torch.save({**content, "bomb": Bomb()}, tmp_path / "bomb.pt")
    for file, says in (
        ("none.pt", "found no file"),
        ("empty.pt", "found no encoder in it"),
        ("other.pt", "it lacks bn1.bias; it has besides wings"),
        ("bomb.pt", "found exec in its pickle, expected tensors and plain values"),
    ):
        if words[-1] == "voc:nowhere" and file == "other.pt":
            continue  # the images are looked for first
        if words[0] == "export" and file == "other.pt":
            continue  # safetensors takes whatever the backbone is
        assert says in refused(*words, tmp_path / file)
    shutil.copy(tmp_path / "bomb.pt", checkpoint)
    assert "exec" in refused(*words, run)


def test_data_and_words_that_cannot_be_used(refused, make_run, image_folder):
    run = make_run()
    for words, says in (
        (["knn", run, "--k", "34"], "k: found 34, expected up to 33"),
        (["knn", run, "--k", "0"], "k: found 0, expected 1 or more"),
        (["knn", run, "--temperature", "0"], "temperature: found 0, expected a finite number above 0"),
        (["knn", run, "--workers", "-1"], "workers: found -1, expected 0 or more"),
        (["knn", run, "--workers", "two"], "workers: found 'two', expected a whole number;"),
        (["knn", run, "--k", "1e3"], "k: found '1e3', expected a whole number;"),
        (["knn", run, "--temperature", "warm"], "temperature: found 'warm', expected a number;"),
        (["knn", run, "--data", image_folder / "train" / "class0"], "found no held-out split"),
        (["linear", run, "--epochs", "0"], "epochs: found 0, expected 1 or more"),
        (["linear", run, "--lr", "1", "2"], "lr: found 2 rates, expected one, or several with --fast"),
        (["finetune", run, "--percent", "101"], "percent: found 101, expected above 0, up to 100"),
        (["finetune", run, "--lr", "0"], "lr: found 0, expected a finite number above 0"),
        (["finetune", run, "--list", image_folder / "none.txt"], "list: cannot read"),
        (["detection", run], "data: found none, expected voc:FOLDER or coco:FOLDER"),
        (["detection", run, "--data", "voc:x", "--steps", "0"], "steps: found 0, expected 1 or more"),
    ):
        assert says in refused("evaluate", *words)
    assert "found no run in" in refused("report", image_folder)
    assert "found no run in" in refused("compare", run, image_folder)
    assert "expected a name that ends in .png" in refused("compare", run, "--out", "comparison.txt")
    assert "expected a name that ends in .npz" in refused("embed", run, "--out", "features.csv")
    shutil.rmtree(image_folder / "val" / "class1")
    assert "found 3 classes among the training images" in refused("evaluate", "linear", run)


def test_the_default_folder_is_checked_before_anything_is_computed(refused, make_run, tmp_path, voc, monkeypatch):
    """On a folder that takes no files, as /proc does for every user."""
    pytest.importorskip("torchmetrics", reason="the extra 'detection' is not installed")
    pytest.importorskip("pycocotools", reason="the extra 'detection' is not installed")
    run, free, page = make_run(), make_run(name="free"), tmp_path / "page.html"
    results = run / "evaluation"
    results.symlink_to("/proc")
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *arguments, **named: pytest.fail("something was computed"))
    for words in (*SUBCOMMANDS[:4], ["evaluate", "detection", "--data", f"voc:{voc}"]):
        assert f"out: found {results}, expected a place where this user can write" in refused(*words, run)
    results.unlink()
    results.write_text("")
    assert f"out: found a file {results}, expected a folder" in refused("evaluate", "knn", run)
    assert "out: found a folder" in refused("report", free, "--out", results.parent)
    (run / "report.html").mkdir()
    assert "out: found a folder" in refused("report", run)
    (free / "evaluation").symlink_to("/proc")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "images")
    assert main(["report", str(free), "--out", str(page)]) == 0, "a page can go where results cannot"
    assert page.is_file()


def test_an_imported_checkpoint_asks_for_its_images(refused, tmp_path, capsys):
    import torchvision

    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    words = ["import", tmp_path / "resnet.pth", "--method", "moco", "--out", tmp_path / "ours.pt"]
    assert "--backbone NAME" in refused(*words)
    assert "nearest: resnet18" in refused(*words, "--backbone", "resnet188")
    assert "another architecture than resnet34: it lacks" in refused(*words, "--backbone", "resnet34")
    assert main([str(word) for word in [*words, "--backbone", "resnet18"]]) == 0
    assert "data: found none, expected --data SOURCE" in refused("evaluate", "knn", tmp_path / "ours.pt")
    assert "data: found none, expected --data SOURCE" in refused("embed", tmp_path / "ours.pt", "--out", "f.npz")


def test_every_subcommand_has_an_example(capsys):
    for words in [
        *(words[:2] for words in SUBCOMMANDS[:5]),
        ["export"],
        ["import"],
        ["embed"],
        ["report"],
        ["compare"],
    ]:
        with pytest.raises(SystemExit) as left:
            main([*words, "--help"])
        assert left.value.code == 0
        assert "example:" in capsys.readouterr().out
