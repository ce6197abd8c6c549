"""Time model: the counts of each launch, divided by assumed rates of a device.

The time of a launch is modelled as

    launch + max(issue + latency, tensor, shuffle, special, L2, HBM)

issue: the warp instructions of the busiest multiprocessor, at the fraction `Device.issue` of its peak rate.
latency: the waits of a program (barriers and dependent loads), divided by the resident programs of a multiprocessor.

Half of the time of a launch's matrix products overlaps with its other instructions; none of it if ptxas has serialised
them. If a measurement contradicts the model, the model is wrong.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from triton.runtime.jit import JITFunction

from synco_fast.bench.cost.counts import Counts, count
from synco_fast.bench.cost.launches import Bytes, Launch, launches_of_loss
from synco_fast.bench.cost.stated import STATED, Stated
from synco_fast.bench.loss import Shape

__all__ = ["DEVICES", "Cost", "Device", "costs_of_loss", "occupancy", "total"]


@dataclass(frozen=True)
class Device:
    """Assumed rates of a device.

    Attributes:
        name: The vendor's name.
        processors: Number of multiprocessors.
        clock: MHz under load.
        issue: Fraction of the issue slots that the kernels reach, as measured for scan, select and mix on an H100
            (bench/records/h100).
        flops: Operations of bfloat16 matrix products per clock and multiprocessor.
        l2, hbm: Bytes per microsecond.
        shared: Bytes of shared memory of a multiprocessor.
        launch: Microseconds of a launch in a CUDA graph.
        barrier, near, far: Clocks of a barrier, and of a dependent load from L2, idle and under load.
    """

    name: str
    processors: int
    clock: float
    flops: int
    l2: float
    hbm: float
    shared: int
    issue: float = 0.55
    launch: float = 1.2
    barrier: int = 30
    near: int = 350
    far: int = 650


#: Devices by compute capability.
DEVICES = {
    80: Device("A100", 108, 1410, 2048, 4.0e6, 1.5e6, 164 << 10),
    90: Device("H100", 132, 1755, 4096, 5.5e6, 3.0e6, 228 << 10),
    100: Device("B200", 148, 1850, 8192, 9.0e6, 7.0e6, 228 << 10),
}


@dataclass(frozen=True)
class Cost:
    """The counts and the modelled time of one launch.

    Attributes:
        name, programs, warps, registers, shared, spilled, serialised: As compiled.
        resident, waves: Resident programs of a multiprocessor, and the number of waves.
        instructions: Warp instructions of the whole launch.
        waits: Waits of a warp for loads, one after another.
        requested: Bytes that the warps load from and store to L2, by the machine code.
        l2: Bytes through L2, in whole sectors: ``requested``, or as stated.
        used: Those of them that are used.
        hbm: Bytes of inputs that this launch is the first to read.
        flops: Tensor-core operations; None if the machine code does not show them (compute capability 10.0).
        bounds: Microseconds of each bound, by name.
        microseconds: Modelled time.
        loops: Loops of the machine code: source, instructions, trips, and how the trips are known.
        assumed: Branches that count as taken although that is not known.
    """

    name: str
    programs: int
    warps: int
    registers: int
    shared: int
    spilled: int
    serialised: bool
    resident: int
    waves: int
    instructions: float
    waits: float
    requested: float
    l2: float
    used: float
    hbm: float
    flops: float | None
    bounds: dict[str, float]
    microseconds: float
    loops: list[dict[str, Any]]
    assumed: list[str]

    @property
    def bound(self) -> str:
        """The name of the longest bound."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"bound": self.bound}


def occupancy(warps: int, registers: int, shared: int, device: Device) -> int:
    """Resident programs of a multiprocessor."""
    # Registers are allocated to warps in units of 256, and each program takes an extra KiB of shared memory.
    by_registers = 65536 // (256 * math.ceil(max(registers, 16) * 32 / 256)) // warps
    by_shared = device.shared // (shared + 1024)
    return max(1, min(by_registers, by_shared, 64 // warps, 32))


def names_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The global names of a kernel's module, and of the modules of the functions that it imports."""
    own = function.__globals__
    modules = (value.fn.__globals__ for value in own.values() if isinstance(value, JITFunction))
    return {name: value for names in (*modules, own) for name, value in names.items()}


def costs_of_loss(shape: Shape, capability: int) -> list[Cost]:
    """Compile the launches of SynCo's loss for a compute capability, and count and model them, in order.

    Raises:
        RuntimeError: A kernel does not compile.
    """
    device = DEVICES[capability]
    seen: set[int] = set()
    found = []
    for launch in launches_of_loss(shape, capability):
        stated = STATED.get(launch.name, Stated())
        counts = count(
            launch.sass,
            launch.arguments,
            launch.grid,
            launch.warps,
            launch.name,
            lambda line, stated=stated: stated.turns_of(line, shape),  # type: ignore[misc]
            names_of(launch.function),
        )
        found.append(_cost(launch, counts, stated, shape, device, seen, capability))
    return found


def _cost(
    launch: Launch, counts: Counts, stated: Stated, shape: Shape, device: Device, seen: set[int], capability: int
) -> Cost:
    resident = occupancy(launch.warps, launch.registers, launch.shared, device)
    fullest = math.ceil(launch.programs / device.processors)
    at_once = min(resident, fullest)
    requested = (counts.loaded + counts.stored) * launch.programs
    used, l2 = stated.moved(launch, shape) if stated.moved else (requested, requested)
    hbm = _first_read(launch, counts.loaded * launch.programs, seen)
    warp_clocks = fullest * launch.warps / device.clock
    issue = counts.instructions * warp_clocks / 4 / device.issue
    wait = device.far if launch.programs >= device.processors else device.near
    chain = counts.barriers * device.barrier + counts.waits * wait
    latency = math.ceil(fullest / resident) * chain / device.clock / at_once
    tensor = counts.flops * fullest / device.flops / device.clock
    bounds = {
        "issue": issue,
        "latency": latency,
        "tensor": tensor,
        "shuffle": counts.shuffles * warp_clocks,
        "special": 2 * counts.special * warp_clocks,
        "L2": l2 / device.l2,
        "HBM": hbm / device.hbm,
    }
    busy = issue + latency
    products = busy + tensor if launch.serialised else max(busy, tensor) + min(busy, tensor) / 2
    others = max(bounds[name] for name in ("shuffle", "special", "L2", "HBM"))
    return Cost(
        name=launch.name,
        programs=launch.programs,
        warps=launch.warps,
        registers=launch.registers,
        shared=launch.shared,
        spilled=launch.spilled,
        serialised=launch.serialised,
        resident=resident,
        waves=math.ceil(launch.programs / (resident * device.processors)),
        instructions=counts.instructions * launch.warps * launch.programs,
        waits=counts.waits,
        requested=requested,
        l2=l2,
        used=used,
        hbm=hbm,
        flops=None if capability >= 100 else counts.flops * launch.programs,
        bounds=bounds,
        microseconds=device.launch + max(products, others),
        loops=[asdict(loop) for loop in counts.loops],
        assumed=counts.assumed,
    )


def _first_read(launch: Launch, loaded: float, seen: set[int]) -> float:
    """Bytes of the loss's inputs that this launch is the first to read in full."""
    found = 0
    for value in launch.arguments.values():
        if isinstance(value, Bytes) and value.input is not None and value.input not in seen and value.count <= loaded:
            seen.add(value.input)
            found += value.count
    return float(found)


def total(costs: Sequence[Cost]) -> dict[str, float]:
    """Sums over the launches: warp instructions, bytes through L2 (all, used) and from HBM, modelled microseconds."""
    return {
        "instructions": sum(cost.instructions for cost in costs),
        "l2": sum(cost.l2 for cost in costs),
        "used": sum(cost.used for cost in costs),
        "hbm": sum(cost.hbm for cost in costs),
        "microseconds": sum(cost.microseconds for cost in costs),
    }
