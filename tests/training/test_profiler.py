"""The profile of a step: its phases are there and make up the step."""

import json

import torch

from synco_fast.cli import main
from synco_fast.runtime.phases import PHASES, phase, recorded_by
from synco_fast.training.tuning.profiler import PhaseClock


def test_phases_are_timed_only_where_a_recorder_is_active():
    clock = PhaseClock(torch.device("cpu"))
    with phase("loss"):
        pass
    assert clock.pop() == []
    with recorded_by(clock):
        for name in ("loss", "backward"):
            with phase(name):
                torch.ones(10).sum()
    assert [name for name, seconds in clock.pop() if seconds > 0] == ["loss", "backward"]
    assert clock.pop() == []
    assert [point["phase"] for point in clock.memory] == ["loss", "backward"]
    assert all(point["mib"] > 1 for point in clock.memory)


def test_the_command_names_every_phase_and_writes_a_trace(tiny, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(tiny({"training.epochs": 3}).to_yaml())
    words = ["profile", "step", "--config", str(tmp_path / "tiny.yaml"), "--steps", "3", "--out", str(tmp_path / "out")]
    assert main([*words, "--json", str(tmp_path / "profile.json")]) == 0
    report = json.loads((tmp_path / "profile.json").read_text())
    assert list(report["phases"]) == [*PHASES, "other"]
    assert all(found["ms"] > 0 for name, found in report["phases"].items() if name != "other")
    assert sum(found["ms"] for found in report["phases"].values()) > 0.8 * report["step_ms"]
    assert len(report["memory"]) == 3 * len(PHASES)
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert set(PHASES) <= {event.get("name") for event in events}
    assert "query forward" in capsys.readouterr().out
