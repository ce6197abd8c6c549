"""The machine: many CTAs of one kernel at once, every register an array with an element for each thread."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx_machine import arithmetic, memory_access, warp, warpgroup
from tests.support.ptx_machine.faults import Fault
from tests.support.ptx_machine.memory import GlobalMemory
from tests.support.ptx_machine.operands import UNSIGNED, bits_of, reader
from tests.support.ptx_machine.parse import Instruction, Kernel, Symbol, parse
from tests.support.ptx_machine.shared import ORIGIN, SharedMemory

__all__ = ["Program", "program_of", "run"]

Array = NDArray[Any]

#: Threads that run at once: more amortise the time of a call of NumPy, but more of them wait where they diverge.
THREADS_AT_ONCE = 8192
_MODULES = (arithmetic, memory_access, warp, warpgroup)
_NOTHING = ("griddepcontrol", "fence", "membar", "nanosleep", "pragma")


@dataclass(frozen=True)
class Step:
    """An instruction ready to run.

    Attributes:
        kind: "plain", "warp" (of a whole warp), "branch", "barrier" or "exit".
        run: What a plain one does, given the state and the mask of threads, None for all.
        guard, negated: Reader of its predicate, or None; whether that is negated.
        target: Where a branch leads.
        instruction: The instruction itself.
        together: Threads that must come together: a warp, or four.
        registers: Registers that it uses.
        begins: Whether a label stands before it.
    """

    kind: str
    run: Callable[[Any, Any], None] | None
    guard: Callable[[Any], Any] | None
    negated: bool
    target: int
    instruction: Instruction
    begins: bool
    together: int = 32
    registers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Program:
    """A decoded kernel. ``shared`` and ``everywhere`` are the granules of its accesses to either memory, in bytes."""

    kernel: Kernel
    steps: list[Step]
    shared: int
    everywhere: int


@functools.lru_cache(maxsize=64)
def program_of(text: str) -> Program:
    """Parse and decode a PTX text.

    Raises:
        NotImplementedError: For an instruction that is not known.
    """
    kernel = parse(text)
    # Most labels are those of the debugger.
    begins = {
        kernel.labels[operand.name]
        for instruction in kernel.instructions
        for operand in instruction.operands
        if isinstance(operand, Symbol) and operand.name in kernel.labels
    }
    warpgroup.check_fences(kernel.instructions, begins)
    steps = [_step(instruction, kernel, place in begins) for place, instruction in enumerate(kernel.instructions)]
    return Program(kernel, steps, _granule(kernel, "shared"), _granule(kernel, "global"))


def _granule(kernel: Kernel, space: str) -> int:
    """The largest number of bytes that divides every access."""
    smallest = 16
    for instruction in kernel.instructions:
        name = instruction.name
        if name.startswith(("ld.", "st.", "atom.", "red.")) and memory_access.spaces_of(name) == space:
            kind, count = memory_access.width_of(name)
            smallest = min(smallest, bits_of(kind) // 8 * count)
        elif name.startswith(("cp.async.ca", "cp.async.cg")):
            smallest = min(smallest, getattr(instruction.operands[2], "value", 4) if space == "shared" else 4)
    return smallest


def _step(instruction: Instruction, kernel: Kernel, begins: bool) -> Step:
    name = instruction.name
    guard = reader(instruction.guard, "pred") if instruction.guard else None
    target, kind, run = -1, "plain", None
    if name in ("bra", "bra.uni"):
        (label,) = instruction.operands
        assert isinstance(label, Symbol), instruction
        kind, target = "branch", kernel.labels[label.name]
    elif name in ("ret", "exit"):
        kind = "exit"
    elif name in ("bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.cta.sync", "barrier.cta.sync"):
        if len(instruction.operands) > 1 or getattr(instruction.operands[0], "value", -1) != 0:
            raise NotImplementedError(str(instruction))
        kind = "barrier"
    elif name == "trap":
        run = _trap
    elif name.startswith(_NOTHING) and not name.startswith("fence.proxy"):
        run = _nothing
    else:
        try:
            run = next(filter(None, (module.decode(instruction) for module in _MODULES)), None)
        except (AssertionError, KeyError, ValueError, StopIteration) as error:
            raise NotImplementedError(f"{instruction} ({error!r})") from error
        if run is None:
            raise NotImplementedError(str(instruction))
        kind = "warp" if warp.needs_warp(name) else "plain"
    together = 128 if warpgroup.is_product(name) else 32
    registers = warpgroup.registers_of(instruction) if together == 32 else frozenset()
    return Step(kind, run, guard, instruction.negated, target, instruction, begins, together, registers)


def _nothing(s: Any, m: Any) -> None:
    pass


def _trap(s: Any, m: Any) -> None:
    threads = memory_access.chosen(s, m)
    if len(threads):
        raise Fault("a trap", int(threads[0]))


def run(
    text: str,
    grid: tuple[int, ...],
    parameters: Mapping[str, int],
    *,
    memory: GlobalMemory,
    shared: int = 0,
    threads: int = 0,
    most: int = 0,
    error: float = 0,
    unfenced_copies: bool = False,
) -> None:
    """Run a kernel.

    Args:
        text: The PTX text with one entry.
        grid: CTAs along each axis.
        parameters: The bits of each parameter by name; pointers are those that ``memory`` gives.
        memory: Global memory.
        shared: Bytes of shared memory of a CTA.
        threads: Threads of a CTA, if the text does not say.
        error: Error of approximate instructions, from -1 to 1 times the largest that the PTX ISA allows.
        unfenced_copies: See `Emulator`.
        most: Instructions after which the machine takes the kernel for an endless loop, by default a great many.

    Raises:
        Fault: The kernel does what must not be done; see `Fault`.
        NotImplementedError: For an instruction that is not known.
    """
    program = program_of(text)
    threads = program.kernel.threads or threads
    assert threads > 0, "the number of threads is not known"
    assert threads % 32 == 0, f"{threads} threads"
    sizes = tuple(int(size) for size in (*grid, 1, 1)[:3])
    total = sizes[0] * sizes[1] * sizes[2]
    memory.granule = program.everywhere
    at_once = max(1, THREADS_AT_ONCE // threads)
    for first in range(0, total, at_once):
        numbers = np.arange(first, min(first + at_once, total))
        machine = _Run(program, sizes, numbers, threads, parameters, memory, shared)
        machine.error, machine.unfenced_copies = error, unfenced_copies
        machine.run(most or 1 << 40)


class _Run:
    """Some CTAs, from their start to their end. The attributes are what `Step.run` sees of the machine."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        numbers: Array,
        threads: int,
        parameters: Mapping[str, int],
        memory: GlobalMemory,
        shared: int,
    ) -> None:
        self.program, self.grid, self.numbers, self.parameters, self.memory = program, grid, numbers, parameters, memory
        self.error, self.unfenced_copies = 0.0, False
        self.ctas, self.threads, self.warps = len(numbers), threads, threads // 32
        self.shape = (self.ctas * threads,)
        self.everyone = np.arange(self.shape[0])
        self.everyone_by_warp = self.everyone.reshape(-1, 32)
        self.cta = self.everyone // threads
        self.tid = self.everyone % threads
        self.warp, self.lane = self.tid // 32, self.tid % 32
        #: Number of each thread in the grid, for the stamps of global memory.
        self.number = numbers[self.cta] * threads + self.tid
        self.epoch = np.ones(self.ctas, np.int64)
        self.clock = np.ones((self.ctas, self.warps), np.int32)
        self.passed = self.clock.copy()
        self.shared = SharedMemory(self, shared, program.shared)
        self.copies = memory_access.Copies(self)
        self.products = warpgroup.Products(self)
        poison = {bits: _poison(bits, self.shape) for bits in UNSIGNED}
        self.r: list[Array] = [poison[bits] for bits in program.kernel.registers]
        self._special: dict[str, Array] = {}

    def special(self, name: str) -> Array:
        """A special register."""
        if name not in self._special:
            self._special[name] = self._made(name)
        return self._special[name]

    def _made(self, name: str) -> Array:
        register, _, axis = name[1:].partition(".")
        place = "xyz".index(axis) if axis else 0
        number = self.numbers[self.cta]
        match register:
            case "tid":
                return self.tid if place == 0 else np.zeros(self.shape, np.int64)
            case "ntid":
                return np.full(self.shape, self.threads if place == 0 else 1)
            case "ctaid":
                x, y, _ = self.grid
                return (number % x, number // x % y, number // (x * y))[place]
            case "nctaid":
                return np.full(self.shape, self.grid[place])
            case "laneid":
                return self.lane
            case "warpid":
                return self.warp
        raise NotImplementedError(f"the register {name}")

    def symbol(self, name: str) -> int:
        """The address of a variable in shared memory."""
        if name not in self.program.kernel.shared:
            raise NotImplementedError(f"the symbol {name}")
        return ORIGIN + self.program.kernel.shared[name]

    def pass_warp_barrier(self, m: Any) -> None:
        """The warps of a mask have passed a barrier."""
        threads = memory_access.chosen(self, m)[::32]
        self.clock[self.cta[threads], self.warp[threads]] += 1

    def _pass_barrier(self, ctas: Any) -> None:
        self.epoch[ctas] += 1
        self.clock[ctas] += 1
        self.passed[ctas] = self.clock[ctas]

    def run(self, most: int) -> None:
        """Run all threads to the end."""
        with np.errstate(all="ignore"):
            self._alive = np.ones(self.shape, bool)
            self._at = np.zeros(self.shape, np.int32)
            # Threads that wait for others of their warp or CTA.
            self._parked = np.zeros(self.shape, bool)
            self._at_barrier = np.zeros(self.shape, bool)
            self._left = most
            while self._alive.any():
                runnable = self._alive & ~self._parked
                if not runnable.any():
                    self._stuck()
                place = int(self._at[runnable].min())
                self._go(place, runnable & (self._at == place))

    def _go(self, place: int, active: Array) -> None:
        """Run the threads of a mask from an instruction on, until they diverge or others may join them."""
        steps = self.program.steps
        m: Any = None if active.all() else active
        begun = place
        try:
            while True:
                step = steps[place]
                if m is not None and place != begun and step.begins:
                    self._at[active] = place
                    return
                self._left -= 1
                if self._left < 0:
                    raise Fault("an endless loop", int(np.flatnonzero(active)[0]))
                kind = step.kind
                if self.products.under_way:
                    self.products.check(m, step.registers)
                if kind == "plain":
                    if step.guard is None:
                        step.run(self, m)  # type: ignore[misc]
                    else:
                        step.run(self, self._guarded(step, m))  # type: ignore[misc]
                    place += 1
                elif kind == "branch":
                    taken = active if step.guard is None else self._guarded(step, m)
                    if step.guard is None or taken is None or taken.all() or (taken == active).all():
                        place = step.target
                        if m is not None:
                            self._at[active] = place
                            return
                        begun = place
                    elif not taken.any():
                        place += 1
                    else:
                        self._at[active] = place + 1
                        self._at[taken] = step.target
                        return
                elif kind == "warp":
                    active = self._together(place, active, step.together)
                    if not active.any():
                        return
                    m = None if active.all() else active
                    step.run(self, m if step.guard is None else self._guarded(step, m))  # type: ignore[misc]
                    place += 1
                elif kind == "barrier":
                    if m is None:
                        self._pass_barrier(slice(None))
                        place += 1
                        continue
                    active = self._together(place, active, 32)
                    self._at[active] = place + 1
                    self._parked |= active
                    self._at_barrier |= active
                    self._release()
                    return
                else:
                    gone = active if step.guard is None else active & self._guarded_mask(step, active)
                    self._alive &= ~gone
                    self._at[active] = place + 1
                    self._release()
                    return
        except Fault as fault:
            if not fault.where:
                fault.where = f"{self._who(fault.thread)}\n    {self.program.kernel.name}, {steps[place].instruction}"
            raise

    def _guarded(self, step: Step, m: Any) -> Any:
        """The mask of an instruction with a predicate; None for all."""
        chosen = step.guard(self)  # type: ignore[misc]
        if step.negated:
            chosen = ~chosen
        if m is not None:
            chosen = chosen & m
        return None if chosen.all() else chosen

    def _guarded_mask(self, step: Step, active: Array) -> Array:
        found = self._guarded(step, active)
        return active if found is None else found

    def _together(self, place: int, active: Array, threads: int) -> Array:
        """The threads of a mask whose whole warp, or group of warps, is here; the others of the mask wait."""
        by_warp = active.reshape(-1, threads)
        waiting = (self._parked & ~self._at_barrier & (self._at == place)).reshape(-1, threads)
        here = by_warp | waiting
        whole = (here | ~self._alive.reshape(-1, threads)).all(axis=1) & by_warp.any(axis=1)
        ready = (here & whole[:, None]).reshape(-1)
        left = active & ~ready
        self._parked &= ~ready
        self._parked |= left
        self._at[left | ready] = place
        return ready

    def _release(self) -> None:
        """CTAs all of whose threads wait at a barrier, or are gone, go on."""
        waits = (self._at_barrier | ~self._alive).reshape(self.ctas, -1).all(axis=1)
        waits &= self._alive.reshape(self.ctas, -1).any(axis=1)
        if waits.any():
            go = np.repeat(waits, self.threads)
            self._parked &= ~go
            self._at_barrier &= ~go
            self._pass_barrier(waits)

    def _stuck(self) -> None:
        waiting = self._alive & self._parked
        first = int(np.flatnonzero(waiting)[0])
        places = sorted(set((self._at - self._at_barrier)[waiting].tolist()))
        lines = "\n    ".join(str(self.program.steps[place].instruction) for place in places)
        raise Fault(f"a deadlock{self._who(first)} and others wait at\n    {lines}")

    def _who(self, thread: int | None) -> str:
        if thread is None:
            return ""
        return f", CTA {int(self.numbers[self.cta[thread]])}, thread {int(self.tid[thread])}"


def _poison(bits: int, shape: tuple[int, ...]) -> Array:
    """What an unwritten register holds: as a float, of 32 bits or 16, not a number."""
    if bits == 1:
        return np.zeros(shape, bool)
    return np.full(shape, 0x7FFB7FFB7FFB7FFB & (1 << bits) - 1, UNSIGNED[bits])


def parameters_of(text: str) -> list[str]:
    """Names of the parameters of a PTX text, in order."""
    return list(program_of(text).kernel.parameters)
