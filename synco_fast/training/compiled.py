"""torch.compile where it works, and the same code as it stands where it does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["Compiled", "keep_compile_cache"]

#: What torch.compile translates with; the tests put a back end without a C++ compiler in its place.
BACKEND = "inductor"


class Compiled:
    """A function translated by torch.compile when it is first called.

    Where the translation fails, for want of a compiler or because something cannot be translated, the function runs as
    it is, and one line says so.

    Args:
        function: Called with tensors of the same shapes every time.
        title: What the line calls it.
        note: Takes the line.
    """

    def __init__(self, function: Callable[..., Any], title: str, note: Callable[[str], None]) -> None:
        self._plain, self._title, self._note = function, title, note
        self._translated: Callable[..., Any] | None = torch.compile(function, dynamic=False, backend=BACKEND)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the translated function."""
        if self._translated is not None:
            try:
                return self._translated(*arguments, **named)
            except Exception as error:
                if not _is_of_the_compiler(error):
                    raise
                reason = " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
                self._note(
                    f"training.compile: {self._title} runs uncompiled, since its translation failed: "
                    f"{reason[:200] or type(error).__name__}"
                )
                self._translated = None
        return self._plain(*arguments, **named)


def _is_of_the_compiler(error: Exception) -> bool:
    """Whether torch.compile raised it, not the function."""
    kinds = {kind.__module__.split(".")[1] for kind in type(error).__mro__ if kind.__module__.startswith("torch.")}
    return bool(kinds & {"_dynamo", "_inductor", "_functorch"})


def keep_compile_cache() -> None:
    """Let translations outlive the machine's temporary files; where PyTorch has been told a place, that one stays."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "synco-fast" / "inductor"))
