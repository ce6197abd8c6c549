"""What every pipeline promises: complete epochs, shares for ranks, reproducible views, exact resume, no fatal file."""

import numpy as np
import pytest
import torch
from PIL import Image

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import CorruptImageError, DataError
from synco_fast.data.pipelines import build, resident
from synco_fast.data.pipelines.build import build_pipeline, choose_pipeline, evaluation_batches, has_dali
from synco_fast.data.pipelines.epochs import replace_corrupt
from synco_fast.data.sources.open import ArraySplit, open_source
from tests.data.photos import photo

RECIPE = Recipe(size=16)
DALI = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
NAMES = ["torchvision", "resident", pytest.param("dali", marks=DALI)]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def split(image_folder):
    return open_source(str(image_folder)).train


def pipeline(split, name, **changes):
    return build_pipeline(split, RECIPE, name=name, **({"batch": 8, "seed": 3, "workers": 0} | changes))


def epoch(pipe, number, start=0):
    pipe.set_epoch(number, start)
    return list(pipe)


def same(one, other):
    return all(torch.equal(getattr(one, field), getattr(other, field)) for field in ("first", "second", "image_ids"))


def test_every_epoch_is_complete_and_of_equal_length(split, name):
    pipe = pipeline(split, name, batch=11)
    orders = []
    for number in range(3):
        batches = epoch(pipe, number)
        assert len(batches) == len(pipe) == 3
        orders.append(torch.cat([batch.image_ids for batch in batches]).tolist())
        assert sorted(orders[-1]) == list(range(33)), "each image once"
        for batch in batches:
            assert batch.first.shape == batch.second.shape == (11, 3, 16, 16)
            assert not torch.equal(batch.first, batch.second)
            assert not batch.corrupt
    assert orders[0] != orders[1] != orders[2]


def test_a_last_batch_that_is_not_full_is_skipped_another_in_each_epoch(split, name):
    pipe = pipeline(split, name, batch=10)
    left = []
    for number in range(4):
        seen = torch.cat([batch.image_ids for batch in epoch(pipe, number)]).tolist()
        assert len(seen) == len(set(seen)) == 30
        left.append(set(range(33)) - set(seen))
    assert len({frozenset(images) for images in left}) > 1


def test_ranks_share_an_epoch_without_overlap_and_make_the_views_of_one_process(split, name):
    whole = epoch(pipeline(split, name, batch=9), 2)
    shares = [epoch(pipeline(split, name, batch=9, rank=rank, world=3), 2) for rank in range(3)]
    assert {len(share) for share in shares} == {3}
    for step, batch in enumerate(whole):
        for field in ("image_ids", "first", "second"):
            together = torch.cat([getattr(share[step], field) for share in shares])
            assert torch.equal(together, getattr(batch, field)), field


def test_views_depend_on_seed_and_epoch_not_on_workers(split, name):
    alone, shared = pipeline(split, name), pipeline(split, name, workers=2)
    first = [epoch(alone, number) for number in (0, 1)]
    assert all(same(a, b) for number in (0, 1) for a, b in zip(epoch(shared, number), first[number], strict=True))
    assert not same(epoch(pipeline(split, name, seed=4), 0)[0], first[0][0])
    shared.close()
    by_image = [
        {int(image): view for batch in batches for image, view in zip(batch.image_ids, batch.first, strict=True)}
        for batches in (*first, epoch(pipeline(split, name, seed=4), 0))
    ]
    for other in by_image[1:]:
        assert len(shared_images := by_image[0].keys() & other.keys()) > 20
        assert not any(torch.equal(by_image[0][image], other[image]) for image in shared_images), "not order alone"


def test_starting_in_the_middle_meets_the_same_batches(split, name):
    whole = epoch(pipeline(split, name), 1)
    assert all(same(a, b) for a, b in zip(whole[2:], epoch(pipeline(split, name), 1, start=2), strict=True))


def test_an_epoch_given_up_in_the_middle_leaves_no_trace(split, name):
    pipe, fresh = pipeline(split, name), pipeline(split, name)
    pipe.set_epoch(0)
    batches = iter(pipe)
    next(batches)
    del batches
    assert all(same(a, b) for a, b in zip(epoch(pipe, 1), epoch(fresh, 1), strict=True))
    pipe.set_epoch(0)
    kept = iter(pipe)  # as by the traceback of an error in a notebook
    next(kept)
    assert all(same(a, b) for a, b in zip(epoch(pipe, 1), epoch(fresh, 1), strict=True))
    del kept
    assert all(same(a, b) for a, b in zip(epoch(pipe, 2), epoch(fresh, 2), strict=True))
    for _ in range(2):
        pipe.close()


def test_views_grow_by_epoch_and_are_those_of_a_recipe_of_that_size(split, name):
    """Also where an epoch begins in its middle, on a share of the ranks, and going back."""
    growing = Recipe(size=32, min_size=16, size_step=8, start_ramp=0, end_ramp=3)
    options = {"name": name, "batch": 8, "seed": 3, "workers": 0}
    pipe, share = (build_pipeline(split, growing, **options, rank=0, world=world) for world in (1, 2))
    seen = {number: epoch(pipe, number, start=3)[0] for number in (1, 3)}
    for number, size in ((1, 24), (3, 32)):
        (wanted,) = epoch(build_pipeline(split, Recipe(size=size), **options), number, start=3)
        assert seen[number].first.shape == (8, 3, size, size)
        assert same(seen[number], wanted)
    assert same(epoch(pipe, 1, start=3)[0], seen[1])
    assert torch.equal(epoch(share, 3, start=3)[0].second, seen[3].second[:4])
    assert epoch(share, 0, start=3)[0].first.shape[-1] == 16


def test_loading_leaves_the_global_generator_alone(split, name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch(pipeline(split, name), 0)
    assert torch.equal(before, torch.get_rng_state())


def test_too_few_images_for_a_step(split, name):
    with pytest.raises(DataError, match=r"training\.batch: found 34, expected up to 33"):
        pipeline(split, name, batch=34)
    with pytest.raises(DataError, match=r"training\.batch: found 9, expected a multiple of 2"):
        pipeline(split, name, batch=9, world=2)
    with pytest.raises(DataError, match="rank: found 2, expected 0 to 1"):
        pipeline(split, name, batch=2, rank=2, world=2)


def test_arrays(name):
    colours = ArraySplit(np.random.default_rng(0).integers(0, 256, (9, 20, 24, 3), dtype=np.uint8), None, "noise")
    gray = ArraySplit(colours.images[..., 0].copy(), None, "gray")
    for split in (colours, gray):
        ours, theirs = (epoch(pipeline(split, chosen, batch=4), 0) for chosen in (name, "torchvision"))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.image_ids, b.image_ids)
            assert (a.first.int() - b.first.int()).abs().float().mean() < 1.5


# -- what real folders hold -------------------------------------------------------------------------------------------

CORRUPT = (
    "bent.jpg",
    "empty.jpg",
    "headless.jpg",
    "huge.png",
    "missing.jpg",
    "text.jpg",
    "truncated.jpg",
    "truncated.png",
)


def damage(folder):
    """Eight files that cannot be read, by name, beside the good ones of the folder."""
    sound = folder / "whole.jpg"
    photo(200, 150).save(sound, quality=95)
    content = sound.read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("I am no picture")
    photo(60, 60).save(folder / "truncated.png")
    (folder / "truncated.png").write_bytes((folder / "truncated.png").read_bytes()[:2000])
    (folder / "headless.jpg").write_bytes(content[300:])
    # A header that promises 20,000 x 20,000 pixels, as a decompression bomb has.
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    (folder / "missing.jpg").write_bytes(content)
    # Header and end are there; what lies between has no meaning.
    scan = content.index(b"\xff\xda")
    (folder / "bent.jpg").write_bytes(content[: scan + 2] + b"\x00\x03\x01" + b"\xff\xd9")
    sound.unlink()


def special(folder):
    """Files that are sound and out of the ordinary."""
    image = photo(80, 60)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("L").save(folder / "gray.jpg")
    image.convert("P").save(folder / "palette.png")
    image.convert("RGBA").save(folder / "transparent.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    exif = Image.Exif()
    for orientation in (3, 6):
        exif[0x0112] = orientation
        image.save(folder / f"turned{orientation}.jpg", exif=exif, quality=95)
    Image.new("RGB", (1, 1), (10, 200, 30)).save(folder / "pixel.png")
    Image.new("RGB", (1, 1), (10, 200, 30)).save(folder / "pixel.jpg")
    image.save(folder / "progressive.jpg", progressive=True)
    image.save(folder / "still.gif")
    image.save(folder / "picture.webp")
    image.save(folder / "wrong-suffix.png", format="JPEG", quality=95)


@pytest.mark.parametrize("name", ["torchvision", pytest.param("dali", marks=DALI)])
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_replaced_and_named_and_never_end_a_run(tmp_path, name, workers):
    for number in range(16):
        photo(50, 40, number).save(tmp_path / f"good{number:02d}.jpg")
    damage(tmp_path)
    split = open_source(str(tmp_path)).train
    assert len(split) == 24
    (tmp_path / "missing.jpg").unlink()
    pipe = pipeline(split, name, batch=6, workers=workers)
    for number in range(2):
        batches = epoch(pipe, number)
        assert [len(batch.image_ids) for batch in batches] == [6] * 4
        corrupt = {index: reason for batch in batches for index, reason in batch.corrupt.items()}
        assert sorted(split.name(index).rpartition("/")[2] for index in corrupt) == list(CORRUPT)
        for index, reason in corrupt.items():
            assert split.name(index) in reason
            assert "\n" not in reason
        images = torch.cat([batch.image_ids for batch in batches]).tolist()
        assert not set(images) & set(corrupt)
        assert set(images) | set(corrupt) == set(range(24)), "every good image is there"
    pipe.close()


@pytest.mark.parametrize("name", ["torchvision", pytest.param("dali", marks=DALI)])
def test_special_files_are_read_alike_by_every_pipeline(tmp_path, name):
    special(tmp_path)
    split = open_source(str(tmp_path)).train
    (batch,) = epoch(pipeline(split, name, batch=len(split)), 0)
    assert not batch.corrupt
    still = Recipe(
        size=16, jitter_probability=0, grayscale_probability=0, blur_probability=0, flip_probability=0, area=(1, 1)
    )
    (batch,) = list(build_pipeline(split, still, name=name, batch=len(split), seed=0, workers=0))
    found = {
        split.name(i).rpartition("/")[2]: view for i, view in zip(batch.image_ids.tolist(), batch.first, strict=True)
    }
    assert found["gray.jpg"][0].equal(found["gray.jpg"][2])
    assert (found["pixel.png"].float().mean((1, 2)) - torch.tensor([10.0, 200, 30])).abs().max() <= 1
    upright = np.asarray(photo(80, 60).resize((16, 16), Image.Resampling.BILINEAR)).astype(float).transpose(2, 0, 1)
    for file in ("cmyk.jpg", "palette.png", "transparent.png", "progressive.jpg", "picture.webp", "wrong-suffix.png"):
        decoded = Image.open(tmp_path / file).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
        # Against Pillow's decoding of the same file, and against the picture before it was compressed.
        assert np.abs(found[file].numpy() - np.asarray(decoded).astype(float).transpose(2, 0, 1)).mean() < 1, file
        assert np.abs(found[file].numpy() - upright).mean() < 3, file
    for file, turns in (("turned3.jpg", 2), ("turned6.jpg", 3)):
        with Image.open(tmp_path / file) as stored:
            turned = np.rot90(np.asarray(stored), turns)
        expected = np.asarray(Image.fromarray(turned).resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        difference = np.abs(found[file].numpy().astype(float) - expected)
        assert difference.mean() < 20, file


def test_a_resident_set_replaces_what_is_broken(image_folder):
    (image_folder / "train" / "class1" / "3.jpg").write_bytes(b"")
    split = open_source(str(image_folder)).train
    victim = next(index for index in range(33) if split.name(index).endswith("class1/3.jpg"))
    for number in range(2):
        batches = epoch(pipeline(split, "resident", batch=11, workers=2), number)
        assert [list(batch.corrupt) for batch in batches if batch.corrupt] == [[victim]]
        images = torch.cat([batch.image_ids for batch in batches]).tolist()
        assert images.count(victim + 1) == 2
        assert victim not in images


def test_a_resident_set_has_images_of_one_size(tmp_path):
    for number, width in enumerate((20, 20, 24)):
        photo(width, 20).save(tmp_path / f"{number}.png")
    split, says = (
        open_source(str(tmp_path)).train,
        r"found \S+2\.png of 20 x 24 pixels among images of 20 x 20, expected",
    )
    for workers in (0, 1):
        with pytest.raises(DataError, match=f"^data.pipeline: {says} one size for resident; use another pipeline$"):
            pipeline(split, "resident", batch=2, workers=workers)
    images, numbers, _ = resident._Pixels(split, (20, 20))[range(2)]
    assert (images.shape, numbers) == ((2, 3, 20, 20), [0, 1]), "a file descriptor for a batch, not for each image"


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_corrupt_images_is_an_error(tmp_path, name, workers):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    split = open_source(str(tmp_path)).train
    says = r"^data: found 3 corrupt images, all that were tried of 3; the first: \S+ the file is empty$"
    with pytest.raises(DataError, match=says):
        next(iter(pipeline(split, name, batch=2, workers=workers)))


def test_a_long_row_of_corrupt_images_is_replaced_from_elsewhere():
    length, start = 1000, 300

    def read(index):
        if start <= index < start + 100:
            raise CorruptImageError(f"{index}: empty")
        return index

    neighbours = list(range(start, start + 64))
    for wanted in (start, start + 30):
        image, index, corrupt = replace_corrupt(length, wanted, read)
        assert image == index
        assert not start <= index < start + 100
        assert list(corrupt)[:64] == neighbours[:64] or wanted > start
        assert (image, index, corrupt) == replace_corrupt(length, wanted, read)
    assert len({replace_corrupt(length, wanted, read)[1] for wanted in range(start, start + 30)}) > 20
    assert replace_corrupt(length, start + 40, read)[1] == start + 100, "the next one, where it is near"


@pytest.mark.parametrize(("length", "reads"), [(3, 3), (500, 500), (1024, 1024), (100_000, 1015)])
def test_a_set_ends_a_run_where_nearly_all_of_it_is_corrupt(length, reads):
    tried = []

    def read(index):
        tried.append(index)
        if len(tried) < reads:
            raise CorruptImageError("empty")
        return index

    _, index, corrupt = replace_corrupt(length, 1, read)
    assert len(tried) == len(set(tried)) == reads
    assert index not in corrupt
    tried.clear()
    reads = length + 1
    with pytest.raises(DataError, match=f"of {length:,}; the first: empty"):
        replace_corrupt(length, 1, read)


# -- the choice -------------------------------------------------------------------------------------------------------


def test_the_choice(split, monkeypatch):
    arrays = ArraySplit(np.zeros((9, 28, 28), np.uint8), None, "zeros")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for installed in (True, False):
        monkeypatch.setattr("synco_fast.data.pipelines.build.has_dali", lambda installed=installed: installed)
        assert choose_pipeline("auto", arrays, gpu) == "resident"
        assert choose_pipeline("auto", split, cpu) == "torchvision"
        assert choose_pipeline("auto", split, gpu) == ("dali" if installed else "torchvision")
        assert choose_pipeline("torchvision", arrays, gpu) == "torchvision"
    with pytest.raises(DataError, match=r"data\.pipeline: found dali, expected .* where DALI is not installed"):
        choose_pipeline("dali", split, cpu)


@pytest.mark.parametrize(
    ("installed", "device", "pipeline", "wanted"),
    [
        (True, "cuda", "auto", "dali"),
        (True, "cuda", "dali", "dali"),
        (True, "cuda", "torchvision", "torchvision"),
        (False, "cuda", "auto", "torchvision"),
        (False, "cuda", "dali", "torchvision"),
        (True, "cpu", "dali", "torchvision"),
        (True, None, "auto", "torchvision"),
    ],
)
def test_what_decodes_for_an_evaluation(split, monkeypatch, installed, device, pipeline, wanted):
    monkeypatch.setattr(build, "has_dali", lambda: installed)
    monkeypatch.setattr(build, "evaluation_loader", lambda *_, **options: ("torchvision", options))
    if has_dali():
        monkeypatch.setattr(
            "synco_fast.data.pipelines.dali.pipeline.dali_evaluation", lambda *_, **options: ("dali", options)
        )
    elif wanted == "dali":
        pytest.skip("DALI is not installed")
    device = device and torch.device(device)
    chosen, options = evaluation_batches(split, RECIPE, batch=5, pipeline=pipeline, device=device, numbers=[1])
    assert chosen == wanted
    assert (options["batch"], options["numbers"]) == (5, [1])
    arrays = ArraySplit(np.zeros((9, 28, 28), np.uint8), None, "zeros")
    assert evaluation_batches(arrays, RECIPE, device=device)[0] == "torchvision"
