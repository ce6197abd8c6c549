"""First use of fused kernels on a device: validated once, in a subprocess, with the result in the user's cache.

The subprocess is `synco_fast.kernels.proof`. Each result is one JSON file for a device, versions and shapes, and lists
every comparison. A kernel that fails, crashes or hangs is not used.
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

#: Time limit of a kernel in seconds, including compilation.
LIMIT = 180.0
#: Failures with another cause than the kernel; they are not cached.
_PASSING = ("out of memory", "busy or unavailable", "did not start", "SIGKILL", "SIGTERM")
_CHILD = (sys.executable, "-m", "synco_fast.kernels.proof")
_CASE = {"about", "errors", "bounds", "misses"}
_LONGEST_REASON = 200


@dataclass(frozen=True)
class Outcome:
    """The result of a kernel's validation.

    Attributes:
        passed: Whether the kernel may be used.
        reason: Why not; empty if it passed.
        fresh: Whether it was validated now, rather than read from the cache.
    """

    passed: bool
    reason: str = ""
    fresh: bool = False


def device_facts(index: int) -> dict[str, str]:
    """What a result on a CUDA device depends on beside the shapes: device, driver, and versions.

    Args:
        index: Index of the device.
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
    """Version of the driver's kernel module, as on bare Linux; else the CUDA version that the driver supports."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", file.read_text(encoding="utf-8"))
    except OSError:
        found = None
    if found is not None:
        return found[0]
    from synco_fast.kernels.driver import driver_version

    supported = driver_version()
    return f"CUDA {supported // 1000}.{supported % 1000 // 10}" if supported else "unknown"


def _digest() -> str:
    """Hash of the kernels' source: a checkout changes between two versions."""
    from synco_fast import kernels

    folder = Path(str(kernels.__file__)).parent
    total = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*.py")):
        total.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:16]


def key_of(kernel: str, shapes: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """Key of a cached result: the same for the same kernel, shapes and facts."""
    whole = json.dumps([kernel, shapes, facts], sort_keys=True)
    return f"{kernel}-{hashlib.sha256(whole.encode()).hexdigest()[:24]}"


def proofs_folder() -> Path:
    """Folder of cached results: ``synco-fast/proofs`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return cache_folder() / "proofs"


def forget() -> int:
    """Remove all cached results and return their number."""
    files = list(proofs_folder().glob("*.json"))
    for file in files:
        file.unlink(missing_ok=True)
    return len(files)


@dataclass(frozen=True)
class Prover:
    """Validates kernels on a device, or reads cached results.

    Attributes:
        device: Name of the device, such as ``cuda:0``.
        facts: `device_facts`.
        folder: Folder of cached results; `proofs_folder` by default.
        command: Command of the subprocess.
        limit: Time limit of each kernel in seconds.
        say: Shows a line of progress.
    """

    device: str
    facts: Mapping[str, str]
    folder: Path | None = None
    command: Sequence[str] = _CHILD
    limit: float = LIMIT
    say: Callable[[str], None] = lambda line: None

    def key(self, kernel: str, shapes: Mapping[str, Any]) -> str:
        """The `key_of` a kernel on this device."""
        return key_of(kernel, shapes, self.facts)

    def prove(self, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Outcome]:
        """Validate kernels; only those without a cached result run.

        Args:
            wanted: Shapes by name in `synco_fast.kernels.proof.KERNELS`.
        """
        found = {name: self._known(name, shapes) for name, shapes in wanted.items()}
        unknown = {name: shapes for name, shapes in wanted.items() if found[name] is None}
        if unknown:
            self.say(
                f"first use on {self.facts['device'].split(',')[0]}: compiling and validating the fused kernels of "
                f"{', '.join(unknown)} (at most {self.limit:g} s each) ..."
            )
        for name, line in self._ask(unknown).items():
            found[name] = self._judge(name, unknown[name], line)
        return {name: outcome for name, outcome in found.items() if outcome is not None}

    # -- cached results -----------------------------------------------------------------------------------------

    def _file(self, name: str, shapes: Mapping[str, Any]) -> Path:
        return (self.folder or proofs_folder()) / f"{self.key(name, shapes)}.json"

    def _known(self, name: str, shapes: Mapping[str, Any]) -> Outcome | None:
        try:
            record = read_json(self._file(name, shapes))
        except UserError:  # damaged
            return None
        if not isinstance(record.get("passed"), bool) or not isinstance(record.get("reason"), str):
            return None
        if record["passed"]:
            return Outcome(True)
        found = f"cached on {record.get('date')}; 'synco-fast validate --forget' empties the cache"
        return Outcome(False, f"{record['reason']} ({found})")

    def _judge(self, name: str, shapes: Mapping[str, Any], line: dict[str, Any]) -> Outcome:
        """Judge the answer about a kernel, and cache the result."""
        compared = line.get("compared", [])
        reason = str(line["raised"]) if "raised" in line else ""
        for case in compared:
            if case["misses"] and not reason:
                reason = f"differs from PyTorch in {', '.join(case['misses'])} at {case['about']}"
                for what in case["misses"]:
                    if what in case["errors"]:
                        reason += f"; {what}: found an error of {case['errors'][what]:.1e}, "
                        reason += f"expected {case['bounds'][what]:.1e} or less"
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
                self.say(f"first use: the result for {name} cannot be cached ({error})")
        return Outcome(not reason, reason, fresh=True)

    # -- the subprocess -----------------------------------------------------------------------------------------

    def _ask(self, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The answer about each kernel, from one subprocess, and another one after each failure."""
        answers: dict[str, dict[str, Any]] = {}
        while left := [name for name in wanted if name not in answers]:
            for line in self._start([(name, wanted[name]) for name in left]):
                answers[line["kernel"]] = line
        return answers

    def _start(self, wanted: list[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """The answers of one subprocess in order; after a failure the last one says what happened."""
        request = {"device": self.device, "wanted": wanted, "seconds": 60 + self.limit * len(wanted)}
        answers: list[dict[str, Any]] = []
        with tempfile.TemporaryFile() as errors:
            try:
                # In its own session, so that its compilers are killed with it and Ctrl-C reaches this process only.
                child = subprocess.Popen(
                    list(self.command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,
                )
            except OSError as error:
                return [{"kernel": wanted[0][0], "raised": f"the subprocess did not start ({error})"}]
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
    """Send ``request`` to a subprocess and queue its lines of output; None marks the end."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with child.stdin:
                child.stdin.write(f"{request}\n")
        except OSError:
            pass  # it has exited already
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _parse(text: str, name: str) -> dict[str, Any]:
    """The answer about the kernel ``name``; anything else is a failure."""
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    good = isinstance(line, dict) and line.get("kernel") == name and isinstance(line.get("compared", []), list)
    if not good or not all(isinstance(case, dict) and case.keys() >= _CASE for case in line.get("compared", [])):
        return {"kernel": name, "raised": f"the subprocess printed {text.strip()[:80]!r}"}
    return dict(line)


def _last_words(child: subprocess.Popen[str], errors: Any) -> str:
    """Why a subprocess ended without an answer."""
    try:
        code = child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return "the subprocess closed its output but did not exit"
    if code < 0:
        return f"the subprocess was killed by {signal.Signals(-code).name}"
    errors.seek(0)
    words = errors.read().decode(errors="replace").strip().splitlines()
    return f"the subprocess exited with code {code}" + (f": {words[-1]}" if words else "")


def _end(child: subprocess.Popen[str]) -> None:
    """Kill a subprocess and its children; do not wait for one that hangs in the driver."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=10)
