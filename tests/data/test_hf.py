"""Datasets of the ``datasets`` library, made here; all but the first test need the library."""

import io
import pickle
import sys
from types import ModuleType

import numpy as np
import pytest

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import CorruptImageError, DataError
from synco_fast.data.pipelines.build import build_pipeline, evaluation_batches, has_dali
from synco_fast.data.sources.check import find_corrupt
from synco_fast.data.sources.decode import Limits
from synco_fast.data.sources.hf import HfSplit
from synco_fast.data.sources.open import open_shards, open_source
from synco_fast.data.sources.pack import PackSettings, pack_source
from tests.conftest import write_images
from tests.data.photos import photo


@pytest.mark.parametrize("found", [None, ModuleType("datasets")], ids=["nothing", "a folder of that name"])
def test_without_the_library_one_line_says_so(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", found)
    with pytest.raises(DataError, match=r"data: found no datasets, which hf: needs; pip install 'synco-fast\[hf\]'"):
        open_source("hf:ylecun/mnist")


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The library, without a network and with a cache of its own."""
    found = pytest.importorskip("datasets")
    if not hasattr(found, "config"):
        pytest.skip("datasets is a folder here, not the library")
    monkeypatch.setattr(found.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def encoded(seed, size=(50, 40)):
    file = io.BytesIO()
    photo(*size, seed).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture
def saved(datasets, tmp_path):
    """A folder of ``save_to_disk``: twelve training images, four held-out ones, and a test set of secret labels."""
    features = datasets.Features(
        {"id": datasets.Value("int64"), "image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ant"])}
    )

    def rows(numbers, labels):
        images = [{"bytes": encoded(number), "path": None} for number in numbers]
        return datasets.Dataset.from_dict({"id": [*numbers], "image": images, "label": labels}, features)

    splits = {"train": rows(range(12), [0, 1, 1] * 4), "test": rows(range(20, 22), [-1, -1])}
    splits["validation"] = rows(range(30, 34), [1, 0, 0, 1])
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_dataset(saved):
    source = open_source(f"hf:{saved}")
    assert (len(source.train), len(source.validation)) == (12, 4)
    assert source.train.classes == source.validation.classes == ("zebra", "ant")
    assert source.train.labels.tolist() == [0, 1, 1] * 4
    assert source.validation.labels.tolist() == [1, 0, 0, 1]
    copy = pickle.loads(pickle.dumps(source.train))
    for index in (7, 0, 11, 4):
        assert source.train.read_bytes(index) == copy.read_bytes(index) == encoded(index)
    assert source.train.read(3).size == (50, 40)
    assert source.train.name(7) == f"hf:{saved}/train[7]"
    with pytest.raises(CorruptImageError, match="max_file_bytes"):
        open_source(f"hf:{saved}", Limits(file_bytes=9)).train.read(0)


def test_every_pipeline_evaluation_check_and_pack_read_it(saved, tmp_path):
    source = open_source(f"hf:{saved}")
    names = ["torchvision", "resident", *(["dali"] if has_dali() else [])]
    first = {}
    for name in names:
        for workers in (0, 2):
            pipeline = build_pipeline(source.train, Recipe(size=16), batch=12, seed=0, workers=workers, name=name)
            batch = next(iter(pipeline))
            pipeline.close()
            assert sorted(batch.image_ids.tolist()) == list(range(12))
            first.setdefault(name, batch.first)
            assert first[name].equal(batch.first)
    assert (first["torchvision"].int() - first["resident"].int()).abs().float().mean() < 1
    assert sum(len(ids) for _, ids, _ in evaluation_batches(source.validation, Recipe(size=16), workers=0)) == 4
    assert find_corrupt(source.train, workers=0) == {}
    pack_source(source, tmp_path / "out", PackSettings(short_side=50), workers=0)
    packed = open_shards(tmp_path / "out")
    assert (packed.train.classes, packed.train.labels.tolist()) == (source.train.classes, source.train.labels.tolist())
    assert [packed.train.read_bytes(row) for row in range(12)] == [encoded(row) for row in range(12)]


def test_options_choose_splits_and_columns(saved):
    source = open_source(f"hf:{saved},train=validation,validation=none,label=none,image=image")
    assert (len(source.train), source.train.labels, source.train.classes, source.validation) == (4, None, None, None)
    by_number = open_source(f"hf:{saved},label=id,validation=none")
    assert by_number.train.classes == tuple(map(str, range(12)))
    for options, says in (
        ("train=all", r"found the splits train, test, validation in hf:.*, expected all; choose by hf:.*,train=SPLIT"),
        ("image=picture", "found the columns id, image, label in hf:.*/train, expected picture"),
        ("validation=test", "found the class -1 in hf:.*/test, which the training images do not have"),
        ("split=train", "found 'split=train' in .*, expected train=..., validation=..., image=..., label=..., config="),
    ):
        with pytest.raises(DataError, match=says):
            open_source(f"hf:{saved},{options}")


def test_folders_of_images_and_of_parquet_files(datasets, saved, tmp_path):
    write_images(tmp_path / "images" / "train", classes=2, each=3, seed=0)
    write_images(tmp_path / "images" / "validation", classes=2, each=1, seed=1)
    source = open_source(f"hf:{tmp_path / 'images'}")
    assert (len(source.train), len(source.validation)) == (6, 2)
    assert source.train.classes == ("class0", "class1")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.train.read_bytes(0) == (tmp_path / "images/train/class0/0.jpg").read_bytes()
    (tmp_path / "rows").mkdir()
    one = datasets.load_from_disk(str(saved))["train"]
    one.to_parquet(tmp_path / "rows" / "train-00000-of-00001.parquet")
    assert np.asarray(open_source(f"hf:{tmp_path / 'rows'}").train.read(5)).shape == (40, 50, 3)
    one.save_to_disk(tmp_path / "single")
    single = open_source(f"hf:{tmp_path / 'single'}")
    assert (len(single.train), single.validation) == (12, None)


def test_what_cannot_be_loaded_is_one_line(datasets, tmp_path):
    for name, says in (
        (
            "nobody/nothing",
            "data: cannot load hf:nobody/nothing .*, expected a name on the Hub within reach, or one",
        ),
        ("./nowhere", "data: found no folder nowhere, expected one or a name on the Hub behind hf:"),
        (str(tmp_path), r"data: cannot load hf:.*, expected a folder"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            open_source(f"hf:{name}")
        assert len(str(caught.value).splitlines()) == 1
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    rows.save_to_disk(tmp_path / "text")
    with pytest.raises(DataError, match=r"found the columns text in hf:.*/train, expected one of image, img"):
        open_source(f"hf:{tmp_path / 'text'}")


def test_rows_without_an_image_are_corrupt(datasets, tmp_path):
    images = [{"bytes": encoded(0), "path": None}, None, {"bytes": None, "path": str(tmp_path / "none.jpg")}]
    features = datasets.Features({"image": datasets.Image()})
    split = HfSplit(datasets.Dataset.from_dict({"image": images}, features), title="rows")
    assert find_corrupt(split, workers=0) == {
        1: "rows[1]: found no bytes in the column image",
        2: f"{tmp_path / 'none.jpg'}: No such file or directory",
    }
