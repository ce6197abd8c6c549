"""The evaluations on a run folder: what they find, what they leave, how they resume."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from synco_fast.data.sources.open import open_source
from synco_fast.evaluation import classifier
from synco_fast.evaluation import features as cache
from synco_fast.evaluation.classifier import ClassifierProtocol
from synco_fast.evaluation.context import EvalOptions, open_context, weights_sha256
from synco_fast.evaluation.features import cached_features, extract_features
from synco_fast.evaluation.finetune import evaluate_finetune, published_protocol
from synco_fast.evaluation.knn import evaluate_knn, knn_accuracy, nearest
from synco_fast.evaluation.labelled import LabelledBatches, balanced_subset, listed_subset
from synco_fast.evaluation.linear import PUBLISHED, evaluate_linear, evaluate_linear_fast, sweep_heads
from synco_fast.runtime.errors import ConfigError, DataError, DivergedError
from tests.support.rotation import in_turn

SHORT = replace(PUBLISHED, epochs=3, batch=8, head_lr=0.3)


def test_published_protocols_are_the_defaults():
    assert (PUBLISHED.epochs, PUBLISHED.batch, PUBLISHED.head_lr, PUBLISHED.weight_decay) == (100, 256, 30, 0)
    assert [PUBLISHED.factor(epoch) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    one, ten = published_protocol(1), published_protocol(10)
    assert (one.epochs, ten.epochs, one.batch, one.head_lr) == (60, 30, 1024, 0.5)
    assert one.factor(0) == 1
    assert [epoch for epoch in range(60) if one.tested(epoch)] == [9, 19, 29, 39, 49, 59]
    assert all(PUBLISHED.tested(epoch) for epoch in range(100))
    assert one.factor(30) == pytest.approx(0.5)


def test_the_bank_may_come_in_parts():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 8, generator=generator), torch.randn(1100, 8, generator=generator)
    whole = nearest([bank], queries, 7)
    parts = nearest([bank[:3], bank[3:40], bank[40:]], queries, 7)
    assert torch.equal(whole[1], parts[1])
    assert torch.allclose(whole[0], parts[0])
    with pytest.raises(ConfigError, match="found 51, expected up to 50"):
        nearest([bank[:25], bank[25:]], queries, 51)


def test_knn_is_that_of_all_features_and_the_cache_is_used(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr(cache, "CHUNK", 10)
    found = evaluate_knn(run, EvalOptions(workers=0), k=(3, 5))
    assert found["precision"] == "fp32"
    context = open_context(run, EvalOptions(workers=0, precision="fp32"))
    bank = cached_features(context, context.train, "bank")
    assert len(bank.files) == 4
    train, held_out = bank.load(), cached_features(context, context.held_out, "queries").load()
    assert train.labels.tolist() == context.train.labels.tolist()
    for k in (3, 5):
        expected = knn_accuracy(train.values, train.labels, held_out.values, held_out.labels, k=k, temperature=0.07)
        assert found["accuracies"][str(k)] == expected
    assert (found["chance"], found["bank"], found["queries"]) == (pytest.approx(1 / 3), 33, 12)
    assert found["backbone_unchanged"] is True
    assert json.loads((run / "evaluation" / "knn.json").read_text())["headline"] == found["headline"]

    def never(*arguments, **named):
        raise AssertionError("features were extracted again")

    monkeypatch.setattr(cache, "extract_features", never)
    assert evaluate_knn(run, EvalOptions(workers=0), k=(3, 5))["accuracies"] == found["accuracies"]
    with pytest.raises(AssertionError, match="again"):
        evaluate_knn(run, EvalOptions(workers=0, fresh=True))
    bank.files[1].write_bytes(b"cut")
    with pytest.raises(AssertionError, match="again"):
        evaluate_knn(run, EvalOptions(workers=0))


def test_other_weights_have_other_features(make_run):
    first, second = (open_context(make_run({"seed": seed}, str(seed)), EvalOptions(workers=0)) for seed in (0, 1))
    assert cache._key(first, first.train) != cache._key(second, second.train)
    assert cache._key(first, first.train) != cache._key(first, first.held_out)


def test_k_follows_the_size_of_the_set(make_run):
    run = make_run()
    assert evaluate_knn(run, EvalOptions(workers=0))["k"] == [3, 20]
    with pytest.raises(ConfigError, match="k: found 34, expected up to 33"):
        evaluate_knn(run, EvalOptions(workers=0), k=(3, 34))


def test_heads_side_by_side_are_heads_one_by_one():
    generator = torch.Generator().manual_seed(0)
    values, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    values[:, :3] += 2 * torch.nn.functional.one_hot(labels, 3)
    protocol = ClassifierProtocol(epochs=4, batch=16, head_lr=1, drops=(0.5,))
    both = sweep_heads(values, labels, values, classes=3, rates=(0.01, 0.5, 1e38), protocol=protocol)
    for place, rate in enumerate((0.01, 0.5)):
        alone = sweep_heads(values, labels, values, classes=3, rates=(rate,), protocol=protocol)
        assert torch.equal(both[place], alone[0])
    assert (both[1] == labels).float().mean() > 0.7
    assert (both[2] == labels).float().mean() < 0.5


def test_linear_evaluation_learns_leaves_the_backbone_alone_and_goes_on(make_run, monkeypatch):
    run = make_run()
    whole = evaluate_linear(run, EvalOptions(workers=0, out=run / "whole"), protocol=SHORT)
    assert whole["top1"] > whole["chance"]
    assert len(whole["history"]) == 3
    assert np.sum(whole["confusion"]) == 12
    assert np.trace(whole["confusion"]) == round(12 * whole["top1"])
    assert whole["backbone_unchanged"] is True

    keep, kept = classifier._save, []

    def stop(*arguments, **named):
        keep(*arguments, **named)
        kept.append(1)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(classifier, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_linear(run, EvalOptions(workers=0), protocol=SHORT)
    assert not (run / "evaluation" / "linear.json").exists()
    found = evaluate_linear(run, EvalOptions(workers=0), protocol=SHORT)
    assert len(kept) == 3, "two epochs were there already"
    assert found["history"] == whole["history"]
    again = evaluate_linear(run, EvalOptions(workers=0), protocol=SHORT)
    assert len(kept) == 3, "nothing was left to do"
    assert (again["top1"], again["confusion"]) == (found["top1"], found["confusion"])
    other = evaluate_linear(run, EvalOptions(workers=0), protocol=replace(SHORT, epochs=1))
    assert len(other["history"]) == 1, "another protocol starts anew"


def test_the_fast_probe_says_how_far_it_agrees(make_run):
    run = make_run()
    protocol = replace(SHORT, epochs=20)
    alone = evaluate_linear_fast(run, EvalOptions(workers=0), protocol=protocol)
    assert alone["agreement"] is None
    assert alone["top1"] == max(alone["rates"].values()) > alone["chance"]
    full = evaluate_linear(run, EvalOptions(workers=0), protocol=SHORT)
    assert full["agreement"]["other_top1"] == alone["top1"]
    assert full["agreement"]["difference_in_points"] == pytest.approx(100 * (full["top1"] - alone["top1"]))


def test_a_backbone_that_changes_is_noticed(make_run, monkeypatch):
    def meddle(context, model, *rest):
        next(model.backbone.buffers()).add_(1)
        return 0.0

    def read_and_meddle(backbone, *arguments, **named):
        found = extract_features(backbone, *arguments, **named)
        next(backbone.buffers()).add_(1)
        return found

    run = make_run()
    monkeypatch.setattr(classifier, "_epoch", meddle)
    with pytest.raises(RuntimeError, match="frozen backbone was changed"):
        evaluate_linear(run, EvalOptions(workers=0), protocol=replace(SHORT, epochs=1))
    monkeypatch.setattr(cache, "extract_features", read_and_meddle)
    for evaluate in (evaluate_knn, evaluate_linear_fast):
        with pytest.raises(RuntimeError, match="frozen backbone was changed"):
            evaluate(run, EvalOptions(workers=0, fresh=True))


def test_divergence_is_one_line(make_run):
    with pytest.raises(DivergedError, match="non-finite value in epoch"):
        evaluate_finetune(
            make_run(),
            EvalOptions(workers=0),
            percent=100,
            rates=(1e30,),
            protocol=replace(published_protocol(1), epochs=3, batch=8),
        )


def test_fine_tuning_sweeps_and_learns(make_run):
    run = make_run()
    before = weights_sha256(open_context(run, EvalOptions()).backbone)
    protocol = replace(published_protocol(10), epochs=2, batch=8)
    found = evaluate_finetune(run, EvalOptions(workers=0), percent=50, rates=(0.01, 0.05), protocol=protocol)
    assert (found["images_per_class"], found["percent"]) == ([6, 6, 6], 50)
    assert set(found["rates"]) == {"0.01", "0.05"}
    assert found["top1"] == max(found["rates"].values())
    assert found["chance"] == pytest.approx(1 / 3)
    state = torch.load(run / "evaluation" / "finetune_50-lr0.01.pt", weights_only=True)
    assert set(state["model"]) == {"head.weight", "head.bias"}, "a finished run keeps its head alone"
    assert weights_sha256(open_context(run, EvalOptions()).backbone) == before
    with pytest.raises(ConfigError, match="percent: found 0, expected above 0"):
        evaluate_finetune(run, percent=0)


def test_every_rank_tests_with_the_same_running_statistics(make_run, monkeypatch):
    order, measure = [], classifier._test

    def test(context, model):
        order.append("test")
        return measure(context, model)

    monkeypatch.setattr(classifier, "mean_over_ranks", lambda tensors: order.append(len(tensors)))
    monkeypatch.setattr(classifier, "_test", test)
    protocol = replace(published_protocol(1), epochs=1, batch=16, tests=1)
    evaluate_finetune(make_run(), EvalOptions(workers=0), percent=10, rates=(0.01,), protocol=protocol)
    statistics, tested = order
    assert (statistics > 0, tested) == (True, "test")


def test_subsets_are_balanced_and_follow_the_seed(image_folder):
    split = open_source(str(image_folder)).train
    chosen = balanced_subset(split, 0.3, seed=1)
    assert np.bincount(split.labels[chosen]).tolist() == [3, 3, 3]
    assert chosen == balanced_subset(split, 0.3, seed=1) != balanced_subset(split, 0.3, seed=2)
    assert np.bincount(split.labels[balanced_subset(split, 0.001, seed=0)]).tolist() == [1, 1, 1]


def test_lists_name_images_in_several_ways(image_folder, tmp_path):
    split = open_source(str(image_folder)).train
    file = tmp_path / "list.txt"
    file.write_text("class1/3.jpg\n\n32\ntrain/class0/0.jpg\n")
    chosen = listed_subset(split, file)
    assert [Path(split.name(number)).parts[-2:] for number in chosen] == [
        ("class0", "0.jpg"),
        ("class1", "3.jpg"),
        ("class2", Path(split.name(32)).name),
    ]
    for text, says in (("class9/1.jpg", "found 'class9/1.jpg'"), ("", "found no names"), ("33", "found '33'")):
        file.write_text(text)
        with pytest.raises(DataError, match=says):
            listed_subset(split, file)
    with pytest.raises(DataError, match="cannot read"):
        listed_subset(split, tmp_path / "none.txt")
    file.write_text("3.jpg\n")
    with pytest.raises(DataError, match=r"found '3.jpg' in .*several images such as .*class0/3.jpg and .*class2/3.jpg"):
        listed_subset(split, file)


def test_ranks_share_each_batch_and_crops_depend_on_the_epoch(image_folder, tiny):
    split = open_source(str(image_folder)).train

    def batches(epoch: int, rank: int = 0, world: int = 1):
        loader = LabelledBatches(
            split, tiny().augment, list(range(33)), batch=8, seed=0, workers=0, rank=rank, world=world
        )
        return list(loader.epoch(epoch))

    whole, halves = batches(1), [batches(1, rank, 2) for rank in (0, 1)]
    assert sum(len(labels) for _, labels in whole) == 33
    assert [len(labels) for _, labels in halves[0]] == [len(labels) for _, labels in halves[1]] == [4, 4, 4, 5]
    assert torch.equal(whole[0][0][::2], halves[0][0][0])
    assert torch.equal(whole[0][0][1::2], halves[1][0][0])
    assert torch.equal(batches(1)[0][0], whole[0][0])
    assert not torch.equal(batches(2)[0][0], whole[0][0])


def test_fewer_images_than_ranks_are_taken_several_times(image_folder, tiny):
    split = open_source(str(image_folder)).train
    for rank in range(4):
        loader = LabelledBatches(split, tiny().augment, [5], batch=4, seed=0, workers=0, rank=rank, world=4)
        assert [len(labels) for _, labels in loader.epoch(0)] == [1]


def test_a_batch_that_the_processes_cannot_share_is_refused(make_run, monkeypatch):
    """One rank would get none of it, or a smaller part that counts as much as the others' in the gradient."""
    monkeypatch.setattr("synco_fast.evaluation.classifier.world", lambda: 4)
    with pytest.raises(ConfigError, match=r"batch: found 6, expected a multiple of 4, the processes"):
        evaluate_linear(make_run(), EvalOptions(workers=0), protocol=replace(PUBLISHED, batch=6))


def test_labelled_batches_end_their_workers_when_they_are_dropped(image_folder, tiny):
    split = open_source(str(image_folder)).train
    before = multiprocessing.active_children()
    batches = LabelledBatches(split, tiny().augment, list(range(4)), batch=4, seed=0, workers=1)
    assert len(list(batches.epoch(0))) == 1
    gc.disable()
    try:
        del batches
        assert multiprocessing.active_children() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: (root / "val").rename(root / "elsewhere"), "found no held-out split"),
        (
            lambda root: [file.rename(root / "val" / file.name) for file in (root / "val").glob("*/*.jpg")],
            "no class folders",
        ),
        (lambda root: (root / "val" / "class2").rename(root / "elsewhere"), "found 3 classes .* and 2 among"),
        (
            lambda root: (root / "train").rename(root / "train2017"),
            r"held-out split .*among the classes, expected train/",
        ),
    ],
)
def test_data_that_cannot_be_evaluated_on(make_run, image_folder, damage, says):
    run = make_run()
    damage(image_folder)
    with pytest.raises(DataError, match=says):
        evaluate_knn(run, EvalOptions(workers=0))


@pytest.mark.slow
@in_turn(1, 2)
def test_two_processes_find_what_one_finds(make_run, tmp_path):
    run = make_run()
    options = EvalOptions(workers=0, out=tmp_path / "one", precision="fp32")
    one = evaluate_linear(run, options, protocol=replace(SHORT, epochs=1))
    knn = evaluate_knn(run, options, k=(3,))
    script = tmp_path / "both.py"
    script.write_text(
        "import torch\n"
        "from synco_fast.cli import main\n"
        "from synco_fast.evaluation.context import join_job\n"
        f"common = ['--out', {str(tmp_path / 'two')!r}, '--workers', '0', '--device', 'cpu', '--precision', 'fp32']\n"
        "with join_job('cpu'):\n"
        f"  main(['evaluate', 'linear', {str(run)!r}, '--epochs', '1', '--batch', '8', '--lr', '0.3', *common])\n"
        f"  main(['evaluate', 'knn', {str(run)!r}, '--k', '3', *common])\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("linear of") == 1, "one process prints"
    two = json.loads((tmp_path / "two" / "linear.json").read_text())
    # 33 images are filled up to 34 for two ranks, so one of them counts twice.
    assert two["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=0.005)
    assert np.sum(two["confusion"]) == 12
    assert json.loads((tmp_path / "two" / "knn.json").read_text())["accuracies"] == knn["accuracies"]
