"""The script that breaks the kernels can make each of its breaks, and the tests notice those of today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "mutation.py"
spec = importlib.util.spec_from_file_location("mutation", SCRIPT)
mutation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutation)


@pytest.mark.parametrize("broken", mutation.BREAKS, ids=lambda broken: broken.what)
def test_can_be_made(broken):
    text = (mutation.ROOT / broken.file).read_text()
    assert text.count(broken.old) == 1
    assert broken.new != broken.old


def test_each_is_another():
    assert len({broken.what for broken in mutation.BREAKS}) == len(mutation.BREAKS)
    assert len({(broken.file, broken.old, broken.new) for broken in mutation.BREAKS}) == len(mutation.BREAKS)


def test_the_pages_count_them():
    said = {"docs/kernels.md": "breaks the code in {} ways", "CHANGELOG.md": "{} mutations test the kernels"}
    for page, text in said.items():
        assert text.format(len(mutation.BREAKS)) in (mutation.ROOT / page).read_text(encoding="utf-8"), page


def test_samples_follow_the_seed():
    assert mutation.chosen(None, None) == list(mutation.BREAKS)
    assert mutation.chosen(4, 1) == mutation.chosen(4, 1) != mutation.chosen(4, 2)
    assert len(mutation.chosen(4, None)) == 4


@pytest.mark.slow
def test_a_sample_is_noticed(capfd):
    pytest.importorskip("triton")
    assert mutation.main(["--sample", "2"]) == 0, capfd.readouterr().out


def test_what_cannot_be_made_is_said(monkeypatch, capsys):
    broken = mutation.BREAKS[0]._replace(old="no such line")
    monkeypatch.setattr(mutation, "BREAKS", (broken,))
    assert mutation.main(["--sample", "1"]) == 1
    assert "CANNOT BE MADE: kernels/topk.py: found 0 places to break, expected 1" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "noticed"), [(0, False), (1, True), (-11, True), (-9, None), (5, None)])
def test_a_crash_is_noticed_and_a_run_that_proves_nothing_is_an_error(monkeypatch, code, noticed):
    done = mutation.subprocess.CompletedProcess([], code, "1 failed" if code else "1 passed", "")
    monkeypatch.setattr(mutation.subprocess, "run", lambda *_, **__: done)
    if noticed is None:
        with pytest.raises(RuntimeError, match="1 failed"):
            mutation.noticed(mutation.BREAKS[0])
    else:
        assert mutation.noticed(mutation.BREAKS[0]) is noticed


def test_a_run_that_proves_nothing_is_said_and_the_others_go_on(monkeypatch, capsys):
    def noticed(broken):
        if broken is mutation.BREAKS[0]:
            raise RuntimeError("some lines\nthe last one")
        return True

    monkeypatch.setattr(mutation, "noticed", noticed)
    monkeypatch.setattr(mutation, "unbroken", lambda: True)
    assert mutation.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PROVES NOTHING: the last one")
    assert len(lines) == len(mutation.BREAKS)
    assert all(line.startswith("caught") for line in lines[1:])
