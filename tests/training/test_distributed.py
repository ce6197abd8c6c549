"""Several processes over gloo do what one does."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from synco_fast.runtime import distributed, heartbeat
from synco_fast.runtime.checkpoint import find_checkpoint
from synco_fast.runtime.distributed import DistEnv, init_distributed
from synco_fast.runtime.errors import ConfigError, LostProcessError
from synco_fast.training.run.metrics import read_metrics
from tests.support.rotation import in_turn, todays

from ..support.job import Job, losses, run_job, under_torchrun

BASE = {
    "evaluation.every": 0,
    # Four images of some size in a group: statistics of fewer values would magnify rounding into other losses.
    "training.batch": 16,
    "training.epochs": 4,
    "augment.size": 64,
    "augment.evaluation_resize": 64,
    "model.batch_norm_groups": 4,
    "model.momentum": 0.9,
    "optimizer.lr": 0.03,
    "method.mask_same_image": True,
}


def assert_same_state(job: Job, state: dict, atol: float = 2e-5) -> None:
    """Identical on every rank, and that of another job but for rounding."""
    assert job.codes == [0] * len(job.codes), job.words
    for other in job.states[1:]:
        assert all(torch.equal(job.states[0][name], value) for name, value in other.items() if name.startswith("queue"))
    for name in ("queue.rows", "queue.image_ids", "queue.pointer", "encoder.head.2.weight"):
        assert torch.allclose(job.states[0][name], state[name], atol=atol), (name, job.states[0][name] - state[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "changes"),
    todays([(2, {"method.symmetric": True}), (4, {}), (2, {"training.accumulate": 2, "method.name": "moco"})], 2),
)
def test_losses_and_queue_are_those_of_one_process(tiny, tmp_path, world, changes):
    config = tiny({**BASE, "method.warmup_epochs": 0, "training.max_steps": 5, **changes})
    alone = run_job(1, tiny({**config_values(config), "training.accumulate": 1}), tmp_path / "alone")
    job = run_job(world, config, tmp_path / "job")
    assert_same_state(job, alone.states[0])
    assert torch.allclose(losses(tmp_path / "job"), losses(tmp_path / "alone"), atol=1e-5)
    health = [read_metrics(tmp_path / name)[-1] for name in ("job", "alone")]
    assert health[0]["key_rank"] == pytest.approx(health[1]["key_rank"], rel=1e-3)
    assert [0 <= line["false_negatives"] <= 1 for line in health] == [True, True]
    if config.training.accumulate > 1:
        return  # running statistics move once for each part
    mean = find_checkpoint(tmp_path / "job")[0]["method"]["encoder.backbone.bn1.running_mean"]
    expected = find_checkpoint(tmp_path / "alone")[0]["method"]["encoder.backbone.bn1.running_mean"]
    assert torch.allclose(mean, expected, atol=1e-5), "the statistics of all ranks"


@pytest.mark.slow
def test_captured_steps_exchange_what_eager_ones_do(tiny, tmp_path):
    """By a stand-in for CUDA graphs: after eager steps of DDP the whole step is replayed, its exchange included.

    Both processes measure, agree on the graph, and go on as if they had not measured.
    """
    changes = {**BASE, "training.max_steps": 6, "method.name": "moco", "data.pipeline": "torchvision"}
    alone = run_job(1, tiny({**changes, "training.engine": "eager"}), tmp_path / "alone")
    job = run_job(2, tiny(changes), tmp_path / "job", act="graph")
    assert_same_state(job, alone.states[0])
    assert "engine graph: graph 32, eager 16, compile out (no C++ compiler)" in job.words[0]
    assert "CUDA graph disabled" not in job.words[0]
    rows = {row["engine"]: row for row in json.loads((tmp_path / "job" / "engines.json").read_text())["engines"]}
    assert rows["graph"]["reason"] is None
    assert rows["graph"]["weight_error"] < 1e-3, "rounding alone"
    assert torch.allclose(losses(tmp_path / "job"), losses(tmp_path / "alone"), atol=1e-5)


def config_values(config):
    return {
        f"{section}.{key}": value
        for section, keys in config.model_dump(mode="json").items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }


@pytest.mark.slow
@in_turn(1, 2)
def test_a_run_goes_on_with_another_number_of_processes(tiny, tmp_path):
    changes = {**BASE, "method.name": "moco", "training.epochs": 4}
    whole = run_job(1, tiny(changes), tmp_path / "whole")
    run_job(2, tiny({**changes, "training.max_steps": 3}), tmp_path / "parts")
    job = run_job(4, tiny({**changes, "training.max_steps": 6}), tmp_path / "parts", resume=True)
    assert job.states[0]["step"] == 6
    last = run_job(1, tiny(changes), tmp_path / "parts", resume=True)
    assert_same_state(last, whole.states[0], atol=1e-4)
    assert torch.allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), atol=1e-4)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_the_job_resumes(tiny, tmp_path):
    config = tiny({**BASE, "training.checkpoint_every": 2})
    job = run_job(2, config, tmp_path / "run", act="leave", within=40)
    assert job.codes[1] == -9
    assert job.codes[0] == 2, job.words[0]
    assert job.seconds < 30
    assert "rank 0 lost the connection to the other processes at step 6" in job.words[0]
    assert f"step-00000004.pt: resume with --resume {tmp_path / 'run'}" in job.words[0]
    resumed = run_job(2, config, tmp_path / "run", resume=True)
    assert "resumed from" in resumed.words[0]
    whole = run_job(2, config, tmp_path / "whole")
    assert_same_state(resumed, whole.states[0], atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("act", "hangs"), todays([("hang", 1), ("hang while the others wait", 0)]))
def test_a_process_that_hangs_ends_the_others(tiny, tmp_path, act, hangs):
    """Stopped as by SIGSTOP, in a step and where the others wait without a timeout, as for an evaluation."""
    config = tiny({**BASE, "training.checkpoint_every": 2})
    job = run_job(2, config, tmp_path / "run", act=act, timeout=4, within=40)
    assert job.codes[1 - hangs] == 2, job.words
    assert job.codes[hangs] is None
    said = job.words[1 - hangs].strip().splitlines()[-1]
    assert said.startswith(f"error: rank {1 - hangs} "), said
    assert re.search(rf"step-0000000[46]\.pt: resume with --resume {tmp_path / 'run'}$", said), said


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill(tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    config = tiny({**BASE, "training.checkpoint_every": 2, "training.epochs": 8})
    (tmp_path / "job.yaml").write_text(config.to_yaml())
    run = tmp_path / "run"
    words = ["pretrain", "--config", str(tmp_path / "job.yaml"), "--out", str(run), "--continue"]
    under_torchrun(words, run, world=2, restarts=1)
    said = {name: (tmp_path / f"rank{name}.txt").read_text() for name in ("0-0", "1-1", "0-1")}
    # Whether rank 0 says that it lost the connection depends on the machine: torchrun ends it at the same time.
    assert "resumed from" not in said["0-0"], said
    assert "16 of 16" not in said["0-0"], said
    assert f"resumed from {run}" in said["0-1"], said
    assert find_checkpoint(run)[0]["step"] == 16


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step_and_differences_are_found(tiny, tmp_path):
    config = tiny({**BASE, "training.epochs": 400})
    job = run_job(2, config, tmp_path / "run", act="ask to stop")
    assert job.codes == [0, 0], job.words
    one, other = (state["step"] for state in job.states)
    assert 2 < one == other <= 4, "the processes agree at the end of the epoch at the latest"
    job = run_job(2, config, tmp_path / "run", resume=True, act="differ")
    assert job.codes == [2, 2], job.words
    assert "rank 1 is out of sync with rank 0 at step 6 (weights or queue differ)" in job.words[0]


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


def test_the_place_is_found_in_what_torchrun_or_slurm_sets():
    assert DistEnv.detect({}) == DistEnv()
    assert DistEnv.detect(TORCHRUN) == DistEnv(3, 4, 1, 2, "h", 29500)
    assert DistEnv.detect({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) == DistEnv()
    assert DistEnv.detect(SLURM) == DistEnv(9, 16, 1, 8, "gpu03", 24567)
    assert DistEnv.detect({**SLURM, "MASTER_PORT": "7", "MASTER_ADDR": "a"}).port == 7
    assert DistEnv.detect({**SLURM, "SLURM_STEP_ID": ""}) == DistEnv(), "a shell inside an allocation is no task"
    shell = {**SLURM, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    assert DistEnv.detect(shell) == DistEnv(), "nor is a shell that salloc starts in a step of its own"
    assert DistEnv.detect({**SLURM, "SLURM_STEP_NUM_TASKS": "12"}).world == 12, "a step of fewer tasks than the job"
    assert DistEnv.detect({**SLURM, **TORCHRUN}).world == 4, "torchrun inside a Slurm job"
    with pytest.raises(ConfigError, match="MASTER_PORT: found '' in the environment"):
        DistEnv.detect({**TORCHRUN, "MASTER_PORT": ""})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-05,9]", "gpu03"),
        ("a1,b[2-3]", "a1"),
        ("n[7,9]-ib", "n7-ib"),
        ("rack-1-n5", "rack-1-n5"),
    ],
)
def test_the_first_machine_of_slurms_list(nodes, first):
    assert DistEnv.detect({**SLURM, "SLURM_STEP_NODELIST": nodes}).address == first


def test_a_batch_that_cannot_be_spread(tiny):
    from synco_fast.methods.build import build_method, groups_of_part

    config = tiny({"model.batch_norm_groups": 4})
    assert [groups_of_part(config, processes) for processes in (1, 2, 4, 8)] == [4, 2, 1, 1]
    with pytest.raises(ConfigError, match=r"training\.batch: found 8, expected a multiple of 3 \(3 processes\)"):
        build_method(config, processes=3)
    with pytest.raises(ConfigError, match=r"model\.batch_norm_groups: found 4, expected a multiple or a divisor of 6"):
        groups_of_part(tiny({"training.batch": 24, "model.batch_norm_groups": 4, "training.accumulate": 2}), 3)
    config = tiny({"model.sync_batch_norm": True, "model.batch_norm_groups": 1})
    with pytest.raises(ConfigError, match=r"model\.sync_batch_norm: found true in 2 processes on CPUs"):
        build_method(config, processes=2)
    build_method(config)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_heartbeats_give_up_before_nccls_own_watch_aborts(device, monkeypatch):
    """Over gloo a collective fails first, with an error of its own."""
    asked = {}

    class Beats:
        def __init__(self, store, rank, world, timeout, give_up):
            asked["beats"] = heartbeat._PATIENCE * timeout

        def start(self):
            pass

        def stop(self, *, finished):
            pass

    def connect(backend, *, timeout, **options):
        asked["collectives"] = timeout.total_seconds()
        raise RuntimeError("nobody is there")

    for place, name, value in (
        (torch.cuda, "device_count", lambda: 2),
        (torch.cuda, "set_device", lambda index: None),
        (distributed, "_open_store", lambda env, timeout: dist.HashStore()),
        (distributed, "agree_on_prefix", lambda *given: ("job", {})),
        (distributed, "TCPStore", lambda *given, **options: dist.HashStore()),
        (distributed, "Heartbeat", Beats),
        (distributed.atexit, "register", lambda function: None),
        (dist, "init_process_group", connect),
    ):
        monkeypatch.setattr(place, name, value)
    with pytest.raises(LostProcessError), init_distributed(DistEnv(0, 2, 0, 2, "here", 1), device, timeout=100):
        pass
    assert (asked["beats"] < asked["collectives"]) == (device == "cuda")


def test_processes_that_do_not_come_are_one_line_and_the_end_waits_for_no_connection(monkeypatch):
    """Connections to a process that hangs keep the interpreter from ending."""
    at_exit, codes = [], []
    monkeypatch.setattr(distributed.atexit, "register", at_exit.append)
    monkeypatch.setattr(distributed.os, "_exit", codes.append)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = DistEnv(0, 2, 0, 2, "127.0.0.1", port)
    with (
        pytest.raises(LostProcessError, match=r"could not connect 2 processes at 127\.0\.0\.1:\d+ within 0\.2 s \("),
        init_distributed(alone, "cpu", timeout=0.2),
    ):
        pytest.fail("nobody came")
    (leave,) = at_exit
    leave()
    assert codes == [2]


def test_a_port_in_use_is_named_at_once(monkeypatch):
    monkeypatch.setattr(distributed.atexit, "register", lambda function: None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        alone = DistEnv(0, 2, 0, 2, "127.0.0.1", other.getsockname()[1])
        with (
            pytest.raises(LostProcessError, match=r"could not connect 2 processes at 127\.0\.0\.1:\d+ \(.*EADDRINUSE"),
            init_distributed(alone, "cpu", timeout=100),
        ):
            pytest.fail("the port is another's")
