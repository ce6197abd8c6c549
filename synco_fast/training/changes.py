"""Changed settings of a resumed run: which are refused, and a line about the others."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from synco_fast.runtime.errors import ConfigError

__all__ = ["FIXED", "explain_changes"]

#: Sections and keys that a checkpoint's tensors and counters depend on.
FIXED = frozenset({"seed", "model", "method", "generated", "optimizer.name"})
#: Exceptions: keys about how to compute, how long a phase lasts, or what only the first step reads.
_FREE = frozenset(
    {
        "model.norm",
        "method.backend",
        "method.queue_dtype",
        "method.warmup_epochs",
        "method.cooldown_epochs",
        "generated.checkpoint",
        "generated.ramp_epochs",
        "generated.collapse",
    }
)
#: Descriptions of the run, and limits of one start of it.
_UNSAID = frozenset({"preset", "about", "training.max_steps", "training.max_time", "max_time"})


def explain_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], file: Path, *, fixed: Collection[str] = FIXED
) -> str | None:
    """A line about the settings that differ from those of a checkpoint; None if none do.

    Args:
        before: Settings of the checkpoint, by section and key, as plain values.
        after: Settings of the resumed run; keys that only one of them has are ignored.
        file: The checkpoint, for the message.
        fixed: Sections and keys that may not differ.

    Raises:
        ConfigError: One of these differs.
    """
    old, new = _by_dotted_name(before), _by_dotted_name(after)
    changed = [key for key in new if key in old and old[key] != new[key] and key not in _UNSAID]
    for key in changed:
        if key not in _FREE and (key in fixed or key.partition(".")[0] in fixed):
            raise ConfigError(
                f"{key}: found {new[key]!r}, expected {old[key]!r} as in {file}: it cannot change in the middle of a "
                "run; start a new one"
            )
    said = ", ".join(f"{key} {_shown(old[key])} -> {_shown(new[key])}" for key in changed)
    return f"changed since {file.name}: {said}" if said else None


def _shown(value: Any) -> str:
    """A value as one writes it in a file: null, true."""
    return value if isinstance(value, str) else json.dumps(value)


def _by_dotted_name(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found[name] = value
    return found
