"""Packs: what is in them, that the shard reader reads them, and that no interruption leaves a trace."""

import fcntl
import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synco_fast.bench import data as bench
from synco_fast.cli import main
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import CorruptImageError, DataError
from synco_fast.data.pipelines.build import build_pipeline
from synco_fast.data.pipelines.pack_quality import measure_quality
from synco_fast.data.sources.check import find_corrupt
from synco_fast.data.sources.open import ArraySplit, Source, open_shards, open_source
from synco_fast.data.sources.pack import PackSettings, pack_source, shrink
from synco_fast.data.sources.pack_index import INDEX, PackIndex, packed_manifest, read_index
from synco_fast.data.sources.shards import index_shards
from tests.data.photos import photo

SMALL = PackSettings(short_side=30, quality=90, shard_bytes=20_000)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Two splits of photographs of several sizes and kinds, two of them corrupt."""
    for number in range(26):
        split, label = ("val" if number >= 20 else "train"), ("9", "10")[number % 2]
        inside = tmp_path / "images" / split / label
        inside.mkdir(parents=True, exist_ok=True)
        photo(60 + number, 40 + 2 * number, number).save(inside / f"{number:02d}.{'png' if number % 5 == 0 else 'jpg'}")
    (tmp_path / "images" / "train" / "9" / "02.jpg").write_bytes(b"")
    content = (tmp_path / "images" / "train" / "10" / "19.jpg").read_bytes()
    (tmp_path / "images" / "train" / "10" / "19.jpg").write_bytes(content[: len(content) // 2])
    photo(40, 20, 99).save(tmp_path / "images" / "train" / "9" / "small.jpg", quality=95)
    return tmp_path / "images"


def pack(folder, out, settings=SMALL, **options):
    return pack_source(open_source(str(folder)), out, settings, workers=0, **options)


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_the_shard_reader_reads_a_pack(folder, tmp_path):
    found = pack(folder, tmp_path / "out")
    source, packed = open_source(str(folder)), open_source(f"tar:{tmp_path / 'out'}")
    assert (len(found["train"]), len(found["val"])) == (len(packed.train), len(packed.validation)) == (19, 6)
    assert len(found["train"].shards) > 2, "so small are the shards here"
    assert packed.train.classes == packed.validation.classes == source.train.classes == ("10", "9")
    for title, split, original in (
        ("train", packed.train, source.train),
        ("val", packed.validation, source.validation),
    ):
        index = found[title]
        assert split.labels.tolist() == original.labels[index.numbers].tolist()
        for row, number in enumerate(index.numbers.tolist()):
            image, wanted = split.read(row), original.read(number)
            assert min(image.size) == min(30, *wanted.size)
            assert (image.height, image.width) == tuple(index.sizes[row])
            assert (wanted.height, wanted.width) == tuple(index.source_sizes[row])
            near = np.asarray(wanted.resize(image.size, Image.Resampling.LANCZOS)).astype(int)
            assert np.abs(near - np.asarray(image)).mean() < 15, "of the same image; another differs by some 60"
    assert not find_corrupt(packed.train, workers=0)


def test_the_index_says_what_the_headers_say(folder, tmp_path):
    pack(folder, tmp_path / "out")
    shards = sorted((tmp_path / "out" / "train").glob("*.tar"))
    index, headers = packed_manifest(shards), index_shards(shards)
    assert list(index.names) == list(headers.names)
    assert index.places.tolist() == headers.places.tolist()
    assert [index.classes[label] for label in index.labels] == [headers.classes[label] for label in headers.labels]
    assert index.stamps == headers.stamps


def test_small_jpeg_files_keep_their_bytes(folder, tmp_path):
    found = pack(folder, tmp_path / "out")["train"]
    packed, source = open_shards(tmp_path / "out").train, open_source(str(folder)).train
    assert found.kept == 1
    row = next(row for row, size in enumerate(found.sizes.tolist()) if size == [20, 40])
    number = int(found.numbers[row])
    assert source.name(number).endswith("small.jpg")
    assert packed.read_bytes(row) == source.read_bytes(number)


def test_corrupt_images_are_excluded_and_named(folder, tmp_path):
    found = pack(folder, tmp_path / "out")["train"]
    assert sorted(found.excluded) == ["10/19.jpg", "9/02.jpg"]
    assert "is empty" in found.excluded["9/02.jpg"]
    assert found.read == sum(len(path.read_bytes()) for path in (folder / "train").rglob("*.*"))
    for path in (folder / "train").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="found no readable image besides"):
        pack(folder, tmp_path / "other")


def killed_pack(folder, out, where, number):
    """Pack, and die at the ``number``-th image, index or rename."""
    calls = itertools.count(1)

    def die(*_):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(function):
        return lambda *args: (die(), function(*args))[1]

    if where == "index":
        PackIndex.write = dying(PackIndex.write)
    elif where == "rename":
        Path.replace = dying(Path.replace)
    pack(folder, out, tick=die if where == "image" else lambda *_: None)


@pytest.mark.parametrize(
    ("where", "number"),
    [("image", 1), ("image", 9), ("image", 20), ("image", 25), ("index", 1), ("index", 3), ("rename", 4)],
)
def test_a_killed_pack_is_resumed_and_is_the_same_to_the_byte(folder, tmp_path, where, number):
    pack(folder, tmp_path / "whole")
    child = os.fork()
    if not child:
        try:
            killed_pack(folder, tmp_path / "out", where, number)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    seen = []
    pack(folder, tmp_path / "out", tick=lambda title, done, total, corrupt: seen.append((title, done)))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    if (where, number) == ("image", 20):
        assert ("train", 3) not in seen, "the shards that were whole are not made again"


def test_a_finished_pack_is_only_read(folder, tmp_path):
    first = pack(folder, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    again = pack(folder, tmp_path / "out", tick=lambda *_: pytest.fail("nothing is to do"))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert again["train"].places.tolist() == first["train"].places.tolist()


def test_workers_make_the_same_pack(folder, tmp_path):
    pack(folder, tmp_path / "one")
    pack_source(open_source(str(folder)), tmp_path / "two", SMALL, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_what_a_pack_cannot_be_made_of_or_in(folder, tmp_path):
    out = tmp_path / "out"
    pack(folder, out)
    with pytest.raises(DataError, match=r"found a pack with short_side 30 in .*out, expected 31"):
        pack(folder, out, PackSettings(31, 90, 20_000))
    moved = next((folder / "train" / "9").iterdir())
    moved.rename(moved.with_name("renamed.jpg"))
    with pytest.raises(DataError, match=r"found a pack in .*out of other images than those of .*, though as many"):
        pack(folder, out)
    moved.with_name("renamed.jpg").rename(moved)
    about = json.loads((out / "pack.json").read_text())
    del about["digests"]  # as earlier versions
    (out / "pack.json").write_text(json.dumps(about))
    pack(folder, out)
    photo(60, 60, 7).save(folder / "train" / "9" / "more.jpg")
    with pytest.raises(DataError, match=r"found a pack with images \[21, 6\]"):
        pack(folder, out)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="found other files in"):
        pack(folder, tmp_path / "thesis")
    arrays = ArraySplit(np.zeros((3, 8, 8), np.uint8), None, "zeros")
    with pytest.raises(DataError, match="arrays need no pack"):
        pack_source(Source("idx:zeros", arrays, None), tmp_path / "arrays", SMALL)
    other = tmp_path / "busy"
    other.mkdir()
    with (other / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="found another pack running"):
            pack(folder, other)


def test_a_flipped_bit_is_noticed_and_the_image_replaced(folder, tmp_path):
    found = pack(folder, tmp_path / "out")["train"]
    number, offset, size = found.places[4].tolist()
    shard = tmp_path / "out" / "train" / f"{number:05d}.tar"
    content = bytearray(shard.read_bytes())
    content[offset + size // 2] ^= 4
    shard.write_bytes(content)
    split = open_shards(tmp_path / "out").train
    with pytest.raises(CorruptImageError, match="differ from the pack's checksum"):
        split.read(4)
    pipe = build_pipeline(split, Recipe(size=16), batch=19, seed=0, workers=0, name="torchvision")
    (batch,) = pipe
    assert list(batch.corrupt) == [4]


def test_an_index_that_does_not_fit_is_not_used(folder, tmp_path):
    pack(folder, tmp_path / "out")
    train = tmp_path / "out" / "train"
    shards = sorted(train.glob("*.tar"))
    assert packed_manifest(shards) is not None
    assert packed_manifest(shards[1:]) is None
    content = (train / INDEX).read_bytes()
    for damaged in (content[:200], b"", b"no archive", content[:-50] + bytes(50)):
        (train / INDEX).write_bytes(damaged)
        assert packed_manifest(shards) is None
        assert len(open_shards(tmp_path / "out").train) == 19, "the headers say the same"
    (train / INDEX).write_bytes(content)
    with shards[0].open("ab") as shard:
        shard.write(bytes(10_240))
    assert read_index(train / INDEX) is None


def test_names_that_are_not_utf8_and_images_without_classes(tmp_path):
    inside = tmp_path / "flat"
    inside.mkdir()
    for number, name in enumerate((b"caf\xe9.jpg", b"plain.jpg")):
        photo(50, 40, number).save(inside / os.fsdecode(name))
    (inside / os.fsdecode(b"broken\xff.jpg")).touch()
    found = pack(tmp_path / "flat", tmp_path / "out")["train"]
    assert found.labels is None
    assert list(found.excluded) == ["broken\ufffd.jpg"]
    assert len(open_source(f"tar:{tmp_path / 'out'}").train) == 2


def test_a_pack_of_shards_and_of_a_list(folder, tmp_path):
    pack(folder, tmp_path / "first", PackSettings(36, 95, 1 << 20))
    again = pack(f"tar:{tmp_path / 'first'}", tmp_path / "second")
    assert len(again["train"]) == 19
    (tmp_path / "list.txt").write_text("images/train/10/01.jpg\tone\nimages/train/9/04.jpg\ttwo\n")
    listed = pack(f"list:{tmp_path / 'list.txt'}", tmp_path / "third")
    assert listed["train"].classes == ("one", "two")
    assert open_shards(tmp_path / "third").train.labels.tolist() == [0, 1]


def test_an_image_that_is_too_long_for_jpeg_is_excluded():
    import io

    file = io.BytesIO()
    Image.new("L", (70_000, 2)).save(file, "PNG")
    with pytest.raises(CorruptImageError, match="found 70000 x 2 pixels, expected sides up to 65500"):
        shrink(file.getvalue(), "long.png", SMALL)


def test_what_is_lost_in_quality(tmp_path):
    """The figures that docs/data.md states, on fewer photographs: bounds half as large again."""
    for number in range(12):
        photo(500, 375, number).save(tmp_path / f"{number}.jpg", quality=90)
    source = open_source(str(tmp_path))
    found = {}
    for short, quality in ((320, 90), (320, 30), (375, 90)):
        out = tmp_path.with_name(f"{tmp_path.name}-{short}-{quality}")
        index = pack_source(source, out, PackSettings(short, quality), workers=0)["train"]
        found[short, quality] = measure_quality(source.train, open_shards(out).train, index, Recipe(), views=12)
    default = found[320, 90]
    assert default.views == 12
    assert default.mean < 5.7
    assert default.worst < 9.5
    assert found[320, 30].mean > 1.3 * default.mean, "a worse pack is seen to be worse"
    untouched = found[375, 90]
    assert (untouched.mean, untouched.largest) == (0, 0)
    assert untouched.small == untouched.small_source == default.small_source < default.small


def test_the_share_of_small_crops_is_counted(tmp_path):
    photo(500, 375).save(tmp_path / "a.jpg")
    source = open_source(str(tmp_path))
    index = pack_source(source, tmp_path / "out", PackSettings(), workers=0)["train"]
    packed = open_shards(tmp_path / "out").train
    whole = Recipe(area=(1, 1), ratio=(4 / 3, 4 / 3), size=320)
    assert measure_quality(source.train, packed, index, whole).small == 0
    larger = measure_quality(source.train, packed, index, whole.model_copy(update={"size": 321}))
    assert (larger.small, larger.small_source) == (1, 0)


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    (folder / "train" / "notes.txt").write_text("")
    words = ["data", "pack", str(folder), str(tmp_path / "out"), "--short-side", "30", "--workers", "1", "--view", "16"]
    assert main([*words, "--json", str(tmp_path / "pack.json")]) == 0
    out = capsys.readouterr().out
    assert "19 train, 6 val" in out
    assert "9/02.jpg: the file is empty" in out
    assert f"{folder}: not read: 1 .txt" in out
    assert "--data tar:" in out
    figures = json.loads((tmp_path / "pack.json").read_text())
    assert (figures["short_side"], figures["quality"]) == (30, 90), "what was asked for, beside what it cost"
    assert figures["loss_of_quality"]["views"] == 19
    assert sorted(figures["corrupt"]) == ["10/19.jpg", "9/02.jpg"]
    assert figures["bytes_packed"] == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.tar"))
    assert main(words) == 0, "a finished pack"
    assert main([*words, "--quality", "80"]) == 2
    assert "found a pack with quality 90" in capsys.readouterr().err
    for wrong in (["--quality", "0"], ["--quality", "101"], ["--short-side", "0"]):
        assert main([*words, *wrong]) == 2


def test_a_folder_that_cannot_be_written_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["data", "pack", str(folder), str(tmp_path / "file" / "out")]) == 2
    assert "which is a file, expected a folder" in capsys.readouterr().err


def test_the_benchmark_measures_a_pack(tmp_path):
    names = bench.make_photos(tmp_path, 3)
    pipe = bench._pipeline("torchvision-packed", tmp_path, names, torch.device("cpu"), 2, 0, Recipe(size=32))
    batch = next(iter(pipe))
    assert batch.first.shape == (2, 3, 32, 32)
    packed = open_shards(tmp_path / "packed-3").train
    assert [min(packed.read(row).size) for row in range(3)] == [320] * 3


def test_a_pack_says_how_far_it_is(folder, tmp_path):
    seen = []
    pack(folder, tmp_path / "out", tick=lambda *figures: seen.append(figures))
    assert seen[0] == ("train", 0, 21, 0)
    assert ("train", 21, 21, 2) in seen
    assert seen[-1] == ("val", 6, 6, 0)


def test_an_index_of_other_shards_or_in_another_order_is_not_used(tmp_path):
    """Its places hold the numbers of shards, which would lead into another shard."""
    shards = [tmp_path / f"{number}.tar" for number in range(3)]
    for number, shard in enumerate(shards):
        shard.write_bytes(bytes(512 * (number + 1)))
    places, sizes = np.array([[0, 512, 9], [1, 512, 9]]), np.full((2, 2), 8)
    index = PackIndex(
        np.arange(2), places, np.zeros(2, np.uint32), sizes, sizes, None, None, {"0.tar": 512, "1.tar": 1024}
    )
    index.write(tmp_path / INDEX)
    assert packed_manifest(shards[:2]).places.tolist() == places.tolist()
    for others in (shards[1::-1], shards, shards[:1], shards[1:]):
        assert packed_manifest(others) is None
