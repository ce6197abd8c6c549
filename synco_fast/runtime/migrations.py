"""Names of older configurations and checkpoints, and what they are called now: the one table of such changes.

A change of a name or value is a row here. `build_config` and `load_checkpoint` apply the tables; nothing else in the
package knows an older name.
"""

from __future__ import annotations

import warnings
from typing import Any

from synco_fast.runtime.errors import ConfigError

__all__ = ["OldLayoutWarning", "migrate_checkpoint", "migrate_config"]

#: Keys of the configuration by dotted name.
KEYS: dict[str, str] = {
    "augment.greyscale_probability": "augment.grayscale_probability",
    "data.max_broken": "data.max_corrupt",
    "data.share": "data.fraction",
    "evaluation.neighbours": "evaluation.k",
}
#: Values of a key.
VALUES: dict[str, dict[Any, Any]] = {"method.backend": {"closed_form": "blockwise"}}
#: Parts of a checkpoint.
PARTS: dict[str, str] = {"game": "extra"}
#: Tensors below a checkpoint's ``method``.
TENSORS: dict[str, str] = {"queue.images": "queue.image_ids"}

#: Once two keys of ``training``, now ``training.engine``: their values, and what each adds to the engine's name.
ENGINE_KEYS: dict[str, dict[Any, str]] = {
    "compile": {"none": "", "encoders": "compile", "step": "compile"},
    "cuda_graph": {False: "", True: "graph"},
}

#: Once the name of a method of its own, with its negatives under ``method.base``.
_PAIRS = "generated"


class OldLayoutWarning(UserWarning):
    """A configuration in an older layout was read; the message says how it was understood."""


def migrate_config(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's nested values under the names of today; warns in one line where anything changed.

    Args:
        values: By section and key; not changed.

    Raises:
        ConfigError: An older name has a value that it never had, or stands beside the name that replaced it.
    """
    values = {name: dict(inner) if isinstance(inner, dict) else inner for name, inner in values.items()}
    changes = (_rename_keys, _rename_values, _join_engine_keys, _part_method_from_pairs)
    notes = [line for change in changes for line in change(values)]
    if notes:
        warnings.warn(f"configuration in an older layout: read {'; '.join(notes)}", OldLayoutWarning, stacklevel=3)
    return values


def migrate_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's content under the names of today; tensors are shared with ``state``."""
    state = {PARTS.get(name, name): value for name, value in state.items()}
    if isinstance(state.get("method"), dict):
        state["method"] = {TENSORS.get(name, name): value for name, value in state["method"].items()}
    return state


def _rename_keys(values: dict[str, Any]) -> list[str]:
    notes = []
    for old, new in KEYS.items():
        section, _, key = old.rpartition(".")
        inside = values.get(section) if section else values
        if isinstance(inside, dict) and key in inside:
            to_section, _, to_key = new.rpartition(".")
            target = values.setdefault(to_section, {}) if to_section else values
            target.setdefault(to_key, inside.pop(key))
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


def _join_engine_keys(values: dict[str, Any]) -> list[str]:
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
    if "engine" in training:
        raise ConfigError(
            f"{words[0]}: found beside training.engine {training['engine']}, which replaces it; "
            f"expected training.engine {name} alone"
        )
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
        # A run folder of that time lists every key, and this one meant nothing beside another method.
        del method["base"]
        values["generated"] = {**pairs, "pair": "none"}
        return [f"method.base as unused beside method.name {method.get('name', 'synco')}"]
    return []
