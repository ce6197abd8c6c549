"""Every key of a configuration says what it does and what it may be, and can be read back."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from typing import Annotated, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from synco_fast.config import Config, build_config, read_mapping
from synco_fast.explain import bounds, explain_config, known_keys
from synco_fast.generated.config import GeneratorConfig
from synco_fast.presets import PRESETS, load_config
from synco_fast.runtime.errors import ConfigError


def fields(model: type[BaseModel], prefix: str = ""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def numbers(kind, limits=()):
    """The limits of every number inside an annotation."""
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *more = get_args(kind)
        yield from numbers(inner, (*limits, *more))
    elif origin in (Union, types.UnionType, tuple):
        for inner in get_args(kind):
            yield from numbers(inner, limits)
    elif kind in (int, float):
        yield limits


ALL = {**dict(fields(Config)), **dict(fields(GeneratorConfig, "generator."))}
OURS = dict(fields(Config))


@pytest.mark.parametrize("key", ALL)
def test_every_key_is_described(key):
    assert ALL[key].description
    assert "\n" not in ALL[key].description


@pytest.mark.parametrize("key", ALL)
def test_every_number_has_a_finite_range(key):
    for limits in numbers(ALL[key].annotation, tuple(ALL[key].metadata)):
        (low, _), (high, _) = bounds(limits)
        assert low is not None
        assert high is not None
        assert math.isfinite(low)
        assert math.isfinite(high)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_as_it_is_printed_is_read_back(name, tmp_path):
    config = load_config(name)
    text = explain_config(config)
    (tmp_path / "a.yaml").write_text(text)
    assert build_config(read_mapping(tmp_path / "a.yaml")) == config
    for line in text.splitlines():
        if line.strip() and not line.startswith("#") and not line.endswith(":"):
            assert "  # " in line, line
    assert len([line for line in text.splitlines() if "  # " in line]) == len(known_keys(Config))


def test_a_default_is_named_where_the_value_differs():
    lines = explain_config(load_config("demo")).splitlines()
    assert any(line.startswith("  momentum: 0.996  # ") and line.endswith("default 0.999") for line in lines)
    assert any(line.startswith("  dim: 128  # ") and "default" not in line for line in lines)


def test_a_generator_is_explained_too():
    text = explain_config(GeneratorConfig())
    assert yaml.safe_load(text) == GeneratorConfig().model_dump(mode="json")


@pytest.mark.parametrize(
    "key",
    [key for key, field in OURS.items() if list(numbers(field.annotation, tuple(field.metadata)))],
)
def test_no_number_takes_what_is_none(key):
    """One line that begins with the key; null is a value of some."""
    optional = type(None) in get_args(OURS[key].annotation)
    for value in (math.nan, math.inf, -math.inf, True, "much", -1e300, 1e300, [1], *([] if optional else [None])):
        with pytest.raises(ConfigError) as caught:
            build_config({}, {key: value})
        assert str(caught.value).startswith(key), value
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "values"),
    [("training.fused", "auto, none"), ("training.precision", "auto, fp32, tf32, bf16, fp16"), ("seed", "0 or more")],
)
def test_a_boolean_where_none_belongs_is_told_the_values(key, values):
    """YAML reads yes, no, on and off as booleans, and nobody typed true or false."""
    with pytest.raises(ConfigError, match=f"{key}: found False, expected {values}"):
        build_config({}, {key: False})


def test_sections_are_found_by_a_near_name():
    for key, near in (
        ("augmnt.size", "augment.size"),
        ("trainin.epoch", "training.epochs"),
        ("evaluation.kk", "evaluation.k"),
        ("training.warmup_epochs", "optimizer.warmup_epochs"),
    ):
        with pytest.raises(ConfigError, match=rf"did you mean {near}\?"):
            build_config({}, {key: 1})


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("augment.greyscale_probability", "augment.grayscale_probability", 0.5),
        ("data.share", "data.fraction", 0.5),
        ("data.max_broken", "data.max_corrupt", 0.5),
        ("evaluation.neighbours", "evaluation.k", 7),
    ],
)
def test_older_names_are_read_with_one_line(old, new, value):
    section, key = old.split(".")
    with pytest.warns(UserWarning, match=f"read {old} as {new}"):
        config = build_config({section: {key: value}})
    section, key = new.split(".")
    assert getattr(getattr(config, section), key) == value
    with pytest.warns(UserWarning, match=f"read {old} as {new}"):
        assert build_config({}, {old: value}) == config


#: Prints whether torch was imported, after a command.
WITHOUT_TORCH = """
import sys
from synco_fast.cli import main
try:
    code = main({words})
except SystemExit as exit:
    code = exit.code
sys.stderr.write(f"code {{code}} torch {{'torch' in sys.modules}}")
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["evaluate", "--help"], 0),
        (["presets"], 0),
        (["presets", "demo"], 0),
        (["presets", "dmo"], 2),
        (["pretrain"], 2),
        (["pretrain", "--config", "demo", "--method.temperature", "0"], 2),
        (["pretrain", "--config", "demo", "--json", "/proc/a.json"], 2),
        (["pretrain", "--config", "demo", "--out", ""], 2),
        (["pretrain", "--resume", "nowhere"], 2),
        (["pretrain", "--help"], 0),
        (["evaluate", "knn", ".", "--k", "0"], 2),
        (["evaluate", "linear", ".", "--lr", "1", "2"], 2),
        (["data", "show", "demo", "--augmnt.size", "3"], 2),
        (["data", "show", "demo", "--out", "pairs.txt"], 2),
        (["export", "run", "--format", "keras"], 2),
        (["dance"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_words_are_checked_before_torch_is_imported(words, code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH.format(words=words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert not list(tmp_path.iterdir()), "nothing is begun"
    assert done.stderr.endswith(f"code {code} torch False"), done.stderr


#: Runs commands on what is not there, and says after each whether torch was imported.
MISSING = """
import os, sys
from synco_fast.cli import main
os.mkdir("tars")
open("tars/train-000000.tar", "w").close()
os.mkdir("idx")
open("idx/train-images-idx3-ubyte.gz", "w").close()
for words in {all_words}:
    sys.stderr.write(f"{{main(words)}} {{'torch' in sys.modules}}\\n")
"""


def test_what_is_missing_is_refused_before_torch_is_imported(tmp_path):
    """Importing torch takes seconds; a wrong path should not wait for it."""
    preset = "config: found no preset 'dmo'; did you mean demo? 'synco-fast presets' lists them"
    cases = {
        "evaluate knn gone": "checkpoint: found no file or run folder gone",
        "export gone --format timm": "checkpoint: found no file or run folder gone",
        "import gone --method moco --out x.pt": "checkpoint: found no file or run folder gone",
        "embed . --out features.txt": "out: found 'features.txt', expected a name that ends in .npz or .parquet",
        "report gone": "run: found no run in gone, expected a folder with a config.yaml",
        "compare . gone": "run: found no run in ., expected a folder with a config.yaml",
        "evaluate knn . --data gone": f"data: found no folder gone in {tmp_path}",
        "pretrain --config demo --data gone": f"data: found no folder gone in {tmp_path}",
        "pretrain --config demo --data.source tars": "data: found no image in tars, but tar files, expected tar:tars",
        "pretrain-generator --data idx": "data: found no image in idx, but IDX files, expected idx:idx",
        "data check tars": "data: found no image in tars, but tar files, expected tar:tars",
        "data check idx": "data: found no image in idx, but IDX files, expected idx:idx",
        "data pack tar:gone out": "data: found no folder gone, expected a folder of shards",
        "profile step --config dmo": preset,
        "bench step --config dmo": preset,
    }
    done = subprocess.run(
        [sys.executable, "-c", MISSING.format(all_words=[words.split() for words in cases])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.stderr.splitlines() == [line for said in cases.values() for line in (f"error: {said}", "2 False")]


SEVENTH = """
import dataclasses, sys
from synco_fast.kernels import negatives
source = open(negatives.__file__, encoding="utf-8").read()
marker = "FAMILIES: tuple[Family, ...] = ("
assert marker in source
row = '''
    Family("reflected", 7, "Type 7: the mirror image", "-n_i",
           vector=lambda q, n_i, n_j, t, e, negatives: -n_i,
           mixture=lambda negatives: Mixture(first=Affine(-1, 0)), published=3),
'''
exec(compile(source.replace(marker, marker + row), negatives.__file__, "exec"), negatives.__dict__)
from synco_fast.cli import main
from synco_fast.config import build_config
config = build_config({}, {"method.reflected": 5})
assert config.method.negatives().reflected == 5
assert build_config({}).method.negatives().synthetic == 960 + 3
sys.exit(main(["presets", "demo"]))
"""


def test_a_seventh_family_is_a_row_of_the_table_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", SEVENTH], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "  reflected: null  # Type 7: the mirror image; SynCo's count is 3 (0 to 65,536 or null)" in done.stdout
