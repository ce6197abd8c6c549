"""Encoders, projection heads, the EMA encoder, split batch norm, and the queue."""
