"""What a call of the loss and of the batch norm costs the host, without a GPU.

``python -m synco_fast.bench.experiments.host_time`` compiles the kernels for a GPU that need not be there and replaces
each launch by nothing. What remains is the work of the host: checks, autograd, buffers and Triton's own launcher,
except its last call into the CUDA driver. Each subject is timed as called and as a custom operator in turn, on one
thread. ``--json FILE`` writes the figures.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize
from triton.runtime import driver

from synco_fast.bench.cost.launches import Target
from synco_fast.kernels import Negatives, ops, synthetic_contrast
from synco_fast.kernels.norm import batch_norm
from synco_fast.kernels.norm import ops as norm_ops
from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.files import write_json

__all__ = ["SUBJECTS", "launching_nothing", "measure"]


class _Utilities:
    """Loads compiled kernels nowhere."""

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        """Handles of a module and a function, registers, spills and most threads."""
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What Triton compares a kernel's shared memory with."""
        return {"max_shared_mem": 227 << 10}


class _Launcher:
    """Launches nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, *_: object) -> None:
        """Take the arguments of a launch."""


class _Absent(Target):
    utils = _Utilities()
    launcher_cls = _Launcher


@contextlib.contextmanager
def _replaced(module: Any, name: str, result: object) -> Iterator[None]:
    """Context in which a function of a module only returns ``result``. A mock would take time of its own."""
    before = getattr(module, name)
    setattr(module, name, lambda *_: result)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Context in which the loss and norm kernels accept CPU tensors, compile, and are not launched."""
    before = driver._active
    driver.set_active(_Absent(90))
    try:
        with _replaced(ops, "unserved_by_triton", None), _replaced(norm_ops, "unserved_by_triton", None):
            yield
    finally:
        driver.set_active(before)


def _loss() -> Callable[[], object]:
    """SynCo's loss with its gradient, as a training step calls it: float32 rows and a bfloat16 queue."""
    q, k = (normalize(torch.randn(256, 128), dim=1) for _ in range(2))
    queue, step, negatives = torch.zeros(65536, 128, dtype=torch.bfloat16), torch.tensor(7), Negatives.synco()
    q.requires_grad_()

    def run() -> object:
        loss = synthetic_contrast(
            q, k, queue, negatives, temperature=0.2, seed=3, step=step, backend="triton", operand_dtype=queue.dtype
        ).loss
        return torch.autograd.grad(loss.mean(), q)

    return run


def _norm() -> Callable[[], object]:
    """One batch norm with add and ReLU, forward and backward."""
    x, residual, up = (
        torch.randn(8, 64, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last) for _ in range(3)
    )
    weight, bias, mean, variance = (torch.ones(64) for _ in range(4))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias, residual)]

    def run() -> object:
        y = batch_norm(
            x, weight, bias, mean, variance, groups=2, residual=residual, relu=True, momentum=0.1, backend="triton"
        )
        return torch.autograd.grad(y, leaves, up)

    return run


#: A function that prepares each subject, and the module whose `traced` chooses between its two forms.
SUBJECTS: dict[str, tuple[Callable[[], Callable[[], object]], Any]] = {
    "loss": (_loss, ops),
    "norm": (_norm, norm_ops),
}


def measure(subject: str, *, rounds: int = 20, repeats: int = 50) -> dict[str, list[float]]:
    """Seconds of one call by form, ``direct`` and ``operator``: the median of each round.

    Args:
        subject: One of `SUBJECTS`.
        rounds: Rounds of both forms in turn.
        repeats: Calls in a round.
    """
    prepare, module = SUBJECTS[subject]
    found: dict[str, list[float]] = {"direct": [], "operator": []}
    with launching_nothing():
        run = prepare()
        for number in range(rounds + 1):
            for form, seconds in found.items():
                with _replaced(module, "traced", form == "operator"):
                    taken = [_seconds(run) for _ in range(repeats)]
                # The first round compiles.
                if number:
                    seconds.append(statistics.median(taken))
    return found


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all subjects, print a line for each form, and write the figures."""
    parser = argparse.ArgumentParser(description="Host time of the loss and of the batch norm.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {name: measure(name, rounds=options.rounds, repeats=options.repeats) for name in SUBJECTS}
    for name, forms in found.items():
        for form, seconds in forms.items():
            print(f"{name:5} {form:9} {statistics.median(seconds) * 1e6:6.0f} us")
    if options.json:
        write_json(options.json, {"environment": describe_environment(torch.device("cpu")), "seconds": found})


if __name__ == "__main__":
    main()
