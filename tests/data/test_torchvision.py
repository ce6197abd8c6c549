import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import epoch_order, normalise
from synco_fast.data.pipelines.torchvision import TorchvisionPipeline, evaluation_loader, evaluation_view, pixels_of
from synco_fast.data.sources.open import open_source

RECIPE = Recipe(size=16)


@pytest.fixture
def split(image_folder):
    return open_source(str(image_folder)).train


def pipeline(split, **changes):
    return TorchvisionPipeline(split, RECIPE, **({"batch": 8, "seed": 3, "workers": 0} | changes))


def test_a_broken_image_is_replaced_and_named(image_folder, split):
    victim = next(index for index in range(33) if split.name(index).endswith("class1/3.jpg"))
    (image_folder / "train" / "class1" / "3.jpg").write_bytes(b"")
    pipe = pipeline(split, batch=11)
    pipe.set_epoch(0)
    batches = list(pipe)
    assert sum(len(batch.image_ids) for batch in batches) == 33
    corrupt = {index: reason for batch in batches for index, reason in batch.corrupt.items()}
    assert list(corrupt) == [victim]
    assert "class1/3.jpg" in corrupt[victim]
    numbers = torch.cat([batch.image_ids for batch in batches]).tolist()
    assert victim not in numbers
    assert numbers.count(victim + 1) == 2, "the next image takes its place"


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


def test_evaluation_crops_the_centre():
    view = evaluation_view(pixels_of(photo()), Recipe(size=56, evaluation_resize=60))
    assert torch.equal(view, torch.from_numpy(np.asarray(photo())[2:58, 12:68].copy()).permute(2, 0, 1))
    assert Recipe().resize == 256


def test_evaluation_leaves_out_what_is_broken(image_folder, split):
    (image_folder / "train" / "class0" / "1.jpg").write_text("no picture")
    loaded = list(evaluation_loader(split, RECIPE, batch=4, workers=0, numbers=[0, 1, 2, 30]))
    ((images, numbers, corrupt),) = loaded
    assert images.shape == (len(numbers), 3, 16, 16)
    assert len(numbers) == 3
    assert len(corrupt) == 1


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
