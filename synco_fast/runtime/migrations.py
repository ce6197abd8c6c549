"""Migrations: names in older configurations and checkpoints, and their names now.

A renamed key or value is a row here. `build_config`, `build_generator_config` and `load_checkpoint` apply the tables;
no other module knows older names.
"""

from __future__ import annotations

import warnings
from typing import Any

from synco_fast.runtime.errors import ConfigError

__all__ = ["OldLayoutWarning", "migrate_checkpoint", "migrate_config", "migrate_generator_config"]

#: Keys of the configuration by dotted name.
KEYS: dict[str, str] = {
    "augment.greyscale_probability": "augment.grayscale_probability",
    "data.max_broken": "data.max_corrupt",
    "data.share": "data.fraction",
    "evaluation.neighbours": "evaluation.k",
}
#: Keys of the configuration of ``pretrain-generator``.
GENERATOR_KEYS: dict[str, str] = {
    "max_broken": "max_corrupt",
    "quality_every": "kid_every",
    "quality_images": "kid_images",
    "share": "fraction",
}
#: Values of a key.
VALUES: dict[str, dict[Any, Any]] = {"method.backend": {"closed_form": "blockwise"}}
#: Parts of a checkpoint.
PARTS: dict[str, str] = {"broken": "corrupt", "game": "extra", "players": "optimizers"}
#: Tensors below a checkpoint's ``method``.
TENSORS: dict[str, str] = {"queue.images": "queue.image_ids"}

#: Formerly two keys of ``training``, now ``training.engine``: their values, and what each adds to the engine's name.
ENGINE_KEYS: dict[str, dict[Any, str]] = {
    "compile": {"none": "", "encoders": "compile", "step": "compile"},
    "cuda_graph": {False: "", True: "graph"},
}

#: Formerly a method of its own, with its negatives under ``method.base``.
_PAIRS = "generated"


class OldLayoutWarning(UserWarning):
    """A configuration in an older layout was read; the message says how."""


def migrate_config(values: dict[str, Any], *, older_wins: bool = False) -> dict[str, Any]:
    """A configuration's nested values under today's names; one warning if anything changed.

    Args:
        values: By section and key; not changed.
        older_wins: Whether an older name overrides the newer one, as if given on the command line.

    Raises:
        ConfigError: An older name has a value that it never had.
    """
    values = {name: dict(inner) if isinstance(inner, dict) else inner for name, inner in values.items()}
    notes = [
        *_rename_keys(values, KEYS, older_wins),
        *_rename_values(values),
        *_join_engine_keys(values, older_wins),
        *_part_method_from_pairs(values),
    ]
    if notes:
        warnings.warn(f"configuration in an older layout: read {'; '.join(notes)}", OldLayoutWarning, stacklevel=3)
    return values


def migrate_generator_config(values: dict[str, Any]) -> dict[str, Any]:
    """The same for the configuration of ``pretrain-generator``, which has no sections."""
    values = dict(values)
    notes = _rename_keys(values, GENERATOR_KEYS)
    if notes:
        warnings.warn(f"configuration in an older layout: read {'; '.join(notes)}", OldLayoutWarning, stacklevel=3)
    return values


def migrate_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's content under today's names; tensors are shared with ``state``."""
    state = {PARTS.get(name, name): value for name, value in state.items()}
    if isinstance(state.get("method"), dict):
        state["method"] = {TENSORS.get(name, name): value for name, value in state["method"].items()}
    return state


def _rename_keys(values: dict[str, Any], names: dict[str, str], older_wins: bool = False) -> list[str]:
    notes = []
    for old, new in names.items():
        section, _, key = old.rpartition(".")
        inside = values.get(section) if section else values
        if isinstance(inside, dict) and key in inside:
            to_section, _, to_key = new.rpartition(".")
            target = values.setdefault(to_section, {}) if to_section else values
            found = inside.pop(key)
            if older_wins or to_key not in target:
                target[to_key] = found
            notes.append(f"{old} as {new}")
    return notes


def _rename_values(values: dict[str, Any]) -> list[str]:
    notes = []
    for dotted, known in VALUES.items():
        section, _, key = dotted.partition(".")
        inside = values.get(section)
        if isinstance(inside, dict) and isinstance(inside.get(key), str) and inside[key] in known:
            notes.append(f"{dotted} {inside[key]} as {known[inside[key]]}")
            inside[key] = known[inside[key]]
    return notes


def _join_engine_keys(values: dict[str, Any], older_wins: bool) -> list[str]:
    """``training.compile`` and ``training.cuda_graph`` are now ``training.engine``."""
    training = values.get("training")
    if not isinstance(training, dict):
        return []
    found = {key: training.pop(key) for key in ENGINE_KEYS if key in training}
    if not found:
        return []
    words, engine = [], []
    for key, value in found.items():
        text = str(value).lower()
        known = {str(name).lower(): part for name, part in ENGINE_KEYS[key].items()}
        if text not in known:
            raise ConfigError(
                f"training.{key}: found {value!r}, an older name with the values {', '.join(known)}; "
                "expected training.engine, which replaces it"
            )
        words.append(f"training.{key} {text}")
        engine += [known[text]] if known[text] else []
    name = "+".join(engine) or "eager"
    if older_wins or "engine" not in training:
        training["engine"] = name
    return [f"{' and '.join(words)} as training.engine {name}"]


def _part_method_from_pairs(values: dict[str, Any]) -> list[str]:
    """``method.name: generated`` and ``method.base`` are now ``method.name`` and ``generated.pair``."""
    method, pairs = values.get("method"), values.get("generated", {})
    if not isinstance(method, dict) or not isinstance(pairs, dict):
        return []
    if method.get("name") == _PAIRS:
        name, pair = method.pop("base", "moco"), pairs.get("pair", "joint")
        method["name"], values["generated"] = name, {**pairs, "pair": pair}
        return [f"method.name {_PAIRS} as method.name {name} with generated.pair {pair}"]
    if "base" in method:
        # Run folders of that time list every key; with another method this one had no effect.
        del method["base"]
        values["generated"] = {**pairs, "pair": "none"}
        return [f"method.base as unused with method.name {method.get('name', 'synco')}"]
    return []
