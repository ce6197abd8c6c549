import pytest
import torch
from torch import nn

from synco_fast.runtime.checkpoint import (
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from synco_fast.runtime.errors import CheckpointError


def test_the_newest_are_kept(tmp_path):
    for step in (1, 5, 20, 100_000_000_000):
        save_checkpoint(tmp_path, step, {"x": torch.tensor(step)}, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-100000000000.pt", "step-00000020.pt"]
    assert not list(tmp_path.glob(".*"))
    state, path, problems = find_checkpoint(tmp_path)
    assert (state["step"], path.name, problems) == (100_000_000_000, "step-100000000000.pt", [])


def test_a_write_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(3)}, keep=1)

    def fail(state, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, {"x": torch.ones(3)}, keep=1)
    state, _, problems = find_checkpoint(tmp_path)
    assert (state["step"], problems) == (1, [])


def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.ones(1000)}, keep=2)
    newest = tmp_path / "step-00000002.pt"
    newest.write_bytes(newest.read_bytes()[:900])
    state, path, problems = find_checkpoint(tmp_path)
    assert (state["step"], path.name) == (1, "step-00000001.pt")
    assert len(problems) == 1
    assert "cut short or damaged" in problems[0]
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_checkpoint(newest)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_code_in_a_checkpoint_is_refused(tmp_path):
    torch.save({"format": 1, "step": 1, "x": Bomb()}, tmp_path / "step-00000001.pt")
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_checkpoint(tmp_path / "step-00000001.pt")


def test_what_is_no_checkpoint(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="found no synco-fast checkpoint"):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="found no file"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="found no file or run folder"):
        find_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="found none in"):
        find_checkpoint(tmp_path)


def test_another_architecture_is_named(tmp_path):
    model = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"another architecture: weight has shape \(5, 3\), the model \(2, 3\)"):
        load_weights(model, nn.Linear(3, 5).state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match="another architecture: it lacks bias"):
        load_weights(model, {"weight": model.weight}, tmp_path)
    with pytest.raises(CheckpointError, match="it has extra besides"):
        load_weights(model, {**model.state_dict(), "extra": torch.ones(1)}, tmp_path)
