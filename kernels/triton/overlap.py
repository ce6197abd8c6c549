"""Programmatic dependent launch: a kernel is brought onto the device while the one before it still runs.

Every kernel that is launched so first waits until the one before has completed and its writes can be seen, and then
lets the next one come. What it reads may be older than that: the kernel before has waited in its turn. It is off by
default (`config.OVERLAP`), exists from compute capability 9.0 on, and is absent in the interpreter.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["begin"]


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """The first statement of every kernel of a chain."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
