"""Benchmarks and records of measurements."""
