"""What a console prints of names that rich would take for markup or for an emoji."""

from __future__ import annotations

import io
import os
from pathlib import Path

from rich.console import Console

from synco_fast.cli import main
from synco_fast.commands.tables import two_columns
from synco_fast.runtime.console import LastingConsole, open_console, say
from synco_fast.runtime.progress import ProgressBar

NAME = "runs/[final] of :key: x[/b]"


def test_names_are_printed_as_they_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    console = open_console()
    table = two_columns(f"features of {NAME}")
    table.add_row("file", NAME)
    console.print(table)
    say(console, NAME)
    assert capsys.readouterr().out.count(NAME) == 3


def test_so_are_those_in_errors_and_in_the_progress_bar(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["evaluate", "knn", NAME]) == 2
    assert capsys.readouterr().err == f"error: checkpoint: found no file or run folder {NAME}\n"
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with ProgressBar(terminal, NAME, 3) as bar:
        bar.note(NAME)
        bar.advance()
    assert terminal.file.getvalue().count(NAME) >= 2


def test_a_reader_that_has_ended_does_not_end_the_program():
    """Such as ``tee`` after Ctrl-C, while the run still finishes its step and writes a checkpoint."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", buffering=1) as file:
        console = LastingConsole(file=file)
        say(console, "it is read")
        assert os.read(reading, 100) == b"it is read\n"
        os.close(reading)
        say(console, "it is not")
        say(console, "nor is this")
        assert os.path.samestat(os.fstat(writing), Path(os.devnull).stat())
