"""Fused augmentation on the device: ragged uint8 pixels and drawn parameters in, augmented views out."""

from synco_fast.kernels.views.launch import make_views, unserved_by_triton
from synco_fast.kernels.views.words import PARAMETERS, WORDS, as_parameters, as_words

__all__ = ["PARAMETERS", "WORDS", "as_parameters", "as_words", "make_views", "unserved_by_triton"]
