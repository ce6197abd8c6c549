"""``export``: a backbone in another tool's format, with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from synco_fast.export.card import has_card, write_card
from synco_fast.export.formats import FORMATS, Written
from synco_fast.export.load import read_weights
from synco_fast.runtime.errors import ConfigError

__all__ = ["Exported", "export_checkpoint"]


@dataclass(frozen=True)
class Exported:
    """What was written: format, folder, names of files, and measurements of the check, if any."""

    format: str
    folder: Path
    files: tuple[str, ...]
    checks: dict[str, float]


def export_checkpoint(path: Path, format: str, out: Path | None = None, *, licence: str | None = None) -> Exported:
    """Write the query encoder's backbone for another tool, and ``README.md`` as its model card.

    Args:
        path: Whatever `synco_fast.export.load.read_weights` takes.
        format: A name of `FORMATS`.
        out: The folder; ``export/FORMAT`` in the run folder by default, or ``export-FORMAT`` in the working folder.
        licence: The licence stated in the card.

    Raises:
        CheckpointError: The checkpoint cannot be read, or the format does not support its backbone.
        ConfigError: The format is unknown, a package that it needs is missing, or the folder has another README.md.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: found {format!r}, expected {', '.join(FORMATS)}")
    weights = read_weights(path)
    folder = out or (weights.run / "export" / format if weights.run else Path(f"export-{format}"))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: found a file {folder}, expected a folder")
    card = folder / "README.md"
    if card.exists() and not has_card(folder):
        raise ConfigError(f"out: found a README.md in {folder} that is no model card, expected a folder for the export")
    written: Written = import_module(f"synco_fast.export.formats.{format}").write(weights, folder)
    files, checks, usage = written
    write_card(card, weights, format=format, files=files, usage=usage, checks=checks, licence=licence)
    return Exported(format, folder, (*files, "README.md"), checks)
