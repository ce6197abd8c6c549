"""Pairs of generated images as hard positives, after Wu et al. (arXiv 2202.06464)."""
