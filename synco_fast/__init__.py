"""synco-fast: contrastive pretraining with synthetic hard negatives."""

from synco_fast.version import __version__

__all__ = ["__version__"]
