import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from synco_fast.data.augment import Recipe
from synco_fast.data.errors import DataError
from synco_fast.data.pipeline import epoch_order, normalise
from synco_fast.data.sources import ArraySplit, open_source
from synco_fast.data.torchvision import TorchvisionPipeline, evaluation_loader, evaluation_transform, view_transform

RECIPE = Recipe(size=16)
STILL = {"jitter_probability": 0, "greyscale_probability": 0, "blur_probability": 0, "flip_probability": 0}


@pytest.fixture
def split(image_folder):
    return open_source(str(image_folder)).train


def pipeline(split, **changes):
    return TorchvisionPipeline(split, RECIPE, **({"batch": 8, "seed": 3, "workers": 0} | changes))


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("first", "second", "images"))


def test_an_epoch_is_complete_and_of_equal_length(split):
    pipe = pipeline(split)
    seen = []
    for epoch in range(3):
        pipe.set_epoch(epoch)
        batches = list(pipe)
        assert len(batches) == len(pipe) == 4
        numbers = torch.cat([batch.images for batch in batches])
        assert len(set(numbers.tolist())) == 32, "no image twice"
        seen.append(numbers)
        assert batches[0].first.shape == (8, 3, 16, 16)
        assert batches[0].first.dtype == torch.uint8
        assert not torch.equal(batches[0].first, batches[0].second)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_views_depend_on_seed_and_epoch_not_on_workers(split):
    alone, shared = pipeline(split), pipeline(split, workers=2)
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
    other = pipeline(split, seed=4)
    alone.set_epoch(0)
    other.set_epoch(0)
    assert not same(next(iter(alone)), next(iter(other)))


def test_starting_in_the_middle_meets_the_same_batches(split):
    whole, rest = pipeline(split), pipeline(split)
    whole.set_epoch(1)
    rest.set_epoch(1, start=2)
    assert all(same(a, b) for a, b in zip(list(whole)[2:], rest, strict=True))


def test_loading_leaves_the_global_generator_alone(split):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pipe = pipeline(split)
    pipe.set_epoch(0)
    list(pipe)
    list(evaluation_loader(split, RECIPE, workers=0))
    assert torch.equal(before, torch.get_rng_state())


def test_a_broken_image_is_replaced_and_named(image_folder, split):
    victim = next(index for index in range(33) if split.name(index).endswith("class1/3.jpg"))
    (image_folder / "train" / "class1" / "3.jpg").write_bytes(b"")
    pipe = pipeline(split, batch=11)
    pipe.set_epoch(0)
    batches = list(pipe)
    assert sum(len(batch.images) for batch in batches) == 33
    broken = {index: reason for batch in batches for index, reason in batch.broken.items()}
    assert list(broken) == [victim]
    assert "class1/3.jpg" in broken[victim]
    numbers = torch.cat([batch.images for batch in batches]).tolist()
    assert victim not in numbers
    assert numbers.count(victim + 1) == 2, "the next image takes its place"


def test_nothing_but_broken_images_is_an_error(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    pipe = TorchvisionPipeline(open_source(str(tmp_path)).train, RECIPE, batch=2, seed=0, workers=0)
    with pytest.raises(DataError, match="broken images in a row"):
        next(iter(pipe))


def test_a_batch_larger_than_the_set(split):
    with pytest.raises(DataError, match=r"training\.batch: found 34, allowed up to 33"):
        pipeline(split, batch=34)


@pytest.mark.parametrize("world", [2, 4])
def test_the_shares_of_all_processes_are_the_batch(split, world):
    whole, shares = pipeline(split), [pipeline(split, rank=rank, world=world) for rank in range(world)]
    for pipe in (whole, *shares):
        pipe.set_epoch(1, start=1)
    for batch, *parts in zip(whole, *shares, strict=True):
        for name in ("first", "second", "images"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(part, name) for part in parts]))
    with pytest.raises(DataError, match=r"training\.batch: found 8, allowed a multiple of 3"):
        pipeline(split, world=3)


def test_orders_are_permutations_of_seed_and_epoch():
    first = epoch_order(100, seed=0, epoch=0)
    assert sorted(first.tolist()) == list(range(100))
    assert torch.equal(first, epoch_order(100, seed=0, epoch=0))
    assert not torch.equal(first, epoch_order(100, seed=0, epoch=1))
    assert not torch.equal(first, epoch_order(100, seed=1, epoch=0))


def photo():
    rows, columns = np.mgrid[0:60, 0:80]
    return Image.fromarray(
        np.stack([rows * 4, columns * 3, 255 - rows * 2 - columns], -1).clip(0, 255).astype(np.uint8)
    )


def test_each_operation_of_the_recipe_is_there():
    torch.manual_seed(0)
    whole = {"area": (1, 1), "ratio": (4 / 3, 4 / 3), "size": 24}
    still = view_transform(Recipe(**whole, **STILL))(photo()).float()
    assert torch.equal(still, view_transform(Recipe(**whole, **STILL))(photo()).float())
    flipped = view_transform(Recipe(**whole, **STILL | {"flip_probability": 1}))(photo()).float()
    assert (flipped - still.flip(2)).abs().max() <= 2
    grey = view_transform(Recipe(**whole, **STILL | {"greyscale_probability": 1}))(photo()).float()
    assert torch.equal(grey[0], grey[1])
    luma = 0.299 * still[0] + 0.587 * still[1] + 0.114 * still[2]
    assert (grey[0] - luma).abs().max() <= 2
    jitter = view_transform(Recipe(**whole, **STILL | {"jitter_probability": 1}))
    assert not torch.equal(jitter(photo()), jitter(photo()))
    edge = Image.fromarray(np.repeat(np.array([0, 255], np.uint8), 12)[None, :, None].repeat(24, 0).repeat(3, 2))
    square = {"area": (1, 1), "ratio": (1, 1), "size": 24}
    blur = view_transform(Recipe(**square, **STILL | {"blur_probability": 1}, blur_sigma=(2, 2)))(edge).float()
    assert 0 < blur[0, 12, 10] < 128 < blur[0, 12, 13] < 255
    crops = view_transform(Recipe(size=24, **STILL))
    assert not torch.equal(crops(photo()), crops(photo()))


def test_probabilities_are_those_of_the_recipe():
    torch.manual_seed(0)
    transform = view_transform(Recipe(size=8, **STILL | {"greyscale_probability": 0.2}))
    share = np.mean([torch.equal(view[0], view[1]) for view in (transform(photo()) for _ in range(600))])
    assert 0.15 < share < 0.25  # three standard deviations


def test_evaluation_crops_the_centre():
    view = evaluation_transform(Recipe(size=56, evaluation_resize=60))(photo())
    assert torch.equal(view, torch.from_numpy(np.asarray(photo())[2:58, 12:68].copy()).permute(2, 0, 1))
    assert Recipe().resize == 256


def test_evaluation_leaves_out_what_is_broken(image_folder, split):
    (image_folder / "train" / "class0" / "1.jpg").write_text("no picture")
    loaded = list(evaluation_loader(split, RECIPE, batch=4, workers=0, numbers=[0, 1, 2, 30]))
    ((images, numbers, broken),) = loaded
    assert images.shape == (len(numbers), 3, 16, 16)
    assert len(numbers) == 3
    assert len(broken) == 1


def test_normalise():
    views = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    recipe = Recipe()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    expected = (views.double() / 255 - mean) / std
    assert torch.allclose(normalise(views, recipe).double(), expected, atol=1e-5)
    assert normalise(views, recipe, torch.channels_last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "wrong",
    [
        {"area": (0.5, 0.2)},
        {"area": (0.2, 1.5)},
        {"std": (1, 0, 1)},
        {"size": 64, "evaluation_resize": 32},
        {"blurr": 1},
    ],
)
def test_a_recipe_that_cannot_be(wrong):
    with pytest.raises(ValidationError):
        Recipe(**wrong)


def test_arrays_load_too():
    split = ArraySplit(np.zeros((9, 28, 28), np.uint8), np.zeros(9, np.int64), "zeros")
    pipe = TorchvisionPipeline(split, RECIPE, batch=4, seed=0, workers=0)
    assert next(iter(pipe)).first.shape == (4, 3, 16, 16)
