"""What a finished classifier is taken for again, and what it is trained on: precision, images, classes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from synco_fast.cli import main
from synco_fast.data.sources.open import Source
from synco_fast.data.sources.splits import ArraySplit
from synco_fast.evaluation import classifier
from synco_fast.evaluation.context import EvalOptions, check_labels, open_context
from synco_fast.evaluation.finetune import evaluate_finetune, published_protocol
from synco_fast.evaluation.linear import PUBLISHED, evaluate_linear, evaluate_linear_fast
from synco_fast.export.load import read_weights
from synco_fast.export.save import export_checkpoint
from synco_fast.runtime.errors import DataError
from synco_fast.training.run.run_folder import close_run
from synco_fast.training.run.throughput import Throughput

ONE = replace(PUBLISHED, epochs=1, batch=8)
OPTIONS = EvalOptions(workers=0, precision="fp32")


@pytest.fixture
def trained(monkeypatch):
    """Grows by one with each epoch, which takes no time."""
    epochs = []
    monkeypatch.setattr(classifier, "_epoch", lambda *arguments: epochs.append(1) or 0.5)
    monkeypatch.setattr(classifier, "_test", lambda *arguments: (0.5, 1.0, [[1]]))
    return epochs


def test_a_finished_probe_is_that_of_its_precision_and_images(make_run, image_folder, trained):
    run = make_run()
    evaluate_linear(run, OPTIONS, protocol=ONE)
    evaluate_linear(run, OPTIONS, protocol=ONE)
    assert len(trained) == 1
    evaluate_linear(run, replace(OPTIONS, precision="bf16"), protocol=ONE)
    assert len(trained) == 2
    evaluate_linear(run, OPTIONS, protocol=ONE)
    for split in ("train", "val"):
        file = image_folder / split / "class1" / "0.jpg"
        file.rename(file.with_name("other.jpg"))
        before = len(trained)
        evaluate_linear(run, OPTIONS, protocol=ONE)
        evaluate_linear(run, OPTIONS, protocol=ONE)
        assert len(trained) == before + 1, split


def test_a_state_of_an_earlier_version_is_not_taken(make_run, trained):
    run, state = make_run(), "evaluation/linear.pt"
    evaluate_linear(run, OPTIONS, protocol=ONE)
    content = torch.load(run / state, weights_only=True)
    content["made_by"] = {name: content["made_by"][name] for name in ("plan", "weights", "source")} | {"images": 33}
    torch.save(content, run / state)
    evaluate_linear(run, OPTIONS, protocol=ONE)
    assert len(trained) == 2


def test_lists_of_the_same_name_and_length_are_two_jobs(make_run, tmp_path, trained):
    run = make_run()
    for folder, text in (("a", "0\n12\n30"), ("b", "1\n12\n30"), ("c", "30\n1\n12\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "list.txt").write_text(text)
        protocol = replace(published_protocol(1), epochs=1)
        evaluate_finetune(run, OPTIONS, listed=tmp_path / folder / "list.txt", rates=(0.1,), protocol=protocol)
    assert len(trained) == 2, "the order of a list does not matter"


def test_a_list_is_trained_on_for_as_long_as_its_share_says(make_run, tmp_path, trained):
    run, shares = make_run(), []
    (tmp_path / "list.txt").write_text("".join(f"{number}\n" for number in range(0, 33, 3)))

    def protocol(percent):
        shares.append(percent)
        return replace(published_protocol(percent), epochs=1)

    evaluate_finetune(run, OPTIONS, listed=tmp_path / "list.txt", rates=(0.1,), protocol=protocol)
    evaluate_finetune(run, OPTIONS, percent=2.5, rates=(0.1,), protocol=protocol)
    assert shares == [33, 2.5]
    trained.clear()
    assert main(["evaluate", "finetune", str(run), "--list", str(tmp_path / "list.txt"), "--lr", "0.1"]) == 0
    assert len(trained) == 30


def test_two_sets_of_images_have_two_states_and_weights_without_a_run_two_results(
    make_run, image_folder, tmp_path, trained
):
    """Otherwise an interrupted probe on one would be lost, and the result of an imported file."""
    other = shutil.copytree(image_folder, tmp_path / "other")
    run = make_run()
    for data in (image_folder, other, image_folder):
        evaluate_linear(run, replace(OPTIONS, data=str(data)), protocol=ONE)
        evaluate_finetune(run, replace(OPTIONS, data=str(data)), percent=50, rates=(0.1,), protocol=ONE)
    assert len(trained) == 4
    content = torch.load(next((run / "checkpoints").iterdir()), weights_only=True)
    file = tmp_path / "weights" / "moco.v2.pt"
    file.parent.mkdir()
    torch.save({**content, "imported": {"from": "moco.pth"}}, file)
    for data in (image_folder, other, image_folder):
        evaluate_linear(file, replace(OPTIONS, data=str(data)), protocol=ONE)
    assert len(trained) == 6
    names = sorted(found.name for found in (file.parent / "moco.v2-evaluation").glob("*.json"))
    assert [name.rpartition("-")[0] for name in names] == ["linear-on-images", "linear-on-other"]
    evaluate_linear(file, replace(OPTIONS, data=str(other), out=tmp_path / "here"), protocol=ONE)
    assert (tmp_path / "here" / "linear.json").is_file()


def test_an_imported_file_below_a_run_is_not_the_run_s(make_run, image_folder, trained):
    run = make_run()
    evaluate_linear(run, OPTIONS, protocol=ONE)
    before = (run / "evaluation" / "linear.json").read_text()
    content = torch.load(next((run / "checkpoints").iterdir()), weights_only=True)
    (run / "imported").mkdir()
    torch.save({**content, "imported": {"from": "moco.pth"}}, run / "imported" / "moco.pt")
    evaluate_linear(run / "imported" / "moco.pt", replace(OPTIONS, data=str(image_folder)), protocol=ONE)
    assert (run / "evaluation" / "linear.json").read_text() == before
    assert read_weights(run / "imported" / "moco.pt").run is None


def test_the_evaluation_of_an_export_is_beside_its_folder(make_run, image_folder, tmp_path, trained, monkeypatch):
    """The folder is uploaded as it is, and the file in it is named the same as those of other exports."""
    export = export_checkpoint(make_run(), "safetensors", tmp_path / "exports" / "mine").folder
    options = replace(OPTIONS, data=str(image_folder))
    files = sorted(export.iterdir())
    evaluate_linear(export / "backbone.safetensors", options, protocol=ONE)
    monkeypatch.chdir(export)
    evaluate_linear(Path(), options, protocol=ONE)
    assert sorted(export.iterdir()) == files
    assert len(trained) == 1
    assert len([*(tmp_path / "exports" / "mine-evaluation").glob("linear-on-*.json")]) == 1
    alone = shutil.copy(export / "backbone.safetensors", tmp_path / "other.safetensors")
    evaluate_linear(alone, options, protocol=ONE)
    assert (tmp_path / "other-evaluation").is_dir()


def test_the_variants_of_a_linear_evaluation_agree_after_the_run_has_moved(make_run, tmp_path, trained, monkeypatch):
    run = make_run()
    fast = evaluate_linear_fast(run, OPTIONS, protocol=ONE)
    moved = run.rename(tmp_path / "moved")
    full = evaluate_linear(moved, OPTIONS, protocol=ONE)
    assert full["agreement"]["other_top1"] == fast["top1"]
    monkeypatch.chdir(moved)
    assert evaluate_linear_fast(Path(), OPTIONS, protocol=ONE)["agreement"]["other_top1"] == full["top1"]
    (moved / "evaluation" / "linear.json").write_text(json.dumps({**full, "weights": "of another file"}))
    assert evaluate_linear_fast(moved, OPTIONS, protocol=ONE)["agreement"] is None


def labelled(train, held_out) -> Source:
    splits = (ArraySplit(np.zeros((len(each), 8, 8), np.uint8), np.array(each), "idx") for each in (train, held_out))
    return Source("idx:here", *splits)


def test_the_splits_have_the_same_classes_not_as_many():
    with pytest.raises(
        DataError, match=r"found 3 classes .* and 3 among the held-out ones \(2, 3 in one of them alone\)"
    ):
        check_labels(labelled([0, 1, 2], [0, 1, 3]))
    check_labels(labelled([0, 2, 5, 5], [5, 2, 0]))


def test_chance_is_that_of_the_classes_with_images(make_run):
    context = open_context(make_run(), OPTIONS)
    assert context.chance == pytest.approx(1 / 3)
    source = labelled([1, 2, 3], [3, 2, 1])
    train, _ = check_labels(source)
    context = replace(context, train=train)
    assert context.classes == 4, "a label is an output's number"
    found = context.result("some", {})
    assert (found["chance"], found["classes"]) == (pytest.approx(1 / 3), 3)
    run = context.folder.parent
    (run / "metrics.jsonl").write_text('{"kind": "evaluation", "step": 0, "epoch": 0, "knn": 0.5}\n')
    progress = {"steps_per_epoch": 1, "step": 1, "finished": True, "throughput": Throughput(8, 0)}
    summary = close_run(run, context.weights.config, source, **progress, corrupt=0, forms={}, writes=False)
    assert summary.chance == found["chance"]
