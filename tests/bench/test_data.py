"""The fused subjects of the data benchmark, with plain PyTorch in the kernels' place."""

from __future__ import annotations

import pytest
import torch

from synco_fast.bench import data
from synco_fast.bench.subjects import PIPELINES, PIPELINES_OF
from synco_fast.cli import main
from synco_fast.data.augment.recipe import Recipe
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
