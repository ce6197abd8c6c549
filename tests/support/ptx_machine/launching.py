"""Triton's launches on CPU tensors, compiled for a GPU that is not there and run by the machine."""

from __future__ import annotations

import inspect
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from synco_fast.bench.cost.launches import compiled_for
from tests.support.ptx_machine.machine import parameters_of, run
from tests.support.ptx_machine.memory import GlobalMemory

__all__ = ["Emulator", "emulated"]

_EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class Emulator:
    """What a test sees of the machine.

    Attributes:
        memory: Global memory.
        launches: Name, grid and PTX text of each launch.
        copies: Names of kernels in which a thread may store what other threads of its CTA read before, without a
            barrier. Triton gives several threads copies of an element where a tensor has fewer of them than a CTA has
            threads; all load it and one stores it. The others' copies are then used by nobody.
        overlaps: Names of kernels that may store different numbers at one place of global memory, since nobody uses
            what stands there in the end.
        unfenced_copies: Whether a product may read what an asynchronous copy brought without a proxy fence. Triton
            before 3.8 has none there.
        change: Given the name of a kernel and its PTX, returns the PTX to run: for tests that break it.
    """

    def __init__(self, error: float) -> None:
        self.memory = GlobalMemory()
        self._error = error
        self.launches: list[tuple[str, tuple[int, ...], str]] = []
        self.change: Callable[[str, str], str] = lambda name, text: text
        self.copies: set[str] = set()
        self.overlaps: set[str] = set()
        self.unfenced_copies = False
        self._reachable: list[Tensor] = []

    def address(self, tensor: Tensor) -> int:
        """The address of a tensor that kernels read from memory, where they find others; all launches may touch it."""
        self._reachable.append(tensor)
        with _disable_current_modes():
            return self.memory.pointer(tensor)

    def launch(self, kernel: Any, compiled: Any, grid: Any, values: dict[str, Any]) -> None:
        """Run a compiled kernel."""
        sizes = tuple(grid(values)) if callable(grid) else tuple(grid)
        text = self.change(kernel.__name__, compiled.asm["ptx"])
        names = parameters_of(text)
        self.memory.begin()
        self.memory.copies = kernel.__name__ in self.copies
        self.memory.overlaps = kernel.__name__ in self.overlaps
        for tensor in self._reachable:
            self.memory.pointer(tensor)
        given = []
        for name, kind in compiled.src.signature.items():
            given += _bits(self.memory, kind, values[name])
        # Scratch memory of Triton's own comes last, and none is asked for.
        assert len(names) - len(given) in (0, 1, 2), f"{len(given)} arguments for {len(names)} parameters"
        given += [0] * (len(names) - len(given))
        self.launches.append((kernel.__name__, sizes, text))
        run(
            text,
            sizes,
            dict(zip(names, given, strict=True)),
            memory=self.memory,
            shared=compiled.metadata.shared,
            threads=32 * compiled.metadata.num_warps,
            error=self._error,
            unfenced_copies=self.unfenced_copies,
        )


def _bits(memory: GlobalMemory, kind: Any, value: Any) -> list[int]:
    """The bits of an argument, none for one that is compiled in."""
    if isinstance(kind, tuple | list):
        return [bits for one, part in zip(kind, value, strict=True) for bits in _bits(memory, one, part)]
    if kind == "constexpr":
        return []
    if isinstance(value, Tensor):
        return [memory.pointer(value)]
    if kind.startswith("fp") or kind in ("f32", "f64"):
        return [int.from_bytes(struct.pack("<d" if kind.endswith("64") else "<f", value), "little")]
    bits = 1 if kind in ("i1", "u1") else int(kind[1:])
    return [int(value) & (1 << bits) - 1]


class _Watch(TorchDispatchMode):
    """Notes which memory PyTorch allocates without writing it, and what it writes."""

    def __init__(self, memory: GlobalMemory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "synco_fast":
            # Look into the package's own operators.
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        schema = func._schema
        if schema.name in _EMPTY:
            if result.numel() and result.device.type == "cpu":
                # As a float it is NaN.
                if result.is_contiguous():
                    result.view(-1).view(torch.uint8).fill_(0xFF)
                self.memory.register(result, written=False)
            return result
        for number, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                        self.memory.mark(tensor)
        return result


@contextmanager
def _without_machine_code() -> Iterator[None]:
    """Compile to PTX and no further, which saves half of the time, with a cache of its own beside Triton's."""
    original, name = CUDABackend.make_cubin, "TRITON_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = f"{before or Path.home() / '.triton' / 'cache'}-of-ptx"
    CUDABackend.make_cubin = lambda *arguments: b"none"
    try:
        yield
    finally:
        CUDABackend.make_cubin = original
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def emulated(capability: int, error: float = 0) -> Iterator[Emulator]:
    """Context in which Triton's kernels run on CPU tensors as they are compiled for a device.

    Every launch is compiled for ``capability`` (80, 90, ...) and its PTX is run, thread by thread of the grid, before
    the launch returns. Memory from `torch.empty` counts as unwritten until a kernel or PyTorch writes it.

        with emulated(90):
            outputs = launch.contrast_and_gradient(q, k, queue, Negatives.synco(32), temperature=0.2, seed=3, step=7)

    Args:
        capability: What to compile for.
        error: Error of sine, exponential and other approximate instructions, from -1 to 1 times the largest that the
            PTX ISA allows.

    Yields:
        An `Emulator`.

    Raises:
        Fault: A kernel reads or writes what it must not; see `synco_fast`'s docs/kernels.md.
        NotImplementedError: A kernel has an instruction that the machine does not know.
    """
    emulator = Emulator(error)
    original, seen = JITFunction.run, set()

    def launched(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if self not in seen:
            seen.add(self)
            self.device_caches.clear()
        compiled = original(self, *arguments, grid=grid, warmup=True, **options)
        if not warmup:
            signature = inspect.signature(self.fn)
            known = {name: value for name, value in options.items() if name in signature.parameters}
            bound = signature.bind(*arguments, **known)
            bound.apply_defaults()
            with _disable_current_modes():
                emulator.launch(self, compiled, grid, dict(bound.arguments))
        return compiled

    JITFunction.run = launched
    try:
        with ExitStack() as stack:
            stack.enter_context(_without_machine_code())
            stack.enter_context(compiled_for(capability))
            stack.enter_context(_Watch(emulator.memory))
            yield emulator
    finally:
        JITFunction.run = original
        for kernel in seen:
            kernel.device_caches.clear()
