"""The package as an installation lays it out, made from a checkout: a tree of links, or a copy to be changed.

``setup.py`` maps the top-level folders into one package; its table ``FOLDERS`` is the only list of them.

    python tests/support/layout.py DIR      # DIR/synco_fast, of links; then PYTHONSAFEPATH=1 PYTHONPATH=DIR python ...
"""

from __future__ import annotations

import ast
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Begins a program that takes the package from ``PYTHONPATH``, where an editable install would come first.
WITHOUT_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"


def folders() -> dict[str, str]:
    """Folder by package, from ``setup.py``, which cannot be imported without building."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS":
            found: dict[str, str] = ast.literal_eval(node.value)
            return found
    raise LookupError("setup.py: found no table FOLDERS, expected one")


def link_package(root: Path) -> Path:
    """Make the package below ``root``, which must not hold one yet, out of links; the package's folder."""
    for name, folder in sorted(folders().items()):
        place = root.joinpath(*name.split("."))
        if "." in name:
            place.symlink_to(ROOT / folder)
        else:
            place.mkdir(parents=True)
            for inner in (ROOT / folder).iterdir():
                (place / inner.name).symlink_to(inner)
    return root / "synco_fast"


def copy_package(root: Path) -> Path:
    """Copy the package below ``root``, without records; the package's folder."""
    ignore = shutil.ignore_patterns("__pycache__", "records")
    for name, folder in sorted(folders().items()):
        shutil.copytree(ROOT / folder, root.joinpath(*name.split(".")), ignore=ignore)
    return root / "synco_fast"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {os.path.basename(__file__)} DIR")  # noqa: PTH119
    link_package(Path(sys.argv[1]))
