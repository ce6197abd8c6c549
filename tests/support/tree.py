"""The tree of CONTRIBUTING.md: every file with the first line of its docstring.

``python -m tests.support.tree`` writes it anew.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
FOLDERS = ("kernels", "data", "synco_fast", "bench", "examples", "tests/support")
BEGIN, END = "<!-- tree: python -m tests.support.tree -->\n", "<!-- end of the tree -->\n"


def about(file: Path) -> str:
    """What a file holds, in its own words; empty where it does not say."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".sh":
        return next((line[2:] for line in text.splitlines() if line.startswith("# ")), "")
    return (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")


def files() -> list[Path]:
    """Every file that the tree lists."""
    found = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".sh")]
    return sorted(file for file in found if file.name != "__init__.py" or file.read_text(encoding="utf-8").strip())


def tree() -> str:
    """Folders as headings of a list, files below them."""
    lines: list[str] = []
    for folder in dict.fromkeys(file.parent for file in files()):
        lines.append(f"- `{folder.relative_to(ROOT).as_posix()}/`")
        lines += [f"  - `{file.name}`: {about(file)}" for file in files() if file.parent == folder]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the tree of today."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{head}{BEGIN}{tree()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
