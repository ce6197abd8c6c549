"""Names of older configurations, and what they are called now: the one table of such changes."""

from __future__ import annotations

import warnings
from typing import Any

__all__ = ["KEYS", "OldLayoutWarning", "migrate_config"]

#: Keys of the configuration by dotted name.
KEYS: dict[str, str] = {
    "augment.greyscale_probability": "augment.grayscale_probability",
    "data.max_broken": "data.max_corrupt",
    "data.share": "data.fraction",
    "evaluation.neighbours": "evaluation.k",
}


class OldLayoutWarning(UserWarning):
    """A configuration in an older layout was read; the message says how it was understood."""


def migrate_config(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's nested values under the names of today; warns in one line where anything changed.

    Args:
        values: By section and key; not changed.
    """
    values = {name: dict(inner) if isinstance(inner, dict) else inner for name, inner in values.items()}
    notes = _rename_keys(values)
    if notes:
        warnings.warn(f"configuration in an older layout: read {'; '.join(notes)}", OldLayoutWarning, stacklevel=3)
    return values


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
