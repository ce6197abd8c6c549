"""Results in a run folder: whose they are, and what they are called."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from synco_fast.evaluation.detection.finetune import published_protocol as detection
from synco_fast.evaluation.finetune import RATES
from synco_fast.evaluation.finetune import published_protocol as finetuning
from synco_fast.evaluation.linear import FAST_RATES, PUBLISHED
from synco_fast.runtime.results import (
    PROTOCOLS,
    columns,
    finetuning_name,
    protocol_of,
    read_results,
    result_stem,
    same_source,
)


@pytest.fixture
def read(tmp_path):
    """Write results and read them as those of a run on ``images`` at step 60."""

    def call(step=60, checkpoint=None, **results):
        for name, values in results.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(values))
        return read_results(tmp_path, own="images", step=step, checkpoint=checkpoint)

    return call


def test_the_published_protocols_are_those_of_the_evaluations():
    for name, protocol in PROTOCOLS.items():
        published = {**protocol.published}
        rates = published.pop("rates", None)
        if name.startswith("linear"):
            expected, sweep = asdict(PUBLISHED), FAST_RATES
            published["head_lr"] = published.pop("lr", PUBLISHED.head_lr)
        elif name.startswith("finetune"):
            expected, sweep = asdict(finetuning(float(name.removeprefix("finetune_")))), RATES
        elif name.startswith("detection"):
            expected, sweep = asdict(detection(name.removeprefix("detection_"))), ()
        else:
            continue
        assert published.items() <= expected.items(), name
        assert rates in (None, tuple(f"{rate:g}" for rate in sweep)), name


def test_results_belong_to_one_checkpoint(read):
    results, notes = read(
        knn={"checkpoint": "runs/a/checkpoints/step-00000020.pt", "knn": 0.1},
        linear={"checkpoint": "step-00000060.pt", "top1": 0.2},
        linear_fast={"checkpoint": "best.pt", "step": 60, "top1": 0.3},
        finetune_1={"checkpoint": "best.pt", "top1": 0.4},
        finetune_10={"top1": 0.5},
    )
    assert [found.name for found in results] == ["linear", "linear_fast", "finetune_10"]
    assert notes == [
        "knn.json: skipped, since it is of step-00000020.pt, expected step 60",
        "finetune_1.json: skipped, since it is of best.pt, expected step 60",
    ]
    assert len(read(step=None)[0]) == 5, "without a checkpoint to compare with, all are taken"
    assert "finetune_1" in [found.name for found in read(checkpoint="best.pt")[0]]


def test_other_images_are_named(read):
    results, _ = read(
        **{
            "linear": {"source": "images", "top1": 0.5, "headline": {"linear top-1": 0.5}},
            "linear-on-two-0123": {
                "evaluation": "linear",
                "source": "two",
                "top1": 0.9,
                "headline": {"linear top-1": 0.9},
            },
            "knn": {"source": "two", "accuracies": {"200": 0.6, "20": 0.7}},
            "detection_voc": {"source": "voc:there", "headline": {"VOC box AP": 0.3}, "protocol": {"steps": 1}},
        }
    )
    assert columns(results) == ["linear", "kNN, k 20 on two", "kNN, k 200 on two", "linear on two"]
    headlines = {name: value for found in results for name, value in found.headline.items()}
    assert headlines == {"linear top-1": 0.5, "VOC box AP (1 step)": 0.3, "linear top-1 on two": 0.9}


@pytest.mark.parametrize(
    ("name", "values", "title"),
    [
        ("linear", {"epochs": 100, "batch": 256, "lr": 30.0}, "linear"),
        ("linear", {"epochs": 2, "batch": 256, "lr": 3.0}, "linear (2 epochs, lr 3)"),
        ("linear_fast", {"epochs": 1, "rates": {"0.03": 0.5}}, "linear, cached (1 epoch, lr 0.03)"),
        ("finetune_10", {"epochs": 30, "head_lr": 0.1}, "10 % labels (classifier's lr 0.1)"),
        ("finetune_5", {"epochs": 30}, "5 % labels"),
        ("finetune_5", {"rates": {f"0.{n}": 0 for n in range(1, 7)}}, "5 % labels (6 lr from 0.1 to 0.6)"),
        ("finetune_subset", {}, "labels of subset"),
        ("finetune_10percent", {"epochs": 30, "percent": 10}, "labels of 10percent"),
        ("finetune_10percent", {"epochs": 60, "percent": 10}, "labels of 10percent (60 epochs)"),
        ("finetune_1percent", {"epochs": 30, "percent": 1}, "labels of 1percent (30 epochs)"),
        ("finetune_subset", {"epochs": 30}, "labels of subset"),
        ("knn", {"temperature": 0.1}, "kNN (temperature 0.1)"),
    ],
)
def test_a_column_says_where_it_departs_from_the_published_protocol(read, name, values, title):
    assert columns(read(**{name: {**values, "top1": 0.5}})[0]) == [title]


def test_the_same_images_however_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same_source("two", str(tmp_path / "two"))
    assert same_source("idx:two", f"idx:{tmp_path}/two/")
    assert same_source("demo", "/root/.cache/synco-fast/demo")
    assert same_source("parquet:two,label=c", f"parquet:{tmp_path / 'two'},label=c")
    assert not same_source("two", "three")
    assert not same_source("two", "tar:two")
    assert not same_source("demo", "datasets/demo")


def test_a_file_on_other_images_has_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        result_stem("knn", "two", "two") == result_stem("knn", None, "two") == result_stem("knn", "two", None) == "knn"
    )
    other = result_stem("knn", "tar:two $x", "two")
    assert other.startswith("knn-on-two_x-")
    assert other != result_stem("knn", "list:two $x", "two")
    assert protocol_of("spread").title is None


@pytest.mark.parametrize(
    "source",
    ["hf:org/name,train=a", "stream:s3://bucket/{000..146}.tar", "stream:pipe:cat {0..3}.tar, b.tar", "/data/at 9:30"],
)
def test_the_name_of_a_file_does_not_depend_on_the_working_folder(tmp_path, monkeypatch, source):
    names = set()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        names.add(result_stem("knn", source, "demo"))
    assert len(names) == 1


def test_a_folder_may_have_a_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "at 9:30").mkdir()
    assert same_source("at 9:30", str(tmp_path / "at 9:30"))
    (tmp_path / "set").mkdir()
    assert same_source("hf:set", f"hf:{tmp_path / 'set'}")


def test_a_list_never_passes_for_a_percentage():
    assert finetuning_name(10, None) == "finetune_10"
    assert finetuning_name(1, Path("10percent.txt")) == "finetune_10percent"
    for stem in ("10", "0.5", "1e-05"):
        name = finetuning_name(1, Path(f"{stem}.txt"))
        assert name == f"finetune_list_{stem}"
        assert protocol_of(name).title == f"labels of list_{stem}"
