"""Files of a run: written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from synco_fast.data.files import atomic_write

__all__ = ["atomic_write", "write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write readable JSON, whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")
