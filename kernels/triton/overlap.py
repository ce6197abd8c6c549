"""Programmatic dependent launch: a kernel is scheduled while the previous one still runs.

Every kernel of the chain waits until the previous one has completed and its writes are visible, and only then allows
the next one to start. So when a kernel starts, all but the previous one have completed. Before it waits, it may read
the inputs of the operator and, through L2 (``cache_modifier=".cg"``), what earlier kernels than the previous one wrote.
It writes nothing before.

`config.OVERLAP` turns it on. It needs compute capability 9.0 or higher; the interpreter does not have it.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["EARLY", "LATE", "begin", "release"]

#: Where a kernel allows the next one to start: as it starts itself, or after its loops.
EARLY, LATE = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Wait for the previous kernel. Once in every kernel of the chain, above all it writes."""
    if OVERLAP > 0:
        gdc_wait()
    if OVERLAP == EARLY:
        gdc_launch_dependents()


@triton.jit
def release(OVERLAP: tl.constexpr):
    """Allow the next kernel to start, once all programs are here or have ended."""
    if OVERLAP == LATE:
        gdc_launch_dependents()
