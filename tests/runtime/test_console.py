"""What a console prints of names that rich would take for markup or for an emoji."""

from __future__ import annotations

import io

from rich.console import Console

from synco_fast.cli import main
from synco_fast.commands.tables import two_columns
from synco_fast.runtime.console import open_console, say
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
