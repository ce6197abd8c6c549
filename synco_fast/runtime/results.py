"""Results of evaluations in a folder: their files, and the images, checkpoint and protocol that each belongs to."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synco_fast.runtime.files import read_json

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "Result",
    "columns",
    "finetuning_name",
    "protocol_of",
    "read_results",
    "result_stem",
    "same_source",
]


@dataclass(frozen=True)
class Protocol:
    """A published protocol.

    Attributes:
        title: The title of the accuracy's column; None for a result without one.
        published: What the fields of a result hold that follows the protocol.
    """

    title: str | None
    published: Mapping[str, Any] = field(default_factory=dict)


#: Learning rates by their names in a result.
_FAST_RATES = ("0.03", "0.1", "0.3", "1", "3", "10", "30", "100")
_FINETUNE_RATES = ("0.005", "0.01", "0.02", "0.05", "0.1")


def _finetuning(title: str, percent: float | None) -> Protocol:
    epochs = {} if percent is None else {"epochs": 60 if percent <= 1 else 30}
    return Protocol(title, {**epochs, "batch": 1024, "head_lr": 0.5, "rates": _FINETUNE_RATES})


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol("kNN", {"temperature": 0.07}),
    "linear": Protocol("linear", {"epochs": 100, "batch": 256, "lr": 30.0}),
    "linear_fast": Protocol("linear, cached", {"epochs": 100, "batch": 256, "rates": _FAST_RATES}),
    "finetune_1": _finetuning("1 % labels", 1),
    "finetune_10": _finetuning("10 % labels", 10),
    "finetune_100": _finetuning("100 % labels", 100),
    "detection_voc": Protocol(None, {"steps": 24000, "batch": 16, "lr": 0.02}),
    "detection_coco": Protocol(None, {"steps": 180000, "batch": 16, "lr": 0.02}),
}
"""Protocols by the name of a result, in the order of their columns in comparisons and studies."""

#: How a departure from a protocol is said, by field.
_SAID = {
    "epochs": "{} epochs",
    "steps": "{:,} steps",
    "batch": "batch {}",
    "lr": "lr {:g}",
    "head_lr": "classifier's lr {:g}",
    "temperature": "temperature {:g}",
}
#: Rates that are listed; of more, ends and number are said.
_LISTED = 4
_STEP = re.compile(r"step-(\d{8,})\.pt")
_PERCENTAGE = re.compile(r"\d+(\.\d+)?(e-\d+)?")


def protocol_of(name: str, percent: float | None = None) -> Protocol:
    """The protocol of a result; fine-tuning on any percentage, or on a list of images, has one too.

    Args:
        name: The evaluation, such as ``linear_fast``.
        percent: For a list, its percentage of the training images, on which the epochs depend; unknown by default.
    """
    if name in PROTOCOLS or not name.startswith("finetune_"):
        return PROTOCOLS.get(name, Protocol(None))
    part = name.removeprefix("finetune_")
    if _PERCENTAGE.fullmatch(part):
        return _finetuning(f"{part} % labels", float(part))
    return _finetuning(f"labels of {part}", percent)


def finetuning_name(percent: float, listed: Path | None) -> str:
    """The name of a result of fine-tuning: that of a list never reads as a percentage."""
    if listed is None:
        return f"finetune_{percent:g}"
    return f"finetune_{'list_' if _PERCENTAGE.fullmatch(listed.stem) else ''}{listed.stem}"


@dataclass(frozen=True)
class Result:
    """The result of an evaluation.

    Attributes:
        name: The evaluation, such as ``linear_fast``.
        values: The content of its file.
        source: The images, where they are not the run's own.
        file: Its file.
    """

    name: str
    values: dict[str, Any]
    source: str | None
    file: Path

    @property
    def departures(self) -> str:
        """Where it departs from the published protocol, such as ``30 epochs``; fields that it lacks are not judged."""
        inside = self.values.get("protocol")
        found = {**self.values, **(inside if isinstance(inside, dict) else {})}
        parts = []
        for key, published in protocol_of(self.name, self.values.get("percent")).published.items():
            value = tuple(found[key]) if isinstance(found.get(key), dict) else found.get(key)
            if value is None or value == published:
                continue
            if key == "rates":
                few = len(value) <= _LISTED
                parts.append(f"lr {'/'.join(value)}" if few else f"{len(value)} lr from {value[0]} to {value[-1]}")
            else:
                said = _SAID[key].format(value)
                parts.append(said.removesuffix("s") if value == 1 else said)
        return ", ".join(parts)

    @property
    def headline(self) -> dict[str, float]:
        """Its accuracies by name; the name has departures from the protocol, and images that are not the run's own."""
        return {f"{name}{self._suffix}": value for name, value in self.values.get("headline", {}).items()}

    @property
    def columns(self) -> dict[str, float]:
        """The accuracies that are compared, by title. A title never stands for two protocols, nor for two sources."""
        title = protocol_of(self.name).title
        if title is None:
            return {}
        by_k = self.values.get("accuracies")
        if isinstance(by_k, dict):
            found = {f"{title}, k {k}": by_k[k] for k in sorted(by_k, key=int)}
        else:
            found = {title: self.values.get("top1", self.values.get("knn"))}
        return {f"{name}{self._suffix}": float(value) for name, value in found.items() if value is not None}

    @property
    def place(self) -> tuple[str, int, str]:
        """Where it stands among others: the run's own images first, each source in the order of `PROTOCOLS`."""
        order = list(PROTOCOLS)
        return self.source or "", order.index(self.name) if self.name in order else len(order), self.departures

    @property
    def _suffix(self) -> str:
        departures = f" ({found})" if (found := self.departures) else ""
        return f"{departures} on {self.source}" if self.source else departures


def columns(results: Iterable[Result]) -> list[str]:
    """The titles of results' columns, in order."""
    ordered = sorted(results, key=lambda result: result.place)
    return list(dict.fromkeys(title for result in ordered for title in result.columns))


def read_results(
    folder: Path,
    *,
    own: str,
    step: int | None,
    checkpoint: str | None = None,
    read: Callable[[Path], dict[str, Any]] = read_json,
) -> tuple[list[Result], list[str]]:
    """Read the results that belong to one checkpoint of a run.

    A result names its images and its checkpoint; where an older one names none, it counts as the run's own.

    Args:
        folder: ``evaluation/`` in the run folder.
        own: The images that the run is evaluated on by default.
        step: The checkpoint's step; None takes every result.
        checkpoint: The checkpoint's file name, by which results of one without a step in its name are known.
        read: Reads a file.

    Returns:
        The results in order, and a line about each that belongs to another checkpoint.
    """
    results: dict[tuple[str, str | None], Result] = {}
    notes = []
    for file in sorted(folder.glob("*.json"), key=lambda file: (len(file.stem), file.stem)):
        values = read(file)
        made_of, there = str(values.get("checkpoint") or ""), _step_of(values)
        current = there == step if there is not None else Path(made_of).name == checkpoint
        if made_of and step is not None and not current:
            notes.append(f"{file.name}: skipped, since it is of {Path(made_of).name}, expected step {step:,}")
            continue
        name, source = str(values.get("evaluation") or file.stem), values.get("source")
        # A detector's images are never those of pretraining, and the name of its result says which.
        foreign = source and not name.startswith("detection_") and not same_source(str(source), own)
        result = Result(name, values, str(source) if foreign else None, file)
        results.setdefault((name, result.source), result)
    return sorted(results.values(), key=lambda result: result.place), notes


def _step_of(values: Mapping[str, Any]) -> int | None:
    """The step of a result's checkpoint; None where nothing says it."""
    if type(values.get("step")) is int:
        return int(values["step"])
    named = _STEP.fullmatch(Path(str(values.get("checkpoint") or "")).name)
    return int(named[1]) if named else None


def result_stem(name: str, source: str | None, own: str | None) -> str:
    """The name of a result's file without ``.json``: on other images than the run's own, it has a part for them.

    Args:
        name: The evaluation, such as ``linear_fast``.
        source: The images; None for the run's own.
        own: The images that the run is evaluated on by default; empty where there are none, None to leave the part out.
    """
    if source is None or own is None or (own and same_source(source, own)):
        return name
    place = _place(source)
    words = re.sub(r"[^\w.=+]+", "_", place.rstrip("/").rpartition("/")[2]).strip("_")[:40]
    return f"{name}-on-{words}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"


def same_source(first: str, second: str) -> bool:
    """Whether two values of ``--data`` mean the same images, however their folders are written."""
    return first == second or _place(first) == _place(second)


def _place(source: str) -> str:
    """A source with absolute paths; names on a server and commands stay as they are, wherever the process works.

    The demo set is the same wherever the user's cache lies.
    """
    prefix, colon, rest = source.partition(":")
    # A folder may have a colon in its name. Unlike pathlib's, this function takes any text.
    if "/" in prefix or os.path.exists(source):  # noqa: PTH110
        prefix, colon, rest = "", "", source
    elif not colon:
        prefix, rest = "", source
    if source == "demo" or (not colon and Path(source).parts[-2:] == ("synco-fast", "demo")):
        return "demo"
    if "://" in rest or rest.startswith("pipe:"):
        return source

    def placed(part: str) -> str:
        remote = prefix == "hf" and not os.path.exists(part)  # noqa: PTH110
        return part if "=" in part or remote else os.path.realpath(Path(part).expanduser())

    return f"{prefix}{colon}{','.join(map(placed, rest.split(',')))}"
