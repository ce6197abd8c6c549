"""The fused subjects of the data benchmark, with plain PyTorch in the kernels' place."""

from __future__ import annotations

import json
import multiprocessing
import time

import pytest
import torch

from synco_fast.bench import data, data_parts
from synco_fast.bench.subjects import PIPELINES, PIPELINES_OF
from synco_fast.cli import main
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import Batch
from synco_fast.data.pipelines.build import has_dali
from synco_fast.kernels.views.reference import plain_views

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [name for name in PIPELINES if name.endswith("-fused")])
def test_fused_subjects_make_their_views_by_the_kernels(name, tmp_path, monkeypatch):
    if name.startswith("dali") and not has_dali():
        pytest.skip("DALI is not installed")
    calls = []
    monkeypatch.setattr(data, "make_views", lambda *given, **options: calls.append(1) or plain_views(*given, **options))
    monkeypatch.setattr(data, "_RESIDENT_IMAGES", 8)
    monkeypatch.setattr(data, "_RESIDENT_BATCH", 2)
    names = data.make_photos(tmp_path, 2)
    pipe = data._pipeline(name, tmp_path, names, CPU, 2, 0, Recipe(size=16))
    batch = next(iter(pipe))
    pipe.close()
    assert calls
    assert len(batch.first) == 2


def test_a_stream_has_the_same_photos(tmp_path):
    names = data.make_photos(tmp_path, 6)
    pipe = data._pipeline("torchvision-stream", tmp_path, names, CPU, 2, 0, Recipe(size=16))
    images = torch.cat([batch.image_ids for batch, _ in zip(pipe, range(30), strict=False)])
    pipe.close()
    assert len(set(images.tolist())) == len(names)
    assert len(pipe) > 10_000


def test_they_are_measured_where_the_kernels_run(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert {"dali-fused", "resident-32-fused"} <= set(PIPELINES_OF["photos"])
    assert not data.has_pipeline("resident-32-fused", CPU)
    assert data.has_pipeline("resident-32", CPU)
    monkeypatch.setattr(data, "unserved_by_triton", lambda pixels: None)
    assert data.has_pipeline("resident-32-fused", CPU)
    monkeypatch.undo()
    assert main(["bench", "data", "--pipelines", "dali-fused", "--device", "cpu"]) == 2
    assert "found dali-fused, expected pil, torchvision" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(("words", "threads"), [(["--workers", "0"], 1), (["--parts"], 1), (["--workers", "2"], 3)])
def test_the_record_has_the_threads_and_the_device_that_were_measured(words, threads, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    row = {"pipeline": "pil", "core_share": None, "processor_milliseconds": None}
    row |= {"images_per_second": 1.0, "views_per_second": 2.0}
    monkeypatch.setattr(data, "measure_pipelines", lambda *_, keep, **__: keep([row]) or [row])
    monkeypatch.setattr(data_parts, "measure_parts", lambda *_, **__: {"pil": {"decode": 1.0}})
    file, common = tmp_path / "data.json", ["--device", "cpu", "--pipelines", "pil", "--photos", "1"]
    assert main(["bench", "data", *common, "--folder", str(tmp_path), "--json", str(file), *words]) == 0
    environment = json.loads(file.read_text())["environment"]
    assert environment["threads"] == threads
    assert environment["device"] != "a GPU"


FORK = multiprocessing.get_context("fork")


def burn(begin, done, seconds):
    """A worker's work ahead: CPU time that goes on when the batch it is for is no longer waited for."""
    begin.wait()
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    done.set()
    time.sleep(60)


class Ahead:
    """A pipeline whose worker starts with the first batch and then works ahead."""

    def __init__(self, seconds):
        self.begin, self.done, self.seconds, self.worker = FORK.Event(), FORK.Event(), seconds, None

    def __len__(self):
        return 1000

    def set_epoch(self, epoch, start=0):
        pass

    def __iter__(self):
        if self.worker is None:
            self.worker = FORK.Process(target=burn, args=(self.begin, self.done, self.seconds), daemon=True)
            self.worker.start()
        for _ in range(len(self)):
            time.sleep(0.01)
            yield Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1))

    def close(self):
        if self.worker is not None:
            self.worker.kill()
            self.worker.join()


def test_a_round_waits_for_the_workers_of_the_others_and_does_not_count_them(monkeypatch):
    monkeypatch.setattr(data, "_LOOK", 0.25)
    busy, asked = data.busy_seconds, []
    monkeypatch.setattr(data, "busy_seconds", lambda others=frozenset(): asked.append(others) or busy(others))
    ahead, calm = Ahead(0.3), Ahead(0.0)
    one, other = data._Stream(ahead), data._Stream(calm)
    try:
        one.measure(CPU, 0.01, settle=1)
        ahead.begin.set()
        while busy() - busy({ahead.worker.pid}) < 0.02:
            time.sleep(0.01)
        other.measure(CPU, 0.01, settle=1)
        assert ahead.done.is_set()
        assert asked[-2:] == [{ahead.worker.pid}] * 2
        assert busy() - busy({ahead.worker.pid}) > 0.2
        assert (one._workers, other._workers) == ({ahead.worker.pid}, {calm.worker.pid})
    finally:
        ahead.close()
        calm.close()
