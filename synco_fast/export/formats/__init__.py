"""The export formats, a module each: the names of the modules are the list that everything else reads.

A module has a function ``write(weights, folder)`` that writes its files into a folder that may not be there yet, and
returns their names, what a check measured, and the lines of code that load them (`Written`).
"""

from __future__ import annotations

import pkgutil

__all__ = ["FORMATS", "Written"]

FORMATS: tuple[str, ...] = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""By name; nothing of them is imported yet."""

Written = tuple[tuple[str, ...], dict[str, float], str]
"""The files, what was measured by name, and the lines that load them."""
