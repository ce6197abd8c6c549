"""Features of images as a file for other tools."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from synco_fast.data.sources.open import open_source
from synco_fast.evaluation.context import EvalOptions, for_features, progress, source_of
from synco_fast.evaluation.features import extract_features
from synco_fast.export.load import backbone_of, read_weights
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.errors import ConfigError, DataError
from synco_fast.runtime.files import atomic_write
from synco_fast.runtime.precision import Precision, resolve_device

__all__ = ["embed"]


def embed(
    path: Path, out: Path, options: EvalOptions | None = None, *, splits: str = "both", console: Console | None = None
) -> dict[str, Any]:
    """Write ``features`` (n, F) float32, ``labels`` (n,) int64 (-1 without), ``paths`` (n,) and ``splits`` (n,).

    Args:
        path: A run folder, a checkpoint, or an imported file.
        out: ``.npz`` (arrays) or ``.parquet`` (columns features, label, path, split).
        options: Source and device; precision ``auto`` is fp32.
        splits: ``train``, ``val`` or ``both``; without a held-out split, all images are ``train``. Of a source that has
            labels for some training images alone, these are ``train``.
        console: Where progress is shown.

    Raises:
        ConfigError: The file has another suffix, or pyarrow is missing.
        CheckpointError, DataError: The checkpoint or the source cannot be read.
    """
    options = for_features(options or EvalOptions())
    if out.suffix not in (".npz", ".parquet"):
        raise ConfigError(f"out: found {out.name!r}, expected a name that ends in .npz or .parquet")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("out: found .parquet without pyarrow: pip install 'synco-fast[embed]'")
    weights = read_weights(path)
    device = resolve_device(options.device)
    precision = Precision(options.precision, device, key="precision")
    source = open_source(source_of(weights, options))
    chosen = {"train": source.evaluated, "val": source.validation}
    chosen = {name: split for name, split in chosen.items() if splits in (name, "both")}
    if splits == "val" and source.validation is None:
        raise DataError(f"data: found no held-out split in {source.spec}, expected --split train")
    backbone = backbone_of(weights).to(device)
    features, labels, paths, names, corrupt = [], [], [], [], 0
    for name, split in chosen.items():
        if split is None:
            continue
        with progress(console, f"features of {name}", len(split)) as bar, precision.autocast():
            found = extract_features(
                backbone,
                split,
                weights.config.augment,
                device=device,
                workers=options.workers if options.workers is not None else weights.config.data.workers,
                pipeline=weights.config.data.pipeline,
                labelled=False,
                tick=bar.advance,
            )
        features.append(found.values)
        labels.append(found.labels)
        paths += [split.name(number) for number in found.numbers.tolist()]
        names += [name] * len(found.labels)
        corrupt += len(found.corrupt)
    values, classes = torch.cat(features).numpy(), torch.cat(labels).numpy()
    _write(out, values, classes, paths, names)
    return {
        "file": str(out),
        "checkpoint": str(weights.file),
        "source": source.spec,
        "images": len(paths),
        "width": values.shape[1],
        "labelled": int((classes >= 0).sum()),
        "corrupt": corrupt,
        "environment": describe_environment(device),
    }


def _write(
    out: Path, features: NDArray[np.float32], labels: NDArray[np.int64], paths: list[str], splits: list[str]
) -> None:
    """Write the file atomically."""
    with atomic_write(out) as temporary:
        if out.suffix == ".npz":
            np.savez(temporary, features=features, labels=labels, paths=np.array(paths), splits=np.array(splits))
        else:
            import pyarrow
            from pyarrow import parquet

            rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.reshape(-1)), features.shape[1])
            table = pyarrow.table({"features": rows, "label": labels, "path": paths, "split": splits})
            parquet.write_table(table, temporary)
