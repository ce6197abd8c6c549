"""Benchmarks, and the records of what was measured where."""
