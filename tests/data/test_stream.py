"""Streams of tar shards: what is read, in which order, by how many ranks and workers, and after a resume."""

import gzip
import io
import json
import re
import tarfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from synco_fast.cli import main
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import DataError
from synco_fast.data.pipelines import stream_order
from synco_fast.data.pipelines.build import build_pipeline, evaluation_batches, pipelines_for
from synco_fast.data.pipelines.stream_order import Piece, ShuffleBuffer, plan_epoch
from synco_fast.data.sources import stream_reader
from synco_fast.data.sources.decode import Limits
from synco_fast.data.sources.open import open_source
from synco_fast.data.sources.pack import PackSettings, pack_source
from synco_fast.data.sources.splits import share_of
from synco_fast.data.sources.stream import StreamSettings, expand_shards
from synco_fast.data.sources.stream_reader import ShardError, read_images
from tests.data.photos import photo


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stream_reader, "_PAUSE", 0.001)


def jpeg(seed=0):
    file = io.BytesIO()
    photo(24, 20, seed).save(file, "JPEG")
    return file.getvalue()


def tar(images, first=0):
    """A shard as WebDataset writes it: each image beside its label."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as shard:
        for number, content in enumerate(images):
            for name, part in ((f"{first + number:06d}.jpg", content), (f"{first + number:06d}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(part)
                shard.addfile(info, io.BytesIO(part))
    return file.getvalue()


SIZES = (5, 3, 7, 4, 5)


@pytest.fixture(scope="module")
def content():
    """The bytes of five shards with 24 images."""
    images = iter([jpeg(seed) for seed in range(sum(SIZES))])
    return [tar([next(images) for _ in range(size)], 100 * number) for number, size in enumerate(SIZES)]


@pytest.fixture
def shards(content, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, shard in enumerate(content):
        (folder / f"{number:03d}.tar").write_bytes(shard)
    return folder


def index(folder, sizes=SIZES):
    (folder / "sizes.json").write_text(json.dumps({f"{number:03d}.tar": size for number, size in enumerate(sizes)}))


def opened(spec, **settings):
    return open_source(f"stream:{spec}", stream=StreamSettings(**settings)).train


def pipeline(split, batch=8, workers=0, rank=0, world=1, seed=3):
    return build_pipeline(
        split, Recipe(size=8), batch=batch, seed=seed, workers=workers, rank=rank, world=world, name="torchvision"
    )


def read(made, epoch=0, start=0):
    made.set_epoch(epoch, start)
    return list(made)


def same(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.image_ids.tolist() == right.image_ids.tolist()
        assert left.first.equal(right.first)
        assert left.second.equal(right.second)
        assert left.corrupt == right.corrupt


def ids(batches):
    return [image for batch in batches for image in batch.image_ids.tolist()]


EVERY = {shard << 32 | image for shard, size in enumerate(SIZES) for image in range(size)}


# -- order --------------------------------------------------------------------------------------------------------


def test_an_indexed_epoch_reads_every_image_once(shards):
    index(shards)
    split = opened(f"{shards}/*.tar", buffer=8, readers=4)
    assert len(split) == 24
    made = pipeline(split)
    epochs = [ids(read(made, epoch)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(EVERY)
    assert epochs[0] != epochs[1] != epochs[2]
    assert ids(read(made, 0)) == epochs[0], "a function of seed and epoch alone"
    assert ids(read(pipeline(split, seed=4), 0)) != epochs[0]
    leftover = pipeline(split, batch=20)
    assert len(leftover) == 1
    assert len({frozenset(EVERY - set(ids(read(leftover, epoch)))) for epoch in range(4)}) > 1, "others in each epoch"


@pytest.mark.parametrize("known", [True, False])
def test_ranks_and_workers_and_resume_change_nothing(shards, known):
    """A step has the same images and views on any number of ranks and workers, from whichever step it begins."""
    if known:
        index(shards)
    split = opened(f"{shards}/{{000..004}}.tar", images=40, buffer=12, readers=4)
    whole = read(pipeline(split), 1)
    assert len(whole) == 5
    for workers, start in ((0, 1), (0, 4), (2, 2)):
        made = pipeline(split, workers=workers)
        same(read(made, 1, start), whole[start:])
        made.close()
    parts = [read(pipeline(split, rank=rank, world=4), 1, 2) for rank in range(4)]
    for step, batch in enumerate(whole[2:]):
        assert torch.cat([part[step].first for part in parts]).equal(batch.first)
        assert [image for part in parts for image in part[step].image_ids.tolist()] == batch.image_ids.tolist()


def test_workers_go_on_from_epoch_to_epoch(shards):
    index(shards)
    split = opened(f"{shards}/*.tar", buffer=4, readers=4)
    made, alone = pipeline(split, workers=2), pipeline(split)
    for epoch, start in ((0, 0), (1, 0), (1, 2), (0, 1)):
        same(read(made, epoch, start), read(alone, epoch, start))
    made.close()


def test_without_an_index_readers_have_whole_shards_and_start_over():
    """Two readers of five shards: the one with fewer images begins its shards again, the other does not finish."""
    plans = [plan_epoch(5, None, readers=2, share=20, seed=0, epoch=epoch) for epoch in range(3)]
    for plan in plans:
        assert sorted(piece.shard for pieces in plan for piece in pieces) == [*range(5)]
        assert [len(pieces) for pieces in plan] == [3, 2]
    assert plans[0] != plans[1]


def test_without_an_index_every_step_is_full(shards):
    split = opened(f"{shards}/*.tar", images=48, buffer=1, readers=1)
    found = Counter(ids(read(pipeline(split))))
    assert set(found) == EVERY
    assert set(found.values()) == {2}, "twice as many images as there are"


@pytest.mark.parametrize("known", [True, False])
def test_an_image_that_comes_again_has_other_views(shards, known):
    """At its first time those of an epoch without repeats; afterwards new ones, also after a resume."""
    if known:
        index(shards)
    once = read(pipeline(opened(f"{shards}/*.tar", images=24, buffer=4, readers=1)))
    split = opened(f"{shards}/*.tar", images=72, buffer=1, readers=1)
    batches = read(pipeline(split))
    views = {}
    for batch in batches:
        for image, first, second in zip(batch.image_ids.tolist(), batch.first, batch.second, strict=True):
            views.setdefault(image, []).append((first, second))
    assert {len(found) for found in views.values()} == {3}
    for batch in once:
        for image, first, second in zip(batch.image_ids.tolist(), batch.first, batch.second, strict=True):
            assert first.equal(views[image][0][0])
            assert second.equal(views[image][0][1])
    for found in views.values():
        assert not any(found[0][side].equal(found[turn][side]) for turn in (1, 2) for side in (0, 1))
        assert not found[1][0].equal(found[2][0])
    same(read(pipeline(split, workers=0), start=5), batches[5:])


def test_a_plan_with_counts_cuts_the_permuted_shards():
    counts = [5, 0, 7, 4]
    plan = plan_epoch(4, counts, readers=3, share=5, seed=1, epoch=2)
    taken = [(piece.shard, piece.first + each) for pieces in plan for piece in pieces for each in range(piece.count)]
    assert len(taken) == len(set(taken)) == 15
    assert all(image < counts[shard] for shard, image in taken)
    assert plan_epoch(1, [4], readers=1, share=10, seed=0, epoch=0) == [
        [Piece(0, 0, 4, 0), Piece(0, 0, 4, 1), Piece(0, 0, 2, 2)]
    ]
    orders = {
        tuple(piece.shard for piece in plan_epoch(40, None, readers=1, share=1, seed=seed, epoch=epoch)[0])
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4, "another order of shards for every seed and epoch"


@pytest.mark.parametrize(("length", "size"), [(50, 8), (5, 8), (50, 1), (2100, 300)])
def test_a_shuffle_buffer_gives_each_position_once_and_never_too_early(length, size):
    given = [*ShuffleBuffer(length, size, 1, 2, 3)]
    assert sorted(given) == [*range(length)]
    assert all(position < place + size for place, position in enumerate(given))
    assert (given == [*range(length)]) == (size == 1)
    assert given == [*ShuffleBuffer(length, size, 1, 2, 3)]
    if size > 1:
        assert given != [*ShuffleBuffer(length, size, 1, 3, 3)]
        assert np.corrcoef(given, range(length))[0, 1] < 1


def test_a_shuffle_buffer_never_draws_the_same_numbers_again(monkeypatch):
    true, asked = stream_order.uniforms, []
    monkeypatch.setattr(
        stream_order, "uniforms", lambda *words, count: (asked.append(words), true(*words, count=count))[1]
    )
    assert len([*ShuffleBuffer(2100, 300, 1, 2, 3)]) == 2100
    assert len(asked) == len(set(asked)) == 3


# -- shards -------------------------------------------------------------------------------------------------------


def test_urls_pipes_and_compressed_shards_read_alike(shards, content):
    system = fsspec.filesystem("memory")
    (shards / "gz").mkdir()
    for number, shard in enumerate(content):
        with system.open(f"/bucket/{number:03d}.tar", "wb") as file:
            file.write(shard)
        (shards / "gz" / f"{number:03d}.tar.gz").write_bytes(gzip.compress(shard))
    whole = read(pipeline(opened(f"{shards}/*.tar", images=16, readers=4)))
    for spec in (
        "memory://bucket/{000..004}.tar",
        "memory://bucket/*.tar",
        f"file://{shards}/{{000..004}}.tar",
        f"pipe:cat {shards}/{{000..004}}.tar",
        f"pipe:cat {shards}/gz/{{000..004}}.tar.gz",
        f"{shards}/{{000,001}}.tar::{shards}/00[234].tar",
    ):
        same(read(pipeline(opened(spec, images=16, readers=4))), whole)


def test_names_of_shards(tmp_path, monkeypatch):
    assert expand_shards("s3://b/{08..10}-{a,b}.tar") == [
        f"s3://b/{n}-{w}.tar" for n in ("08", "09", "10") for w in "ab"
    ]
    assert expand_shards("pipe:awk '{print $1,$2}' {1..2}.tar") == [
        f"pipe:awk '{{print $1,$2}}' {n}.tar" for n in (1, 2)
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.tar").touch()
    assert expand_shards("~/*.tar") == [f"{tmp_path}/a.tar"]
    for spec, says in (
        ("", "found no shard at"),
        (f"{tmp_path}/*.tgz", r"found no shard at .*\*\.tgz"),
        ("x{0..9999999}.tar", r"found \{0\.\.9999999\} in .*, expected up to 1,000,000 shards"),
        ("nowhere://b/*.tar", r"cannot list nowhere://b/\*\.tar \(Protocol not known"),
    ):
        with pytest.raises(DataError, match=says):
            expand_shards(spec)


def test_what_cannot_be_read_is_one_line(shards, tmp_path):
    for spec, says in (
        (f"{tmp_path}/none.tar", r"cannot read the shard .*none\.tar \(.*No such file"),
        ("pipe:echo broken >&2; exit 3", r"cannot read the shard pipe:.* \(the command ended with status 3: broken\)"),
        (f"pipe:head -c 9000 {shards}/000.tar; exit 1", r"\(the command ended with status 1\)"),
        ("memory://nowhere/a.tar", r"cannot read the shard memory://nowhere/a\.tar"),
        ("nowhere://b/a.tar", r"cannot read nowhere://b/a\.tar \(Protocol not known"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            read(pipeline(opened(spec, images=8)))
        assert len(str(caught.value).splitlines()) == 1
    made = pipeline(opened(f"{tmp_path}/none.tar", images=8), workers=1)
    with pytest.raises(DataError, match=r"^data: cannot read the shard .*none\.tar \([^\n]*No such file[^\n]*\)$"):
        read(made)
    made.close()


def test_a_shard_that_fails_for_a_while_is_read_on(shards, monkeypatch):
    whole = [*read_images(f"{shards}/002.tar", lambda _: True)]
    assert [number for number, _, _ in whole] == [*range(7)]
    once, failures = stream_reader._read_once, iter([3, 0, 5])

    def failing(*arguments):
        fail = next(failures, None)
        for place, found in enumerate(once(*arguments)):
            if place == fail:
                raise ConnectionResetError("connection reset")
            yield found

    monkeypatch.setattr(stream_reader, "_read_once", failing)
    assert [*read_images(f"{shards}/002.tar", lambda _: True)] == whole
    failures = iter([0, 0, 0, 0])
    with pytest.raises(DataError, match=r"cannot read the shard .*002\.tar \(connection reset\)"):
        next(read_images(f"{shards}/002.tar", lambda _: True))


@pytest.mark.parametrize("by", ["a reader", "a worker"])
def test_a_command_ends_with_its_reader(shards, tmp_path, by):
    command = f"pipe:cat {shards}/002.tar; sleep 60 & echo $! > {tmp_path}/pid; wait"
    if by == "a reader":
        images = read_images(command, lambda _: True)
    else:
        images = pipeline(opened(command, images=4, readers=1, buffer=1), batch=2, workers=1)
    assert len([*islice(images, 2)]) == 2
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        pass
    images.close()
    status = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    # A killed process is there for a moment; its end is waited for, far below the minute that it would sleep.
    for _ in range(1000):
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.01)
    else:
        pytest.fail("the command outlives its reader")
    assert len([*read_images(f"pipe:cat {shards}/002.tar; sleep 60", lambda _: True, stop=7)]) == 7


def members(*named):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as shard:
        for name, part in named:
            info = tarfile.TarInfo(name)
            info.size = len(part)
            shard.addfile(info, io.BytesIO(part))
    return file.getvalue()


def test_of_a_sample_one_image_is_read(tmp_path):
    """An index counts samples: with every mask an image, half of the samples would never be read."""
    parts = [
        (kind, part)
        for number in range(6)
        for kind, part in ((f"{number}.mask.png", b""), (f"{number}.jpg", jpeg(number)))
    ]
    (tmp_path / "000.tar").write_bytes(members(*parts[:8]))
    (tmp_path / "001.tar").write_bytes(members(*parts[9::2], *parts[8::2]))  # in two runs
    index(tmp_path, (4, 2))
    split = opened(f"{tmp_path}/*.tar", buffer=2, readers=1)
    batches = read(pipeline(split, batch=2))
    assert sorted(ids(batches)) == [0, 1, 2, 3, 1 << 32, 1 << 32 | 1]
    assert not any(batch.corrupt for batch in batches)
    same(read(pipeline(split, batch=2), start=2), batches[2:])
    wanted = [*read_images(f"{tmp_path}/000.tar", lambda number: number == 2, stop=3)]
    assert [(number, content) for number, _, content in wanted] == [(0, None), (1, None), (2, jpeg(2))]


def test_names_with_dots_are_held_a_few_at_a_time(tmp_path, monkeypatch):
    """Whether each is a sample of its own is known at the end of their run, which can be that of the shard."""
    (tmp_path / "a.tar").write_bytes(members(*((f"x.{number:03d}.jpg", b"image") for number in range(200))))
    content, read = stream_reader._content, []
    monkeypatch.setattr(stream_reader, "_content", lambda *arguments: read.append(1) or content(*arguments))
    images = read_images(f"{tmp_path}/a.tar", lambda _: True)
    assert next(images)[0] == 0
    assert len(read) == 64
    assert [number for number, _, _ in images] == [*range(1, 200)]


# -- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_damage_is_replaced_and_named_and_changes_no_order(shards, known):
    """Corrupt images and a truncated shard; the order and the views of the others stay, also after a resume."""
    if known:
        index(shards)
    good = read(pipeline(opened(f"{shards}/*.tar", images=24, buffer=4, readers=2)))
    (shards / "001.tar").write_bytes(tar([jpeg(5), b"no image", b""], 100))
    (shards / "003.tar").write_bytes((shards / "003.tar").read_bytes()[:3000])
    split = opened(f"{shards}/*.tar", images=24, buffer=4, readers=2)
    batches = read(pipeline(split))
    corrupt = {image: reason for batch in batches for image, reason in batch.corrupt.items()}
    assert {image >> 32 for image in corrupt} == {1, 3}
    assert {1 << 32 | 1, 1 << 32 | 2} <= set(corrupt)
    assert any("the shard is truncated or corrupt" in reason for reason in corrupt.values())
    for batch in batches:
        assert not set(batch.image_ids.tolist()) & set(corrupt), "another image takes its place"
    if known:
        kept = [
            [left == right for left, right in zip(one.image_ids.tolist(), other.image_ids.tolist(), strict=True)]
            for one, other in zip(good, batches, strict=True)
        ]
        assert sum(map(sum, kept)) == 24 - len(corrupt)
    for start in (1, 2):
        same(read(pipeline(split, workers=2), start=start), batches[start:])


def test_an_index_that_counts_too_many_gives_corrupt_images(shards):
    index(shards, (5, 3, 9, 4, 5))
    (batch, *_) = read(pipeline(opened(f"{shards}/*.tar", buffer=100, readers=1), batch=26))
    assert sorted(batch.corrupt) == [2 << 32 | 7, 2 << 32 | 8]
    assert "the shard holds 7 images, fewer than the index says" in batch.corrupt[2 << 32 | 7]


def test_shards_without_a_good_image(tmp_path, content):
    (tmp_path / "empty.tar").write_bytes(tar([]))
    (tmp_path / "bad.tar").write_bytes(tar([b"no image"] * 4))
    (tmp_path / "text.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(DataError, match="found no image in 1 shards of stream:"):
        read(pipeline(opened(f"{tmp_path}/empty.tar", images=8)))
    with pytest.raises(DataError, match=r"corrupt images in a row, the first: .*bad"):
        read(pipeline(opened(f"{tmp_path}/bad.tar", images=8)))
    with pytest.raises(ShardError, match=r"text\.tar: the shard is truncated or corrupt \("):
        next(read_images(f"{tmp_path}/text.tar", lambda _: True))
    (tmp_path / "cut.tar").write_bytes(content[0][: -tarfile.RECORDSIZE])
    with pytest.raises(ShardError, match="truncated or corrupt"):
        list(read_images(f"{tmp_path}/cut.tar", lambda _: True))
    (_, name, refused), *_ = read_images(f"{tmp_path}/bad.tar", lambda _: True, Limits(file_bytes=4))
    assert name.endswith("bad.tar:'000000.jpg'")
    assert "data.max_file_bytes" in str(refused)


# -- numbers of images, and refusals --------------------------------------------------------------------------------


def test_how_many_images_comes_from_the_configuration_or_an_index(shards, capsys):
    spec = f"{shards}/*.tar"
    with pytest.raises(DataError, match=r"data\.images: found none and no index beside the shards of .*data check"):
        pipeline(opened(spec))
    assert main(["data", "check", f"stream:{spec}", "--workers", "0", "--json", str(shards / "out.json")]) == 0
    assert "index of the shards" in capsys.readouterr().out
    found = json.loads((shards / "out.json").read_text())
    assert (found["images"], [*found["counts"].values()]) == (24, [*SIZES])
    assert (len(opened(spec)), opened(spec).counts) == (24, SIZES)
    assert len(opened(spec, images=10)) == 10
    for name, text in (
        ("sizes.json", {f"{number:03d}.tar": size for number, size in enumerate(SIZES)}),
        ("index.json", {"shardlist": [{"url": f"{n:03d}.tar", "nsamples": size} for n, size in enumerate(SIZES)]}),
    ):
        (shards / name).write_text(json.dumps(text))
        assert opened(f"file://{shards}/*.tar").counts == SIZES
        (shards / name).write_text("{}")
        assert opened(f"file://{shards}/*.tar").counts is None


def check(spec, capsys):
    assert main(["data", "check", f"stream:{spec}", "--workers", "0"]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_counts_are_those_of_the_files_as_they_are(shards, content, capsys):
    """A check's counts end with the files that it counted; an index beside the shards comes first."""
    spec = f"{shards}/*.tar"
    check(spec, capsys)
    assert open_source(f"stream:{spec}").notes == []
    (shards / "001.tar").write_bytes(content[0])
    split = opened(spec, images=16)
    assert (split.counts, len(split)) == (None, 16)
    (note,) = open_source(f"stream:{spec}").notes
    assert re.search(r": 1 of 5 shards changed since the check of 20\d\d-\d\d-\d\d; 'synco-fast data check str", note)
    with pytest.raises(DataError, match=r"data\.images: found none, .*; stream:.*: 1 of 5 shards changed since"):
        len(opened(spec))
    assert "index beside" not in check(spec, capsys)
    assert opened(spec).counts == (5, 5, 7, 4, 5)
    index(shards, (5, 4, 7, 4, 5))
    assert opened(spec).counts == (5, 4, 7, 4, 5), "it moves with the shards"
    assert "index beside the shards: found 25 images in it, expected 26, as in the shards" in check(spec, capsys)


def test_counts_of_an_older_version_do_not_count(shards, capsys):
    """It counted every image of a sample."""
    check(f"{shards}/*.tar", capsys)
    (file,) = (shards.parent / "cache/synco-fast/lists").glob("*.json")
    kept = json.loads(file.read_text())
    del kept["rules"]
    file.write_text(json.dumps(kept))
    split = opened(f"{shards}/*.tar")
    assert split.counts is None
    assert re.search(
        r"the check of 20\d\d-\d\d-\d\d is of an earlier version, by other rules; 'synco-fast data", split.note
    )


def test_a_check_without_a_cache_says_what_it_found(shards, capsys, monkeypatch, tmp_path):
    (tmp_path / "no-folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
    (shards / "001.tar").write_bytes(tar([b"no image"]))
    for source in (f"stream:{shards}/*.tar", f"tar:{shards}"):
        assert main(["data", "check", source, "--workers", "0", "--json", str(tmp_path / "found.json")]) == 1
        said = capsys.readouterr().out
        assert "cache: cannot write the" in said
        assert "001.tar:'000000.jpg': not an image" in said
        found = json.loads((tmp_path / "found.json").read_text())
        assert (found["images"], len(found["corrupt"]), found["lists"]) == (22, 1, [])


def test_a_pack_streams_by_its_own_index(image_folder, tmp_path):
    pack_source(open_source(str(image_folder)), tmp_path / "pack", PackSettings(shard_bytes=9000), workers=0)
    split = opened(f"file://{tmp_path}/pack/train/*.tar")
    assert sum(split.counts) == 33
    assert len(split.counts) > 2
    found = read(pipeline(split, batch=33))
    assert len(set(ids(found))) == 33


def test_what_does_not_fit_is_refused(shards, tmp_path):
    spec, split = f"{shards}/*.tar", opened(f"{shards}/*.tar", images=24)
    for settings, arguments, says in (
        ({"readers": 3}, {}, r"data\.readers: found 3, expected a divisor of 8 \(training\.batch\)"),
        ({"readers": 4}, {"world": 8}, r"data\.readers: found 4, expected a multiple of 8, the number of processes"),
        ({"readers": 8}, {}, r"data\.readers: found 8, expected up to 5, the number of shards of .*; with an index"),
        ({}, {"batch": 32}, r"training\.batch: found 32, expected up to 24, the images of an epoch"),
    ):
        with pytest.raises(DataError, match=says):
            pipeline(opened(spec, images=24, **settings), **arguments)
    for name in ("dali", "resident"):
        with pytest.raises(DataError, match=rf"data\.pipeline: found {name} for stream:.*, expected auto or tor"):
            build_pipeline(split, Recipe(size=8), batch=8, seed=0, name=name)
    assert pipelines_for(split, torch.device("cpu")) == ["torchvision"]
    for use in (
        lambda: evaluation_batches(split, Recipe(size=8)),
        lambda: share_of(split, 0.5),
        lambda: pack_source(open_source(f"stream:{spec}"), tmp_path / "pack", PackSettings()),
        lambda: split.read(0),
    ):
        with pytest.raises(DataError, match=r"found stream:.*, a stream, expected a source with random access for"):
            use()
