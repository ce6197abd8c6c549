"""The trials of a study: every combination of configuration, setting, method and seed."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from synco_fast.config import Config
from synco_fast.explain import known_keys, nearest_key
from synco_fast.presets import load_config
from synco_fast.runtime.errors import ConfigError

__all__ = ["UNTRAINED", "WITHOUT_TRAINING", "Trial", "plan"]

#: Stands for a method in the trials of encoders that are not trained.
UNTRAINED = "untrained"

#: Sections whose settings change an untrained encoder or its accuracy.
WITHOUT_TRAINING = ("data", "augment", "model", "evaluation")


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        config: A preset, or the path of a YAML file.
        setting: The varied values by dotted key.
        method: The value of ``method.name``, or `UNTRAINED`.
        seed: The run's seed.
        overrides: Everything that differs from ``config``, by dotted key, including what all trials share.
    """

    config: str
    setting: Mapping[str, Any]
    method: str
    seed: int
    overrides: Mapping[str, Any]

    @property
    def group(self) -> tuple[str, str]:
        """Configuration and setting as text, shared by the runs whose methods are compared."""
        described = ", ".join(f"{key.rpartition('.')[2]} {_text(value)}" for key, value in self.setting.items())
        return self.config, described

    @property
    def trained(self) -> bool:
        """Whether the run has any step."""
        return self.method != UNTRAINED

    @property
    def name(self) -> str:
        """The name of the run folder; fixed for a trial, so that a study resumes where it stopped."""
        parts = [self.config, *(f"{key.rpartition('.')[2]}={_text(value)}" for key, value in self.setting.items())]
        parts += [self.method, f"seed{self.seed}"]
        return "-".join(re.sub(r"[^\w.=+]+", "_", part).strip("_") for part in parts)

    def resolved(self) -> Config:
        """The configuration of the run.

        Raises:
            ConfigError: As `load_config` says.
        """
        return load_config(self.config, dict(self.overrides))

    def words(self) -> list[str]:
        """The arguments of ``synco-fast pretrain`` without the folder."""
        found = ["--config", self.config]
        for key, value in self.overrides.items():
            found += [f"--{key}", json.dumps(value)]
        return found


def plan(
    configs: Sequence[str],
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    vary: Mapping[str, Sequence[Any]] | None = None,
    overrides: Mapping[str, Any] | None = None,
    untrained: bool = False,
) -> list[Trial]:
    """Every trial of a study, seed by seed, so that an interrupted study holds complete comparisons.

    Args:
        configs: Presets or YAML files.
        methods: Values of ``method.name``; each configuration's own by default.
        seeds: The same for every method, so that differences can be paired.
        vary: Values of a setting by dotted key; several keys give every combination.
        overrides: Settings of all trials, by dotted key.
        untrained: Add a trial of no steps for each seed and each setting of data, augmentation or model.

    Raises:
        ConfigError: A list is empty or has repeats, a key is unknown or given twice, or a trial's configuration is
            not valid.
    """
    vary, overrides = dict(vary or {}), dict(overrides or {})
    for name, values in (("config", configs), ("seeds", seeds), *vary.items()):
        if not values:
            raise ConfigError(f"{name}: found nothing, expected one value or more")
    for name, values in (("config", configs), ("seeds", seeds), ("methods", methods), *vary.items()):
        twice = [value for place, value in enumerate(values) if value in values[:place]]
        if twice:
            raise ConfigError(f"{name}: found {_text(twice[0])} twice, expected each value once")
    for key in ("seed", "method.name"):
        if key in vary or key in overrides:
            option = "--seeds" if key == "seed" else "--methods"
            raise ConfigError(f"{key}: found it as a setting, expected {option}")
    known = known_keys(Config)
    for key in vary:
        if key not in known:
            raise ConfigError(f"vary: found the unknown key {key}{nearest_key(key, Config)}")
        if key in overrides:
            raise ConfigError(f"{key}: found both varied and fixed, expected one of them")
    settings = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    trials: list[Trial] = []
    for seed, config, setting in itertools.product(seeds, configs, settings):
        named = methods or (load_config(config, {**overrides, **setting}).method.name,)
        if untrained:
            found = _untrained(config, setting, seed, overrides)
            trials += [found] if found.name not in {trial.name for trial in trials} else []
        for method in named:
            chosen = {**overrides, **setting, "method.name": method, "seed": seed}
            trial = Trial(config, setting, method, seed, chosen)
            trial.resolved()
            trials.append(trial)
    names = [trial.name for trial in trials]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"config: found two trials named {name}, expected names that differ; rename a YAML file")
    return trials


def _untrained(config: str, setting: Mapping[str, Any], seed: int, overrides: Mapping[str, Any]) -> Trial:
    """The trial of no steps; settings of the method or of training are dropped, so that several settings share it."""
    kept = {key: value for key, value in setting.items() if key.partition(".")[0] in WITHOUT_TRAINING}
    chosen = {**overrides, **kept, "training.max_steps": 0, "seed": seed}
    trial = Trial(config, kept, UNTRAINED, seed, chosen)
    trial.resolved()
    return trial


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
