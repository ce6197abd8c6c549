"""The presets: named configurations; every key can be changed on the command line."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from synco_fast.config import Config, build_config, read_mapping
from synco_fast.methods import METHODS
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.migrations import migrate_config

__all__ = ["PRESETS", "load_config", "load_values"]

#: What a configuration without a preset says of it.
_NONE = Config.model_fields["preset"].default

#: A ResNet-10 with half of ResNet-18's channels, which two CPU cores train in minutes.
_THIN_RESNET10 = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], "zero_init_last": False}

#: A tenth of ImageNet shows the trend; all of it would cost a quarter of an epoch each time.
_IMAGENET_KNN = {"every": 10, "train_images": 128_000, "images": 10_000}

PRESETS: dict[str, dict[str, Any]] = {
    "synco-r50-200": {
        "about": "SynCo as published: ImageNet, ResNet-50, 200 epochs",
        "method": {"name": "synco"},
        "training": {"epochs": 200},
        "evaluation": _IMAGENET_KNN,
    },
    "synco-r50-800": {
        "about": "SynCo as published: ImageNet, ResNet-50, 800 epochs",
        "method": {"name": "synco"},
        "training": {"epochs": 800},
        "evaluation": _IMAGENET_KNN,
    },
    "synco-r50-fast": {
        "about": "SynCo for 200 epochs at 0.55 of the pixels, views growing from 128 to 224; accuracy not measured",
        "augment": {"min_size": 128, "start_ramp": 100, "end_ramp": 160},
        "method": {"name": "synco"},
        "training": {"epochs": 200},
        "evaluation": _IMAGENET_KNN,
    },
    "mochi-r50-200": {
        "about": "MoCHi (1024, 512, 256): ImageNet, ResNet-50, 200 epochs",
        "method": {"name": "mochi", "warmup_epochs": 15},
        "training": {"epochs": 200},
        "evaluation": _IMAGENET_KNN,
    },
    "moco-v2-r50-200": {
        "about": "MoCo v2 as published: ImageNet, ResNet-50, 200 epochs",
        "method": {"name": "moco", "warmup_epochs": 0},
        "training": {"epochs": 200},
        "evaluation": _IMAGENET_KNN,
    },
    "moco-v2-r50-800": {
        "about": "MoCo v2 as published: ImageNet, ResNet-50, 800 epochs",
        "method": {"name": "moco", "warmup_epochs": 0},
        "training": {"epochs": 800},
        "evaluation": _IMAGENET_KNN,
    },
    "synco-r50-imagenet100": {
        "about": "SynCo on ImageNet-100 (126,689 images): ResNet-50, 200 epochs, a queue of 16,384",
        "method": {"name": "synco", "queue": 16384, "mask_same_image": True},
        "training": {"epochs": 200},
    },
    "synco-r18-cifar": {
        "about": "SynCo on images of 32 x 32 (CIFAR, or of its size): ResNet-18 with the small stem, 200 epochs",
        "augment": {"size": 32, "blur_probability": 0.0, "evaluation_resize": 32},
        "model": {"backbone": "resnet18", "small_stem": True, "momentum": 0.99},
        "method": {"name": "synco", "queue": 4096, "count_scale": 0.25, "mask_same_image": True},
        # MoCo's CIFAR demo: 0.03 for a batch of 256, so 0.06 for one of 512, and more decay than on ImageNet.
        "optimizer": {"lr": 0.03, "weight_decay": 5e-4},
        "training": {"epochs": 200, "batch": 512},
    },
    "fashion-mnist": {
        "about": "SynCo on Fashion-MNIST's gzipped IDX files: a thin ResNet-10, some twenty minutes on a CPU core",
        "data": {"source": "idx:/usr/share/datasets/fashion-mnist"},
        # The images are grayscale, so colour operations are off.
        "augment": {
            "size": 32,
            # Clothes are told apart by their outline, which smaller crops cut off.
            "area": [0.5, 1.0],
            "saturation": 0.0,
            "hue": 0.0,
            "grayscale_probability": 0.0,
            "blur_probability": 0.0,
            "evaluation_resize": 32,
        },
        "model": {
            "backbone": "timm/resnet18",
            # A final map of 2 x 2; stride 32 would leave one pixel.
            "backbone_args": {**_THIN_RESNET10, "output_stride": 16},
            # Slow enough that age does not identify keys.
            "momentum": 0.996,
            "batch_norm_groups": 2,
        },
        "method": {
            "name": "synco",
            "queue": 4096,
            "temperature": 0.2,
            # As in `demo`: the published proportion, and a Q^N larger than one class's tenth of the queue.
            "count_scale": 1 / 16,
            "hard": 2048,
            "warmup_epochs": 3,
            "mask_same_image": True,
        },
        "optimizer": {"lr": 0.03, "weight_decay": 5e-4, "warmup_epochs": 0.1},
        "training": {"epochs": 20, "batch": 128},
        "evaluation": {"every": 1, "k": 20, "train_images": 10000, "images": 5000},
    },
    "demo": {
        "about": "SynCo on the built-in texture images: a thin ResNet-10, one to two minutes on two CPU cores",
        "data": {"source": "demo", "pipeline": "resident"},
        # Grayscale views: colour tells images apart but not classes, and takes steps to be learned past.
        "augment": {"size": 32, "grayscale_probability": 1.0, "blur_sigma": [0.1, 0.5]},
        "model": {
            "backbone": "timm/resnet18",
            # A final map of 2 x 2; stride 32 would leave one pixel.
            "backbone_args": {**_THIN_RESNET10, "output_stride": 16},
            # Slow enough that age does not identify keys, fast enough for a run of some hundred steps.
            "momentum": 0.996,
            "batch_norm_groups": 2,
        },
        "method": {
            "name": "synco",
            "queue": 1024,
            "temperature": 0.2,
            # Published: 960 of 65,536. A class has an eleventh of the queue, so a small Q^N would hold only
            # the query's own class.
            "count_scale": 1 / 64,
            "hard": 512,
            "warmup_epochs": 4,
            "mask_same_image": True,
        },
        "optimizer": {"lr": 0.06, "weight_decay": 5e-4, "warmup_epochs": 1},
        "training": {"epochs": 20, "batch": 64},
        "evaluation": {"every": 4, "k": 20},
    },
}


def _demos() -> dict[str, dict[str, Any]]:
    """The presets ``demo-NAME``, one for each method that changes the demo."""
    found = {}
    for name, spec in METHODS.items():
        if spec.demo:
            demo = {key: dict(value) if isinstance(value, dict) else value for key, value in PRESETS["demo"].items()}
            demo["about"] = f"{spec.title} on the images of demo, with its encoder and budget"
            for section, changes in [("method", {"name": name}), *spec.demo.items()]:
                demo[section] = {**demo[section], **changes}
            found[f"demo-{name}"] = demo
    return found


PRESETS |= _demos()


def load_config(name: str, overrides: dict[str, Any] | None = None) -> Config:
    """A configuration by the name of a preset or the path of a YAML file.

    Args:
        name: A key of `PRESETS`, or a file ending in ``.yaml`` or ``.yml``.
        overrides: By dotted name; see `build_config`.

    Raises:
        ConfigError: No such preset or file, or as `load_values` says.
    """
    if name.endswith((".yaml", ".yml")):
        return load_values(read_mapping(Path(name)), overrides)
    if name not in PRESETS and os.path.exists(name):  # noqa: PTH110 - Path.exists raises on a name that is too long
        what, saved = "folder" if Path(name).is_dir() else "file", Path(name) / "config.yaml"
        expected = f"{saved}, or --resume {name}" if saved.is_file() else "a preset or a file named .yaml"
        raise ConfigError(f"config: found the {what} {name}, expected {expected}")
    return build_config({"preset": name, **_preset("config", name)}, overrides)


def load_values(values: dict[str, Any], overrides: dict[str, Any] | None = None) -> Config:
    """A configuration from nested values, whose key ``preset`` names the preset that they change.

    Values that are whole, such as those of a run folder, take nothing from it: the preset may have changed since.

    Raises:
        ConfigError: No such preset, or as `build_config` says.
    """
    name = values.get("preset", _NONE)
    if isinstance(name, str) and name != _NONE and not _is_whole(values):
        preset, values = _preset("preset", name), migrate_config(values)
        for section, keys in preset.items():
            own = values.get(section)
            if isinstance(keys, dict) and (own is None or isinstance(own, dict)):
                values[section] = {**keys, **(own or {})}
            else:
                values.setdefault(section, keys)
    return build_config(values, overrides)


def _preset(key: str, name: str) -> dict[str, Any]:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ConfigError(f"{key}: found no preset {name!r}; did you mean {near[0]}? 'synco-fast presets' lists them")
    return PRESETS[name]


def _is_whole(values: dict[str, Any]) -> bool:
    """Whether every section is there, up to the last key of the last one, as a run folder lists them since ever."""
    sections = [values.get(name) for name in ("data", "augment", "model", "method", "optimizer", "training")]
    last = values.get("evaluation")
    return all(isinstance(keys, dict) for keys in sections) and isinstance(last, dict) and "batch" in last
