"""Evaluations of a study: what each asks for, and whether a run's result was made so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synco_fast.report.runs import Run
from synco_fast.runtime.files import read_json, write_json
from synco_fast.runtime.results import Result, same_source

__all__ = ["KEY", "Evaluation"]

KEY = "options"
"""The key of a result under which a study writes its `Evaluation.options`."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of every run.

    Attributes:
        words: After ``evaluate`` on the command line, without the checkpoint.
        name: The name of its result, such as ``linear_fast``.
        data: The images; None for the run's own.
        options: The options that change the result, where they are not the default.
    """

    words: tuple[str, ...]
    name: str
    data: str | None
    options: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The words as one."""
        return " ".join(self.words)

    def command(self, run: Path) -> list[str]:
        """The arguments of ``synco-fast`` for a run."""
        return ["evaluate", self.words[0], str(run), *self.words[1:]]

    def result(self, run: Run) -> Result | None:
        """A run's result of this name on these images, however it was made."""
        own = run.config.evaluation.source or run.config.data.source
        here = self.data is None or self.name.startswith("detection_") or same_source(self.data, own)
        for found in run.results:
            if found.name == self.name and (
                found.source is None if here else found.source and same_source(found.source, str(self.data))
            ):
                return found
        return None

    def done(self, run: Run) -> bool:
        """Whether a run has the result, made with these options; one that does not say how it was made counts."""
        found = self.result(run)
        return found is not None and found.values.get(KEY, self.options) == self.options

    def told(self, run: Run) -> bool:
        """Whether a run's result says with which options it was made."""
        found = self.result(run)
        return found is not None and KEY in found.values

    def remember(self, run: Run) -> None:
        """Write the options beside the result that they made."""
        found = self.result(run)
        if found is not None:
            write_json(found.file, read_json(found.file) | {KEY: dict(self.options)})
