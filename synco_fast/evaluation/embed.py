"""Features of images as a file that other tools read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from synco_fast.data.sources.open import open_source
from synco_fast.evaluation.context import Setting
from synco_fast.evaluation.features import extract_features
from synco_fast.evaluation.progress import Bar
from synco_fast.export.load import backbone_of, read_weights
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.errors import ConfigError, DataError
from synco_fast.runtime.files import atomic_write
from synco_fast.runtime.precision import Precision, resolve_device

__all__ = ["embed"]


def embed(
    path: Path, out: Path, setting: Setting | None = None, *, splits: str = "both", console: Console | None = None
) -> dict[str, Any]:
    """Write ``features`` (n, F) float32, ``labels`` (n,) int64 (-1 without), ``paths`` (n,) and ``splits`` (n,).

    Args:
        path: A run folder, a checkpoint, or an imported file.
        out: ``.npz`` (arrays) or ``.parquet`` (columns features, label, path, split).
        setting: Source and device.
        splits: ``train``, ``val`` or ``both``; of a source without a held-out split, all images are ``train``.
        console: Where progress is shown.

    Raises:
        ConfigError: The file's ending is another one, or pyarrow is missing.
        CheckpointError, DataError: The checkpoint or the source cannot be read.
    """
    setting = setting or Setting()
    if out.suffix not in (".npz", ".parquet"):
        raise ConfigError(f"out: found {out.name!r}, expected a name that ends in .npz or .parquet")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("out: found .parquet without pyarrow: pip install 'synco-fast[embed]'")
    weights = read_weights(path)
    if setting.data is None and weights.imported:
        raise ConfigError("data: found none, expected --data SOURCE: an imported checkpoint does not know its images")
    device = resolve_device(setting.device)
    precision = Precision(setting.precision, device)
    source = open_source(setting.data or weights.config.data.source)
    chosen = {"train": source.train, "val": source.validation}
    chosen = {name: split for name, split in chosen.items() if splits in (name, "both")}
    if splits == "val" and source.validation is None:
        raise DataError(f"data: found no held-out split in {source.spec}, expected --split train")
    backbone = backbone_of(weights).to(device)
    features, labels, paths, names, broken = [], [], [], [], 0
    for name, split in chosen.items():
        if split is None:
            continue
        with Bar(console, f"features of {name}", len(split)) as bar, precision.autocast():
            found = extract_features(
                backbone,
                split,
                weights.config.augment,
                device=device,
                workers=setting.workers if setting.workers is not None else weights.config.data.workers,
                labelled=False,
                tick=lambda images, bar=bar: bar.advance(images),  # type: ignore[misc]
            )
        features.append(found.values)
        labels.append(found.labels)
        paths += [split.name(number) for number in found.numbers.tolist()]
        names += [name] * len(found.labels)
        broken += len(found.broken)
    values, classes = torch.cat(features).numpy(), torch.cat(labels).numpy()
    _write(out, values, classes, paths, names)
    return {
        "file": str(out),
        "checkpoint": str(weights.file),
        "source": source.spec,
        "images": len(paths),
        "width": values.shape[1],
        "labelled": int((classes >= 0).sum()),
        "broken": broken,
        "environment": describe_environment(),
    }


def _write(
    out: Path, features: NDArray[np.float32], labels: NDArray[np.int64], paths: list[str], splits: list[str]
) -> None:
    """Whole or not at all."""
    with atomic_write(out) as temporary:
        if out.suffix == ".npz":
            np.savez(temporary, features=features, labels=labels, paths=np.array(paths), splits=np.array(splits))
        else:
            import pyarrow
            from pyarrow import parquet

            rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.reshape(-1)), features.shape[1])
            table = pyarrow.table({"features": rows, "label": labels, "path": paths, "split": splits})
            parquet.write_table(table, temporary)
