"""Processes that do not see the same run folder, as machines without a shared one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from synco_fast.runtime.checkpoint import save_checkpoint
from synco_fast.runtime.errors import CheckpointError, ConfigError
from synco_fast.training.run.resuming import check_same_start, find_start


class Told:
    """Stands for the communication of several processes: what the others found is given."""

    def __init__(self, *others: str) -> None:
        self.others = others

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def test_ranks_that_found_something_else_are_named():
    check_same_start(Told("a run", "a run"), "a run")
    with pytest.raises(ConfigError) as caught:
        check_same_start(Told("a run", *["no run"] * 4, "a run"), "a run")
    assert str(caught.value) == (
        "resume: found a run on ranks 0-1, 6, no run on ranks 2-5, expected the same on every rank: machines must "
        "share the run folder"
    )


def test_all_processes_start_from_the_same_step(tmp_path: Path):
    def accept(state: dict[str, Any], path: Path) -> None:
        if refused:
            raise ConfigError("seed: found 1, expected 0")

    refused = False
    (tmp_path / "config.yaml").touch()
    assert find_start(Told("no checkpoint yet"), tmp_path, accept) is None
    with pytest.raises(ConfigError, match="found no checkpoint yet on rank 0, step 4 on rank 1, expected the same"):
        find_start(Told("step 4"), tmp_path, accept)
    save_checkpoint(tmp_path / "checkpoints", 4, {}, keep=1)
    found = find_start(Told("step 4"), tmp_path, accept)
    assert found is not None
    assert found[0]["step"] == 4
    with pytest.raises(ConfigError, match="found step 4 on rank 0, step 8 on rank 1, expected the same"):
        find_start(Told("step 8"), tmp_path, accept)
    refused = True
    with pytest.raises(ConfigError, match="seed: found 1"):
        find_start(Told("no checkpoint to resume from"), tmp_path, accept)
    with pytest.raises(ConfigError, match="found no checkpoint to resume from on rank 0, step 4 on rank 1"):
        find_start(Told("step 4"), tmp_path, accept)
    (tmp_path / "checkpoints" / "step-00000004.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"step-00000004\.pt: found no file of torch.save"):
        find_start(Told(), tmp_path, accept)
