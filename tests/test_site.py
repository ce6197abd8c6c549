"""The website of the documentation, as far as it can be checked without building it: pages, links, names, addresses."""

from __future__ import annotations

import importlib
import re
import unicodedata

import pytest

from tests.support.site import CONFIG, ROOT, links, listed, pages

MARKDOWN = [page for page in pages() if page.endswith(".md")]


def headings(page: str) -> set[str]:
    """The anchors of a page, as Python-Markdown makes them."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", title)
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def test_the_navigation_lists_every_page_once():
    nav = listed()
    assert len(nav) == len(set(nav))
    assert {f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")} | {"README.md"} <= set(nav)
    assert not [page for page in nav if not (ROOT / page).is_file()]


def test_the_index_of_records_lists_every_record():
    found = {ROOT / target for target in links("bench/records/README.md").values()}
    records = set((ROOT / "bench" / "records").rglob("README.md"))
    assert records - found == {ROOT / "bench/records/README.md"}


@pytest.mark.parametrize("page", [*MARKDOWN, "CONTRIBUTING.md", "examples/pretrain.ipynb"])
def test_links_lead_to_files_and_headings(page):
    """A folder is no page of a website, though a forge shows one."""
    for link, target in links(page).items():
        assert (ROOT / target).is_file(), f"{page}: {link}"
        anchor = link.partition("#")[2]
        assert not anchor or anchor in headings(target), f"{page}: {link}"
    text = (ROOT / page).read_text(encoding="utf-8")
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in headings(page), f"{page}: #{anchor}"


def test_the_reference_names_what_is_there_and_documented():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    assert len(names) > 20
    import synco_fast

    assert {f"synco_fast.{name}" for name in synco_fast.__all__ if name != "__version__"} <= set(names)
    for name in names:
        module, _, last = name.rpartition(".")
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:
            found = getattr(importlib.import_module(module), last)
        assert found.__doc__, name


def test_the_site_asks_no_other_host():
    """Fonts, icons and scripts come with the theme, so that it builds and shows without a network."""
    text = CONFIG.read_text(encoding="utf-8")
    assert re.search(r"^  font: false$", text, re.MULTILINE)
    assert "://" not in text
