"""An error that every process of a job meets is printed once, and one of a single process with its place."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from synco_fast.cli import main
from synco_fast.runtime import dist_env, distributed
from synco_fast.runtime.dist_env import DistEnv
from synco_fast.runtime.errors import ConfigError, UserError

from ..support.job import under_torchrun

#: Three machines with two processes each.
SIX = [DistEnv(rank, 6, rank % 2, 2) for rank in range(6)]


class Clock:
    """Time that passes in `sleep` alone, for turns."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(dist_env, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds):
        self.now += seconds


def in_job(monkeypatch, rank, world, machine=None):
    """The environment of a process of a job; all of one machine, or ``machine`` on each."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    for name, value in zip(names, (rank, world, rank % (machine or world), machine or world, 1), strict=True):
        monkeypatch.setenv(name, str(value))


def test_rank_0_speaks_first_then_one_rank_of_each_machine(monkeypatch):
    clock = Clock(monkeypatch)
    waited = []
    for env in SIX:
        begun, error = clock.now, UserError("data: found no folder gone")
        env.wait_for_turn(error)
        env.wait_for_turn(error)
        waited.append(round(clock.now - begun, 1))
    assert waited == [0, 4, 2, 4, 2, 4]


def test_what_another_rank_has_said_is_not_said_again(monkeypatch):
    """The ranks of a job tell each other by its store, whoever ends first."""
    Clock(monkeypatch)
    store = dist.HashStore()
    for env, said in zip(SIX, [False, *[True] * 5], strict=True):
        error = ConfigError("training.batch: found 31, expected a multiple of 6 (6 processes)")
        distributed._take_turn(env, store, "start", error)
        assert error.said == said
    own = ConfigError("data: found no folder gone")
    distributed._take_turn(SIX[3], store, "start", own)
    assert not own.said
    again = ConfigError("data: found no folder gone")
    distributed._take_turn(SIX[3], store, "next start", again)
    assert not again.said, "a restart says it again"


def test_a_store_that_is_gone_silences_nobody(monkeypatch):
    class Gone:
        def check(self, keys):
            raise dist.DistNetworkError("connection reset by peer")

    Clock(monkeypatch)
    error = ConfigError("data: found no folder gone")
    distributed._take_turn(SIX[1], Gone(), "start", error)
    assert error.waited
    assert not error.said


def test_rank_and_machine_are_named_where_others_may_not_have_met_it(monkeypatch, capsys):
    host = socket.gethostname()
    assert DistEnv().place == DistEnv(0, 2, 0, 2).place == ""
    assert DistEnv(0, 4, 0, 2).place == f" (rank 0 on {host})"
    Clock(monkeypatch)
    in_job(monkeypatch, 3, 4)
    assert main(["pretrain", "--resume", "gone"]) == 2
    found = "resume: found no run in gone, expected a folder with a config.yaml"
    assert capsys.readouterr().err == f"error: {found} (rank 3 on {host})\n"


def test_an_interrupt_while_waiting_is_no_traceback(monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    Clock(monkeypatch)
    monkeypatch.setattr(dist_env.time, "sleep", interrupted)
    in_job(monkeypatch, 1, 2)
    assert main(["pretrain", "--resume", "gone"]) == 130


def test_a_rank_that_cannot_join_ends_those_that_wait_for_it(monkeypatch):
    """On another machine no launcher ends them, and an evaluation would wait for an hour."""
    store = dist.HashStore()
    monkeypatch.setattr(distributed, "_MET", Event())
    monkeypatch.setattr(distributed, "_open_store", lambda env, timeout: store)
    error = ConfigError("resume: found no run in gone")

    def join(env):
        with pytest.raises(ConfigError) as ended, distributed.init_distributed(env, "cpu", timeout=20):
            pytest.fail("it has started")
        return ended.value

    def refuse(env):
        own = ConfigError(str(error))
        distributed.refuse(env, own)
        return own

    with monkeypatch.context() as patch, ThreadPoolExecutor(6) as pool:
        Clock(patch)
        found = [pool.submit(join if env.rank in (0, 1, 2) else refuse, env) for env in (*SIX[3:], *SIX[:3])]
        refused, joined = ([each.result() for each in part] for part in (found[:3], found[3:]))
    expected = f"job: found ranks 3-5 unable to start, on {socket.gethostname()}: {error}"
    assert {str(each) for each in joined} == {expected}
    assert sorted(each.said for each in joined) == [False, True, True]
    assert [each.said for each in refused] == [False, True, True]
    distributed.refuse(SIX[0], error)  # after the others were met, nobody waits


@pytest.mark.parametrize(("machine", "refuses"), [(4, []), (2, ["pretrain"])])
def test_others_are_told_where_no_launcher_ends_them(monkeypatch, capsys, machine, refuses):
    Clock(monkeypatch)
    in_job(monkeypatch, 3, 4, machine)
    told = []
    monkeypatch.setattr(distributed, "refuse", lambda env, error: told.append((env.rank, str(error))))
    assert main(["pretrain", "--resume", "gone"]) == 2
    assert main(["presets", "gone"]) == 2, "no command that ranks run together"
    assert told == [(3, "resume: found no run in gone, expected a folder with a config.yaml")] * len(refuses)
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["every rank's", "rank 1's"])
def test_torchrun_prints_it_once_and_fails(tiny, tmp_path, monkeypatch, whose):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    (tmp_path / "job.yaml").write_text(tiny().to_yaml())
    words = ["pretrain", "--config", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run")]
    if whose == "rank 1's":
        (tmp_path / "images0").symlink_to(tmp_path / "images")
        words += ["--data", str(tmp_path / "images{rank}")]
    else:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ChildFailedError) as failed:
        under_torchrun(words, tmp_path / "run", world=2, restarts=0)
    said = [(tmp_path / f"rank{rank}-0.txt").read_text() for rank in range(2)]
    codes = [failed.value.failures[rank].exitcode for rank in sorted(failed.value.failures)]
    if whose == "rank 1's":
        place = f"(rank 1 on {socket.gethostname()})"
        assert said[1] == f"error: data: found no folder {tmp_path / 'images1'} {place}\n"
        assert "error" not in said[0], said
    else:
        assert f"error: out: found a run in {tmp_path / 'run'}, expected a new folder" in said[0], said
        assert "error" not in said[1], said
    assert all(codes), codes
