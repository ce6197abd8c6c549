"""The pipelines on a GPU against the same ones on the CPU."""

import tarfile

import numpy as np
import pytest
import torch

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import normalise
from synco_fast.data.pipelines.build import build_pipeline, choose_pipeline, evaluation_batches, has_dali
from synco_fast.data.pipelines.stream import StreamPipeline
from synco_fast.data.sources.open import ArraySplit, open_source
from synco_fast.data.sources.stream import StreamSettings, StreamSplit
from synco_fast.data.transfer import to_device
from synco_fast.kernels.views import make_views
from tests.data.photos import photo
from tests.data.test_pipelines import CORRUPT, damage, special

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DALI = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
RECIPE = Recipe(size=96)


@pytest.fixture
def split(tmp_path):
    for number in range(40):
        photo(200 + number, 150, number).save(tmp_path / f"good{number:02d}.jpg", quality=92)
    return open_source(str(tmp_path)).train


def test_the_parts_of_a_stream_are_joined_in_page_locked_memory(split, tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as shard:
            for file in sorted(tmp_path.glob("*.jpg"))[number::2]:
                shard.add(file, arcname=file.name)
    stream = StreamSplit([str(tmp_path / f"{number}.tar") for number in range(2)], settings=StreamSettings(images=40))
    joined, alone = (
        StreamPipeline(stream, RECIPE, batch=8, seed=0, workers=2, pin_memory=pinned) for pinned in (True, False)
    )
    for batch, other in zip(joined, alone, strict=True):
        for name in ("first", "second", "image_ids"):
            assert getattr(batch, name).is_pinned()
            assert torch.equal(getattr(batch, name), getattr(other, name))


def test_the_host_does_not_wait_to_copy_a_small_array():
    cuda, values = torch.device("cuda"), np.arange(5000)
    to_device(values, cuda)  # page-locked memory is taken once
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    done.record()
    copy = to_device(values, cuda)
    assert not done.query(), "a second of work before the copy is still running"
    assert copy.tolist() == values.tolist()


@DALI
@pytest.mark.parametrize("decode", ["once", "windows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dali_makes_the_views_of_the_portable_pipeline(split, decode, dtype):
    options = {"batch": 8, "seed": 0, "workers": 2}
    cuda = torch.device("cuda")
    assert choose_pipeline("auto", split, cuda) == "dali"
    ours = build_pipeline(split, RECIPE, device=cuda, dtype=dtype, decode=decode, **options)
    theirs = build_pipeline(split, RECIPE, name="torchvision", **options)
    for number in range(2):
        for pipe in (ours, theirs):
            pipe.set_epoch(number, start=number)
        for batch, other in zip(ours, theirs, strict=True):
            assert torch.equal(batch.image_ids.cpu(), other.image_ids)
            for view, wanted in ((batch.first, other.first), (batch.second, other.second)):
                assert view.is_cuda
                assert view.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
                assert view.is_contiguous(memory_format=torch.channels_last)
                difference = (view.float().cpu() - normalise(wanted, RECIPE)).abs()
                # Two levels of 255: another JPEG decoder, and the graph rounds after each operation.
                assert difference.mean() < 2 / 255 / 0.225
    for pipe in (ours, theirs):
        pipe.close()


@DALI
def test_dali_gets_over_broken_and_special_files(split, tmp_path):
    damage(tmp_path)
    special(tmp_path)
    split = open_source(str(tmp_path)).train
    (tmp_path / "missing.jpg").unlink()
    cuda = torch.device("cuda")
    pipe = build_pipeline(split, RECIPE, name="dali", device=cuda, batch=len(split), seed=0, workers=2)
    for number in range(2):
        pipe.set_epoch(number)
        (batch,) = pipe
        assert torch.isfinite(batch.first.float()).all()
        assert sorted(split.name(index).rpartition("/")[2] for index in batch.corrupt) == list(CORRUPT)
    pipe.close()


@DALI
@pytest.mark.parametrize("fused", [False, True])
def test_dalis_memory_is_not_reused_before_it_is_read(split, fused):
    """The device lags behind the host, which takes further batches and leaves each epoch in its middle."""
    cuda = torch.device("cuda")

    def views(lag):
        pipe, kept = build_pipeline(split, RECIPE, name="dali", device=cuda, batch=4, seed=0, workers=2), []
        if fused:
            pipe.use_kernels(make_views)
        for number in range(3):
            pipe.set_epoch(number)
            batches = iter(pipe)
            for _ in range(6):
                torch.cuda._sleep(lag)
                kept.append(next(batches).first)
            del batches
        pipe.close()
        return kept

    late, soon = views(50_000_000), views(0)
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(late, soon, strict=True))


def test_a_resident_set_makes_the_same_views_on_the_gpu():
    pixels = np.stack([np.asarray(photo(40, 36, number)) for number in range(32)])
    split = ArraySplit(pixels, None, "photos")
    recipe = Recipe(size=32)
    on_gpu, on_cpu = (
        list(build_pipeline(split, recipe, name="resident", batch=8, seed=0, device=torch.device(device)))
        for device in ("cuda", "cpu")
    )
    for batch, other in zip(on_gpu, on_cpu, strict=True):
        assert batch.first.is_cuda
        difference = (batch.first.cpu().int() - other.first.int()).abs()
        assert difference.float().mean() < 0.05
        assert difference.max() <= 3


@pytest.mark.parametrize("name", ["resident", pytest.param("dali", marks=DALI)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_views_are_those_of_the_portable_pipeline(tmp_path, name, dtype):
    for number in range(24):
        photo(200 + (number if name == "dali" else 0), 150, number).save(tmp_path / f"{number:02d}.jpg", quality=92)
    split = open_source(str(tmp_path)).train
    recipe = Recipe(size=96, min_size=64, start_ramp=0, end_ramp=1)
    options = {"batch": 8, "seed": 0, "workers": 2, "dtype": dtype}
    ours = build_pipeline(split, recipe, name=name, device=torch.device("cuda"), **options)
    theirs = build_pipeline(split, recipe, name="torchvision", **options)
    ours.use_kernels(make_views)
    for number in (0, 1, 0):
        for pipe in (ours, theirs):
            pipe.set_epoch(number)
        for batch, other in zip(ours, theirs, strict=True):
            assert torch.equal(batch.image_ids.cpu(), other.image_ids)
            for view, wanted in ((batch.first, other.first), (batch.second, other.second)):
                assert view.is_cuda
                assert view.dtype == dtype
                assert view.is_contiguous(memory_format=torch.channels_last)
                assert (view.float().cpu() - normalise(wanted, recipe)).abs().mean() < 2 / 255 / 0.225
    for pipe in (ours, theirs):
        pipe.close()


@DALI
def test_evaluation_by_dali_is_that_of_pillow(split):
    cuda = torch.device("cuda")
    ours = list(evaluation_batches(split, RECIPE, batch=16, device=cuda, workers=2))
    theirs = list(evaluation_batches(split, RECIPE, batch=16, workers=2))
    for (images, numbers, corrupt), (others, same, _) in zip(ours, theirs, strict=True):
        assert images.is_cuda
        assert not corrupt
        assert torch.equal(numbers, same)
        assert (images.cpu().int() - others.int()).abs().float().mean() < 1
