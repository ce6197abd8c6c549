"""Optimizers by name, learning rate and EMA momentum over a run."""

import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from synco_fast.config import OptimizerConfig
from synco_fast.runtime.errors import ConfigError
from synco_fast.training.step.optimizer import build_optimizer, key_momentum, learning_rate

CPU = torch.device("cpu")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_each_learns_and_keeps_its_state(name):
    net, x = model(), torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    optimizer = build_optimizer(net, OptimizerConfig(name=name), lr=0.05, device=CPU)
    first = None
    for _ in range(60):
        loss = (net(x) - 1).square().mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first
    other = build_optimizer(model(), OptimizerConfig(name=name), lr=0.05, device=CPU)
    other.load_state_dict(optimizer.state_dict())
    assert len(other.state) == len(list(net.parameters()))


def test_vectors_are_not_decayed_but_by_sgd():
    for name, decays in (("sgd", {0.1}), ("adamw", {0.1, 0.0}), ("lars", {0.1, 0.0}), ("lamb", {0.1, 0.0})):
        optimizer = build_optimizer(model(), OptimizerConfig(name=name, weight_decay=0.1), lr=0.1, device=CPU)
        assert {group["weight_decay"] for group in optimizer.param_groups} == decays
        for group in optimizer.param_groups:
            if group["weight_decay"] == 0:
                assert all(parameter.dim() == 1 for parameter in group["params"])


def test_each_takes_its_momentum_and_betas_from_the_configuration():
    config = OptimizerConfig(momentum=0.7, betas=(0.8, 0.95), weight_decay=0.1)
    for name in ("sgd", "lars", "adamw", "lamb"):
        made = build_optimizer(model(), config.model_copy(update={"name": name}), lr=0.3, device=CPU)
        expected = {"momentum": 0.7} if name in ("sgd", "lars") else {"betas": (0.8, 0.95)}
        for group in made.param_groups:
            assert {key: group[key] for key in expected} == expected
            assert group["lr"] == 0.3


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """Make a package of that name importable, with the given files."""

    def make(**files):
        for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            monkeypatch.delitem(sys.modules, name)
        (tmp_path / "apex").mkdir()
        for name, text in {"__init__": "", **files}.items():
            (tmp_path / "apex" / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def refused(name="apex_sgd"):
    with pytest.raises(ConfigError) as error:
        build_optimizer(model(), OptimizerConfig(name=name), lr=0.1, device=CPU)
    return str(error.value)


def test_without_apex():
    assert "found apex_sgd and no NVIDIA apex here" in refused()


def test_the_other_package_of_that_name_is_recognised(apex):
    apex(interfaces="# what PyPI's package of that name looks like: a toolkit for Pyramid")
    said = refused()
    assert "without FusedSGD, such as the web toolkit of that name on PyPI" in said
    assert "pip uninstall apex" in said
    assert "github.com/NVIDIA/apex" in said


def test_nvidias_apex_wants_a_gpu(apex):
    apex(optimizers="class FusedSGD: ...\nclass FusedLAMB: ...")
    assert refused() == "optimizer.name: found apex_sgd, expected sgd without a GPU"
    assert refused("apex_lamb") == "optimizer.name: found apex_lamb, expected lamb without a GPU"


def test_apex_is_asked_for_what_skips_on_the_device(apex):
    lines = [
        f"class {kind}:\n    def __init__(self, groups, **named): self.named = named"
        for kind in ("FusedSGD", "FusedAdam", "FusedLAMB", "FusedMixedPrecisionLamb")
    ]
    apex(optimizers="\n".join(lines))
    made = {
        name: build_optimizer(model(), OptimizerConfig(name=name), lr=0.1, device=torch.device("cuda"))
        for name in ("apex_sgd", "apex_adam", "apex_lamb", "apex_mixed_lamb")
    }
    kinds = [type(optimizer).__name__ for optimizer in made.values()]
    assert kinds == ["FusedSGD", "FusedAdam", "FusedLAMB", "FusedMixedPrecisionLamb"]
    assert made["apex_adam"].named == {"lr": 0.1, "betas": (0.9, 0.999), "capturable": True}
    assert refused("apex_adam") == "optimizer.name: found apex_adam, expected adamw without a GPU"
    assert refused("apex_mixed_lamb") == "optimizer.name: found apex_mixed_lamb, expected lamb without a GPU"


def test_half_a_cosine():
    rates = [learning_rate(step, peak=2.0, steps=100) for step in range(101)]
    assert rates[0] == 2.0
    assert rates[50] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(rates))


def test_warm_up_rises_to_the_peak():
    rates = [learning_rate(step, peak=1.0, steps=20, warmup=5) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert max(rates) == 1.0


def test_constant():
    assert {learning_rate(step, peak=0.3, steps=9, schedule="constant") for step in range(9)} == {0.3}


def test_the_key_encoder_slows_down_along_a_cosine():
    values = [key_momentum(step, base=0.99, steps=10, schedule="cosine") for step in range(11)]
    assert values[0] == pytest.approx(0.99)
    assert values[5] == pytest.approx(0.995)
    assert values[10] == 1
    assert all(a < b for a, b in pairwise(values))
    assert {key_momentum(step, base=0.9, steps=10) for step in range(10)} == {0.9}
