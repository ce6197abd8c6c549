"""Keys of the configuration on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["overrides_of"]


def overrides_of(rest: Sequence[str]) -> dict[str, Any]:
    """``--section.key value`` and ``--section.key=value`` as a mapping; values are read as YAML.

    Raises:
        ConfigError: A word has another form, or a value is missing or not YAML.
    """
    from synco_fast.runtime.errors import ConfigError
    from synco_fast.runtime.strict_yaml import parse_yaml

    found: dict[str, Any] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"found {word!r}, expected --section.key VALUE")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"--{name}: found no value")
            value = words.pop(0)
        found[name] = parse_yaml(value, f"--{name}")
    return found
