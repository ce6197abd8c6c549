"""Version of CUDA that the device's driver supports, from the driver's library alone."""

from __future__ import annotations

import ctypes
import functools

__all__ = ["driver_version"]


@functools.cache
def driver_version() -> int:
    """CUDA version of the driver, 1,000 times the major one and 10 times the minor one; 0 without a driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value
