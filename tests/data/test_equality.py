"""With its parameters fixed, each operation of each pipeline is torchvision's, within a stated tolerance."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as reference

from synco_fast.data.augment.draw import JITTER, ViewParameters
from synco_fast.data.augment.ops import finish_views
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import Batch, normalise
from synco_fast.data.pipelines.build import has_dali
from synco_fast.data.pipelines.resident import crop_and_resize_batch
from synco_fast.data.pipelines.torchvision import make_view, pixels_of
from synco_fast.data.sources.decode import encode_pixels
from tests.data.photos import photo

SIZE = 64
RECIPE = Recipe(size=SIZE, solarize_probability=0.2)
IMAGE = photo()
WHOLE = (0, 0, 120, 160)
SQUARE = (10, 20, SIZE, SIZE)

#: By operation, against torchvision on tensors: mean and largest difference in levels of 255. torchvision cuts off the
#: fraction after each operation where the pipelines round, hence half a level; DALI resizes a window in place, so that
#: pixels at its edge see their neighbours outside.
TOLERANCE = {
    "crop": (0.5, 24),
    "brightness": (0.65, 1),
    "contrast": (0.65, 1),
    "saturation": (0.65, 1),
    "hue": (0.1, 1),
    "grayscale": (0.55, 1),
    "blur": (0.1, 1),
    "solarize": (0, 0),
    "flip": (0, 0),
    "jitter": (1.7, 6),
    "all": (2.0, 8),
}
#: The same against torchvision on Pillow's images, whose hue has 256 steps and whose blur is three box filters.
PILLOW_TOLERANCE = {
    **TOLERANCE,
    "hue": (0.6, 6),
    "blur": (2.1, 20),
    "jitter": (1.8, 8),
    "all": (1.9, 22),
}


def parameters(
    crop=SQUARE, order=(0, 1, 2, 3), factors=(1, 1, 1, 0), grayscale=False, sigma=0.0, solarize=False, flip=False
):
    return ViewParameters(
        np.array([crop]),
        np.array([order]),
        np.array([factors], dtype=np.float32),
        np.array([grayscale]),
        np.array([sigma], dtype=np.float32),
        np.array([solarize]),
        np.array([flip]),
    )


def only(part, factor):
    factors = [1, 1, 1, 0]
    factors[JITTER.index(part)] = factor
    return parameters(factors=tuple(factors))


CASES = [
    ("crop", parameters(crop=WHOLE)),
    ("crop", parameters(crop=(3, 5, 100, 80))),
    ("crop", parameters(crop=(30, 40, 40, 52))),
    ("crop", parameters(crop=(60, 110, 60, 50))),
    *[(part, only(part, factor)) for part in JITTER[:3] for factor in (0.6, 0.85, 1.4)],
    *[("hue", only("hue", shift)) for shift in (-0.1, -0.03, 0.05, 0.1)],
    ("grayscale", parameters(grayscale=True)),
    *[("blur", parameters(sigma=sigma)) for sigma in (0.1, 0.4, 1.0, 1.5, 2.0)],
    ("solarize", parameters(solarize=True)),
    ("flip", parameters(flip=True)),
    *[
        ("jitter", parameters(order=order, factors=(1.3, 0.7, 1.35, 0.08)))
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1))
    ],
    ("all", parameters((3, 5, 100, 80), (1, 3, 0, 2), (0.8, 1.2, 0.7, -0.06), grayscale=True, sigma=1.2, flip=True)),
    ("all", parameters((8, 30, 90, 110), (2, 3, 1, 0), (1.2, 0.9, 1.3, 0.04), sigma=0.7, flip=True)),
    ("all", parameters((9, 14, 80, 100), (0, 2, 1, 3), (1.1, 0.8, 1.2, 0.05), sigma=0.9, solarize=True, flip=True)),
]
IDS = [f"{name}-{number}" for number, (name, _) in enumerate(CASES)]


def by_torchvision(case, image):
    """The reference: torchvision's functions one after the other, on a uint8 tensor or on Pillow's image."""
    top, left, height, width = case.crop[0].tolist()
    view = reference.resized_crop(image, top, left, height, width, [SIZE, SIZE], antialias=True)
    adjust = [getattr(reference, f"adjust_{part}") for part in JITTER]
    for part in case.order[0].tolist():
        factor = float(case.factors[0, part])
        if factor != (1, 1, 1, 0)[part]:
            view = adjust[part](view, factor)
    if case.grayscale[0]:
        view = reference.rgb_to_grayscale(view, 3)
    sigma = float(case.sigma[0])
    if sigma:
        if isinstance(view, Image.Image):
            view = view.filter(ImageFilter.GaussianBlur(sigma))
        else:
            window = 2 * int(np.ceil(3 * sigma)) + 1
            view = reference.gaussian_blur(view, [window, window], [sigma, sigma])
    if case.solarize[0]:
        view = reference.solarize(view, 128)
    if case.flip[0]:
        view = reference.horizontal_flip(view)
    return reference.pil_to_tensor(view) if isinstance(view, Image.Image) else view


def by_portable():
    return [make_view(pixels_of(IMAGE), case, SIZE) for _, case in CASES]


def all_cases():
    names = [field.name for field in fields(ViewParameters)]
    return ViewParameters(*(np.concatenate([getattr(case, name) for _, case in CASES]) for name in names))


def by_resident():
    pixels = pixels_of(IMAGE)[None].float().repeat(len(CASES), 1, 1, 1)
    return list(finish_views(crop_and_resize_batch(pixels, all_cases().crop, SIZE), all_cases()))


def by_dali(decode, dtype=torch.uint8):
    from synco_fast.data.pipelines.dali.finish import finish_crops
    from synco_fast.data.pipelines.dali.graph import GraphOptions, build_crops, crop_inputs

    graph = build_crops(RECIPE, decode, GraphOptions(len(CASES)))
    drawn = (all_cases(), all_cases()[::-1])
    graph.feed_input("encoded", [np.frombuffer(encode_pixels(np.asarray(IMAGE)), np.uint8)] * len(CASES))
    for name, values in crop_inputs(drawn, decode).items():
        graph.feed_input(name, values)
    crops = [torch.from_dlpack(views.as_tensor()) for views in graph.run()]
    first, second = finish_crops(crops, drawn, RECIPE, dtype)
    assert torch.equal(first, second.flip(0)), "the two views go the same way"
    return list(first)


EXECUTORS = {
    "portable": by_portable,
    "resident": by_resident,
    "dali-once": lambda: by_dali("once"),
    "dali-windows": lambda: by_dali("windows"),
}


@pytest.fixture(scope="module", params=EXECUTORS)
def views(request):
    if request.param.startswith("dali") and not has_dali():
        pytest.skip("DALI is not installed")
    return EXECUTORS[request.param]()


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
@pytest.mark.parametrize("backend", ["tensor", "pillow"])
def test_an_operation_is_torchvisions(views, number, backend):
    name, case = CASES[number]
    expected = by_torchvision(case, pixels_of(IMAGE) if backend == "tensor" else IMAGE)
    difference = (views[number].int() - expected.int()).abs().float()
    mean, largest = (TOLERANCE if backend == "tensor" else PILLOW_TOLERANCE)[name]
    assert views[number].dtype == torch.uint8
    assert difference.mean() <= mean
    assert difference.max() <= largest


def test_an_operation_that_is_missing_would_be_noticed():
    """Each case differs from the plain crop by more than its tolerance, so that the test above can fail."""
    for name, case in CASES:
        plain = by_torchvision(parameters(crop=tuple(case.crop[0].tolist())), pixels_of(IMAGE))
        changed = by_torchvision(case, pixels_of(IMAGE))
        if name != "crop" and not 0 < case.sigma[0] < 0.2:
            assert (plain.int() - changed.int()).abs().float().mean() > 1.2 * TOLERANCE[name][0], name


@pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_normalisation_in_the_graph_is_that_of_the_other_pipelines(dtype, tolerance):
    pixels, values = torch.stack(by_dali("once")), torch.stack(by_dali("once", dtype))
    assert values.dtype == dtype
    assert (values.float() - normalise(pixels, RECIPE)).abs().max() <= tolerance
    values = values.contiguous(memory_format=torch.channels_last)
    assert normalise(values, RECIPE, torch.channels_last).data_ptr() == values.data_ptr(), "no copy"
    assert torch.equal(Batch(values, values, torch.arange(len(values))).as_pixels(RECIPE).first, pixels)
