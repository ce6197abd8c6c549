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
from synco_fast.study.evaluations import Evaluation
from synco_fast.study.plan import WITHOUT_TRAINING, Trial

__all__ = ["StudyError", "evaluations_of", "execute", "run_folder", "state_of"]


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


def evaluations_of(trial: Trial, evaluations: Sequence[Evaluation], supervised: Evaluation | None) -> list[Evaluation]:
    """The evaluations of a trial; the supervised one is of untrained encoders only."""
    return [*evaluations, *([supervised] if supervised and not trial.trained else [])]


def execute(
    folder: Path,
    trials: Sequence[Trial],
    *,
    evaluations: Sequence[Evaluation] = (),
    supervised: Evaluation | None = None,
    parallel: int = 1,
    threads: int | None = None,
    note: Callable[[str], None],
) -> None:
    """Train and evaluate every trial that is not finished.

    An evaluation is repeated where its result was made with other options, or of an older checkpoint. A trial is
    ``synco-fast pretrain`` and ``synco-fast evaluate`` in subprocesses, with output in ``FOLDER/logs``. A started run
    resumes from its newest checkpoint. A failing trial does not stop the others.

    Args:
        folder: The study's folder.
        trials: From `plan`.
        evaluations: Of every run.
        supervised: A further one, of untrained encoders only.
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
    untold: list[Evaluation] = []
    children = _Children(environment)

    def one(number: int) -> None:
        trial, run = trials[number], run_folder(folder, trials[number])
        log = folder / "logs" / f"{trial.name}.txt"
        wanted = evaluations_of(trial, evaluations, supervised)
        finished = states[number] == "finished"
        found = read_run(run) if finished else None
        if found is not None and all(evaluation.done(found) for evaluation in wanted):
            untold.extend(evaluation for evaluation in wanted if not evaluation.told(found))
            return
        note(f"{trial.name}: {'resumes' if states[number] != 'new' else 'starts'} ({number + 1} of {len(trials)})")

        def succeeds(words: list[str]) -> bool:
            code = children.run(words, log)
            if code:
                failed.append(f"{trial.name} ended with exit code {code}; {log} says why")
            return code == 0

        if not finished and not succeeds(["pretrain", *trial.words(), "--out", str(run), "--continue"]):
            return
        for evaluation in wanted:
            if not evaluation.done(read_run(run)):
                if not succeeds(evaluation.command(run)):
                    return
                evaluation.remember(read_run(run))
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
    if untold:
        note(f"{len(untold)} results do not say with which options they were made; they count as done")
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise StudyError(f"study: {failed[0]}{more}; run the same command again to retry")


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
