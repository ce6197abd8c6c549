import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from synco_fast.data.augment.recipe import Recipe
from synco_fast.generated.augment import (
    augment_for_discriminator,
    draw_discriminator,
    draw_views,
    view,
)

CPU = torch.device("cpu")
PLAIN = {
    "size": 16,
    "area": (1.0, 1.0),
    "ratio": (1.0, 1.0),
    "jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probability": 0.0,
    "flip_probability": 0.0,
}


def images(count=4, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def views(batch, seed=0, **changes):
    recipe = Recipe(**{**PLAIN, **changes})
    torch.manual_seed(seed)
    return view(batch, draw_views(len(batch), recipe, CPU), recipe)


def test_nothing_switched_on_is_the_identity():
    assert torch.allclose(views(images()), images(), atol=1e-6)


def test_flip_and_gray():
    assert torch.allclose(views(images(), flip_probability=1.0), images().flip(3), atol=1e-6)
    expected = reference.rgb_to_grayscale(images(), num_output_channels=3)
    assert torch.allclose(views(images(), grayscale_probability=1.0), expected, atol=2e-3)


def test_the_blur_is_a_gaussian_of_the_sigma_drawn():
    out = views(images(), blur_probability=1.0, blur_sigma=(1.0, 1.0))
    assert torch.allclose(out, reference.gaussian_blur(images(), [7, 7], [1.0, 1.0]), atol=1e-5)
    assert torch.allclose(views(images(), blur_probability=1.0, blur_sigma=(0.01, 0.01)), images(), atol=1e-5)


def test_jitter_by_its_parts():
    torch.manual_seed(0)
    recipe = Recipe(**{**PLAIN, "jitter_probability": 1.0, "hue": 0.0})
    draws = draw_views(4, recipe, CPU)
    for values in (draws.brightness, draws.contrast, draws.saturation):
        assert ((values >= 0.6) & (values <= 1.4)).all()
        assert values.std() > 0.01
    out = view(images(), draws, recipe)
    for number, image in enumerate(images()):
        expected = reference.adjust_brightness(image, float(draws.brightness[number]))
        expected = reference.adjust_contrast(expected, float(draws.contrast[number]))
        expected = reference.adjust_saturation(expected, float(draws.saturation[number]))
        assert torch.allclose(out[number], expected, atol=2e-3)


def test_hue_leaves_the_luma_and_a_whole_turn_leaves_all():
    recipe = Recipe(**{**PLAIN, "jitter_probability": 1.0, "hue": 0.5})
    gray_free = 0.4 + 0.2 * images()
    neutral = draw_views(4, Recipe(**PLAIN), CPU)
    out = view(gray_free, neutral._replace(hue=torch.full((4,), 1.0)), recipe)
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose(
        torch.einsum("c,bchw->bhw", luma, out), torch.einsum("c,bchw->bhw", luma, gray_free), atol=1e-4
    )
    assert not torch.allclose(out, gray_free, atol=1e-2)
    whole = view(gray_free, neutral._replace(hue=torch.full((4,), 2 * torch.pi)), recipe)
    assert torch.allclose(whole, gray_free, atol=1e-4)


def test_crops_are_of_the_area_drawn_and_inside():
    torch.manual_seed(0)
    recipe = Recipe(**{**PLAIN, "area": (0.2, 0.5), "ratio": (3 / 4, 4 / 3)})
    crop = draw_views(500, recipe, CPU).crop
    width, height = crop[:, 0, 0].abs(), crop[:, 1, 1]
    assert ((width * height >= 0.2 - 1e-5) & (width * height <= 0.5 + 1e-5)).all()
    assert ((crop[:, 0, 2].abs() + width <= 1 + 1e-5) & (crop[:, 1, 2].abs() + height <= 1 + 1e-5)).all()
    assert crop[:, 0, 2].std() > 0.1


def test_views_let_gradients_through_and_differ_between_images():
    recipe = Recipe(size=16)
    batch = images().requires_grad_()
    torch.manual_seed(3)
    out = view(batch, draw_views(4, recipe, CPU), recipe)
    assert out.shape == (4, 3, 16, 16)
    assert (out.min() >= 0) & (out.max() <= 1 + 1e-6)
    (gradient,) = torch.autograd.grad(out.sum(), batch)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
    same = images()[:1].expand(4, -1, -1, -1)
    torch.manual_seed(3)
    out = view(same, draw_views(4, recipe, CPU), recipe)
    assert not torch.allclose(out[0], out[1], atol=1e-2)


def test_the_same_draws_make_the_same_augmentation():
    torch.manual_seed(0)
    draws = draw_discriminator(4, 16, CPU)
    out = augment_for_discriminator(images(), draws)
    assert torch.equal(out, augment_for_discriminator(images(), draws))
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(draws, draw_discriminator(4, 16, CPU), strict=True))


def test_translation_and_cutout():
    draws = draw_discriminator(1, 16, CPU)
    still = draws._replace(
        brightness=torch.zeros(1),
        saturation=torch.ones(1),
        contrast=torch.ones(1),
        shift_y=torch.tensor([2]),
        shift_x=torch.tensor([-1]),
        cut_y=torch.tensor([-99]),
        cut_x=torch.tensor([-99]),
    )
    batch = images(1)
    out = augment_for_discriminator(batch, still)
    assert torch.allclose(out[..., :14, 1:], batch[..., 2:, :15], atol=1e-6)
    assert (out[..., 14:, :] == 0).all()
    cut = augment_for_discriminator(batch, still._replace(cut_y=torch.tensor([8]), cut_x=torch.tensor([8])))
    assert (cut[..., 5:12, 5:12] == 0).all()
    assert torch.equal(cut[..., :5, :], out[..., :5, :])


@pytest.mark.parametrize("size", [32, 64])
def test_the_discriminators_augmentation_lets_gradients_through(size):
    batch = images(2, size).requires_grad_()
    out = augment_for_discriminator(batch, draw_discriminator(2, size, CPU))
    (gradient,) = torch.autograd.grad(out.square().sum(), batch)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
