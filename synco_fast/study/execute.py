"""Running a study's trials in subprocesses; finished trials are not repeated."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from synco_fast.data.workers import available_cores
from synco_fast.report.runs import read_run
from synco_fast.runtime.errors import ConfigError, UserError
from synco_fast.study.plan import WITHOUT_TRAINING, Trial

__all__ = ["StudyError", "execute", "result_name", "run_folder", "state_of"]


class StudyError(UserError):
    """A trial failed; the others have run."""


def run_folder(folder: Path, trial: Trial) -> Path:
    """The run folder of a trial."""
    return folder / "runs" / trial.name


def state_of(folder: Path, trial: Trial) -> str:
    """``"new"``, ``"begun"`` or ``"finished"``.

    Raises:
        ConfigError: The existing run has another configuration.
    """
    run = run_folder(folder, trial)
    if not (run / "config.yaml").is_file():
        return "new"
    found = read_run(run)
    wanted, there = trial.resolved().model_dump(mode="json"), found.config.model_dump(mode="json")
    if not trial.trained and there["training"]["max_steps"] == 0:
        # Studies of other methods and other training share this run.
        wanted = {section: wanted[section] for section in (*WITHOUT_TRAINING, "seed")}
    for section, values in wanted.items():
        if values != there[section]:
            inside = values if isinstance(values, dict) else {}
            key = next((f"{section}.{name}" for name in inside if inside[name] != there[section][name]), section)
            raise ConfigError(
                f"out: found the run {run} with another {key} than this study asks for, expected a new folder or the "
                "study's own settings"
            )
    return "finished" if found.summary.get("finished") else "begun"


def execute(
    folder: Path,
    trials: Sequence[Trial],
    *,
    evaluations: Sequence[Sequence[str]] = (),
    supervised: Sequence[str] | None = None,
    parallel: int = 1,
    threads: int | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> None:
    """Train and evaluate every trial that is not finished.

    A trial is ``synco-fast pretrain`` and ``synco-fast evaluate`` in subprocesses, with output in ``FOLDER/logs``. A
    started run resumes from its newest checkpoint. A failing trial does not stop the others.

    Args:
        folder: The study's folder.
        trials: From `plan`.
        evaluations: The words after ``evaluate`` of each evaluation, such as ``["linear", "--fast"]``.
        supervised: Those of a further evaluation, of untrained encoders only.
        parallel: Trials at a time.
        threads: Threads of each process; the cores divided by ``parallel`` by default.
        note: Called with a line when a trial starts or ends.

    Raises:
        ConfigError: As `state_of` says, before anything runs.
        StudyError: A trial failed.
    """
    states = [state_of(folder, trial) for trial in trials]
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    threads = threads or max(1, available_cores() // parallel)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "200"}
    failed: list[str] = []
    children = _Children(environment)

    def one(number: int) -> None:
        trial, run = trials[number], run_folder(folder, trials[number])
        log = folder / "logs" / f"{trial.name}.txt"
        steps = [] if states[number] == "finished" else [["pretrain", *trial.words(), "--out", str(run), "--continue"]]
        for words in [*evaluations, *([supervised] if supervised and not trial.trained else [])]:
            if not evaluated(run, words):
                steps.append(["evaluate", words[0], str(run), *words[1:]])
        if not steps:
            return
        note(f"{trial.name}: {'resumes' if states[number] != 'new' else 'starts'} ({number + 1} of {len(trials)})")
        for words in steps:
            code = children.run(words, log)
            if code is None:
                return
            if code:
                failed.append(f"{trial.name} ended with exit code {code}; {log} says why")
                return
        note(f"{trial.name}: done")

    pool = ThreadPoolExecutor(parallel)
    try:
        done, _ = wait([pool.submit(one, number) for number in range(len(trials))], return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        children.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise StudyError(f"study: {failed[0]}{more}; run the same command again to retry")


def evaluated(run: Path, words: Sequence[str]) -> bool:
    """Whether an evaluation's result exists."""
    return (run / "evaluation" / f"{result_name(words)}.json").is_file()


def result_name(words: Sequence[str]) -> str:
    """The name of an evaluation's result file."""
    if words[0] == "linear" and "--fast" in words:
        return "linear_fast"
    if words[0] == "finetune":
        percent = words[words.index("--percent") + 1] if "--percent" in words else "1"
        return f"finetune_{percent}"
    return words[0]


class _Children:
    """Subprocesses that are stopped when the study is interrupted; a run then writes a checkpoint."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, words: list[str], log: Path) -> int | None:
        """Run ``synco-fast``; returns its exit code, or None if the study was interrupted."""
        with log.open("ab") as said:
            with self._lock:
                if self._stopped:
                    return None
                child = subprocess.Popen(
                    [sys.executable, "-m", "synco_fast", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    env=self._environment,
                )
                self._running.add(child)
            code = child.wait()
        with self._lock:
            self._running.discard(child)
            return None if self._stopped else code

    def stop(self) -> None:
        """Send every subprocess a request to stop."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.terminate()
