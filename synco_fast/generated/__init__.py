"""Pairs of generated images as further positives, after Wu et al. (arXiv 2202.06464); registers itself as an extra.

Only its command imports this package by name: `synco_fast.methods.extra_of` imports it where the
section ``generated`` of the configuration is on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from synco_fast.methods import EXTRAS, Extra

if TYPE_CHECKING:
    from synco_fast.config import Config
    from synco_fast.methods.base import Method

__all__: list[str] = []


def _check(config: Config) -> None:
    from synco_fast.generated.config import check_pairs

    check_pairs(config)


def _build(config: Config, processes: int) -> Method:
    from synco_fast.generated.method import build

    return build(config, processes)


EXTRAS["generated"] = Extra("pairs of generated images, after Wu et al.", "2202.06464", _check, _build)
