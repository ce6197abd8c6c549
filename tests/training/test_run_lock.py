"""Two trainers at once in one run folder: the second ends in one line."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from synco_fast.cli import main
from synco_fast.runtime.errors import ConfigError
from synco_fast.training.run import run_lock
from synco_fast.training.run.run_folder import describe_run
from synco_fast.training.run.run_lock import RunLock

from ..generated.conftest import SMALL
from ..support.training import trainer

#: Takes the lock, forks as a data loader does, and waits to be killed; the worker outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from synco_fast.training.run.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), print)
lock.take()
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(600)
"""


def test_it_ends_with_its_process_though_a_worker_lives_on(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        worker = int(holder.stdout.readline())
        try:
            lock = RunLock(tmp_path, lambda line: None)
            with pytest.raises(ConfigError, match=rf"found {tmp_path} in use by process {holder.pid} on .*, expected"):
                lock.take()
            holder.kill()
            holder.wait()
            deadline = time.monotonic() + 60
            while True:  # the worker closes its copy of the file as soon as it runs
                try:
                    lock.take()
                    break
                except ConfigError:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            os.kill(worker, 0)
            lock.release()
        finally:
            os.kill(worker, signal.SIGKILL)
            holder.kill()


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    said: list[str] = []
    lock = RunLock(tmp_path, said.append)
    lock.take()
    lock.take()
    assert len(said) == 1
    assert "without locks" in said[0]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"found no way to write .*/run/\.lock \(Not a directory\), expected"):
        RunLock(tmp_path / "file" / "run", print).take()


def test_a_second_trainer_is_refused_and_leaves_everything_as_it_is(tiny, image_folder, tmp_path, capsys):
    config = tiny({"training.max_steps": 1, "evaluation.every": 0})
    (tmp_path / "tiny.yaml").write_text(config.to_yaml())
    run, new = tmp_path / "run", tmp_path / "new"
    describe_run(run, config)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    locks = [RunLock(folder, print) for folder in (run, new)]
    for lock in locks:
        lock.take()
    started = ["pretrain", "--config", str(tmp_path / "tiny.yaml"), "--out"]
    generator = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    for words in (
        ["pretrain", "--resume", str(run)],
        [*started, str(run), "--continue"],
        [*started, str(new)],
        ["pretrain-generator", "--data", str(image_folder), "--out", str(new), *generator],
    ):
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert "in use by process" in said
        assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == before
    assert [path.name for path in new.iterdir()] == [".lock"]
    for lock in locks:
        lock.release()
    assert main(["pretrain", "--resume", str(run)]) == 0
    assert main([*started, str(new)]) == 0


def test_a_run_that_began_since_the_folder_was_chosen_is_not_taken_over(tiny, tmp_path):
    config = tiny({"training.max_steps": 1, "evaluation.every": 0})
    late = trainer(config, tmp_path / "run")
    describe_run(tmp_path / "run", config)
    with pytest.raises(ConfigError, match=r"found a run in .*, expected a new folder, or --resume"):
        late.run()
