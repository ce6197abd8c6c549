"""Any value of any key: a run, or one line and exit code 2, and never a hang or a traceback."""

from __future__ import annotations

import json
import math
import random
import signal
from contextlib import contextmanager
from typing import Any, Literal, get_args, get_origin

import pytest

from synco_fast.cli import main
from synco_fast.config import Config, build_config
from synco_fast.explain import bounds, known_keys
from synco_fast.generated.config import GeneratorConfig, build_generator_config
from synco_fast.runtime.errors import ConfigError

from .conftest import TINY
from .support.rotation import todays
from .test_explain import OURS, numbers

WILD: list[Any] = [
    None, True, False, 0, -0.0, 1, -1, 2, 3, 17, 2**31, 10**30, -(10**30), 0.5, -0.5, 1e-300, 1e300, -1e300,
    math.nan, math.inf, -math.inf, "", "text", "1", "1e9", "nan", "a\nb", "\x00", "/", "-", "\ud800",
    [], [1], [1, 2], [2, 1], [0.1, 0.1], [-1, 0.9], [1, 1], [math.nan, 1], [1, 2, 3], [math.inf] * 3, ["a", "b"],
    {}, {"a": 1}, {"layers": [1]}, {1: 2}, [[1], [2]], b"bytes",
]  # fmt: skip


def drawn(key: str, count: int) -> list[Any]:
    """Wild values for a key, others for each key; all of them where everything is run."""
    values = list(WILD)
    random.Random(key).shuffle(values)
    return todays(values, count)


@pytest.mark.parametrize("build", [build_config, build_generator_config])
def test_any_value_of_any_key_is_taken_or_is_one_line_that_names_the_key(build):
    model = Config if build is build_config else GeneratorConfig
    for key in known_keys(model):
        for value in drawn(key, 12):
            values: dict[str, Any] = value if isinstance(value, dict) else {}
            section, _, name = key.rpartition(".")
            values = {section: {name: value}} if section else {name: value}
            try:
                build(values)
            except ConfigError as error:
                said = str(error)
                assert "\n" not in said, (key, value)
                assert said.startswith(key.partition(".")[0]) or key in said, (
                    key,
                    value,
                    said,
                )


#: Compiling takes minutes; tests/training/test_compiled.py does it.
COMPILES = ("training.compile", "training.engine")


def legal() -> list[tuple[str, Any]]:
    """For every key the values at the ends of what it may be, and some beyond."""
    found: list[tuple[str, Any]] = []
    for key, field in OURS.items():
        if key in COMPILES:
            continue
        kind = field.annotation
        if get_origin(kind) is Literal:
            found += [(key, value) for value in get_args(kind)]
        elif kind is bool:
            found += [(key, True), (key, False)]
        limits = list(numbers(kind, tuple(field.metadata)))
        for (low, _), (high, _) in map(bounds, limits[:1]):
            ends: list[Any] = [low, high]
            found += [(key, [end] * len(limits) if len(limits) > 1 else end) for end in ends]
        if not limits:
            found += [(key, value) for value in ("text", "1", None, [1])]
    layers = [{"layers": [1]}, {"layers": [0, 0, 0, 0]}, {"layers": [1, 1, 1, 1], "channels": [2**20] * 4}]
    found += [("model.backbone_args", value) for value in layers]
    return found


@contextmanager
def alarm(seconds: int):
    """Fail where something hangs."""

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


CASES = legal()
random.Random(0).shuffle(CASES)


@pytest.mark.parametrize(("key", "value"), todays(CASES, 4))
def test_the_ends_of_what_a_key_may_be_run_or_are_one_line(key, value, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = build_config(TINY, {"data.source": str(image_folder)})
    (tmp_path / "tiny.yaml").write_text(config.to_yaml())
    words = ["pretrain", "--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), "--max-steps", "1"]
    with alarm(120):
        code = main([*words, f"--{key}", json.dumps(value)])
    error = capsys.readouterr().err
    assert code in (0, 2)
    if code:
        lines = [line for line in error.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1, error
        assert lines[0].startswith("error: ")
