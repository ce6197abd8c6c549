"""Encoders, projection heads, the momentum encoder and batch norm that does not leak."""
