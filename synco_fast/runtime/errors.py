"""User errors: the command line prints one line and exits with code 2."""

from __future__ import annotations

from synco_fast.data.errors import DataError, UserError, first_line

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "LostProcessError",
    "UserError",
    "first_line",
]


class ConfigError(UserError):
    """Wrong preset, key or value in the configuration."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not fit the model."""


class DivergedError(UserError):
    """Training diverged: non-finite loss or gradients."""


class LostProcessError(UserError):
    """Another process of the job is gone, or does not respond."""
