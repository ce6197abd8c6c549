"""What is DALI's own: getting over files that its decoder refuses, forked workers, evaluation."""

import contextlib
import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from synco_fast.config import build_config
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.build import has_dali
from synco_fast.data.sources.open import open_source
from tests.data.photos import photo
from tests.data.test_pipelines import damage, epoch, special
from tests.support.calls import Calls

if not has_dali():
    pytest.skip("DALI is not installed", allow_module_level=True)

from nvidia.dali import Pipeline, types
from nvidia.dali.backend import GetSchema

from synco_fast.data.augment.draw import ViewParameters, draw_views
from synco_fast.data.augment.ops import finish_views
from synco_fast.data.pipelines.dali import pipeline as dali_pipeline
from synco_fast.data.pipelines.dali import reader as dali_reader
from synco_fast.data.pipelines.dali.finish import finish_crops
from synco_fast.data.pipelines.dali.graph import GraphOptions, build_crops
from synco_fast.data.pipelines.dali.pipeline import DaliPipeline, dali_evaluation
from synco_fast.data.pipelines.dali.settings import DaliSettings
from synco_fast.data.pipelines.torchvision import evaluation_loader
from synco_fast.data.workers import start_threads

RECIPE = Recipe(size=16)


@pytest.fixture
def folder(tmp_path):
    for number in range(20):
        photo(50, 40, number).save(tmp_path / f"good{number:02d}.jpg")
    return tmp_path


def pipeline(folder, **changes):
    return DaliPipeline(open_source(str(folder)).train, RECIPE, **({"batch": 4, "seed": 0, "workers": 0} | changes))


def test_a_file_that_only_the_decoder_finds_broken_is_remembered(folder):
    damage(folder)
    pipe = pipeline(folder)
    bent = next(index for index in range(28) if pipe._reader.split.name(index).endswith("bent.jpg"))
    builds = []
    build = pipe._runner._build
    pipe._runner._build = lambda: builds.append(1) or build()
    for number in range(3):
        assert len(epoch(pipe, number)) == 7
        assert bent in pipe._runner._failed
        assert all("good" not in pipe._reader.split.name(index) for index in pipe._runner._failed)
        assert len(builds) == 3, "built at first, before the second try, after it; then never again"


def test_a_file_that_only_dali_refuses_is_decoded_by_pillow(folder, monkeypatch):
    photo(50, 40, 99).save(folder / "still.gif")
    expected = [epoch(pipeline(folder, batch=7), number) for number in (0, 1)]

    def trusting(content, limits):
        return (40, 50)

    monkeypatch.setattr(dali_reader, "plain_jpeg_size", trusting)
    pipe = pipeline(folder, batch=7)
    for number in (0, 1):
        for batch, wanted in zip(epoch(pipe, number), expected[number], strict=True):
            assert not batch.corrupt
            assert torch.equal(batch.image_ids, wanted.image_ids)
            assert (batch.first.int() - wanted.first.int()).abs().float().mean() < 1
    assert 0 < len(pipe._runner._failed) <= 7


def test_what_fails_for_another_reason_than_a_file_is_raised(folder, monkeypatch):
    pipe = pipeline(folder)
    inputs = pipe._runner._inputs

    def wrong(batch):
        found = inputs(batch)
        if batch.images.any():  # not the blank images of the start
            found["end_0"] = found["end_0"][:, :1]
        return found

    monkeypatch.setattr(pipe._runner, "_inputs", wrong)
    with pytest.raises(RuntimeError):
        epoch(pipe, 0)


@pytest.fixture
def fed(monkeypatch):
    """The first bytes of each file, by batch, in the order in which batches are fed to a graph."""
    batches = []
    feed = Pipeline.feed_input

    def record(graph, name, values, *rest, **options):
        if name == "encoded":
            batches.append([bytes(memoryview(np.asarray(file))[:3]) for file in values])
        return feed(graph, name, values, *rest, **options)

    monkeypatch.setattr(Pipeline, "feed_input", record)
    return batches


def test_the_first_batches_of_a_graph_are_full_and_of_jpeg_files(folder, fed):
    # By the first batch nvImageCodec fixes how many images of each later one the JPEG decoder in hardware takes.
    pipe = pipeline(folder)
    assert pipe._runner._blank == 1, "on a CPU"
    pipe._runner._blank = 4  # as on a GPU
    epoch(pipe, 0)
    blank = dali_pipeline._DEPTH
    assert fed[:blank] == [[b"\xff\xd8\xff"] * 4] * blank
    assert [len(each) for each in fed[blank:]] == [4] * 5


def test_the_next_batches_are_prepared_beside_a_step(folder, fed):
    pipe = pipeline(folder)
    pipe.set_epoch(0)
    depth = dali_pipeline._DEPTH
    found = [len(fed) - depth for _ in pipe]
    assert found == [min(depth + number, 5) for number in range(5)], "the batch comes before more are fed"


def test_views_are_held_for_their_kernels_also_where_an_epoch_is_left(folder, monkeypatch):
    pipe, held, waited = pipeline(folder), [], []
    monkeypatch.setattr(pipe._runner, "_hold", held.append)
    batches = iter(pipe)
    next(batches)
    assert not held, "the caller may launch further kernels"
    batches.close()
    assert len(held) == 1

    class Event:
        def synchronize(self):
            waited.append(pipe._runner._graph is not None)

    pipe._runner._held.append((Event(), held[0]))
    pipe.close()
    assert waited == [True], "before the graph is freed"


@pytest.mark.parametrize("place", ["encoded", "end_0", "schedule_run", "outputs"])
def test_an_interrupt_inside_dali_does_not_shift_the_next_epoch(folder, monkeypatch, place):
    """The views of an epoch are those of its images, whatever of another batch the graph still has."""
    pipe, calls = pipeline(folder), []
    method = "feed_input" if place in ("encoded", "end_0") else place
    inner = getattr(Pipeline, method)

    def interrupted(graph, *values, **options):
        found = inner(graph, *values, **options)
        calls.append(values[0] if method == "feed_input" else place)
        if calls.count(place) == dali_pipeline._DEPTH + 2:  # of which the first are blank
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, method, interrupted)
        with pytest.raises(KeyboardInterrupt) as error:
            epoch(pipe, 0)
    for batch, wanted in zip(epoch(pipe, 1), epoch(pipeline(folder), 1), strict=True):
        assert torch.equal(batch.image_ids, wanted.image_ids)
        assert torch.equal(batch.first, wanted.first)
    assert error.tb is not None, "which keeps the first epoch"


def test_only_the_latest_epoch_goes_on(folder):
    pipe = pipeline(folder)
    batches, others = iter(pipe), iter(pipe)
    next(batches)
    next(others)
    with pytest.raises(RuntimeError, match="expected one at a time"):
        next(batches)
    assert len(list(others)) == 4


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_no_file_is_blamed_for_an_error_of_the_device(folder, monkeypatch, error):
    pipe = pipeline(folder)

    def gather(outputs):
        raise error("CUDA error")

    monkeypatch.setattr(pipe._runner, "_gather", gather)
    with pytest.raises(error):
        epoch(pipe, 0)
    assert not pipe._runner._failed


@pytest.fixture
def gpu(monkeypatch):
    """DALI's CPU backend where the pipeline takes itself to be on an H100; the graphs that are built."""
    graphs, build_graph = [], GraphOptions.build

    def build(options, definition, *arguments):
        assert options.device == 0
        graphs.append(build_graph(dataclasses.replace(options, device=None, decoder={}), definition, *arguments))
        return graphs[-1]

    class Event:
        def record(self, stream):
            pass

        def query(self):
            return True

    monkeypatch.setattr(GraphOptions, "build", build)
    monkeypatch.setattr(dali_pipeline, "_gpu_number", lambda device: 0)
    monkeypatch.setattr(dali_pipeline, "_about", lambda number: H100)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return graphs


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_on_a_gpu_every_graph_begins_with_full_batches_of_jpeg_files(tmp_path, gpu, fed, suffix):
    """Of training, with kernels too, and of an evaluation with fewer images than a batch, whatever the files are."""
    for number in range(6):
        photo(50, 40, number).save(tmp_path / f"{number}.{suffix}")
    pipe, full = pipeline(tmp_path, batch=3), [[b"\xff\xd8\xff"] * 3] * dali_pipeline._DEPTH
    expected = [b"\xff\xd8\xff" if suffix == "jpg" else b"P6\n"] * 3
    assert len(epoch(pipe, 0)) == 2
    assert fed == [*full, expected, expected]
    fed.clear()
    pipe.use_kernels(lambda *values, size, **options: torch.zeros(6, 3, size, size))
    assert len(epoch(pipe, 1)) == 2
    assert fed == [*full, expected, expected]
    fed.clear()
    list(dali_evaluation(pipe._reader.split, RECIPE, batch=8, workers=0, numbers=[1, 2]))
    assert [len(each) for each in fed] == [*[8] * dali_pipeline._DEPTH, 2]
    assert {file for each in fed[:-1] for file in each} == {b"\xff\xd8\xff"}
    assert len(gpu) == 3


@pytest.mark.parametrize("decode", ["once", "windows"])
def test_both_ways_to_decode_make_the_same_views(folder, decode):
    for batch, other in zip(epoch(pipeline(folder, decode=decode), 1), epoch(pipeline(folder), 1), strict=True):
        assert torch.equal(batch.image_ids, other.image_ids)
        assert (batch.second.int() - other.second.int()).abs().float().mean() < 1.5


def test_the_graph_has_few_operators():
    """Sources of the files and of two crops, the decoder and two resizes; a graph of all operations had 310."""
    counts = [len(build_crops(RECIPE, decode, GraphOptions(2))._ops) for decode in ("once", "windows")]
    assert counts == [8, 9]


def test_a_batch_takes_few_launches_after_the_crop():
    """For both views of any batch together, here as a GPU would get them; the text names about 180."""
    options = {"seed": 0, "epoch": 0, "images": np.arange(128), "sizes": np.tile([40, 50], (128, 1))}
    drawn = ViewParameters.join([draw_views(Recipe(), views=np.full(128, view), **options) for view in range(2)])
    with Calls() as calls:
        finish_views(torch.zeros(256, 3, 8, 8, dtype=torch.uint8), drawn)
    assert 100 < calls.count <= 190


H100, A100, T4 = ((9, 0), 80 << 30), ((8, 0), 40 << 30), ((7, 5), 16 << 30)


def test_the_decoder_takes_published_values_where_none_are_set():
    keys = ("hw_decoder_load", "preallocate_width_hint", "preallocate_height_hint", "jpeg_fancy_upsampling")
    for gpu, values in ((H100, (0.99, 5980, 6430)), (A100, (0.75, 5980, 6430)), (T4, (0.65, 0, 0))):
        assert DaliSettings().decoder(*gpu) == dict(zip(keys, (*values, True), strict=True))
    assert DaliSettings().decoder((12, 0), 96 << 30)["hw_decoder_load"] == 0.65
    assert DaliSettings().decoder((9, 0), 16 << 30)["preallocate_width_hint"] == 0, "a part of a GPU"
    assert DaliSettings().decoder(*H100, allocate=False)["preallocate_width_hint"] == 0
    sizes = {"preallocate_width_hint": 640, "preallocate_height_hint": 480}
    config = build_config({"data": {"hw_decoder_load": 0, "jpeg_fancy_upsampling": False, "dali_threads": 3, **sizes}})
    assert config.data.dali.decoder(*H100) == dict(zip(keys, (0, 640, 480, False), strict=True))
    assert [DaliSettings().count_threads(64, capability) for capability in (None, (7, 5), (9, 0))] == [64, 64, 6]
    assert config.data.dali.count_threads(64, (9, 0)) == 3
    for operator in ("decoders__Image", "decoders__ImageSlice"):
        assert set(keys) <= set(GetSchema(operator).GetArgumentNames())


def test_on_a_gpu_the_settings_reach_the_decoder(folder, monkeypatch):
    monkeypatch.setattr(dali_pipeline, "_about", lambda number: H100)
    pipe = pipeline(folder, settings=DaliSettings(hw_decoder_load=0.5))
    options = pipe._options
    assert options.decoder == DaliSettings(hw_decoder_load=0.5).decoder(*H100)
    assert options.threads <= 6
    shared = {"output_type": types.RGB, "adjust_orientation": False}
    assert options.decode_options == {"device": "cpu", **shared}
    on_gpu = dataclasses.replace(options, device=0).decode_options
    assert on_gpu == {"device": "mixed", **shared, **options.decoder}


def test_one_core_a_thread_makes_the_views_of_one_thread():
    before = torch.get_num_threads()
    crops = [torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8) for _ in range(2)]
    options = {"seed": 0, "epoch": 0, "images": np.arange(5), "sizes": np.tile([40, 50], (5, 1))}
    drawn = [draw_views(RECIPE, views=np.full(5, view), **options) for view in range(2)]
    with start_threads(3) as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(20))) == {1}
        assert torch.get_num_threads() == before
        for one, other in zip(
            finish_crops(crops, drawn, RECIPE, torch.uint8, pool),
            finish_crops(crops, drawn, RECIPE, torch.uint8),
            strict=True,
        ):
            assert torch.equal(one, other)
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == before


def test_evaluation_is_that_of_the_portable_pipeline(folder):
    special(folder)
    damage(folder)
    split = open_source(str(folder)).train
    (folder / "missing.jpg").unlink()
    recipe = Recipe(size=24, evaluation_resize=30)
    numbers = list(range(len(split)))[::-1]
    for workers in (0, 2):
        found, wanted = {}, {}
        for results, batches in (
            (found, dali_evaluation(split, recipe, batch=5, workers=workers, numbers=numbers)),
            (wanted, evaluation_loader(split, recipe, batch=5, workers=0, numbers=numbers)),
        ):
            results["corrupt"], order = {}, []
            for images, indices, corrupt in batches:
                results["corrupt"] |= corrupt
                order += indices.tolist()
                results.update(zip(indices.tolist(), images, strict=True))
            assert order == [number for number in numbers if number not in results["corrupt"]]
        assert set(found["corrupt"]) == set(wanted["corrupt"])
        assert len(found["corrupt"]) == 8
        del found["corrupt"], wanted["corrupt"]
        assert set(found) == set(wanted)
        for number, image in found.items():
            difference = (image.int() - wanted[number].int()).abs().float()
            assert difference.mean() < 0.6, split.name(number)
            assert difference.max() <= 8, split.name(number)


def test_evaluation_of_nothing_but_broken_files(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    batches = list(dali_evaluation(open_source(str(tmp_path)).train, RECIPE, batch=2, workers=0))
    assert [len(corrupt) for _, _, corrupt in batches] == [2, 1]
    assert all(images.shape == (0, 3, 16, 16) and len(numbers) == 0 for images, numbers, _ in batches)


def test_a_forked_worker_does_not_collect_a_graph_that_was_left_behind(folder):
    program = f"""
import gc, multiprocessing
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.dali.pipeline import DaliPipeline
from synco_fast.data.sources.open import open_source
pipe = DaliPipeline(open_source({str(folder)!r}).train, Recipe(size=16), batch=4, seed=0, workers=0)
list(pipe)
gc.collect(); gc.disable()
cycle = [pipe]; cycle.append(cycle)
del pipe, cycle
worker = multiprocessing.get_context("fork").Process(target=gc.collect)
worker.start()
worker.join(30)
print("worker", worker.exitcode)
worker.kill()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["worker 0"], done.stderr


def test_sixteen_bit_palette_and_turned_pixels_reach_dali_as_pillow_reads_them(tmp_path):
    special(tmp_path)
    reader = dali_reader.Reader(open_source(str(tmp_path)).train, replace=True)
    names = [reader.split.name(index).rpartition("/")[2] for index in range(len(reader.split))]
    batch = reader[[(0, index) for index in range(len(names))]]
    plain = {
        name for name, file in zip(names, batch.files(), strict=True) if np.asarray(file[:2]).tobytes() == b"\xff\xd8"
    }
    assert plain == {"gray.jpg", "pixel.jpg", "progressive.jpg", "wrong-suffix.png"}
    sizes = dict(zip(names, batch.sizes.tolist(), strict=True))
    assert sizes["turned6.jpg"] == [80, 60]
    assert sizes["turned3.jpg"] == [60, 80]


def test_features_of_dalis_crops_are_those_of_pillows(folder, monkeypatch):
    """The evaluation as it is called, with the graph on the CPU backend in a GPU's place."""
    from torch import nn

    from synco_fast.evaluation import features

    class Means(nn.Module):
        def forward(self, images):
            return images.unflatten(2, (4, -1)).unflatten(4, (4, -1)).mean((3, 5)).flatten(1)

    damage(folder)
    split = open_source(str(folder)).train
    split.labels = np.zeros(len(split), np.int64)
    options = {"device": torch.device("cpu"), "batch": 5, "workers": 0}
    expected = features.extract_features(Means(), split, RECIPE, **options)
    monkeypatch.setattr(
        features,
        "evaluation_batches",
        lambda split, recipe, *, pipeline, device, **rest: dali_evaluation(split, recipe, **rest),
    )
    found = features.extract_features(Means(), split, RECIPE, **options)
    assert found.numbers.tolist() == expected.numbers.tolist()
    assert set(found.corrupt) == set(expected.corrupt)
    assert (found.values - expected.values).abs().max() < 2 / 255 / 0.224
