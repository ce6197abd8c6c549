"""Configurations and checkpoints of the layout before methods and pairs were told apart still load."""

from __future__ import annotations

import copy
import io
import lzma
import warnings
from pathlib import Path

import pytest
import torch

from synco_fast.cli import main
from synco_fast.config import build_config
from synco_fast.export.load import read_weights
from synco_fast.generated.config import build_generator_config
from synco_fast.runtime.checkpoint import save_checkpoint
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.migrations import OldLayoutWarning, migrate_checkpoint
from synco_fast.training.run.metrics import read_metrics

from ..support.training import assert_identical, newest, trainer

#: Written by the code of that layout: a run of SynCo beside joint pairs after 5 of its 8 steps, and what became of it.
OLDER = Path(__file__).with_name("older_layout.pt.xz")


def read(values, overrides=None):
    """The configuration, and the lines that were said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = build_config(values, overrides)
    assert all(issubclass(one.category, OldLayoutWarning) for one in said)
    return config, [str(one.message) for one in said]


@pytest.mark.parametrize(
    ("values", "name", "pair"),
    [
        ({"method": {"name": "generated", "base": "mochi"}, "generated": {"pair": "frozen"}}, "mochi", "frozen"),
        ({"method": {"name": "generated"}}, "moco", "joint"),
        ({"method": {"name": "generated", "base": "synco"}, "generated": {"pair": "none"}}, "synco", "none"),
        # A run folder of that time lists every key, those without a meaning as well.
        ({"method": {"name": "mochi", "base": "moco"}, "generated": {"pair": "joint"}}, "mochi", "none"),
    ],
)
def test_a_method_that_was_called_generated(values, name, pair):
    values["method"]["queue"] = 4096
    values["augment"] = {"size": 32, "evaluation_resize": 32}
    config, said = read(values)
    assert (config.method.name, config.generated.pair) == (name, pair)
    assert len(said) == 1
    assert said[0].startswith("configuration in an older layout: read method.")
    assert "\n" not in said[0]
    again, said = read(config.model_dump(mode="json"))
    assert (again, said) == (config, [])


def test_overrides_of_either_layout_go_over_an_older_run():
    small = {"augment": {"size": 32, "evaluation_resize": 32}}
    older = {"method": {"name": "generated", "base": "synco"}, "generated": {"pair": "joint"}, **small}
    config, said = read(older, {"generated.pair": "none"})
    assert (config.method.name, config.generated.pair, len(said)) == ("synco", "none", 1)
    config, said = read(small, {"method.name": "generated", "method.base": "mochi", "generated.pair": "frozen"})
    assert (config.method.name, config.generated.pair, len(said)) == ("mochi", "frozen", 1)


def test_an_older_name_of_a_backend():
    config, said = read({"method": {"backend": "closed_form"}})
    assert config.method.backend == "blockwise"
    assert said == ["configuration in an older layout: read method.backend closed_form as blockwise"]


@pytest.mark.parametrize(
    ("training", "overrides", "engine", "said"),
    [
        # A run folder of that time lists both keys.
        ({"compile": "none", "cuda_graph": False}, {}, "eager", "training.compile none and training.cuda_graph false"),
        ({"compile": "encoders", "cuda_graph": True}, {}, "compile+graph", "training.compile encoders and training"),
        ({"compile": "step"}, {}, "compile", "training.compile step"),
        ({}, {"training.cuda_graph": True}, "graph", "training.cuda_graph true"),
        ({"cuda_graph": True}, {"training.engine": "eager"}, "eager", "training.cuda_graph true as training.engine gr"),
        ({"engine": "auto"}, {"training.cuda_graph": True}, "graph", "training.cuda_graph true as training.engine gr"),
    ],
)
def test_two_keys_that_became_the_engine(training, overrides, engine, said):
    config, lines = read({"training": training}, overrides)
    assert config.training.engine == engine
    assert len(lines) == 1
    assert said in lines[0]
    assert "\n" not in lines[0]


def test_an_older_engine_key_that_cannot_be_read():
    with pytest.raises(ConfigError) as caught:
        build_config({"training": {"compile": "all"}})
    assert str(caught.value) == (
        "training.compile: found 'all', an older name with the values none, encoders, step; expected training.engine, "
        "which replaces it"
    )


def test_an_older_name_on_the_command_line_goes_over_the_newer_one_of_a_run():
    for values, overrides, expected in (
        ({"fraction": 0.5}, {"data.share": 0.25}, 0.25),
        ({"share": 0.5}, {"data.fraction": 0.25}, 0.25),
        ({"fraction": 0.5, "share": 0.75}, None, 0.5),
    ):
        config, said = read({"data": values}, overrides)
        assert config.data.fraction == expected
        assert len(said) == 1


def test_older_names_of_stage_one():
    with pytest.warns(OldLayoutWarning, match="read max_broken as max_corrupt; quality_every as kid_every; quality_im"):
        older = build_generator_config({"share": 0.5, "max_broken": 0.2, "quality_every": 7, "quality_images": 9})
    assert (older.fraction, older.max_corrupt, older.kid_every, older.kid_images) == (0.5, 0.2, 7, 9)


def test_older_parts_of_checkpoints():
    older = {"broken": 1, "game": 2, "players": 3, "method": {"queue.images": 4}, "step": 5}
    newer = {"corrupt": 1, "extra": 2, "optimizers": 3, "method": {"queue.image_ids": 4}, "step": 5}
    assert migrate_checkpoint(older) == migrate_checkpoint(newer) == newer


def test_what_is_given_is_not_changed():
    values = {"method": {"name": "generated", "base": "synco"}, "generated": {"pair": "none"}}
    before = repr(values)
    read(values)
    assert repr(values) == before


@pytest.fixture(scope="module")
def older():
    return torch.load(io.BytesIO(lzma.decompress(OLDER.read_bytes())), weights_only=True)


def as_run(state, folder, source):
    """A run folder with one checkpoint; the images are those of `image_folder`, which is where the run had them."""
    state["config"]["data"]["source"] = str(source)
    return save_checkpoint(folder / "checkpoints", state.pop("step"), state, keep=2)


def test_an_older_run_resumes_where_it_was(older, image_folder, tmp_path, recwarn):
    """Against what the older code came to: the same up to rounding, for convolutions differ between machines.

    And against the same checkpoint rewritten by the tables: the same bit for bit.
    """
    warnings.simplefilter("always")
    for name, state in (("older", dict(older["state"])), ("newer", migrate_checkpoint(older["state"]))):
        state["config"] = {
            key: dict(value) if isinstance(value, dict) else value for key, value in state["config"].items()
        }
        as_run(state, tmp_path / name, image_folder)
        config = build_config(state["config"])
        assert (config.method.name, config.generated.pair) == ("moco", "joint")
        run = trainer(config, tmp_path / name, resume=tmp_path / name)
        assert run.step == 5
        assert run.run().finished
    assert_identical(newest(tmp_path / "older"), newest(tmp_path / "newer"))
    end = newest(tmp_path / "older")["method"]
    assert torch.equal(end["queue.image_ids"], older["queue.images"])
    assert torch.allclose(end["encoder.head.2.weight"], older["head"], atol=1e-3)
    assert torch.allclose(end["queue.rows"], older["rows"], atol=0.02)
    lines = [line for line in read_metrics(tmp_path / "older") if line["kind"] == "train"]
    for now, then in zip(lines, older["lines"], strict=True):
        assert {name: now[name] for name in then} == pytest.approx(then, rel=0.02)
    assert any(issubclass(one.category, OldLayoutWarning) for one in recwarn)


def test_an_older_run_with_synthetic_negatives_is_refused(older, image_folder, tmp_path):
    """Their draws changed: resumed, it would be neither the old run nor a new one."""
    state = copy.deepcopy(older["state"])
    state["config"]["method"]["base"] = "synco"
    as_run(state, tmp_path, image_folder)
    with (
        pytest.warns(OldLayoutWarning),
        pytest.raises(ConfigError, match=r"drawn by version 1, expected version 2: start a new run"),
    ):
        trainer(build_config(state["config"]), tmp_path, resume=tmp_path)


def test_an_older_checkpoint_is_read_for_evaluation_and_export(older, image_folder, tmp_path):
    file = as_run(copy.deepcopy(older["state"]), tmp_path / "run", image_folder)
    for path in (tmp_path / "run", file):
        with pytest.warns(
            OldLayoutWarning, match="method.name generated as method.name moco with generated.pair joint"
        ):
            weights = read_weights(path)
        assert (weights.config.method.name, weights.config.generated.pair) == ("moco", "joint")
        assert "queue.image_ids" in weights.state
        assert "queue.images" not in weights.state


def test_the_command_says_it_in_one_line(tiny, tmp_path, capsys, monkeypatch):
    import yaml

    monkeypatch.setenv("COLUMNS", "200")
    values = tiny({"training.max_steps": 1, "evaluation.every": 0}).model_dump(mode="json")
    values["method"] |= {"name": "generated", "base": "mochi", "backend": "closed_form"}
    values["generated"]["pair"] = "none"
    (tmp_path / "older.yaml").write_text(yaml.safe_dump(values))
    assert main(["pretrain", "--config", str(tmp_path / "older.yaml"), "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert err.count("older layout") == 1
    assert len(err.splitlines()) == 1
    assert "mochi on" in out
