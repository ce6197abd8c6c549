"""Parquet files: columns, labels, held-out files, damage, and packing."""

import io
import json
import pickle

import numpy as np
import pytest

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import CorruptImageError, DataError
from synco_fast.data.pipelines.build import build_pipeline
from synco_fast.data.sources.decode import Limits
from synco_fast.data.sources.open import open_shards, open_source
from synco_fast.data.sources.pack import PackSettings, pack_source
from tests.data.photos import photo

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(seed):
    file = io.BytesIO()
    photo(50, 40, seed).save(file, "JPEG", quality=95)
    return file.getvalue()


def write(path, rows, names=None, **columns):
    """A file in which images are structs of bytes and path, with Hugging Face's description of the labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": content, "path": None} for content in rows]
    table = pyarrow.table({"image": images, **columns})
    if names:
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    parquet.write_table(table, path, row_group_size=2)


@pytest.fixture
def hub(tmp_path):
    """Two training files of five rows in three row groups each, and a held-out one."""
    for number in range(2):
        rows = [encoded(10 * number + row) for row in range(5)]
        write(tmp_path / "hub" / f"train-{number:05d}-of-00002.parquet", rows, ["zebra", "ant"], label=[0, 1, 0, 1, 1])
    write(tmp_path / "hub" / "validation-00000-of-00001.parquet", [encoded(99)], ["zebra", "ant"], label=[1])
    write(tmp_path / "hub" / "test-00000-of-00001.parquet", [encoded(98)], ["zebra", "ant"], label=[-1])
    return tmp_path / "hub"


def test_files_of_the_hub(hub):
    source = open_source(f"parquet:{hub}")
    assert (len(source.train), len(source.validation)) == (10, 1)
    assert source.train.classes == source.validation.classes == ("zebra", "ant")
    assert source.train.labels.tolist() == [0, 1, 0, 1, 1] * 2
    assert source.validation.labels.tolist() == [1]
    for index in (7, 0, 9, 4, 5):
        assert source.train.read_bytes(index) == encoded(10 * (index // 5) + index % 5)
    assert source.train.name(7).endswith("train-00001-of-00002.parquet[2]")
    assert pickle.loads(pickle.dumps(source.train)).read(3).size == (50, 40)
    pattern = open_source(f"parquet:{hub}/train-*.parquet")
    assert (len(pattern.train), pattern.validation) == (10, None)


def test_folders_name_splits_too(hub, tmp_path):
    """The layout of the Hub's converted files; where a pattern begins, names tell nothing any more."""
    (tmp_path / "test" / "default").mkdir(parents=True)
    for split, old in (("train", "train-00000-of-00002"), ("validation", "test-00000-of-00001")):
        (tmp_path / "test" / "default" / split).mkdir()
        (hub / f"{old}.parquet").rename(tmp_path / "test" / "default" / split / "0000.parquet")
    (tmp_path / "test" / "default" / "extra-dev_0001.parquet").symlink_to(hub / "validation-00000-of-00001.parquet")
    for spec in ("test", "test/**/*.parquet"):
        source = open_source(f"parquet:{tmp_path}/{spec},label=none")
        assert (len(source.train), source.validation.name(0)) == (
            5,
            f"{tmp_path}/test/default/validation/0000.parquet[0]",
        )
        assert source.notes == [f"parquet:{tmp_path}/{spec},label=none: not read: default/extra-dev_0001.parquet"]
    assert len(open_source(f"parquet:{tmp_path}/test/default/validation").train) == 1
    with pytest.raises(DataError, match=r"found only held-out files in .*, such as .*0000\.parquet, expected training"):
        open_source(f"parquet:{tmp_path}/test/default/val*/*.parquet")


def test_options_choose_columns_and_files(tmp_path):
    """Behind a comma; a folder whose own name has one is still a folder."""
    folder = tmp_path / "a,label=b"
    for name, rows in (("one", 3), ("two", 2)):
        write(folder / name / "rows.parquet", [encoded(row) for row in range(rows)], kind=["b", "a", "b"][:rows])
    assert len(open_source(f"parquet:{folder}").train) == 5
    assert open_source(f"parquet:{folder}").train.labels is None
    folder = folder.rename(tmp_path / "plain")
    spec = f"parquet:{folder}/**/*.parquet,image=image,label=kind,validation={folder}/two/*.parquet"
    source = open_source(spec)
    assert (len(source.train), len(source.validation)) == (3, 2)
    assert source.train.classes == source.validation.classes == ("a", "b")
    assert source.validation.labels.tolist() == [1, 0]
    assert source.train.read_bytes(2) == encoded(2)
    for options, says in (
        ("image=picture", r"found the columns image, kind in .*rows\.parquet, expected picture"),
        ("label=class", r"found the columns image, kind in .*rows\.parquet, expected class"),
        ("colour=kind", r"found 'colour=kind' in .*, expected image=.*, label=.*, validation=.*, each once"),
        ("label=", "found 'label=' in .* not empty"),
        ("label=kind,label=kind", "found 'label=kind' in .* each once"),
        ("validation=nowhere", r"found no \*\.parquet in nowhere"),
    ):
        with pytest.raises(DataError, match=says):
            open_source(f"parquet:{folder},{options}")


def test_labels_that_are_missing_are_named(hub):
    write(hub / "train-00002-of-00002.parquet", [encoded(1), encoded(2)], ["zebra", "ant"], label=[0, None])
    with pytest.raises(DataError, match=r"found None as the label of row 11 in .*; label=none reads without labels"):
        open_source(f"parquet:{hub}")
    source = open_source(f"parquet:{hub},label=none,validation=none")
    assert (len(source.train), source.train.labels, source.validation) == (12, None, None)


def test_few_files_are_open_at_a_time_and_large_row_groups_are_noted(hub, monkeypatch):
    monkeypatch.setattr("synco_fast.data.sources.parquet._OPEN_FILES", 1)
    source = open_source(f"parquet:{hub}")
    for index in (7, 0, 9, 4):
        assert source.train.read_bytes(index) == encoded(10 * (index // 5) + index % 5)
        assert len(source.train._opened) == 1
    unread = f"parquet:{hub}: not read: test-00000-of-00001.parquet"
    assert source.notes == [unread]
    monkeypatch.setattr("synco_fast.data.sources.parquet._LARGE_GROUP", 100)
    (first, note) = source.notes
    assert first == unread
    assert note.startswith(f"parquet:{hub}: each image read in random order unpacks a row group of")


def test_workers_and_packs_read_them(hub, tmp_path):
    source = open_source(f"parquet:{hub}")
    views = [
        next(iter(build_pipeline(source.train, Recipe(size=16), batch=10, seed=0, workers=workers, name="torchvision")))
        for workers in (0, 2)
    ]
    assert views[0].first.equal(views[1].first)
    pack_source(source, tmp_path / "out", PackSettings(short_side=50), workers=2)
    packed = open_shards(tmp_path / "out")
    assert packed.train.classes == ("zebra", "ant")
    assert packed.train.labels.tolist() == source.train.labels.tolist()
    assert [packed.train.read_bytes(row) for row in range(10)] == [source.train.read_bytes(row) for row in range(10)]


@pytest.mark.parametrize(
    ("label", "classes", "labels"),
    [
        ({"label": ["b", "a", "b"]}, ("a", "b"), [1, 0, 1]),
        ({"cls": [10, 9, 10]}, ("9", "10"), [1, 0, 1]),
        ({"caption": ["x", "y", "z"]}, None, None),
    ],
)
def test_labels(tmp_path, label, classes, labels):
    table = pyarrow.table({"bytes": [encoded(row) for row in range(3)], **label})
    parquet.write_table(table, tmp_path / "a.parquet")
    split = open_source(f"parquet:{tmp_path}").train
    assert split.classes == classes
    assert (split.labels if labels is None else split.labels.tolist()) == labels
    assert np.asarray(split.read(1)).shape == (40, 50, 3)


def test_what_is_no_image_is_corrupt(tmp_path):
    write(tmp_path / "a.parquet", [encoded(0), None, b"no image", encoded(1)])
    split = open_source(f"parquet:{tmp_path}", Limits(file_bytes=len(encoded(1)))).train
    for row, says in (
        (1, "found no bytes in the column image"),
        (2, "not an image"),
    ):
        with pytest.raises(CorruptImageError, match=rf"a\.parquet\[{row}\]: {says}"):
            split.read(row)
    with pytest.raises(CorruptImageError, match="max_file_bytes"):
        open_source(f"parquet:{tmp_path}", Limits(file_bytes=9)).train.read(0)


def test_what_is_no_source(tmp_path):
    with pytest.raises(DataError, match=r"found no \*\.parquet in"):
        open_source(f"parquet:{tmp_path}")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"found no readable Parquet file at .*a\.parquet"):
        open_source(f"parquet:{tmp_path}")
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"found the columns text in .*, expected one of image, img"):
        open_source(f"parquet:{tmp_path}")
    parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="found no row in"):
        open_source(f"parquet:{tmp_path}")


def test_other_files_and_folders_beside_them(tmp_path):
    """A folder with the name of a file, hidden files, and names with brackets."""
    inside = tmp_path / "[2024]" / "train.parquet"
    write(inside / "part-0.parquet", [encoded(0), encoded(1)])
    for folder in (tmp_path / "[2024]", inside):
        (folder / "._part-0.parquet").write_bytes(b"\0\5\x16\7")
    for place in (tmp_path, tmp_path / "[2024]", inside, inside / "part-0.parquet"):
        assert len(open_source(f"parquet:{place}").train) == 2


def test_labels_that_are_damaged_or_no_number(tmp_path):
    rows, file = [encoded(row) for row in range(4)], tmp_path / "a.parquet"
    write(file, rows, label=[0.0, 1.0, float("nan"), 1.0])
    with pytest.raises(DataError, match="found nan as the label of row 2"):
        open_source(f"parquet:{tmp_path}")
    write(file, rows, label=["ant", "bee", "ant", "cat"])
    column = parquet.ParquetFile(file).metadata.row_group(0).column(2)
    content, start = bytearray(file.read_bytes()), column.dictionary_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the column label of .*a\.parquet"):
        open_source(f"parquet:{tmp_path}")
    assert open_source(f"parquet:{tmp_path},label=none").train.read(0).size == (50, 40)


def test_a_damaged_row_group_is_corrupt_images(tmp_path):
    write(tmp_path / "a.parquet", [encoded(row) for row in range(6)])
    split = open_source(f"parquet:{tmp_path}").train
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4 : len(content) // 6] = bytes(len(content) // 6 - 4)
    (tmp_path / "a.parquet").write_bytes(content)
    split = pickle.loads(pickle.dumps(split))
    with pytest.raises(CorruptImageError, match=r"a\.parquet\[0\]"):
        split.read(0)
    assert split.read(5).size == (50, 40)


def test_a_file_that_is_replaced_during_a_run_ends_it(tmp_path):
    """Each worker opens the files for itself: rows would be others, or none."""

    def write(rows, size):
        table = {"image": [b"image"] * rows, "label": [0] * rows}
        parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet", row_group_size=size)

    for rows, size in ((5, 5), (20, 5), (20, 20)):
        write(20, 10)
        split = pickle.loads(pickle.dumps(open_source(f"parquet:{tmp_path}").train))
        write(rows, size)
        with pytest.raises(
            DataError, match=r"^data: found .*a\.parquet changed since its rows were counted, expected the"
        ):
            split.read_bytes(17)
