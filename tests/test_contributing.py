"""CONTRIBUTING.md against the tree: every file has its line, and what the recipes name is there."""

from __future__ import annotations

import re

from tests.support.tree import PAGE, ROOT, about, files, page


def test_every_file_says_what_it_holds():
    assert [file.relative_to(ROOT).as_posix() for file in files() if not about(file)] == []


def test_the_page_lists_the_tree_of_today():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.support.tree writes it"


def test_what_the_recipes_name_is_there():
    recipes = PAGE.read_text(encoding="utf-8").partition("## How to add")[2].partition("\n## ")[0]
    named = [name for name in re.findall(r"`([\w./]+)`", recipes) if "/" in name]
    assert len(named) > 15
    for name in named:
        assert (ROOT / name).exists(), name
