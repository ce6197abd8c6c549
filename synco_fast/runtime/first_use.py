"""First use: fused kernels are proved on this device before a run takes them, once, in a process of their own.

The proofs are those of `synco_fast.kernels.proof`. What came of one is kept in the user's cache, one file for each
device, versions and shapes, with everything that was compared. A kernel that fails, crashes or hangs is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from synco_fast.data.sources.manifest import cache_folder
from synco_fast.runtime.errors import UserError
from synco_fast.runtime.files import read_json, write_json
from synco_fast.version import __version__

__all__ = ["LIMIT", "Outcome", "Prover", "device_facts", "forget", "key_of", "proofs_folder"]

#: Seconds that a kernel may take, compiling included; one that takes longer counts as hanging.
LIMIT = 180.0
#: Failures that say something about what else the machine does, and nothing about a kernel: they are not kept.
_PASSING = ("out of memory", "busy or unavailable", "did not start", "SIGKILL", "SIGTERM")
_CHILD = (sys.executable, "-m", "synco_fast.kernels.proof")
_CASE = {"about", "errors", "bounds", "misses"}
_LONGEST_REASON = 200


@dataclass(frozen=True)
class Outcome:
    """What came of a kernel's proof.

    Attributes:
        passed: Whether it may be used.
        reason: Why not, in a line; empty where it passed.
        fresh: Whether it was proved just now, not read from the cache.
    """

    passed: bool
    reason: str = ""
    fresh: bool = False


def device_facts(index: int) -> dict[str, str]:
    """What a proof on a CUDA device depends on beside shapes: the device, the driver, and every version.

    Args:
        index: The device's number.
    """
    import torch

    try:
        compiler = metadata.version("triton")
    except metadata.PackageNotFoundError:
        compiler = "unknown"
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"{properties.name}, {properties.multi_processor_count} multiprocessors",
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "torch": str(torch.__version__),
        "triton": compiler,
        "synco-fast": __version__,
        "kernels": _digest(),
    }


def _driver(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The driver's version as its kernel module gives it; where that tells nothing, the CUDA version that it serves."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", file.read_text(encoding="utf-8"))
    except OSError:
        found = None
    if found is not None:
        return found[0]
    import torch

    serves = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
    return f"CUDA {serves}"


def _digest() -> str:
    """A hash of the kernels' source, so that a checkout that changes between two versions is proved anew."""
    from synco_fast import kernels

    folder = Path(str(kernels.__file__)).parent
    total = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*.py")):
        total.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:16]


def key_of(kernel: str, shapes: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """What names a proof: the same for the same kernel, shapes and facts."""
    whole = json.dumps([kernel, shapes, facts], sort_keys=True)
    return f"{kernel}-{hashlib.sha256(whole.encode()).hexdigest()[:24]}"


def proofs_folder() -> Path:
    """Where proofs are kept: ``synco-fast/proofs`` in the user's cache, ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return cache_folder() / "proofs"


def forget(folder: Path | None = None) -> int:
    """Remove every kept proof; how many there were."""
    files = list((folder or proofs_folder()).glob("*.json"))
    for file in files:
        file.unlink(missing_ok=True)
    return len(files)


@dataclass(frozen=True)
class Prover:
    """Proves kernels on a device, or reads what is known of them.

    Attributes:
        device: As PyTorch names it, such as ``cuda:0``.
        facts: `device_facts`.
        folder: Where proofs are kept; `proofs_folder` by default.
        command: What is started as the process of its own.
        limit: Seconds for each kernel.
        say: Takes a line before something that takes long.
    """

    device: str
    facts: Mapping[str, str]
    folder: Path | None = None
    command: Sequence[str] = _CHILD
    limit: float = LIMIT
    say: Callable[[str], None] = lambda line: None

    def key(self, kernel: str, shapes: Mapping[str, Any]) -> str:
        """`key_of` a kernel on this device."""
        return key_of(kernel, shapes, self.facts)

    def prove(self, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Outcome]:
        """Whether each kernel may be used; starts a process only for what is not known yet.

        Args:
            wanted: By a kernel's name in `synco_fast.kernels.proof.KERNELS`, the shapes.
        """
        found = {name: self._known(name, shapes) for name, shapes in wanted.items()}
        unknown = {name: shapes for name, shapes in wanted.items() if found[name] is None}
        if unknown:
            self.say(
                f"first use on {self.facts['device'].split(',')[0]}: compiling the fused kernels of "
                f"{', '.join(unknown)} and comparing them with PyTorch, {self.limit:g} s each at most ..."
            )
        for name, line in self._ask(unknown).items():
            found[name] = self._judge(name, unknown[name], line)
        return {name: outcome for name, outcome in found.items() if outcome is not None}

    # -- what is known ------------------------------------------------------------------------------------------

    def _file(self, name: str, shapes: Mapping[str, Any]) -> Path:
        return (self.folder or proofs_folder()) / f"{self.key(name, shapes)}.json"

    def _known(self, name: str, shapes: Mapping[str, Any]) -> Outcome | None:
        try:
            record = read_json(self._file(name, shapes))
        except UserError:  # a damaged file is none
            return None
        if not isinstance(record.get("passed"), bool) or not isinstance(record.get("reason"), str):
            return None
        if record["passed"]:
            return Outcome(True)
        found = f"found on {record.get('date')}; 'synco-fast validate --forget' asks anew"
        return Outcome(False, f"{record['reason']} ({found})")

    def _judge(self, name: str, shapes: Mapping[str, Any], line: dict[str, Any]) -> Outcome:
        """Whether an answer is a proof; it is kept unless it says nothing about the kernel."""
        compared = line.get("compared", [])
        reason = str(line["raised"]) if "raised" in line else ""
        for case in compared:
            if case["misses"] and not reason:
                reason = f"differs from PyTorch in {', '.join(case['misses'])} at {case['about']}"
                reason += "".join(
                    f"; {what} is off by {case['errors'][what]:.1e}, allowed {case['bounds'][what]:.1e}"
                    for what in case["misses"]
                    if what in case["errors"]
                )
        if not compared and not reason:
            reason = "nothing was compared"
        reason = " ".join(reason.split())[:_LONGEST_REASON]
        if not any(word in reason for word in _PASSING):
            record = {
                "kernel": name,
                "passed": not reason,
                "reason": reason,
                "date": time.strftime("%Y-%m-%d"),
                "facts": dict(self.facts),
                "shapes": dict(shapes),
                "compared": compared,
                "seconds": line.get("seconds"),
            }
            try:
                write_json(self._file(name, shapes), record)
            except OSError as error:
                self.say(f"first use: the proof of {name} cannot be kept ({error})")
        return Outcome(not reason, reason, fresh=True)

    # -- the process of its own ---------------------------------------------------------------------------------

    def _ask(self, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The answer about each kernel, from one process, or from a further one for what follows a failure."""
        answers: dict[str, dict[str, Any]] = {}
        while left := [name for name in wanted if name not in answers]:
            for line in self._start([(name, wanted[name]) for name in left]):
                answers[line["kernel"]] = line
        return answers

    def _start(self, wanted: list[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """One process: its answers in order; the last of them says what went wrong, where something did."""
        request = {"device": self.device, "wanted": wanted, "seconds": 60 + self.limit * len(wanted)}
        answers: list[dict[str, Any]] = []
        with tempfile.TemporaryFile() as errors:
            try:
                # A session of its own: its compilers end with it, and Ctrl-C is for this process to handle.
                child = subprocess.Popen(
                    list(self.command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,
                )
            except OSError as error:
                return [{"kernel": wanted[0][0], "raised": f"its process did not start ({error})"}]
            try:
                lines = _lines_of(child, json.dumps(request))
                for name, _ in wanted:
                    try:
                        text = lines.get(timeout=self.limit)
                    except queue.Empty:
                        return [*answers, {"kernel": name, "raised": f"no answer within {self.limit:g} s"}]
                    if text is None:
                        return [*answers, {"kernel": name, "raised": _last_words(child, errors)}]
                    answers.append(_parse(text, name))
                    if "raised" in answers[-1]:
                        break
                return answers
            finally:
                _end(child)


def _lines_of(child: subprocess.Popen[str], request: str) -> queue.SimpleQueue[str | None]:
    """The lines that a process writes, as they come, and None where it ends; ``request`` is handed to it first."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with child.stdin:
                child.stdin.write(f"{request}\n")
        except OSError:
            pass  # it ended before it read: its output says why
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _parse(text: str, name: str) -> dict[str, Any]:
    """An answer about the kernel ``name``; what is none counts as a failure."""
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    good = isinstance(line, dict) and line.get("kernel") == name and isinstance(line.get("compared", []), list)
    if not good or not all(isinstance(case, dict) and case.keys() >= _CASE for case in line.get("compared", [])):
        return {"kernel": name, "raised": f"its process answered {text.strip()[:80]!r}"}
    return dict(line)


def _last_words(child: subprocess.Popen[str], errors: Any) -> str:
    """Why a process ended without an answer."""
    try:
        code = child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return "its process closed its output and goes on"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    errors.seek(0)
    words = errors.read().decode(errors="replace").strip().splitlines()
    return f"its process ended with exit code {code}" + (f": {words[-1]}" if words else "")


def _end(child: subprocess.Popen[str]) -> None:
    """End a process and all that it started; one that the driver holds is not waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=10)
