"""The benchmark of optimizer steps: every form moves the weights or says why it cannot."""

from __future__ import annotations

import json

import torch
from torch import nn

from synco_fast.bench.optimizer import build, unavailable
from synco_fast.bench.subjects import OPTIMIZERS
from synco_fast.cli import main

CPU = torch.device("cpu")


def test_every_form_moves_the_weights_or_says_why_not():
    for subject in OPTIMIZERS:
        reason = unavailable(subject, CPU)
        assert (reason is not None) == subject.startswith("apex_"), subject
        if reason is None:
            module = nn.Linear(3, 2)
            module(torch.ones(4, 3)).sum().backward()
            before = module.weight.detach().clone()
            build(subject, module, CPU).step()
            assert not torch.equal(module.weight, before), subject
        else:
            assert subject in reason


def test_the_command(tmp_path, capsys):
    words = [
        "--backbone",
        "timm/resnet10t",
        "--subjects",
        "sgd",
        "lars",
        "lars-timm",
        "--repeats",
        "1",
        "--rounds",
        "2",
    ]
    assert main(["bench", "optimizer", *words, "--device", "cpu", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["subject"] for row in found["results"]] == ["sgd", "lars", "lars-timm"]
    for row in found["results"]:
        assert len(row["seconds"]) == 2
        assert row["operations"] > 0
        assert row["waits"], "on a CPU nothing is skipped on a device"
    assert "apex_adam" in found["unavailable"]
    assert "lars-timm" in capsys.readouterr().out
    assert main(["bench", "optimizer", "--subjects", "apex_sgd", "--device", "cpu"]) == 2
    assert "found apex_sgd" in capsys.readouterr().err
