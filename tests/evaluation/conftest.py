"""Runs without training, shared with the tests of the exports."""

from tests.export.conftest import make_run

__all__ = ["make_run"]
