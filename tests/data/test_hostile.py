"""Folders, lists, shards and IDX files that would stall a run, fill the memory, or end in a traceback."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image, features

from synco_fast.cli import main
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import CorruptImageError, DataError, UserError, first_line, one_line, printable
from synco_fast.data.pipelines.build import build_pipeline, has_dali
from synco_fast.data.pipelines.torchvision import evaluation_loader, evaluation_view, pixels_of
from synco_fast.data.sources import shards, walk
from synco_fast.data.sources.decode import Limits, central_part, decode_image, plain_jpeg_size
from synco_fast.data.sources.open import open_source
from synco_fast.data.sources.splits import read_file
from synco_fast.data.sources.stream_reader import ShardError, read_images
from tests.data.photos import photo, read_image
from tests.data.test_lists_and_shards import jpeg, write_shard

DALI = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(3):
            photo(50, 40, number).save(tmp_path / "images" / label / f"{number}.jpg")
    return tmp_path / "images"


def names(split):
    return [split.manifest.names[index] for index in range(len(split))]


# -- folders ----------------------------------------------------------------------------------------------------------


def test_loops_of_links_end(folder):
    (folder / "cat" / "up").symlink_to(folder)
    (folder / "cat" / "here").symlink_to(folder / "cat")
    (folder / "self").symlink_to(folder / "self")
    (folder / "one").symlink_to(folder / "two")
    (folder / "two").symlink_to(folder / "one")
    split = open_source(str(folder)).train
    assert names(split) == [f"{label}/{number}.jpg" for label in ("cat", "dog") for number in range(3)]
    assert split.classes == ("cat", "dog")
    assert split.manifest.unread == {"broken link": 3, "link to a folder that is read already": 2}


def test_a_tower_of_links_is_read_once_a_folder(tmp_path):
    """Thirty folders, each with two links to the next, hold a billion paths."""
    top = tmp_path / "images" / "class"
    inside = top
    for level in range(30):
        inside.mkdir(parents=True)
        following = tmp_path / "levels" / str(level)
        for link in ("a", "b"):
            (inside / link).symlink_to(following)
        inside = following
    inside.mkdir(parents=True)
    photo(20, 20).save(inside / "x.png")
    assert len(open_source(str(tmp_path / "images")).train) == 1


def test_links_to_images_and_folders_are_followed(folder, tmp_path):
    photo(50, 40, 9).save(tmp_path / "outside.jpg")
    (tmp_path / "elsewhere").mkdir()
    photo(50, 40, 8).save(tmp_path / "elsewhere" / "b.jpg")
    (folder / "dog" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (folder / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "wolf").symlink_to(tmp_path / "elsewhere")
    split = open_source(str(folder)).train
    assert names(split)[-2:] == ["dog/link.jpg", "dog/more/b.jpg"]
    assert split.classes == ("cat", "dog"), "a folder is read once"


def test_images_are_numbered_as_ever(folder):
    """Files of a folder by name, then its folders by name: what a run that is resumed relies on."""
    for inside in ("b", "a", "b/c"):
        (folder / "cat" / inside).mkdir(exist_ok=True)
        photo(20, 20).save(folder / "cat" / inside / "z.jpg")
    assert names(open_source(str(folder)).train)[:6] == [
        "cat/0.jpg",
        "cat/1.jpg",
        "cat/2.jpg",
        "cat/a/z.jpg",
        "cat/b/z.jpg",
        "cat/b/c/z.jpg",
    ]


def test_pipes_and_devices_are_no_images(folder):
    os.mkfifo(folder / "cat" / "pipe.jpg")
    (folder / "cat" / "zero.jpg").symlink_to("/dev/zero")
    split = open_source(str(folder)).train
    assert len(split) == 6
    assert split.manifest.unread == {"pipe or device": 2}


@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "gone", "loop"])
def test_a_list_may_name_anything_and_every_read_ends(tmp_path, kind):
    photo(50, 40).save(tmp_path / "good.jpg")
    bad = tmp_path / "bad.jpg"
    if kind == "pipe":
        os.mkfifo(bad)
    elif kind == "zero":
        bad.symlink_to("/dev/zero")
    elif kind == "folder":
        bad.mkdir()
    elif kind == "loop":
        bad.symlink_to(bad)
    (tmp_path / "list.txt").write_text("good.jpg\nbad.jpg\n")
    split = open_source(f"list:{tmp_path / 'list.txt'}").train
    with pytest.raises(CorruptImageError, match=r"bad\.jpg: ") as error:
        split.read(1)
    assert str(error.value).count("bad.jpg") == 1
    (batch,) = build_pipeline(split, Recipe(size=16), batch=2, seed=0, workers=0, name="torchvision")
    assert list(batch.corrupt) == [1]


@pytest.mark.parametrize("prefix", ["list:", "tar:", "parquet:", ""])
def test_a_source_that_is_a_pipe_is_an_error_and_stalls_nothing(tmp_path, prefix):
    if prefix in ("tar:", "parquet:"):
        if prefix == "parquet:":
            pytest.importorskip("pyarrow")
        os.mkfifo(tmp_path / f"a.{prefix[:-1]}")
        spec = f"{prefix}{tmp_path}"
    else:
        os.mkfifo(tmp_path / "pipe")
        spec = f"{prefix}{tmp_path / 'pipe'}"
    with pytest.raises(DataError, match="found") as error:
        open_source(spec)
    assert str(error.value).count("found") == 1


def test_a_folder_that_cannot_be_read_is_counted(folder, monkeypatch):
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(walk.os, "scandir", refused)
    split = open_source(str(folder)).train
    assert split.classes == ("cat",)
    assert split.manifest.unread == {"folder that cannot be read": 1}
    monkeypatch.setattr(
        walk.os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(DataError, match=r"cannot read the folder .* \(Permission denied\)"):
        open_source(str(folder))


@pytest.mark.parametrize("prefix", ["", "tar:", "list:", "parquet:", "idx:", "cifar:", "stl10:"])
def test_a_name_that_no_path_can_have_is_one_line(prefix, tmp_path, capsys):
    long = tmp_path / ("a" * 300)
    for spec, says in ((f"{prefix}{long}", "cannot read .*File name too long"), (f"{prefix}~nobody-here/x", "a user")):
        with pytest.raises(DataError, match=says):
            open_source(spec)
        assert main(["data", "check", spec]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_row_may_name_a_file_that_cannot_be():
    with pytest.raises(CorruptImageError, match="null byte"):
        read_file("a\0.jpg", Limits())


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_a_sparse_giant_is_not_read(folder):
    with (folder / "cat" / "giant.png").open("wb") as file:
        file.truncate(6 << 30)
    split = open_source(str(folder)).train
    giant = names(split).index("cat/giant.png")
    with pytest.raises(CorruptImageError, match=r"giant\.png: found a file of 6,442,450,944 bytes, expected up to"):
        split.read(giant)
    (batch,) = build_pipeline(split, Recipe(size=16), batch=7, seed=0, workers=0, name="torchvision")
    assert list(batch.corrupt) == [giant]


def test_limits_are_those_of_the_configuration(folder, tmp_path):
    photo(100, 80).save(folder / "cat" / "large.jpg")
    large = (folder / "cat" / "large.jpg").stat().st_size
    for limits, said in ((Limits(file_bytes=large - 1), "max_file_bytes"), (Limits(pixels=7999), "max_pixels")):
        split = open_source(str(folder), limits).train
        corrupt = [index for index in range(len(split)) if said in reason(split, index)]
        assert [names(split)[index] for index in corrupt] == ["cat/large.jpg"]
        write_shard(tmp_path / said / "a.tar", [("a.jpg", (folder / "cat" / "large.jpg").read_bytes())])
        assert said in reason(open_source(f"tar:{tmp_path / said}", limits).train, 0)
        (tmp_path / "list.txt").write_text(f"{folder / 'cat' / 'large.jpg'}\n")
        assert said in reason(open_source(f"list:{tmp_path / 'list.txt'}", limits).train, 0)
    assert plain_jpeg_size((folder / "cat" / "large.jpg").read_bytes(), Limits(pixels=7999)) is None
    assert read_image(folder / "cat" / "large.jpg", Limits(large, 8000)).size == (100, 80)


def reason(split, index):
    try:
        split.read(index)
    except CorruptImageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["torchvision", pytest.param("dali", marks=DALI)])
def test_a_limit_on_pixels_holds_in_every_pipeline(folder, name):
    photo(100, 80).save(folder / "cat" / "large.jpg")
    split = open_source(str(folder), Limits(pixels=7999)).train
    (batch,) = build_pipeline(split, Recipe(size=16), batch=7, seed=0, workers=0, name=name)
    assert [names(split)[index] for index in batch.corrupt] == ["cat/large.jpg"]


MEMORY = """
import resource, sys
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.build import build_pipeline
from synco_fast.data.pipelines.torchvision import evaluation_loader
from synco_fast.data.sources.open import open_source
split = open_source(sys.argv[1]).train
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
((images, numbers, corrupt),) = evaluation_loader(split, Recipe(), workers=0)
assert len(numbers) == len(split) and not corrupt
(batch,) = build_pipeline(split, Recipe(), batch=len(split), seed=0, workers=0, name="torchvision")
assert not batch.corrupt
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_lines_of_pixels_are_evaluated_in_little_memory(tmp_path):
    for number, size in enumerate(((30_000, 1), (1, 65_000))):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300, "MiB; 6 GB of pixels before"


def test_the_central_part_holds_the_central_crop():
    """An image just beyond the ratio gives the crop that resizing all of it gives."""
    recipe = Recipe(size=24, evaluation_resize=30)
    for height, width in ((10, 163), (164, 10), (7, 120)):
        image = photo(width, height)
        part = central_part(np.asarray(image))
        assert max(part.shape[:2]) <= 16 * min(height, width) + 1
        whole = evaluation_view(pixels_of(image.crop((0, 0, width, height))), recipe)
        small = image.resize((round(30 * width / min(height, width)), round(30 * height / min(height, width))))
        top, left = (small.height - 24) // 2, (small.width - 24) // 2
        expected = np.asarray(small.crop((left, top, left + 24, top + 24))).astype(int)
        assert np.abs(whole.permute(1, 2, 0).numpy() - expected).mean() < 12
    ordinary = np.asarray(photo(160, 10))
    assert central_part(ordinary) is ordinary, "nothing changes up to the ratio"


@DALI
def test_dali_evaluates_lines_of_pixels_as_pillow_does(tmp_path):
    from synco_fast.data.pipelines.dali.pipeline import dali_evaluation

    photo(3000, 10).save(tmp_path / "long.jpg")
    photo(60, 50).save(tmp_path / "usual.jpg")
    split = open_source(str(tmp_path)).train
    ((ours, *_),) = dali_evaluation(split, Recipe(size=24), batch=2, workers=0)
    ((theirs, *_),) = evaluation_loader(split, Recipe(size=24), batch=2, workers=0)
    assert (ours.int() - theirs.int()).abs().float().mean() < 1


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "JPEG2000"])
def test_a_name_does_not_make_another_format_an_image(kind):
    """PostScript is a program, and Pillow would have it run."""
    file = io.BytesIO()
    photo(20, 20).save(file, kind)
    with pytest.raises(CorruptImageError, match=r"^a\.png: not an image in a format that can be read$"):
        decode_image(file.getvalue(), "a.png")


# -- what is not read -------------------------------------------------------------------------------------------------


def test_data_check_names_what_is_not_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("a.heic", "b.HEIC", "README", "notes.txt", ".hidden.heic"):
        (folder / "cat" / name).write_bytes(b"x")
    os.mkfifo(folder / "dog" / "pipe.jpg")
    assert main(["data", "check", str(folder), "--workers", "1", "--json", str(tmp_path / "check.json")]) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "not read" in line]
    assert said.startswith("not read: 2 .heic, 1 ")
    assert sorted(said.removeprefix("not read: ").split(", ")) == sorted(
        ["2 .heic", "1 without a suffix", "1 .txt", "1 pipe or device"]
    )
    assert json.loads((tmp_path / "check.json").read_text())["unread"][".heic"] == 2


def test_a_folder_of_shards_or_idx_files_says_how_to_read_it(tmp_path):
    write_shard(tmp_path / "shards" / "a.tar", [("a.jpg", jpeg())])
    with pytest.raises(DataError, match=r"found no image in .*, but tar files, expected tar:.*shards"):
        open_source(str(tmp_path / "shards"))
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"found no image in .*, but IDX files, expected idx:.*idx"):
        open_source(str(tmp_path / "idx"))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "data" / "train-0.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"found no image in .*, but Parquet files, expected parquet:.*hub"):
        open_source(str(tmp_path / "hub"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"found no image in .* \(1 \.txt\), expected files named \..*"):
        open_source(str(tmp_path / "texts"))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
@pytest.mark.parametrize("name", ["torchvision", pytest.param("dali", marks=DALI)])
def test_avif_is_read_where_pillow_can(tmp_path, name):
    for number in range(2):
        photo(60, 50, number).save(tmp_path / f"{number}.avif", quality=95)
    split = open_source(str(tmp_path)).train
    assert len(split) == 2
    assert np.abs(np.asarray(split.read(0)).astype(int) - np.asarray(photo(60, 50))).mean() < 15
    (batch,) = build_pipeline(split, Recipe(size=16), batch=2, seed=0, workers=0, name=name)
    assert not batch.corrupt


def test_data_show_says_what_file_it_writes(folder, tmp_path, capsys):
    assert main(["data", "show", str(folder), "--out", str(tmp_path / "x.txt")]) == 2
    assert "found 'x.txt', expected a name that ends in .png" in capsys.readouterr().err


# -- IDX and tar ------------------------------------------------------------------------------------------------------


def idx(shape, content, kind=8):
    return struct.pack(">HBB", 0, kind, len(shape)) + struct.pack(f">{len(shape)}I", *shape) + content


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (idx((2, 28, 28), bytes(1 << 26)), "found another format or a truncated file"),
        (idx((1 << 31, 1 << 12, 1 << 12), b""), "found an array of 36,028,797,018,963,968 bytes, expected up to"),
        (idx((1 << 16, 28, 28), b""), "found another format or a truncated file"),
        (idx((2,) * 255, b""), "found another format"),
        (struct.pack(">HBB", 0, 8, 3), "corrupt IDX"),
        (b"", "corrupt IDX"),
    ],
)
def test_an_idx_bomb_is_one_line_and_no_memory(tmp_path, content, says):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content, 1))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=says):
            open_source(f"idx:{tmp_path}")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    packed = bytearray((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())
    packed[len(packed) // 2 :] = b"damage"
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed)
    with pytest.raises(DataError):
        open_source(f"idx:{tmp_path}")


@pytest.mark.parametrize(
    ("member", "content", "says"),
    [
        ("a.json", b'{"label": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        ("a.json", b"[" * 60_000, None),
        ("a.json", b'{"label": ["list"]}', None),
        ("a.json", b'{"label": null}', None),
        ("a.cls", b"[" * 100_000, "found a class name of 65,536 characters for 'a.jpg' in .*, expected up to 1000"),
        ("a.cls", b"7" * 5000, "found a class name of 5,000 characters"),
        ("a.json", b'{"label": "' + b"x" * 2000 + b'"}', "found a class name of 2,000 characters"),
    ],
)
def test_labels_of_absurd_length_or_depth(tmp_path, member, content, says):
    write_shard(tmp_path / "a.tar", [("a.jpg", jpeg()), (member, content)])
    if says:
        with pytest.raises(DataError, match=says):
            open_source(f"tar:{tmp_path}")
    else:
        assert open_source(f"tar:{tmp_path}").train.labels is None, "no class is named"


def header(name, size, kind=tarfile.REGTYPE):
    """A tar header that `TarInfo` would not write: of a negative size, in GNU's binary numbers."""
    member = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    member[124:136] = (size % (1 << 96)).to_bytes(12, "big") if size < 0 else b"%011o\0" % size
    member[156:157], member[148:156] = kind, b" " * 8
    member[148:156] = b"%06o\0 " % sum(member)
    return bytes(member)


def pax(record, then):
    """A header of further values for the next one."""
    return header("x", len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0") + then


@pytest.mark.parametrize(
    "members",
    [
        header("b.jpg", -512),
        header("b.jpg", -512, tarfile.GNUTYPE_SPARSE),
        header("b.jpg", -512, tarfile.GNUTYPE_LONGNAME),
        pax(b"13 size=-512\n", header("b.jpg", 0)),
        pax(b"22 GNU.sparse.map=a,b\n", header("b.jpg", 0)),
        (header("long", 4, tarfile.GNUTYPE_LONGNAME) + b"b.j".ljust(512, b"\0")) * 1500 + header("b.jpg", 0),
    ],
    ids=["negative", "sparse", "long name", "in pax", "sparse map", "nested"],
)
def test_headers_that_lead_nowhere_are_the_end_of_a_shard(tmp_path, monkeypatch, members):
    """Some versions of tarfile read a member of negative size without end; other headers raise what is no TarError."""
    calls, following = [], tarfile.TarFile.next

    def counted(archive):
        calls.append(1)
        assert len(calls) < 100
        return following(archive)

    monkeypatch.setattr(tarfile.TarFile, "next", counted)
    content = jpeg()
    good = header("a.jpg", len(content)) + content + bytes(-len(content) % 512)
    (tmp_path / "a.tar").write_bytes(good + members + bytes(1024))
    split = open_source(f"tar:{tmp_path}").train
    assert split.read(0).size == (40, 30)
    assert len(split) == 1
    assert "truncated or corrupt after 1 image" in split.manifest.excluded[f"{tmp_path}/a.tar"]
    images = read_images(f"{tmp_path}/a.tar", lambda number: True)
    assert next(images)[0] == 0
    with pytest.raises(ShardError, match="truncated or corrupt"):
        list(images)


def test_a_shard_that_is_written_while_it_is_indexed_is_indexed_again(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.tar", [("a.jpg", jpeg())])
    index = shards._index

    def copied_meanwhile(shard, *rest):
        found = index(shard, *rest)
        write_shard(path, [("a.jpg", jpeg()), ("b.jpg", jpeg(1))])
        os.utime(path, ns=(1, 1))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(shards, "_index", copied_meanwhile)
        assert len(open_source(f"tar:{tmp_path}").train) == 1
    assert len(open_source(f"tar:{tmp_path}").train) == 2


def test_hidden_files_are_no_shards(tmp_path):
    """As macOS puts them beside the files that it copies to another disk."""
    for folder in ("train", "val"):
        write_shard(tmp_path / folder / "0.tar", [("a.jpg", jpeg())])
        (tmp_path / folder / "._0.tar").write_bytes(b"\0\5\x16\7" + bytes(100))
    source = open_source(f"tar:{tmp_path}")
    assert (len(source.train), len(source.validation), source.notes) == (1, 1, [])


def test_a_stream_may_have_brackets_in_its_name(tmp_path):
    path = write_shard(tmp_path / "[2024]" / "a.tar", [("a.jpg", jpeg())])
    assert open_source(f"stream:{path}").train.shards == (str(path),)


def test_what_shards_hold_beside_images_is_counted(tmp_path):
    write_shard(tmp_path / "a.tar", [("a.jpg", jpeg()), ("a.heic", b"x"), ("b.heic", b"x"), ("a.cls", b"1")])
    assert open_source(f"tar:{tmp_path}").train.manifest.unread == {".heic": 2}


def test_a_giant_in_a_shard_is_not_read(tmp_path):
    giant = tarfile.TarInfo("giant.jpg")
    giant.size = 3 << 30
    with (tmp_path / "a.tar").open("wb") as shard:
        shard.write(giant.tobuf())
        shard.truncate(shard.tell() + giant.size + 1024)
    split = open_source(f"tar:{tmp_path}").train
    with pytest.raises(CorruptImageError, match="found a file of 3,221,225,472 bytes"):
        split.read(0)


# -- names ------------------------------------------------------------------------------------------------------------


def test_messages_are_one_printable_line_whatever_the_name():
    name = os.fsdecode(b"caf\xe9\n\x1b[31m/\xc3\xa9.jpg")
    for kind in (UserError, DataError, CorruptImageError):
        text = str(kind(f"{name}: wrong"))
        assert text == "caf\\xe9\\n\\x1b[31m/é.jpg: wrong"
        text.encode("utf-8", "strict")
    assert printable("\ud800") == "\\ud800"
    assert str(UserError()) == ""
    with pytest.raises(CorruptImageError, match=r"caf\\xe9\\n"):
        decode_image(b"", name)


def test_the_message_of_an_error_as_a_part_of_a_line():
    said, silent = RuntimeError("  no such device\nraised by\tsomething "), RuntimeError(" \n")
    assert (first_line(said), first_line(said, 7), first_line(silent)) == ("no such device", "no such", "RuntimeError")
    assert (one_line(said), one_line(silent)) == ("no such device raised by something", "RuntimeError")
    assert one_line(said, 9) == "no such d"


STRICT = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "COLUMNS": "80"}


def test_names_that_are_not_utf8_reach_a_strict_terminal(tmp_path):
    inside = tmp_path / os.fsdecode(b"im\xe1ges") / os.fsdecode(b"c\xe4t")
    inside.mkdir(parents=True)
    photo(50, 40).save(inside / os.fsdecode(b"good\xff.jpg"))
    (inside / os.fsdecode(b"b\xe4d.jpg")).write_bytes(b"")
    (inside / os.fsdecode(b"x.\xfftxt")).write_bytes(b"")
    words = [sys.executable, "-m", "synco_fast", "data", "check", str(inside.parent), "--workers", "1"]
    words += ["--json", str(tmp_path / "check.json")]
    env = STRICT | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(words, capture_output=True, timeout=120, env=env)
    assert done.returncode == 1, done.stderr
    assert "b\\xe4d.jpg: the file is empty" in done.stdout.decode("utf-8")
    assert "Traceback" not in done.stderr.decode()
    assert json.loads((tmp_path / "check.json").read_text())["images"] == 2


def test_a_list_or_a_shard_that_names_classes_and_images_in_another_encoding(tmp_path):
    photo(50, 40).save(tmp_path / os.fsdecode(b"\xe9.jpg"))
    (tmp_path / "list.txt").write_bytes(b"\xe9.jpg\tcaf\xe9\n")
    split = open_source(f"list:{tmp_path / 'list.txt'}").train
    assert split.read(0).size == (50, 40)
    (tmp_path / os.fsdecode(b"\xe9.jpg")).unlink()
    with pytest.raises(CorruptImageError, match=r"\\xe9\.jpg: No such file"):
        split.read(0)
    file = io.BytesIO()
    photo(50, 40).save(file, "JPEG")
    write_shard(tmp_path / "t" / "a.tar", [(os.fsdecode(b"\xe9.jpg"), file.getvalue()[:500])])
    with pytest.raises(CorruptImageError, match=r"a\.tar:"):
        open_source(f"tar:{tmp_path / 't'}").train.read(0)
