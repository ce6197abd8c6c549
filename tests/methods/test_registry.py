"""The one list of methods, and what every method of it keeps to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from synco_fast.config import build_config
from synco_fast.data.pipelines.base import Batch
from synco_fast.kernels import Negatives
from synco_fast.methods import EXTRAS, METHODS, extra_of, with_queue
from synco_fast.methods.build import build_method
from synco_fast.presets import PRESETS, load_config
from synco_fast.runtime.errors import ConfigError
from synco_fast.training.step.engine import Engine

from ..conftest import TINY

ROOT = Path(__file__).resolve().parents[2]


def batch(number, rows=16):
    first, second = torch.randint(
        0, 256, (2, rows, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
    )
    return Batch(first, second, torch.arange(rows))


def engine(name, **changes):
    values = {"method.name": name, "training.batch": 16, "optimizer.lr": 0.5, "model.hidden": 16}
    return Engine(build_config(TINY, {**values, **changes}), 4)


@pytest.mark.parametrize("name", METHODS)
def test_all_that_learns_is_trained_and_the_rest_is_not(name):
    """Every parameter of `trainable`, a predictor included, moves by the optimizer; those of `target` by EMA alone."""
    run = engine(name, **{"model.momentum": 1.0, "method.warmup_epochs": 0})
    method = run.method.train()
    before = {key: value.clone() for key, value in method.named_parameters()}
    learned = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    for step in range(3):
        run.step(batch(step), step, 0)
    assert run.skipped.read()[0] == 0
    learns = {id(parameter) for parameter in method.trainable.parameters()}
    assert learned == learns
    for key, parameter in method.named_parameters():
        moved = not torch.equal(before[key], parameter)
        assert moved == (id(parameter) in learns), key
    assert {id(parameter) for parameter in method.encoder.parameters()} <= learns


@pytest.mark.parametrize("name", METHODS)
def test_what_it_declares_covers_what_it_has(name):
    method = engine(name).method
    replicated = {id(p) for module in method.replicated.values() for p in [*module.parameters(), *module.buffers()]}
    assert replicated == {id(tensor) for tensor in [*method.parameters(), *method.buffers()]}
    normalised = {id(buffer) for module in method.statistics for buffer in module.buffers()}
    running = {id(buffer) for name, buffer in method.named_buffers() if "running" in name}
    assert running <= normalised


@pytest.mark.parametrize("name", METHODS)
def test_its_headline_is_among_its_metrics(name):
    run = engine(name)
    run.step(batch(0), 0, 0)
    values = run.means.pop()
    for metric, form in run.method.headline.items():
        assert re.search(r"\d", form.format(values[metric]))


@pytest.mark.parametrize("name", METHODS)
def test_a_difference_on_one_process_would_be_found(name):
    run = engine(name)
    before = run.replica_hash()
    for module in run.method.replicated.values():
        for parameter in [*module.parameters(), *(b for b in module.buffers() if b.dtype == torch.float32)][:1]:
            first = (0,) * parameter.dim()
            with torch.no_grad():
                value = parameter[first].item()
                parameter[first] += 1
                assert run.replica_hash() != before
                parameter[first] = value
    assert run.replica_hash() == before


def test_negatives_are_the_published_ones():
    assert {name: published() for name, published in with_queue().items()} == {
        "moco": Negatives.moco(),
        "mochi": Negatives.mochi(),
        "synco": Negatives.synco(),
    }
    with pytest.raises(ConfigError, match=r"method\.name: found simclr, expected one with a queue: moco, mochi, synco"):
        build_config({"method": {"name": "simclr"}}).method.negatives()


@pytest.mark.parametrize("name", [name for name, spec in METHODS.items() if spec.demo])
def test_a_demo_preset_is_the_demo_with_another_method(name):
    config, demo = load_config(f"demo-{name}"), load_config("demo")
    assert config.method.name == name
    assert (config.data, config.augment, config.training) == (demo.data, demo.augment, demo.training)
    assert METHODS[name].title in config.about


def test_the_extra_registers_itself_when_its_section_is_on():
    pairs = {"generated.pair": "frozen", "generated.batch": 4}
    config = build_config(TINY, {**pairs, "method.name": "moco"})
    extra = extra_of(config)
    assert extra is EXTRAS["generated"]
    assert extra_of(build_config(TINY)) is None
    for name in METHODS.keys() - with_queue().keys():
        with pytest.raises(ConfigError, match=rf"generated\.pair: found frozen, expected none with method.name {name}"):
            build_config(TINY, {"generated.pair": "frozen", "method.name": name})


def test_pairs_are_made_only_where_they_are_asked_for():
    for name in METHODS:
        method = build_method(build_config(TINY, {"method.name": name}))
        assert type(method).__name__ != "Generated"
        assert not any(key.startswith("generators") for key, _ in method.named_parameters())


def test_there_is_no_other_list_of_methods():
    """Two method names in one literal list, tuple or set are a list that can be forgotten."""
    names = "|".join(METHODS)
    several = re.compile(rf"""[\[({{]\s*["'](?:{names})["'](?::[^,\n]*)?,\s*["'](?:{names})["']""")
    found = []
    for folder in ("synco_fast", "bench", "data"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            found += [f"{file}: {hit[0]!r}" for hit in several.finditer(file.read_text(encoding="utf-8"))]
    assert found == []
    assert several.search('X = ("moco", "mochi")')
    assert several.search('{"moco": 1, "synco": 2}')


def test_presets_name_known_methods():
    assert {values["method"]["name"] for values in PRESETS.values()} <= set(METHODS)
