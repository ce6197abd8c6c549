"""Pipelines that hand decoded images to fused views, with plain PyTorch in the kernels' place."""

from __future__ import annotations

import sys
import threading
import types
from dataclasses import fields

import numpy as np
import pytest
import torch

from synco_fast.data.augment.draw import draw_views
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import normalise
from synco_fast.data.pipelines.build import build_pipeline, has_dali
from synco_fast.data.pipelines.fused import WORDS, FusedViews, packed
from synco_fast.data.pipelines.resident import ResidentPipeline
from synco_fast.data.sources.open import ArraySplit, open_source
from synco_fast.kernels import views
from synco_fast.kernels.proof import augment_shapes
from synco_fast.kernels.views import as_parameters, as_words
from synco_fast.kernels.views.reference import plain_views
from tests.data.photos import photo
from tests.data.test_pipelines import CORRUPT, damage, special
from tests.support.calls import Calls

RECIPE = Recipe(size=24, min_size=16, size_step=8, start_ramp=0, end_ramp=1, solarize_probability=0.3)
DALI = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
NAMES = ["resident", pytest.param("dali", marks=DALI)]


class Watched:
    """`plain_views`, and what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, *given, **options):
        self.calls.append((given, options))
        return plain_views(*given, **options)


@pytest.fixture
def split(tmp_path):
    """JPEG files of one size, upright and not."""
    for number in range(9):
        picture = photo(48, 40, number)
        exif = picture.getexif()
        exif[274] = 3 if number % 2 else 1  # turned by half a turn
        picture.save(tmp_path / f"{number}.jpg", quality=95, exif=exif)
    return open_source(str(tmp_path)).train


def pipeline(split, name, **changes):
    settings = {"batch": 4, "seed": 3, "workers": 0, "dtype": torch.float32}
    return build_pipeline(split, RECIPE, name=name, **(settings | changes))


def epoch(pipe, number, start=0):
    pipe.set_epoch(number, start)
    return list(pipe)


def near(one, other, mean=1.5, largest=30):
    difference = (one.float() - other.float()).abs()
    assert difference.mean() <= mean
    assert difference.max() <= largest


@pytest.mark.parametrize("name", NAMES)
def test_fused_views_are_those_of_the_portable_pipeline(split, name):
    """Normalised in the encoder's dtype, in the order and of the size of each epoch."""
    ours, theirs, make = pipeline(split, name), pipeline(split, "torchvision"), Watched()
    assert isinstance(ours, FusedViews)
    epoch(ours, 0)  # before the kernels are validated
    ours.use_kernels(make)
    for number in (1, 0):
        for batch, other in zip(epoch(ours, number), epoch(theirs, number), strict=True):
            assert torch.equal(batch.image_ids, other.image_ids)
            assert batch.first.dtype == torch.float32
            assert batch.first.is_contiguous(memory_format=torch.channels_last)
            pixels = batch.as_pixels(RECIPE)
            # Levels of 255; DALI decodes by another library.
            near(pixels.first, other.first)
            near(pixels.second, other.second)
    assert [options["size"] for _, options in make.calls] == [24, 24, 16, 16]
    for _, options in make.calls:
        assert (options["dtype"], options["mean"], options["std"]) == (torch.float32, RECIPE.mean, RECIPE.std)
    whole = epoch(ours, 1)[1]
    assert torch.equal(epoch(ours, 1, start=1)[0].first, whole.first), "starting in the middle"
    half = pipeline(split, name, rank=1, world=2)
    half.use_kernels(plain_views)
    assert torch.equal(epoch(half, 1)[1].second, whole.second[2:]), "the share of a rank"
    ours.close()


def test_arrays_of_one_and_of_three_channels_are_read_where_they_lie():
    colours = np.random.default_rng(0).integers(0, 256, (9, 20, 26, 3), dtype=np.uint8)
    for pixels, planar, channels in ((colours, False, 3), (colours[..., 0].copy(), True, 1)):
        ours, make = pipeline(ArraySplit(pixels, None, "noise"), "resident", dtype=torch.uint8), Watched()
        ours.use_kernels(make)
        theirs = pipeline(ArraySplit(pixels, None, "noise"), "resident")
        for batch, other in zip(epoch(ours, 0), epoch(theirs, 0), strict=True):
            assert batch.first.dtype == torch.uint8
            near(batch.first, other.first, mean=0.2, largest=4)
        (buffer, offsets, sizes, *_), options = make.calls[0]
        assert (options["planar"], options["channels"]) == (planar, channels)
        assert buffer.data_ptr() == ours._pixels.data_ptr(), "no copy of the set"
        assert offsets.tolist() == [20 * 26 * channels * number for number in range(9)]
        assert sizes.tolist() == [[20, 26]] * 9


def test_a_batch_takes_few_operations_of_the_host(monkeypatch):
    """Beside the four kernels only buffers and views of tensors: an operation that launches costs the host more."""
    launches = []

    class Stage:
        def __getitem__(self, grid):
            return lambda *given, **options: launches.append(grid)

    stages = types.ModuleType("stages")
    stages.crop = stages.colour = stages.blur_rows = stages.blur_columns = Stage()
    monkeypatch.setattr(views, "stages", stages, raising=False)
    monkeypatch.setitem(sys.modules, "synco_fast.kernels.views.stages", stages)
    monkeypatch.setattr(views.launch, "unserved_by_triton", lambda pixels: None)
    ours = pipeline(ArraySplit(np.zeros((9, 20, 26, 3), np.uint8), None, "noise"), "resident", dtype=torch.bfloat16)
    ours.use_kernels(views.make_views)
    batches = iter(ours)
    next(batches)
    with Calls() as seen:
        next(batches)
    assert launches == [(8, 1)] * 8
    assert seen.names == 4 * ["empty"]


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_thread_that_draws_ahead_changes_nothing(split, ahead):
    plain, ours = (ResidentPipeline(split, RECIPE, batch=2, seed=3, workers=0, ahead=many) for many in (0, ahead))
    for number, start in ((0, 0), (1, 2)):
        found, wanted = epoch(ours, number, start), epoch(plain, number, start)
        assert len(found) == len(wanted) == 4 - start
        for batch, other in zip(found, wanted, strict=True):
            assert torch.equal(batch.image_ids, other.image_ids)
            assert torch.equal(batch.first, other.first)
            assert torch.equal(batch.second, other.second)
    batches = iter(ours)
    next(batches)
    assert any(thread.name.startswith("draws") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("draws") for thread in threading.enumerate())


@DALI
def test_ragged_special_and_corrupt_files_reach_the_kernels_with_offsets(tmp_path):
    for number, size in enumerate(((40, 30), (17, 61), (64, 9))):
        photo(*size, number).save(tmp_path / f"good{number}.jpg")
    special(tmp_path)
    damage(tmp_path)
    split = open_source(str(tmp_path)).train
    (tmp_path / "missing.jpg").unlink()
    make = Watched()
    ours, theirs = (pipeline(split, name, batch=len(split)) for name in ("dali", "torchvision"))
    ours.use_kernels(make)
    for number in range(2):  # again, after the graph was rebuilt without what it cannot decode
        (batch,), (other,) = epoch(ours, number), epoch(theirs, number)
        assert torch.equal(batch.image_ids, other.image_ids)
        assert sorted(split.name(index).rpartition("/")[2] for index in batch.corrupt) == list(CORRUPT)
        near(batch.as_pixels(RECIPE).first, other.first, mean=2, largest=80)
    (pixels, offsets, sizes, images, _), options = make.calls[-1]
    assert offsets.tolist() == [0, *(3 * sizes.prod(1)).cumsum(0).tolist()[:-1]]
    assert pixels.numel() == 3 * sizes.prod(1).sum()
    assert len({tuple(size) for size in sizes.tolist()}) > 3, "ragged"
    assert images.tolist() == list(range(len(split))), "both views of each"
    assert (options["planar"], options["channels"]) == (False, 3)
    ours.close()


@DALI
def test_an_image_of_another_size_than_its_header_says_is_decoded_by_pillow(split, monkeypatch):
    from synco_fast.data.pipelines.dali import reader

    expected = epoch(pipeline(split, "torchvision"), 0)
    chosen = next(image for image in expected[0].image_ids.tolist() if image % 2 == 0)
    real, odd = reader.plain_jpeg_size, split.read_bytes(chosen)
    assert real(odd) == (40, 48)
    monkeypatch.setattr(
        reader, "plain_jpeg_size", lambda content, limits: (48, 40) if content == odd else real(content)
    )
    ours = pipeline(split, "dali")
    ours.use_kernels(Watched())
    for number in range(2):
        found = epoch(ours, number)
        assert ours._runner._failed == {chosen}
        for batch, other in zip(found, expected, strict=True) if number == 0 else ():
            assert torch.equal(batch.image_ids, other.image_ids)
            assert not batch.corrupt
            near(batch.as_pixels(RECIPE).first, other.first, mean=2, largest=80)
    ours.close()


@DALI
def test_windows_leave_no_room_for_kernels(split):
    assert pipeline(split, "dali", decode="windows").kernel_input is None
    assert not isinstance(pipeline(split, "torchvision"), FusedViews)


@pytest.mark.parametrize("name", NAMES)
def test_a_proof_gets_the_shapes_of_the_run(split, name):
    given = pipeline(split, name, dtype=torch.bfloat16, world=2).kernel_input
    image = [40, 48] if name == "resident" else None
    assert augment_shapes(**given) == {
        "sides": [16, 24],
        "views": 4,
        "dtype": "bfloat16",
        "image": image,
        "channels": 3,
        "planar": name == "resident",
        "sigma": 2.0,
    }


def test_parameters_survive_their_packing():
    count = 50
    drawn = draw_views(
        RECIPE,
        seed=0,
        epoch=1,
        images=np.arange(count),
        views=np.zeros(count, np.int64),
        sizes=np.full((count, 2), 300),
    )
    words = packed(drawn)
    assert (words.shape, words.dtype) == ((count, WORDS), np.int32)
    found = as_parameters(torch.from_numpy(words))
    assert torch.equal(as_words(found), torch.from_numpy(words))
    assert set(found) == {field.name for field in fields(drawn)}
    for name, values in found.items():
        wanted = torch.from_numpy(getattr(drawn, name))
        assert torch.equal(values, wanted.to(values.dtype)), name
        assert values.is_floating_point() == wanted.is_floating_point()
        assert (values.dtype == torch.bool) == (wanted.dtype == torch.bool)


def test_normalised_bfloat16_is_what_the_engine_makes_of_pixels(split):
    pipes = [pipeline(split, "resident", dtype=dtype) for dtype in (torch.uint8, torch.bfloat16)]
    for pipe in pipes:
        pipe.use_kernels(plain_views)
    pixels, values = (epoch(pipe, 0)[0].first for pipe in pipes)
    expected = normalise(pixels, RECIPE, torch.channels_last, torch.bfloat16)
    assert (values.float() - expected.float()).abs().max() <= 2**-7, "a unit in the last place of bfloat16"
    again = normalise(values, RECIPE, torch.channels_last, torch.bfloat16)
    assert again.data_ptr() == values.data_ptr()
