"""The script that breaks the batch norm can still make each of its breaks. It takes minutes; this takes none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("mutation_of_norm", Path(__file__).parent / "mutation.py")
mutation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutation)


@pytest.mark.parametrize("broken", mutation.BREAKS, ids=lambda broken: broken.what)
def test_can_be_made(broken):
    text = (mutation.ROOT / broken.file).read_text()
    assert text.count(broken.old) == 1


def test_there_are_ten():
    assert len({broken.what for broken in mutation.BREAKS}) >= 10
