"""The registry of methods, read by configuration, loss, model card, import, benchmarks and presets.

A method is a module of this package with a function ``build(config, processes)`` that returns a
`synco_fast.methods.base.Method`, and a row of `METHODS`. An extra, such as pairs of generated images, modifies a
method. It is a package named after its section of the configuration, and registers itself in `EXTRAS` when imported.
`extra_of` imports it when the section is on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synco_fast.kernels import Negatives

__all__ = ["EXTRAS", "METHODS", "Extra", "MethodSpec", "extra_of", "with_queue"]


@dataclass(frozen=True)
class MethodSpec:
    """A method's entry in the registry.

    Attributes:
        title: The name for people.
        arxiv: The paper's arXiv number.
        module: Its module in this package, imported when the method is built.
        negatives: The constructor of `synco_fast.kernels.Negatives` for its published negatives; None for a method
            without a queue.
        demo: Changes of the preset ``demo-NAME`` to the preset ``demo``, by section; no such preset if empty.
    """

    title: str
    arxiv: str
    module: str
    negatives: str | None = None
    demo: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def published(self) -> Negatives:
        """The published negatives of a method with a queue."""
        from synco_fast.kernels import Negatives

        found: Negatives = getattr(Negatives, self.negatives or "")()
        return found


METHODS: dict[str, MethodSpec] = {
    "moco": MethodSpec("MoCo v2", "2003.04297", "contrastive", "moco"),
    "mochi": MethodSpec("MoCHi", "2010.01028", "contrastive", "mochi"),
    "synco": MethodSpec("SynCo", "2410.02401", "contrastive", "synco"),
    "simclr": MethodSpec("SimCLR", "2002.05709", "simclr", demo={"method": {"temperature": 0.2}}),
    "byol": MethodSpec("BYOL", "2006.07733", "byol", demo={"model": {"hidden": 512, "momentum_schedule": "cosine"}}),
}


def with_queue() -> dict[str, Callable[[], Negatives]]:
    """The methods with a queue, and their published negatives."""
    return {name: spec.published for name, spec in METHODS.items() if spec.negatives is not None}


@dataclass(frozen=True)
class Extra:
    """A modification of a method, off unless its section of the configuration turns it on.

    Attributes:
        title: The name for people.
        arxiv: The paper's arXiv number.
        check: Takes a `Config` with the extra on; raises `ConfigError` if something does not fit.
        build: Takes that `Config` and the number of processes; returns the whole `Method`.
    """

    title: str
    arxiv: str
    check: Callable[..., None]
    build: Callable[..., Any]


#: By section of the configuration; the package of that name registers itself.
EXTRAS: dict[str, Extra] = {}
_SECTIONS = ("generated",)


def extra_of(config: Any) -> Extra | None:
    """The extra that is on in a `Config`: a section whose ``on`` is true."""
    for section in _SECTIONS:
        if getattr(config, section).on:
            import_module(f"synco_fast.{section}")
            return EXTRAS[section]
    return None
