"""The digest of a split: the same for the same images in the same order, another one otherwise."""

import json
import shutil

import numpy as np
import pytest

from synco_fast.data.sources.check import keep_list
from synco_fast.data.sources.identity import digest_of
from synco_fast.data.sources.open import open_source
from synco_fast.data.sources.pack import PackSettings, pack_source
from synco_fast.data.sources.splits import ArraySplit, SubsetSplit, share_of


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def digest(spec, share=1.0):
    return digest_of(share_of(open_source(spec).train, share))


def test_folders(image_folder, tmp_path):
    whole, part = digest(str(image_folder)), digest(str(image_folder), 0.5)
    assert len(whole) == 32
    assert whole != part != digest(str(image_folder), 0.25)
    split = open_source(str(image_folder)).train
    subsets = [digest_of(SubsetSplit(split, np.array(numbers))) for numbers in ([0, 1, 2], [0, 1, 3], [1, 0, 2])]
    assert len(set(subsets)) == 3, "other images, and the same in another order"
    moved = shutil.copytree(image_folder, tmp_path / "moved")
    assert (digest(str(moved)), digest(str(moved), 0.5)) == (whole, part), "names below the folder alone"
    split = open_source(str(moved)).train
    keep_list(split, {})
    assert digest(str(moved)) == whole, "from a manifest too"
    keep_list(split, {5: "it is corrupt"})
    assert digest(str(moved)) != whole
    (moved / "train" / "class0" / "0.jpg").rename(moved / "train" / "class0" / "x.jpg")
    assert digest(str(moved)) not in (whole, digest(str(moved), 0.5))


def test_shards_and_streams(image_folder, tmp_path):
    for quality in (90, 91):
        settings = PackSettings(short_side=16, shard_bytes=9000, quality=quality)
        pack_source(open_source(str(image_folder)), tmp_path / f"{quality}", settings, workers=0)
    packed = digest(f"tar:{tmp_path}/90")
    assert packed != digest(f"tar:{tmp_path}/91"), "other sizes"
    streamed = digest(f"stream:{tmp_path}/90/train/*.tar")
    (tmp_path / "90" / "train" / "index.npz").rename(tmp_path / "90" / "index.npz")
    shutil.copytree(tmp_path / "90", tmp_path / "other")
    assert digest(f"tar:{tmp_path}/other") == packed, "from the headers alone"
    counts = open_source(f"stream:{tmp_path}/91/train/*.tar").train.counts
    names = [path.name for path in sorted((tmp_path / "other" / "train").glob("*.tar"))]
    found = []
    for sizes in (counts, [counts[0] + 1, *counts[1:]]):
        (tmp_path / "other" / "train" / "sizes.json").write_text(json.dumps(dict(zip(names, sizes, strict=True))))
        found.append(digest(f"stream:{tmp_path}/other/train/*.tar"))
    assert found[0] == streamed, "names below their folder, and counts"
    assert found[1] != streamed


def test_arrays_and_tables(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = np.arange(300, dtype=np.uint8).reshape(3, 10, 10)
    whole = digest_of(ArraySplit(images, None, "a"))
    assert whole == digest_of(ArraySplit(images.copy(), None, "b"))
    assert whole != digest_of(ArraySplit(images[::-1], None, "a"))
    assert whole != digest_of(ArraySplit(images.reshape(3, 5, 20), None, "a"))
    found = set()
    for labels in ([0, 1, 0], [0, 1, 1], [0, 1]):
        table = pyarrow.table({"image": [b"x"] * len(labels), "label": labels})
        parquet.write_table(table, tmp_path / "a.parquet")
        found.add(digest(f"parquet:{tmp_path}"))
    assert len(found) == 3
