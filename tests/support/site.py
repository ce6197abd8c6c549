"""The pages of the website: those that ``docs/mkdocs.yml`` lists and what they link to, laid out as in the checkout.

python tests/support/site.py DIR      # DIR/pages and DIR/package, of links; then mkdocs build -f docs/mkdocs.yml
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "docs" / "mkdocs.yml"

#: A link or picture of Markdown, and what is not read as one.
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def listed() -> list[str]:
    """The pages in the navigation, in its order, from the checkout's root."""

    def walk(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            for value in entry.values():
                yield from walk(value)
        elif isinstance(entry, list):
            for value in entry:
                yield from walk(value)

    found = re.search(r"^nav:\n(?:[ -].*\n)+", CONFIG.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, f"{CONFIG}: found no nav"
    return list(walk(yaml.safe_load(found[0])["nav"]))


def links(page: str) -> dict[str, str]:
    """Target from the checkout's root, by relative link of a page; links to other hosts and within the page are not."""
    text = _CODE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    found = {}
    for link in _LINK.findall(text):
        path = link.partition("#")[0]
        if path and "://" not in link and not link.startswith("mailto:"):
            found[link] = os.path.normpath(Path(page).parent / path)
    return found


def pages() -> list[str]:
    """The pages in the navigation and every file that can be reached from them by relative links."""
    found = listed()
    for page in found:
        if page.endswith(".md"):
            found += [target for target in links(page).values() if target not in found]
    return list(dict.fromkeys(found))


def lay_out(root: Path) -> None:
    """Link every page and the package below ``root``, which must not hold them yet."""
    from layout import link_package  # beside this file, which runs as a script

    for page in pages():
        place = root / "pages" / page
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(ROOT / page)
    link_package(root / "package")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {Path(__file__).name} DIR")
    lay_out(Path(sys.argv[1]))
