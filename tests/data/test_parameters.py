"""The one draw of parameters: its distribution is torchvision's, and it depends on what it should, alone."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from synco_fast.data.augment.draw import JITTER, draw_views
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.torchvision import make_view, pixels_of
from synco_fast.data.seeding import derive_seed, uniforms
from tests.data.photos import photo

RECIPE = Recipe()
MANY = 4000
#: Two-sample Kolmogorov-Smirnov: a statistic above it has a probability below 1e-5 where the distributions agree.
KS_LIMIT = 2.47 * np.sqrt(2 / MANY)


def draw(recipe=RECIPE, count=MANY, size=(375, 500), seed=0, epoch=0, view=0, images=None):
    images = np.arange(count) if images is None else np.asarray(images)
    return draw_views(
        recipe,
        seed=seed,
        epoch=epoch,
        images=images,
        views=np.full(len(images), view),
        sizes=np.tile(size, (len(images), 1)),
    )


def distance(one, other):
    """The Kolmogorov-Smirnov statistic of two samples."""
    values = np.sort(np.concatenate([one, other]))
    shares = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (one, other)]
    return np.abs(shares[0] - shares[1]).max()


@pytest.mark.parametrize("size", [(375, 500), (500, 120), (30, 40)])
def test_crops_are_distributed_as_torchvisions(size):
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    crop = v2.RandomResizedCrop(8, scale=RECIPE.area, ratio=RECIPE.ratio)
    theirs = np.array([list(crop.make_params([image]).values()) for _ in range(MANY)])
    ours = draw(size=size).crop
    top, left, height, width = ours.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()
    for measure in (
        lambda crop: crop[:, 2] * crop[:, 3] / (size[0] * size[1]),
        lambda crop: crop[:, 3] / crop[:, 2],
        lambda crop: crop[:, 0] / size[0],
        lambda crop: crop[:, 1] / size[1],
    ):
        assert distance(measure(ours), measure(theirs)) < KS_LIMIT


def test_jitter_blur_and_flip_are_distributed_as_the_recipe_says():
    views = draw()
    jittered = (views.factors != [1, 1, 1, 0]).any(axis=1)
    torch.manual_seed(0)
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = [jitter.make_params([]) for _ in range(MANY)]
    for part, name in enumerate(JITTER):
        factors = np.array([float(found[f"{name}_factor"]) for found in theirs])
        ours = views.factors[jittered, part]
        assert distance(ours, factors) < KS_LIMIT * np.sqrt(1 / 2 * (1 + MANY / len(ours))), name
    blurred = views.sigma > 0
    even = np.random.default_rng(0).uniform(0.1, 2.0, MANY)
    assert distance(views.sigma[blurred], even) < KS_LIMIT * np.sqrt(1 / 2 * (1 + MANY / blurred.sum()))
    shares = {
        "jitter": (jittered, 0.8),
        "grayscale": (views.grayscale, 0.2),
        "blur": (blurred, 0.5),
        "flip": (views.flip, 0.5),
    }
    for name, (happened, share) in shares.items():
        assert abs(happened.mean() - share) < 4.5 * np.sqrt(share * (1 - share) / MANY), name


def test_all_orders_of_the_jitter_are_equally_frequent():
    _, counts = np.unique(draw().order, axis=0, return_counts=True)
    assert len(counts) == 24
    expected = MANY / 24
    assert ((counts - expected) ** 2 / expected).sum() < 65  # chi-squared, 23 degrees: probability below 1e-5


def test_draws_do_not_depend_on_one_another():
    """Correlations between the parameters of one view, of an image's two views, and of neighbouring images."""
    columns = []
    for view in (0, 1):
        views = draw(Recipe(jitter_probability=1, blur_probability=1), view=view)
        columns += [*views.crop.T.astype(float)[:2], *views.factors.T, views.grayscale, views.sigma, views.flip]
    columns += [np.roll(column, 1) for column in columns[:9]]
    # The place of a crop is bound to its size, and so its top to its left.
    found = np.abs(np.corrcoef(np.array([np.asarray(column, float) for column in columns])))
    np.fill_diagonal(found, 0)
    found[0, 1] = found[1, 0] = found[9, 10] = found[10, 9] = found[18, 19] = found[19, 18] = 0
    assert found.max() < 5 / np.sqrt(MANY)


def test_mean_and_variance_of_the_views_are_torchvisions():
    """The whole augmentation by this package and by torchvision's own random transforms, over many views."""
    count, image = 300, photo()
    recipe = Recipe(size=32)
    views = draw(recipe, count, image.size[::-1])
    pixels = pixels_of(image)
    ours = torch.stack([make_view(pixels, views[row : row + 1], 32) for row in range(count)]).float()
    torch.manual_seed(0)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(32, scale=recipe.area, antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, recipe.blur_sigma)], 0.5),
            v2.RandomHorizontalFlip(),
        ]
    )
    theirs = torch.stack([transform(pixels) for _ in range(count)]).float()
    for measure in (lambda views: views.mean((2, 3)), lambda views: views.var((2, 3)).sqrt()):
        one, other = measure(ours), measure(theirs)
        error = ((one.var(0) + other.var(0)) / count).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() < 4.5 * error + 0.7).all(), "0.7: torchvision cuts off fractions"
        assert ((one.std(0) / other.std(0)).log().abs() < 4.5 / np.sqrt(count)).all()


def test_a_view_depends_on_seed_epoch_image_and_view_alone():
    base = draw(count=8)
    alone = draw(images=[5])
    assert all(np.array_equal(getattr(base, name)[5:6], getattr(alone, name)) for name in vars(base))
    for other in (draw(count=8, seed=1), draw(count=8, epoch=1), draw(count=8, view=1), draw(images=np.arange(8) + 8)):
        assert not np.array_equal(base.crop, other.crop)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (2, 3)])
def test_crops_of_tiny_and_extreme_images_fit(size):
    top, left, height, width = draw(size=size, count=200).crop.T
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()


@pytest.mark.parametrize("ratio", [(0.01, 0.01), (100, 100), (0.01, 100)])
def test_every_crop_holds_a_pixel_whatever_the_ratio(ratio):
    _, _, height, width = draw(Recipe(ratio=ratio), size=(40, 44)).crop.T
    assert height.min() >= 1
    assert width.min() >= 1


def test_parts_that_the_recipe_leaves_out_change_nothing():
    still = Recipe(brightness=0, contrast=0, saturation=0, hue=0, grayscale_probability=0, blur_probability=0)
    views = draw(still)
    assert not list(views.steps())
    assert not views.grayscale.any()
    assert not views.sigma.any()


def test_the_jitter_is_applied_to_every_row_in_its_own_order_and_the_hue_once():
    views = replace(
        draw(Recipe(), 48),
        order=np.array([*permutations(range(4))] * 2),
        factors=np.repeat([[0.9, 1.1, 1.2, 0.05], [0.9, 1, 1.2, 0]], 24, axis=0).astype(np.float32),
    )
    for taken in (views, *(views[row : row + 1] for row in range(48))):
        applied = [[] for _ in range(len(taken))]
        for part, rows in taken.steps():
            for row in rows:
                applied[row].append(part)
        for row, parts in enumerate(applied):
            changed = [part for part in taken.order[row].tolist() if taken.factors[row, part] != (1, 1, 1, 0)[part]]
            assert parts == changed
    assert [part for part, _ in views.steps()].count(JITTER.index("hue")) == 1
    assert len(list(views.steps())) <= 15


def test_uniforms_are_even_and_follow_the_fold_of_derived_seeds():
    values = uniforms(7, 0, np.arange(2000), count=20)
    assert values.shape == (2000, 20)
    assert (values >= 0).all()
    assert (values < 1).all()
    counts, _ = np.histogram(values, bins=100, range=(0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 170  # chi-squared, 99 degrees: probability below 1e-5
    assert np.array_equal(values[3], uniforms(7, 0, 3, count=20)[0])
    assert derive_seed(7, 0, 3) != derive_seed(7, 3, 0)


def test_strong_jitter_never_turns_a_factor_below_zero():
    strong = Recipe(size=16, brightness=3.0, contrast=3.0, saturation=3.0, hue=0.5, jitter_probability=1.0)
    count = 500
    drawn = draw_views(
        strong,
        seed=0,
        epoch=0,
        images=np.arange(count),
        views=np.zeros(count, dtype=np.int64),
        sizes=np.full((count, 2), 40),
    ).factors
    assert drawn[:, :3].min() >= 0
    assert drawn[:, :3].max() > 3.9
    assert drawn[:, 3].min() < -0.45
    assert drawn[:, 3].max() > 0.45
