"""One list of operations, and every executor has all of them."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from synco_fast.data.augment import draw, ops
from synco_fast.data.augment.draw import EXECUTORS, JITTER, OPERATIONS, ViewParameters, draw_views, operations_of
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.build import has_dali
from synco_fast.data.pipelines.resident import crop_and_resize_batch
from synco_fast.data.pipelines.torchvision import make_view, pixels_of
from synco_fast.data.sources.decode import encode_pixels
from synco_fast.generated import augment as differentiable
from tests.data.photos import photo

SIZE = 32
IMAGE = photo(80, 60)
#: What no operation belongs to: how views are scaled at the end, and evaluation.
ELSEWHERE = {"mean", "std", "evaluation_resize"}
#: With every probability 0 and the whole image as the crop, a view is the resized image.
PLAIN = Recipe(size=SIZE, area=(1, 1), ratio=(4 / 3, 4 / 3)).model_copy(
    update={operation.probability: 0.0 for operation in OPERATIONS if operation.probability}
)

EARLIER = {
    "crop": [12701, 28396, 99788, 103134],
    "order": [3269, 3140, 2933, 3138],
    "factors": [2131.0694, 2208.4281, 2158.6704, -12.5557],
    "grayscale": 439,
    "sigma": 825.9974,
    "flip": 969,
}


def tables(executor):
    """What an executor says that it carries out, by operation."""
    if executor == "differentiable":
        return [differentiable.APPLY]
    return [ops.APPLY | {"crop": None}]


def missing(executor):
    wanted = {operation.name for operation in draw.OPERATIONS if executor in operation.executors}
    return {name for table in tables(executor) for name in wanted ^ set(table)}


def only(operation):
    """A recipe in which this operation alone changes anything, in every view."""
    if operation.name == "crop":
        return PLAIN.model_copy(update={"area": (0.3, 0.4)})
    return PLAIN.model_copy(update={operation.probability: 1.0})


def drawn(recipe, count=4):
    images, sizes = np.arange(count), np.tile([60, 80], (count, 1))
    return draw_views(recipe, seed=0, epoch=0, images=images, views=np.zeros(count, np.int64), sizes=sizes)


def by_torchvision(recipe):
    views = drawn(recipe)
    return torch.stack([make_view(pixels_of(IMAGE), views[row : row + 1], SIZE) for row in range(4)])


def by_resident(recipe):
    pixels = pixels_of(IMAGE)[None].float().repeat(4, 1, 1, 1)
    return ops.finish_views(crop_and_resize_batch(pixels, drawn(recipe).crop, SIZE), drawn(recipe))


def by_dali(recipe):
    from synco_fast.data.pipelines.dali.finish import finish_crops
    from synco_fast.data.pipelines.dali.graph import GraphOptions, build_crops, crop_inputs

    graph = build_crops(recipe, "once", GraphOptions(4))
    graph.feed_input("encoded", [np.frombuffer(encode_pixels(np.asarray(IMAGE)), np.uint8)] * 4)
    for name, values in crop_inputs([drawn(recipe), drawn(recipe)], "once").items():
        graph.feed_input(name, values)
    crops = torch.from_dlpack(graph.run()[0].as_tensor())
    return finish_crops([crops], [drawn(recipe)], recipe, torch.uint8)[0]


def by_differentiable(recipe):
    torch.manual_seed(0)
    square = reference.resize(pixels_of(IMAGE), [SIZE, SIZE], antialias=True)
    images = square[None].repeat(4, 1, 1, 1).float() / 255
    recipe = recipe.model_copy(update={"ratio": (1.0, 1.0)})
    return differentiable.view(images, differentiable.draw_views(4, recipe, torch.device("cpu")), recipe) * 255


RUN = {
    "torchvision": by_torchvision,
    "resident": by_resident,
    "dali": by_dali,
    "differentiable": by_differentiable,
}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_executor_has_every_operation(executor):
    assert set(RUN) == set(EXECUTORS)
    assert not missing(executor)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_operation_that_one_executor_lacks_is_noticed(executor, monkeypatch):
    new = replace(OPERATIONS[-1], name="posterize")
    monkeypatch.setattr(draw, "OPERATIONS", (*OPERATIONS, new))
    assert missing(executor) == {"posterize"}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_operation_alone_changes_the_views_and_as_it_does_in_the_first_executor(executor, operation):
    if executor not in operation.executors or (executor == "dali" and not has_dali()):
        pytest.skip("not in this executor" if executor not in operation.executors else "DALI is not installed")
    plain, changed = (RUN[executor](recipe).float() for recipe in (PLAIN, only(operation)))
    assert (changed - plain).abs().mean() > 3, "it does something"
    if executor != "differentiable":  # which draws for itself
        difference = (changed - by_torchvision(only(operation)).float()).abs()
        assert difference.mean() <= 2
        assert difference.max() <= 24


def test_solarize_of_generated_pairs_is_torchvisions_and_lets_gradients_through():
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    recipe = PLAIN.model_copy(update={"size": 16, "solarize_probability": 1.0, "ratio": (1.0, 1.0)})
    out = differentiable.view(images, differentiable.draw_views(3, recipe, torch.device("cpu")), recipe)
    assert torch.allclose(out, reference.solarize(images.detach(), 0.5), atol=1e-5)
    (gradient,) = torch.autograd.grad(out.sum(), images)
    assert torch.allclose(gradient, torch.where(images < 0.5, 1.0, -1.0), atol=1e-4)


def test_a_recipe_draws_solarize_as_often_as_it_says_and_by_default_never():
    assert not drawn(Recipe(), 4000).solarize.any()
    share = drawn(Recipe(solarize_probability=0.2), 4000).solarize.mean()
    assert abs(share - 0.2) < 4.5 * np.sqrt(0.2 * 0.8 / 4000)
    first, other = drawn(Recipe(), 50), drawn(Recipe(solarize_probability=0.2), 50)
    for field in fields(ViewParameters):
        if field.name != "solarize":
            assert np.array_equal(getattr(first, field.name), getattr(other, field.name)), "the other draws stay"


def test_views_of_earlier_versions_stay_as_they_were():
    """Sums over the views of 64 images, each times its number, written down before solarize was added."""
    views = drawn(Recipe(), 64)
    for name, expected in EARLIER.items():
        found = np.tensordot(np.arange(1, 65), getattr(views, name).astype(float), 1)
        assert np.allclose(found, expected, rtol=1e-6, atol=1e-3), name


def test_the_list_is_sound():
    names = [operation.name for operation in OPERATIONS]
    assert len(set(names)) == len(names)
    columns = [set(range(operation.uniforms.start, operation.uniforms.stop)) for operation in OPERATIONS]
    assert sum(map(len, columns)) == len(set().union(*columns)), "no two operations share a random number"
    described = [name for operation in OPERATIONS for name in operation.recipe]
    assert sorted(described) == sorted(set(Recipe.model_fields) - ELSEWHERE)
    assert sorted(name for operation in OPERATIONS for name in operation.parameters) == sorted(
        field.name for field in fields(ViewParameters)
    )
    for operation in OPERATIONS:
        assert set(operation.executors) <= set(EXECUTORS)
        u = np.full((2, operation.uniforms.stop - operation.uniforms.start), 0.5)
        assert set(operation.draw(Recipe(), u, np.array([[60, 80]] * 2))) == set(operation.parameters)
    assert set(JITTER) < set(described)


def test_what_a_recipe_never_draws_is_not_carried_out():
    names = [operation.name for operation in operations_of(Recipe(), "dali")]
    assert names == ["crop", "jitter", "grayscale", "blur", "flip"]
    assert [operation.name for operation in operations_of(PLAIN, "dali")] == ["crop"]


def test_rows_of_parameters_are_taken_from_every_field():
    views = drawn(Recipe(solarize_probability=0.5), 6)
    part = views[2:4]
    assert len(part) == 2
    for field in fields(ViewParameters):
        assert np.array_equal(getattr(part, field.name), getattr(views, field.name)[2:4])


def test_every_key_of_a_recipe_is_described():
    for name, field in Recipe.model_fields.items():
        assert len(field.description or "") > 10, name


def test_a_blur_does_not_depend_on_the_other_views_of_its_batch():
    views = 255 * torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    sigma = np.array([0.5, 1.1, 2.0], dtype=np.float32)
    together = ops.blur(views, sigma)
    for row in range(3):
        alone = ops.blur(views[row : row + 1], sigma[row : row + 1])[0]
        assert torch.allclose(together[row], alone, atol=1e-3)


def test_a_crop_smaller_than_its_view_is_enlarged_as_interpolate_does():
    image = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crops = np.array([[3, 5, 7, 9], [0, 0, 20, 6]])
    found = crop_and_resize_batch(image.expand(2, 3, 20, 24).float(), crops, 32)
    for one, crop in zip(found, crops, strict=True):
        assert (one - ops.crop_and_resize(image, crop, 32)[0].float()).abs().max() <= 1
