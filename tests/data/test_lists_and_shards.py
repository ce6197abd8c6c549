"""Sources beside folders: lists of files, tar shards, and the lists that are kept of them."""

import bz2
import dataclasses
import gzip
import io
import lzma
import os
import pickle
import tarfile
import time

import numpy as np
import pytest

from synco_fast.data.errors import CorruptImageError, DataError
from synco_fast.data.sources import shards as shards_module
from synco_fast.data.sources.check import find_corrupt, keep_list, open_afresh
from synco_fast.data.sources.manifest import Manifest, PackedNames, manifest_path, read_manifest, write_manifest
from synco_fast.data.sources.open import ArraySplit, open_source
from synco_fast.data.sources.shards import ShardSplit
from synco_fast.data.sources.splits import FolderSplit
from synco_fast.data.sources.stream_reader import read_images
from tests.data.photos import photo


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def jpeg(seed=0):
    file = io.BytesIO()
    photo(40, 30, seed).save(file, "JPEG")
    return file.getvalue()


def write_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                shard.addfile(info)
            else:
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    root = tmp_path / "shards"
    for number in range(3):
        members = []
        for place in range(4):
            label = (number + place) % 3
            members += [(f"{number}{place}.jpg", jpeg(10 * number + place)), (f"{number}{place}.cls", b"%d\n" % label)]
        write_shard(root / "train" / f"{number:05d}.tar", members)
    write_shard(root / "val" / "00000.tar", [("a.cls", b"2"), ("a.jpg", jpeg(99))])
    return root


# -- tar shards -------------------------------------------------------------------------------------------------------


def test_shards(shards):
    source = open_source(f"tar:{shards}")
    assert (len(source.train), len(source.validation)) == (12, 1)
    assert source.train.classes == source.validation.classes == ("0", "1", "2")
    assert source.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert source.validation.labels.tolist() == [2]
    assert source.train.read_bytes(5) == jpeg(11)
    assert source.train.read(5).size == (40, 30)
    assert source.train.name(5).endswith("00001.tar:'11.jpg'")


@pytest.mark.parametrize(
    ("files", "train", "held_out", "unread"),
    [
        ("trainval-0 test-0", "trainval-0", "test-0", ""),
        ("train-0 valid-0 train-1", "train-0 train-1", "valid-0", ""),
        ("a-train-0 a-dev-0 a-test-0", "a-train-0", "a-dev-0", "a-test-0.tar"),
        ("train2017 val2017 extra", "train2017", "val2017", "extra.tar"),
        ("0 1 val-0", "0 1", "val-0", ""),
        ("latest-0 interval-0", "interval-0 latest-0", "", ""),
        ("mytrain0 mytrainval0 myval0", "mytrain0 mytrainval0", "myval0", ""),
        ("trainset-0 valset-0", "trainset-0", "valset-0", ""),
        ("test-0 test-1", "test-0 test-1", "", ""),
        ("train/val-0 val/0 test/0 more/0 0", "train/val-0", "val/0", "more/, test/, 0.tar"),
        ("train/0 test-0", "train/0", "test-0", ""),
    ],
)
def test_which_shards_are_held_out(tmp_path, files, train, held_out, unread):
    """Whole words decide, and no shard is in two splits; a run says what it does not read."""
    for name in files.split():
        write_shard(tmp_path / f"{name}.tar", [("a.jpg", b"")])
    source = open_source(f"tar:{tmp_path}")
    for split, expected in ((source.train, train), (source.validation, held_out)):
        names = [split.name(index).partition(".tar:")[0] for index in range(len(split))] if split else []
        assert names == [f"{tmp_path}/{name}" for name in expected.split()]
    assert source.notes == ([f"tar:{tmp_path}: not read: {unread}"] if unread else [])


def test_labels_in_json_by_folder_or_none(tmp_path):
    write_shard(
        tmp_path / "j" / "a.tar",
        [("x.jpg", jpeg()), ("x.json", b'{"label": "cat"}'), ("y.jpg", jpeg()), ("y.cls", b"10")],
    )
    write_shard(tmp_path / "f" / "a.tar", [("dog/1.jpg", jpeg()), ("cat/1.jpg", jpeg()), ("dog/1.txt", b"woof")])
    write_shard(tmp_path / "n" / "a.tar", [("1.jpg", jpeg()), ("2.PNG", jpeg())])
    by_json, by_folder, none = (open_source(f"tar:{tmp_path / name}").train for name in "jfn")
    assert (by_json.classes, by_json.labels.tolist()) == (("10", "cat"), [1, 0])
    assert (by_folder.classes, by_folder.labels.tolist()) == (("cat", "dog"), [1, 0])
    assert (none.classes, none.labels, len(none)) == (None, None, 2)


def test_labels_of_a_part_of_the_images_are_not_read(tmp_path):
    write_shard(tmp_path / "a.tar", [("0.jpg", jpeg()), ("0.cls", b"0"), ("1.jpg", jpeg(1)), ("2.jpg", jpeg(2))])
    source = open_source(f"tar:{tmp_path}")
    assert source.train.labels is None
    assert source.notes == [f"tar:{tmp_path}: not read: 1 .cls or .json, since '1.jpg' has no label"]


@pytest.mark.parametrize("order", [("cls", "json"), ("json", "cls")])
def test_a_json_member_without_a_label_leaves_that_of_the_cls_member(tmp_path, order, monkeypatch):
    """Also where an index of earlier rules is kept, by which the last member counted."""
    contents = {"cls": b"3", "json": b'{"label": "cat", "width": 40}'}
    unlabelled = {**contents, "json": b'{"width": 40}'}
    members = [("0.jpg", jpeg(1)), *((f"0.{kind}", contents[kind]) for kind in order)]
    members += [("1.jpg", jpeg(2)), *((f"1.{kind}", unlabelled[kind]) for kind in order)]
    write_shard(tmp_path / "a.tar", [*members, ("2.jpg", jpeg(3)), ("2.json", contents["json"])])
    write_shard(tmp_path / "b.tar", [("2.jpg", jpeg(4)), ("2.json", contents["json"])])
    split = open_source(f"tar:{tmp_path}").train
    assert (split.classes, split.labels.tolist()) == (("3", "cat"), [0, 0, 1, 1])
    kept = dataclasses.replace(split.manifest.without({2: "corrupt"}), labels=None, classes=None, rules=1)
    write_manifest(manifest_path(split.key), kept)
    for _ in range(2):
        again = open_source(f"tar:{tmp_path}").train
        assert (again.classes, again.labels.tolist()) == (("3", "cat"), [0, 0, 1])
        assert again.manifest.excluded == {"2.jpg": "corrupt"}
        monkeypatch.setattr(shards_module, "index_shards", None)


def test_numbered_classes_are_in_order_of_value(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        [part for label in (10, 9, 2) for part in ((f"{label}.jpg", jpeg()), (f"{label}.cls", b"%d" % label))],
    )
    assert open_source(f"tar:{tmp_path}").train.classes == ("2", "9", "10")


def test_numbers_written_in_several_ways_have_one_order():
    ways = ["7", "07", "007", "0007", "00007"]
    assert [sorted(given, key=shards_module._natural) for given in (ways, ways[::-1])] == [sorted(ways)] * 2


def names(split):
    return [split.name(index).rpartition(":")[2].strip("'") for index in range(len(split))]


@pytest.mark.parametrize(
    ("members", "images", "labels", "unread"),
    [
        (
            ["0.jpg", "0.mask.png", "0.cls", "1.mask.png", "1.jpg", "1.cls"],
            ["0.jpg", "1.jpg"],
            [0, 1],
            {".mask.png": 2},
        ),
        (["0.png", "0.jpg", "0.cls"], ["0.jpg"], [0], {".png": 1}),
        (["0.depth.png", "0.rgb.jpg", "0.json"], ["0.rgb.jpg"], [0], {".depth.png": 1}),
        (["a.b/0.jpg", "a.b/0.left.PNG"], ["a.b/0.jpg"], [0], {".left.png": 1}),
        (["x.0001.jpg", "x.0002.jpg"], ["x.0001.jpg", "x.0002.jpg"], None, {}),
        (["x.1.jpg", "x.1.cls", "x.2.jpg", "x.2.cls"], ["x.1.jpg", "x.2.jpg"], [0, 1], {}),
        (["x.jpg", "x.cls", "x.2.jpg", "x.2.cls"], ["x.jpg", "x.2.jpg"], [0, 1], {}),
    ],
)
def test_a_sample_has_one_image(tmp_path, members, images, labels, unread):
    contents, label = {".cls": b"%d", ".json": b'{"label": "%d"}'}, 0
    written = []
    for name in members:
        template = contents.get(name[name.rindex(".") :])
        written.append((name, jpeg() if template is None else template % label))
        label += template is not None
    write_shard(tmp_path / "a.tar", written)
    split = open_source(f"tar:{tmp_path}").train
    assert names(split) == images
    streamed = [*read_images(f"{tmp_path}/a.tar", lambda _: True)]
    assert [name.rpartition(":")[2].strip("'") for _, name, _ in streamed] == images, "as from a stream"
    assert [content for _, _, content in streamed] == [split.read_bytes(place) for place in range(len(split))]
    assert (split.labels is None) if labels is None else (split.labels.tolist() == labels)
    assert split.manifest.unread == unread


def test_an_index_of_earlier_rules_is_made_anew(tmp_path, monkeypatch):
    """Unless the same images are found by the rules of today: then what a check excluded stays so."""
    for folder, part in (("samples", "0.mask.png"), ("dots", "0.2.jpg")):
        first = "0.jpg" if folder == "samples" else "0.1.jpg"
        write_shard(tmp_path / folder / "a.tar", [(first, jpeg(1)), (part, jpeg(2)), ("3.jpg", jpeg(3))])
        split = open_source(f"tar:{tmp_path / folder}").train
        places = shards_module.index_shards([tmp_path / folder / "a.tar"]).places
        old = dataclasses.replace(split.manifest, rules=0)
        if folder == "samples":
            old = dataclasses.replace(old, names=PackedNames.pack([first, part]), places=places)
        else:
            old = dataclasses.replace(old.without({2: "corrupt"}), rules=0)
        write_manifest(manifest_path(split.key), old)
        for _ in range(2):
            again = open_source(f"tar:{tmp_path / folder}").train
            assert names(again) == (["0.jpg", "3.jpg"] if folder == "samples" else ["0.1.jpg", "0.2.jpg"])
            assert again.manifest.excluded == ({} if folder == "samples" else {"3.jpg": "corrupt"})
            monkeypatch.setattr(shards_module, "index_shards", None)
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_nothing_in_a_shard_reaches_the_file_system(tmp_path):
    """Names that climb out, absolute ones and links are names: nothing is written, and links are no images."""
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(b"secret")
    members = [
        ("../../escape.jpg", jpeg(1)),
        ("/etc/absolute.jpg", jpeg(2)),
        ("link.jpg", str(outside)),
        ("line\nbreak.jpg", jpeg(3)),
    ]
    write_shard(tmp_path / "set" / "evil.tar", members)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    split = open_source(f"tar:{tmp_path / 'set'}").train
    assert [split.read_bytes(index) for index in range(len(split))] == [jpeg(1), jpeg(2), jpeg(3)]
    assert "\n" not in split.name(2)
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert not (tmp_path.parent / "escape.jpg").exists()


def test_the_index_is_kept_until_a_shard_changes(shards, monkeypatch):
    first = open_source(f"tar:{shards}").train

    def scan(paths):
        raise AssertionError("scanned again")

    with monkeypatch.context() as patched:
        patched.setattr("synco_fast.data.sources.shards.index_shards", scan)
        again = open_source(f"tar:{shards}").train
    assert again.manifest.names[:] == first.manifest.names[:]
    assert again.labels.tolist() == first.labels.tolist()
    write_shard(shards / "train" / "00001.tar", [("new.jpg", jpeg(5)), ("new.cls", b"1")])
    os.utime(shards / "train" / "00001.tar", ns=(1, 1))
    assert len(open_source(f"tar:{shards}").train) == 9


def replace_shard(path, members):
    """As a copy that keeps times: another file under the same name, with the same modification time."""
    time = path.stat().st_mtime_ns
    other = write_shard(path.with_suffix(".part"), members)
    os.utime(other, ns=(time, time))
    other.replace(path)


def test_a_shard_of_the_same_time_or_size_is_indexed_again(tmp_path):
    """Its images would be read at the places of those before."""
    path = write_shard(tmp_path / "a.tar", [("0.png", bytes(700)), ("1.png", bytes(100))])
    assert names(open_source(f"tar:{tmp_path}").train) == ["0.png", "1.png"]
    replace_shard(path, [(f"{number}.png", bytes(9000)) for number in range(3)])
    assert names(open_source(f"tar:{tmp_path}").train) == ["0.png", "1.png", "2.png"]
    for members in (  # of one size, as tar files are padded to 10 KiB
        [("5.png", bytes(700)), ("6.png", bytes(100))],
        [("5.png", bytes(100)), ("6.png", bytes(700))],
        [("5.png", bytes(90)), ("6.png", bytes(700))],
        [("5.png", bytes(1700))],
    ):
        replace_shard(path, members)
        split = open_source(f"tar:{tmp_path}").train
        assert names(split) == [name for name, _ in members]
        assert split.read_bytes(len(members) - 1) == members[-1][1]


def test_a_shard_that_is_replaced_during_a_run_ends_it(tmp_path):
    """Unless its images are where they were, as after a copy of the same shard, or one whose time is set later."""
    members = [(f"{number}.jpg", jpeg(number)) for number in range(2)]
    path = write_shard(tmp_path / "a.tar", members)
    split = open_source(f"tar:{tmp_path}").train
    os.utime(path, ns=(1, 1))
    assert split.read(1).size == (40, 30)
    split = open_source(f"tar:{tmp_path}").train
    replace_shard(path, [("7.jpg", bytes(9000)), *members])
    with pytest.raises(
        DataError, match=r"^data: found .*a\.tar changed since its headers were read, expected the same shard"
    ):
        split.read(0)
    assert len(open_source(f"tar:{tmp_path}").train) == 3, "the next run reads it as it is"


def test_long_names_and_names_of_any_letters_keep_their_index(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar", [("x" * 150 + ".jpg", jpeg())])
    write_shard(tmp_path / "b.tar", [("été.jpg", jpeg())])
    write_shard(tmp_path / "c.tar", [("d" * 90 + "/" + "x" * 90 + ".jpg", jpeg())])
    found = names(open_source(f"tar:{tmp_path}").train)
    monkeypatch.setattr(shards_module, "index_shards", None)
    assert names(open_source(f"tar:{tmp_path}").train) == found


def test_a_cache_that_cannot_be_written_is_done_without(shards, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_source(f"tar:{shards}").train) == 12


def test_a_shard_that_is_cut_short_gives_what_is_before_the_end(shards):
    path = shards / "train" / "00002.tar"
    path.write_bytes(path.read_bytes()[:3500])
    split = open_source(f"tar:{shards}").train
    assert 8 <= len(split) < 12
    assert all(split.read(index).size == (40, 30) for index in range(len(split)))
    ((name, reason),) = split.manifest.excluded.items()
    assert name == str(path)
    assert "truncated" in reason


def test_a_shard_that_shrinks_while_a_run_reads_it(shards):
    split = open_source(f"tar:{shards}").train
    path = shards / "train" / "00002.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptImageError, match="the shard ends inside the image"):
        split.read(11)


def test_what_is_no_shard(tmp_path):
    with pytest.raises(DataError, match="found no folder"):
        open_source(f"tar:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match=r"found no \*\.tar in"):
        open_source(f"tar:{tmp_path}")
    (tmp_path / "a.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(DataError, match=r"found no readable tar file at .*a\.tar"):
        open_source(f"tar:{tmp_path}")
    write_shard(tmp_path / "a.tar", [("a.txt", b"words"), ("n01440764.tar", b"as in ImageNet's own archive")])
    with pytest.raises(DataError, match=r"found no image in the shards of .* \(1 \.txt, 1 \.tar\), expected .* unpack"):
        open_source(f"tar:{tmp_path}")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_shard_is_named_as_such(tmp_path, compress):
    path = write_shard(tmp_path / "a.tar", [("0.jpg", jpeg())])
    path.write_bytes(compress(path.read_bytes()))
    says = rf"^data: found a compressed tar file at {path}, expected an uncompressed one, or stream:{path}$"
    with pytest.raises(DataError, match=says):
        open_source(f"tar:{tmp_path}")
    assert len([*read_images(str(path), lambda _: True)]) == 1


def test_a_split_of_many_shards_holds_few_open_and_travels_to_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("synco_fast.data.sources.shards._OPEN_SHARDS", 2)
    paths = [write_shard(tmp_path / f"{number}.tar", [("a.jpg", jpeg(number))]) for number in range(5)]
    split = ShardSplit(paths)
    for index in (0, 4, 1, 3, 2, 0):
        assert split.read_bytes(index) == jpeg(index)
        assert len(split._opened) <= 2
    assert pickle.loads(pickle.dumps(split)).read_bytes(3) == jpeg(3)


# -- lists of files ---------------------------------------------------------------------------------------------------


def test_lists(image_folder, tmp_path):
    train, held_out = tmp_path / "train.txt", tmp_path / "val.txt"
    train.write_text("# mine\n\nimages/train/class1/3.jpg\tb\n" + f"{image_folder}/train/class0/1.jpg\ta\n")
    held_out.write_text("images/val/class1/0.jpg\tb\n")
    source = open_source(f"list:{train},{held_out}")
    assert source.train.classes == source.validation.classes == ("a", "b")
    assert source.train.labels.tolist() == [1, 0]
    assert source.validation.labels.tolist() == [1]
    assert source.train.read(0).size == source.train.read(1).size == (44, 40)
    held_out.write_text("images/val/class1/0.jpg\n")
    assert open_source(f"list:{held_out}").train.labels is None


def test_a_list_may_begin_with_a_byte_order_mark(image_folder, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfimages/train/class1/3.jpg\r\nimages/train/class0/1.jpg\r\n")
    split = open_source(f"list:{tmp_path / 'list.txt'}").train
    assert list(split.manifest.names) == ["images/train/class1/3.jpg", "images/train/class0/1.jpg"]
    assert split.read(0).size == (44, 40)


def test_a_line_of_a_list_ends_only_at_a_line_break(tmp_path):
    (tmp_path / "list.txt").write_text("a\x85\u2028\x0c.jpg\tb\x0bc\r\nd.jpg\te", encoding="utf-8", newline="")
    split = open_source(f"list:{tmp_path / 'list.txt'}").train
    assert (list(split.manifest.names), split.classes) == (["a\x85\u2028\x0c.jpg", "d.jpg"], ("b\x0bc", "e"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "found no path in the list"),
        ("a.jpg\n".encode("utf-16").decode("latin-1"), "found no plain text in the list .*, expected UTF-8"),
        ("a.jpg\tx\nb.jpg\n", "found no class after 'b.jpg' .* expected one in every line or in none"),
        (None, "cannot read the list"),
    ],
)
def test_lists_that_cannot_be(tmp_path, content, says):
    file = tmp_path / "list.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=says):
        open_source(f"list:{file}")


def test_three_lists(tmp_path):
    with pytest.raises(DataError, match="found 3 lists"):
        open_source("list:a,b,c")


# -- kept lists -------------------------------------------------------------------------------------------------------


def test_names_are_packed_and_found_again():
    names = ["a", "", "été.jpg", "b" * 300, os.fsdecode(b"\xff\xfe.jpg")]
    packed = PackedNames.pack(names)
    assert list(packed) == names
    assert packed[-1] == names[-1]
    assert packed[1:3] == names[1:3]
    with pytest.raises(IndexError):
        packed[5]
    assert list(PackedNames.pack([])) == []


def test_a_list_that_is_damaged_or_out_of_date_is_not_used(tmp_path):
    path, folder = manifest_path("key"), tmp_path / "folder"
    folder.mkdir()
    manifest = Manifest(
        PackedNames.pack(["a", "b"]),
        np.array([0, 1]),
        ("x", "y"),
        stamps={str(folder): folder.stat().st_mtime_ns},
        excluded={"c": "corrupt"},
    )
    write_manifest(path, manifest)
    found = read_manifest(path)
    assert (found.names[:], found.labels.tolist(), found.classes) == (["a", "b"], [0, 1], ("x", "y"))
    assert found.excluded == {"c": "corrupt"}
    assert found.places is None
    os.utime(folder, ns=(1, 1))
    assert read_manifest(path) is None
    content = path.read_bytes()
    for damaged in (content[:100], b"", b"no archive"):
        path.write_bytes(damaged)
        assert read_manifest(path) is None
    assert read_manifest(tmp_path / "nowhere") is None
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no part is left behind"


def test_a_kept_list_serves_a_folder_until_a_file_comes_or_goes(image_folder):
    split = open_source(str(image_folder)).train
    write_manifest(manifest_path(split.key), split.manifest.without({4: "it is corrupt"}))
    kept = open_source(str(image_folder)).train
    assert len(kept) == 32
    assert kept.labels.tolist() == split.labels.tolist()[:4] + split.labels.tolist()[5:]
    assert kept.manifest.excluded == {split.manifest.names[4]: "it is corrupt"}
    time.sleep(0.01)
    photo(44, 40).save(image_folder / "train" / "class2" / "new.jpg")
    assert len(open_source(str(image_folder)).train) == 34


# -- the check --------------------------------------------------------------------------------------------------------


def test_a_check_leaves_out_what_is_broken_and_forgets_it_when_mended(image_folder):
    victim = image_folder / "train" / "class1" / "3.jpg"
    content = victim.read_bytes()
    victim.write_bytes(content[:100])
    source = open_afresh(str(image_folder))
    told = []
    corrupt = find_corrupt(source.train, workers=2, tick=lambda done, wrong: told.append((done, wrong)))
    assert [source.train.name(index) for index in corrupt] == [str(victim)]
    assert told[-1] == (33, 1)
    assert keep_list(source.train, corrupt) == str(manifest_path(source.train.key))
    assert keep_list(source.validation, {}) is not None
    again = open_source(str(image_folder))
    assert len(again.train) == 32
    assert not find_corrupt(again.train, workers=0)
    (note,) = again.notes
    assert "1 excluded as corrupt, the first: class1/3.jpg" in note
    victim.write_bytes(content)
    assert len(open_afresh(str(image_folder)).train) == 33


def test_a_check_of_shards(shards):
    path = shards / "train" / "00001.tar"
    write_shard(path, [("good.jpg", jpeg()), ("bad.jpg", b"no picture")])
    source = open_afresh(f"tar:{shards}")
    corrupt = find_corrupt(source.train, workers=0)
    keep_list(source.train, corrupt)
    again = open_source(f"tar:{shards}").train
    assert len(again) == len(source.train) - 1
    assert not find_corrupt(again, workers=0)


def test_a_source_that_goes_away_during_a_check_is_one_line(image_folder):
    class Gone(FolderSplit):
        def read(self, index):
            raise DataError(f"data: found no regular file at {index}")

    with pytest.raises(DataError, match=r"^data: found no regular file at 0$"):
        find_corrupt(Gone(image_folder / "train"), workers=1)


def test_nothing_is_kept_of_arrays_nor_where_nothing_is_left(tmp_path):
    assert keep_list(ArraySplit(np.zeros((2, 8, 8), np.uint8), None, "zeros"), {}) is None
    (tmp_path / "a.jpg").write_bytes(b"")
    source = open_afresh(str(tmp_path))
    assert keep_list(source.train, find_corrupt(source.train, workers=0)) is None
