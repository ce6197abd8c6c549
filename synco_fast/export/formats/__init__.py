"""The export formats, one module each; the module names are the list of formats.

A module has a function ``write(weights, folder)``. It creates the folder if needed, writes the files, and returns their
names, the results of a check, and the code that loads them (`Written`).
"""

from __future__ import annotations

import pkgutil

__all__ = ["FORMATS", "Written"]

FORMATS: tuple[str, ...] = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""Names of the formats; none of the modules is imported yet."""

Written = tuple[tuple[str, ...], dict[str, float], str]
"""The files, measurements by name, and the code that loads the files."""
