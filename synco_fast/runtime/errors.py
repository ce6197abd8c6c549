"""Errors that a person can mend: the command line prints their one line and exits with code 2."""

from __future__ import annotations

from synco_fast.data.errors import DataError, UserError

__all__ = ["CheckpointError", "ConfigError", "DataError", "DivergedError", "LostProcessError", "UserError"]


class ConfigError(UserError):
    """A preset, a key or a value of the configuration."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class DivergedError(UserError):
    """The loss stopped being a number."""


class LostProcessError(UserError):
    """Another process of the job is gone, or no longer answers."""
