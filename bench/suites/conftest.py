"""Fixtures of the pytest-benchmark suites: ``python -m pytest bench/suites --benchmark-json results.json``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.phases import wait_for


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark: Any, device: torch.device) -> Callable[[Callable[[], object]], None]:
    """Benchmark a function. Every call waits for the device at the end."""

    def run(function: Callable[[], object]) -> None:
        def call() -> None:
            function()
            wait_for(device)

        benchmark.extra_info.update(describe_environment(device))
        benchmark.pedantic(call, rounds=20 if device.type == "cuda" else 5, warmup_rounds=2)

    return run
