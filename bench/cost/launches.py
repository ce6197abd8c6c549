"""Compile the launches of the loss for a device that need not be present.

The launcher runs on CPU tensors, and every launch is replaced by a compilation. So the counted kernels have exactly the
constants, grid, warps and stages of real launches.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from synco_fast.bench.launches import Recorded, intercepted
from synco_fast.bench.loss import TEMPERATURE, Shape

__all__ = ["Bytes", "Launch", "Target", "compiled_for", "compiler_version", "launches_of_loss", "tool"]


@dataclass(frozen=True)
class Launch:
    """One compiled launch.

    Attributes:
        name: Name of the kernel.
        grid: Programs along each axis.
        arguments: Arguments by parameter name: numbers and constants as they are, tensors as `Bytes`.
        warps, shared, registers, spilled: Resources of a program; shared memory and spills in bytes.
        serialised: Whether ptxas serialised wgmma, with a wait after each one (its remark C7515).
        sass: The disassembly with source lines and codes.
        function: The kernel's Python function.
    """

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    shared: int
    registers: int
    spilled: int
    serialised: bool
    sass: str = field(repr=False)
    function: Callable[..., Any] = field(repr=False)

    @property
    def programs(self) -> int:
        """Number of programs in the grid."""
        count = 1
        for axis in self.grid:
            count *= axis
        return count


@dataclass(frozen=True)
class Bytes:
    """The size of a tensor in bytes, and whether it is an input of the loss (by the address of its storage)."""

    count: int
    input: int | None = None


class Target:
    """A Triton driver for a device that is not present."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """The compile target."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """The first device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0


@contextlib.contextmanager
def compiled_for(capability: int) -> Iterator[None]:
    """Context in which kernels compile for ``capability``, with any device or none."""
    # None if no driver has been needed yet. Asking for the active one would look for a device.
    before = driver._active
    driver.set_active(Target(capability))
    try:
        yield
    finally:
        driver.set_active(before)


@contextlib.contextmanager
def _own_cache() -> Iterator[None]:
    """Context with an empty Triton cache, since cached kernels may have source lines of another checkout."""
    name = "TRITON_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def _forget(launch: Recorded) -> None:
    """Clear the kernel's own cache, which would keep the code for the first device."""
    launch.kernel.device_caches.clear()


def launches_of_loss(shape: Shape, capability: int) -> list[Launch]:
    """The launches of SynCo's loss at one shape, in order.

    Raises:
        RuntimeError: A kernel does not compile.
    """
    from synco_fast.kernels.triton import launch

    found: list[Launch] = []

    def keep(kernel: Any, binary: Any, grid: Any, arguments: dict[str, Any]) -> None:
        sizes = tuple(grid(arguments)) if callable(grid) else tuple(grid)
        found.append(_examine(kernel, binary, sizes, arguments, capability, inputs))

    q = torch.empty(shape.rows, shape.dim, dtype=shape.torch_dtype)
    queue = torch.empty(shape.length, shape.dim, dtype=shape.torch_dtype)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (q, queue)}
    # The step is a device tensor, as in a CUDA graph.
    step = torch.zeros((), dtype=torch.int64)
    with compiled_for(capability), _own_cache(), intercepted(keep, run=False, before=_forget):
        launch.contrast_and_gradient(q, q, queue, shape.negatives, temperature=TEMPERATURE, seed=3, step=step)
    return found


def _examine(
    kernel: Any, binary: Any, grid: tuple[int, ...], arguments: dict[str, Any], capability: int, inputs: set[int]
) -> Launch:
    remarks = _ptxas(binary.asm["ptx"], capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        sass = _run(tool("nvdisasm"), "-gi", "-c", "-hex", file.name)
    registers = re.search(r"Used (\d+) registers", remarks)
    spilled = re.search(r"(\d+) bytes spill stores", remarks)
    return Launch(
        name=kernel.fn.__name__,
        grid=grid,
        arguments={name: _plain(value, inputs) for name, value in arguments.items()},
        warps=binary.metadata.num_warps,
        shared=binary.metadata.shared,
        registers=int(registers.group(1)) if registers else 0,
        spilled=int(spilled.group(1)) if spilled else 0,
        serialised="C7515" in remarks,
        sass=sass,
        function=kernel.fn,
    )


def _plain(value: Any, inputs: set[int]) -> Any:
    if isinstance(value, Tensor):
        address = value.untyped_storage().data_ptr()
        return Bytes(value.nbytes, address if address in inputs else None)
    return getattr(value, "value", value)


def tool(name: str) -> Path:
    """A program that is shipped with Triton."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def compiler_version() -> str:
    """Triton's version, which determines the ptxas version."""
    return f"Triton {triton.__version__}"


def _ptxas(ptx: str, capability: int) -> str:
    """The output of ptxas for a kernel: registers, spills, remarks."""
    blackwell = tool("ptxas-blackwell")
    program = blackwell if capability >= 100 and blackwell.exists() else tool("ptxas")
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    arch = target.group(1) if target else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        return _run(program, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null")


def _run(program: Path, *words: str) -> str:
    done = subprocess.run([str(program), *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{program.name}: found exit code {done.returncode}, expected 0: {done.stderr.strip()[:300]}"
        )
    return done.stdout + done.stderr
