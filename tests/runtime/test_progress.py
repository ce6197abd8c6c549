"""The progress bar on terminals of several widths, and the plain lines that stand for it."""

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from synco_fast.runtime import progress
from synco_fast.runtime.console import in_notebook, open_console
from synco_fast.runtime.progress import ProgressBar, clock

FIGURES = ("loss 5.123", "acc 34.5%", "1,234 img/s", "data wait 2%")


def drawn(width: int, title: str = "epoch 12/20") -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    with ProgressBar(console, title, 1000) as bar:
        bar.advance(400, *FIGURES)
        bar._bar.refresh()
    lines = out.getvalue().replace("\x1b[2K", "\n").replace("\r", "\n").splitlines()
    return [line.rstrip() for line in lines if " left" in line and "40%" in line][-1]


@pytest.mark.parametrize("width", [60, 80, 99, 100, 120, 200])
def test_the_line_fits_and_never_cuts_the_time_left(width):
    line = drawn(width)
    assert len(line) <= width
    assert line.endswith(" left")
    assert "…" not in line
    assert FIGURES[0] in line


def test_more_room_shows_more_figures():
    assert FIGURES[2] in drawn(80)
    assert FIGURES[3] not in drawn(80)
    assert all(figure in drawn(120) for figure in FIGURES)


@pytest.mark.parametrize("terminal", [None, "dumb"])
def test_without_a_terminal_and_on_a_dumb_one_it_is_plain_lines(monkeypatch, terminal):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    environment = {} if terminal is None else {"TERM": terminal}
    console = Console(file=out, width=80, force_terminal=terminal is not None, _environ=environment)
    with ProgressBar(console, "epoch 1/2", 100, unit="step") as bar:
        bar.advance(10, "loss 1.0")
        assert out.getvalue() == "epoch 1/2: step 0 of 100\n", "a line at once, then one every 15 s"
        now[0] += 20
        bar.advance(10, "loss 0.9")
        now[0] += 5
        bar.advance(80, "loss 0.5")
    assert out.getvalue().splitlines()[1:] == [
        "epoch 1/2: step 20 of 100  loss 0.9  1:20 left",
        "epoch 1/2: step 100 of 100  loss 0.5",
    ]


def test_a_notebook_has_one_element_that_is_replaced(monkeypatch, capsys):
    """What IPython is asked to show; a kernel is a shell with a ``kernel``."""
    now, shown = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def display(content, *, raw, display_id):
        assert (raw, display_id) == (True, True)
        shown.append(("new", content))
        return SimpleNamespace(update=lambda content, *, raw: shown.append(("replaced", content)))

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    console = open_console()
    with ProgressBar(console, "epoch 1/2", 100, unit="step") as bar:
        bar.advance(10, "loss <1.0>")
        now[0] += 1
        bar.advance(10)
        bar.note("a line")
        bar.advance(80)
    assert [kind for kind, _ in shown] == ["new", "replaced", "replaced"]
    assert [content["text/plain"] for _, content in shown] == [
        "epoch 1/2: step 0 of 100",
        "epoch 1/2: step 20 of 100  loss <1.0>  0:04 left",
        "epoch 1/2: step 100 of 100  loss <1.0>",
    ]
    assert 'value="20" max="100"' in shown[1][1]["text/html"]
    assert "loss &lt;1.0&gt;" in shown[1][1]["text/html"]
    assert capsys.readouterr().out == "a line\n"
    with ProgressBar(Console(quiet=True), "silent", 1), ProgressBar(Console(file=io.StringIO()), "elsewhere", 1):
        pass
    assert len(shown) == 3
    shell.kernel = None
    assert not in_notebook(), "IPython in a terminal"


def test_silence_and_notes():
    with ProgressBar(None, "work", 3) as bar:
        bar.advance(3)
        bar.note("nobody hears")
    out = io.StringIO()
    with ProgressBar(Console(file=out), "work", None) as bar:
        bar.note("[red]as it is[/]")
        bar.restart("other work", 2)
    assert out.getvalue().splitlines() == ["work", "[red]as it is[/]", "other work: 0 of 2"]


def test_another_stage_is_shown_at_once():
    out = io.StringIO()
    with ProgressBar(Console(file=out), "starting", 8, unit="step") as bar:
        bar.stage("evaluation")
        assert out.getvalue().splitlines() == ["starting: step 0 of 8", "evaluation: step 0 of 8"]
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    with ProgressBar(console, "starting", 8) as bar:
        bar.stage("evaluation")
        assert "evaluation" in out.getvalue()


def test_clock():
    assert [clock(value) for value in (-1, 0, 125, 3600, 36_000)] == ["0:00", "0:00", "2:05", "1:00:00", "10:00:00"]
