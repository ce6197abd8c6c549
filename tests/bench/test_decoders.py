from __future__ import annotations

import json

import pytest
import torch

from synco_fast.bench.data import draw_photo
from synco_fast.bench.experiments import decoders


def test_decoders_agree_on_the_pixels():
    pytest.importorskip("simplejpeg")
    content = draw_photo(0, 0, 96, 64)
    expected = decoders.DECODERS["Pillow, and the copy to a tensor"](content)
    assert expected.shape == (64, 96, 3)
    assert torch.equal(decoders.DECODERS["simplejpeg"](content), expected)
    assert torch.equal(decoders.DECODERS["torchvision.io"](content).permute(1, 2, 0), expected)


def test_report(monkeypatch, capsys, tmp_path):
    pytest.importorskip("simplejpeg")
    monkeypatch.setattr(decoders, "SIZES", ((48, 32), (2600, 2000)))
    decoders.main(["--repeats", "1", "--json", str(tmp_path / "record.json")])
    found = json.loads((tmp_path / "record.json").read_text())["milliseconds"]
    assert [len(figures) for figures in found.values()] == [4, len(decoders.DECODERS)]
    assert min(min(figures) for size in found.values() for figures in size.values()) > 0
    assert len(capsys.readouterr().out.splitlines()) == 4 + len(decoders.DECODERS)
