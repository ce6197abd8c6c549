"""The views' kernels against torchvision by the table of the pipelines, and against the pipelines themselves."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from synco_fast.data.augment.draw import ViewParameters, draw_views
from synco_fast.data.augment.ops import blur
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import normalise
from synco_fast.data.pipelines.build import build_pipeline, has_dali
from synco_fast.data.pipelines.torchvision import make_view, pixels_of
from synco_fast.data.sources.open import open_source
from synco_fast.kernels.views import as_words, launch, make_views
from synco_fast.kernels.views.validation import ViewsCase, validate_views
from tests.data import test_equality as table
from tests.data.photos import photo
from tests.support.devices import devices_entered

DALI = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")


def tensors(parameters):
    return {field.name: torch.from_numpy(getattr(parameters, field.name)) for field in fields(ViewParameters)}


def ragged(images, gap=7):
    """Images one after the other, last one first, with other bytes between them."""
    parts, offsets, at = [], [0] * len(images), 0
    for number in reversed(range(len(images))):
        parts += [np.full(gap, 255, np.uint8), np.asarray(images[number]).reshape(-1)]
        offsets[number] = at + gap
        at += gap + parts[-1].size
    sizes = [np.asarray(image).shape[:2] for image in images]
    return torch.from_numpy(np.concatenate(parts)), torch.tensor(offsets), torch.tensor(sizes)


@pytest.fixture(scope="module")
def views():
    """All cases of the table in one call, a program for each view."""
    block, launch._BLOCK = launch._BLOCK, 4096
    pixels, offsets, sizes = ragged([photo(9, 9, 5), table.IMAGE])
    images = torch.ones(len(table.CASES), dtype=torch.int64)
    found = make_views(pixels, offsets, sizes, images, tensors(table.all_cases()), size=table.SIZE)
    launch._BLOCK = block
    return found


@pytest.mark.parametrize("number", range(len(table.CASES)), ids=table.IDS)
@pytest.mark.parametrize("backend", ["tensor", "pillow"])
def test_an_operation_is_torchvisions(views, number, backend):
    name, case = table.CASES[number]
    image = table.pixels_of(table.IMAGE) if backend == "tensor" else table.IMAGE
    difference = (views[number].int() - table.by_torchvision(case, image).int()).abs().float()
    mean, largest = (table.TOLERANCE if backend == "tensor" else table.PILLOW_TOLERANCE)[name]
    assert views.dtype == torch.uint8
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert difference.mean() <= mean
    assert difference.max() <= largest


SIZES = ((40, 30), (17, 61), (90, 3), (24, 24))
RECIPE = Recipe(size=24, solarize_probability=0.4, blur_probability=0.7)


def two_views(images, recipe=RECIPE, seed=0, **options):
    """Both views of each image by the kernels and by the torchvision pipeline."""
    count = len(images)
    numbers, which = np.tile(np.arange(count), 2), np.repeat(np.arange(2), count)
    sizes = np.array([(image.height, image.width) for image in images])
    drawn = draw_views(recipe, seed=seed, epoch=3, images=numbers, views=which, sizes=sizes[numbers])
    expected = torch.stack(
        [
            make_view(pixels_of(images[number]), drawn[row : row + 1], recipe.size)
            for row, number in enumerate(numbers.tolist())
        ]
    )
    pixels, offsets, shapes = ragged(images)
    found = make_views(pixels, offsets, shapes, torch.from_numpy(numbers), tensors(drawn), size=recipe.size, **options)
    return found, expected


def assert_near(found, expected):
    difference = (found.int() - expected.int()).abs().float()
    assert difference.mean(dim=(1, 2, 3)).max() <= 1, "a pixel of a crop may be rounded the other way"
    assert difference.max() <= 4


@pytest.mark.parametrize("seed", [0, 1])
def test_two_views_of_images_of_any_size_are_those_of_the_pipeline(seed, monkeypatch):
    monkeypatch.setattr(launch, "_BLOCK", 256)
    images = [photo(width, height, number) for number, (width, height) in enumerate(SIZES)]
    images.append(Image.new("RGB", (1, 1), (10, 200, 30)))
    assert_near(*two_views(images, seed=seed))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_an_image_has_its_own_size_by_an_index_of_any_dtype(dtype, monkeypatch):
    monkeypatch.setattr(launch, "_BLOCK", 16)
    number = min(torch.iinfo(dtype).max, 20_000)
    # One column of four black pixels, then all white. Every other image is a row, which would mix the two.
    pixels, offsets = torch.tensor([0] * 12 + [255] * 36, dtype=torch.uint8), torch.zeros(number + 1, dtype=torch.int64)
    sizes = torch.tensor([[1, 4]]).repeat(number + 1, 1)
    sizes[number] = torch.tensor([4, 1])
    whole = draw_views(
        RECIPE, seed=0, epoch=0, images=np.zeros(1, np.int64), views=np.zeros(1, np.int64), sizes=np.array([[4, 1]])
    )
    parameters = tensors(whole) | {
        "crop": torch.tensor([[0, 0, 4, 1]]),
        "factors": torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
        "sigma": torch.zeros(1),
        "solarize": torch.zeros(1, dtype=torch.bool),
    }
    found = make_views(pixels, offsets, sizes, torch.tensor([number], dtype=dtype), parameters, size=4)
    assert not found.any()


def test_planes_and_single_channels(monkeypatch):
    monkeypatch.setattr(launch, "_BLOCK", 1024)
    images = [photo(40, 30, 1), photo(25, 33, 2)]
    drawn = draw_views(
        RECIPE, seed=0, epoch=0, images=np.arange(2), views=np.zeros(2, np.int64), sizes=np.array([[30, 40], [33, 25]])
    )
    for channels in (3, 1):
        stored = [image.convert("RGB" if channels == 3 else "L") for image in images]
        arrays = [np.asarray(image) for image in stored]
        planes = [array.transpose(2, 0, 1) if channels == 3 else array for array in arrays]
        buffer = torch.from_numpy(np.concatenate([plane.reshape(-1) for plane in planes]))
        offsets = torch.tensor([0, planes[0].size])
        found = make_views(
            buffer,
            offsets,
            torch.tensor([[30, 40], [33, 25]]),
            torch.arange(2),
            tensors(drawn),
            size=24,
            channels=channels,
            planar=True,
        )
        expected = [make_view(pixels_of(stored[row].convert("RGB")), drawn[row : row + 1], 24) for row in range(2)]
        assert_near(found, torch.stack(expected))


def test_normalised_views_are_the_normalised_pixels(monkeypatch):
    monkeypatch.setattr(launch, "_BLOCK", 1024)
    images = [photo(40, 30, 1)]
    pixels, _ = two_views(images)
    options = {"mean": RECIPE.mean, "std": RECIPE.std}
    expected = normalise(pixels, RECIPE)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        found, _ = two_views(images, dtype=dtype, **options)
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert (found.float() - expected).abs().max() <= tolerance


def test_scratch_memory_is_written_before_it_is_read(monkeypatch):
    monkeypatch.setattr(launch, "_BLOCK", 256)
    images = [photo(40, 30, 1), photo(20, 30, 2)]
    expected, _ = two_views(images)
    empty = torch.empty

    def poisoned(*arguments, **options):
        found = empty(*arguments, **options)
        return found.fill_(float("nan")) if found.is_floating_point() else found.fill_(255)

    monkeypatch.setattr(launch.torch, "empty", poisoned)
    found, _ = two_views(images)
    assert torch.equal(found, expected)


def test_blocks_do_not_matter_but_for_the_order_of_a_sum(monkeypatch):
    images = [photo(40, 30, 1), photo(20, 30, 2)]
    found = []
    for block in (256, 1024):
        monkeypatch.setattr(launch, "_BLOCK", block)
        found.append(two_views(images)[0].int())
    assert (found[0] - found[1]).abs().max() <= 1


def test_a_blur_wider_than_the_view(monkeypatch):
    monkeypatch.setattr(launch, "_BLOCK", 64)
    image = photo(8, 8, 3)
    drawn = table.parameters(crop=(0, 0, 8, 8), sigma=9.0)
    pixels, offsets, sizes = ragged([image])
    found = make_views(pixels, offsets, sizes, torch.zeros(1, dtype=torch.int64), tensors(drawn), size=8)
    expected = blur(pixels_of(image)[None].float(), np.array([9.0], np.float32)).add(0.5).to(torch.uint8)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_large_crops_are_antialiased(monkeypatch):
    monkeypatch.setattr(launch, "_BLOCK", 64)
    image = photo(120, 100, 4)
    drawn = table.parameters(crop=(3, 5, 90, 110))
    pixels, offsets, sizes = ragged([image])
    found = make_views(pixels, offsets, sizes, torch.zeros(1, dtype=torch.int64), tensors(drawn), size=8)
    assert_near(found, make_view(pixels_of(image), drawn, 8)[None])


@pytest.mark.parametrize("name", ["resident", pytest.param("dali", marks=DALI)])
def test_a_pipeline_hands_its_images_to_the_kernels(name, tmp_path, monkeypatch):
    """Resident, and DALI's CPU backend, which decodes ragged images; against the torchvision pipeline."""
    monkeypatch.setattr(launch, "_BLOCK", 256)
    for number in range(4):
        size = (20, 16) if name == "resident" else SIZES[number]
        photo(*size, number).save(tmp_path / f"{number}.jpg", quality=95)
    split = open_source(str(tmp_path)).train
    recipe = Recipe(size=12, solarize_probability=0.4, min_size=8, size_step=4, start_ramp=0, end_ramp=1)
    settings = {"batch": 2, "seed": 0, "workers": 0, "dtype": torch.bfloat16}
    ours, theirs = (build_pipeline(split, recipe, name=chosen, **settings) for chosen in (name, "torchvision"))
    ours.use_kernels(make_views)
    for epoch, size in ((1, 12), (0, 8)):
        for pipe in (ours, theirs):
            pipe.set_epoch(epoch, start=epoch)
        for batch, other in zip(ours, theirs, strict=True):
            assert torch.equal(batch.image_ids, other.image_ids)
            assert (batch.first.dtype, batch.first.shape) == (torch.bfloat16, (2, 3, size, size))
            for view, wanted in ((batch.first, other.first), (batch.second, other.second)):
                levels = (view.float() - normalise(wanted, recipe)).abs() * 255 * 0.225
                assert levels.mean() < 2, "rounding to bfloat16, and another decoder"
    ours.close()


def test_a_proof_passes():
    for case in (
        ViewsCase(12, 6, torch.uint8, image=(30, 17)),
        ViewsCase(8, 4, torch.float16, image=(11, 14), channels=1, planar=True, sigma=4.0),
    ):
        verdict = validate_views(case, torch.device("cpu"))
        assert not verdict.misses, verdict


def test_launches_go_to_the_device_of_the_pixels(monkeypatch):
    current, launched, true = devices_entered(monkeypatch), [], launch._launch

    monkeypatch.setattr(launch, "_launch", lambda *given: launched.append(list(current)) or true(*given))
    pixels, offsets, sizes = ragged([photo(9, 9, 5)])
    nothing = {name: value[:0] for name, value in tensors(table.all_cases()).items()}
    make_views(pixels, offsets, sizes, torch.zeros(0, dtype=torch.int64), nothing, size=8)
    assert [found[0] for found in launched] == [pixels]


def test_words_are_read_as_the_parameters_are(monkeypatch):
    """Also where the views of an image are not side by side, and where the words are rows of a larger tensor."""
    monkeypatch.setattr(launch, "_BLOCK", 256)
    images = [photo(width, height, number) for number, (width, height) in enumerate(SIZES)]
    sizes = np.tile([(image.height, image.width) for image in images], (2, 1))
    drawn = tensors(draw_views(RECIPE, seed=1, epoch=0, images=np.arange(8) % 4, views=np.arange(8) // 4, sizes=sizes))
    buffer = ragged(images)
    expected = make_views(*buffer, torch.arange(4).repeat(2), drawn, size=24)
    words = as_words(drawn)
    assert torch.equal(make_views(*buffer, torch.arange(4), words, size=24), expected)
    assert torch.equal(make_views(*buffer, torch.arange(4), torch.cat([words, words], 1)[:, :16], size=24), expected)


def test_no_views():
    pixels, offsets, sizes = ragged([photo(8, 8)])
    nothing = tensors(table.parameters()[:0])
    found = make_views(pixels, offsets, sizes, torch.zeros(0, dtype=torch.int64), nothing, size=8)
    assert found.shape == (0, 3, 8, 8)
