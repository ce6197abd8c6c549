"""The launch audit: no step dispatches more than the table of docs/training.md says."""

from __future__ import annotations

import torch
from torch import nn

from synco_fast.runtime.phases import phase
from synco_fast.training.tuning.audit import OTHER, count_operations

from ..support import launches


def test_operations_are_counted_by_phase_without_views_and_allocations():
    x = torch.ones(4, 6, requires_grad=True)

    def step():
        with phase("loss"):
            loss = x.view(2, 12).t().exp().sum()
        with phase("backward"):
            loss.backward()
        torch.empty(3)
        nn.functional.relu(x[0].detach())

    found = count_operations(step)
    assert found["loss"] == {"aten::exp": 1, "aten::sum": 1}
    assert found["backward"]["aten::mul"] == 1
    assert found[OTHER] == {"aten::relu": 1}


def test_no_step_launches_more_than_the_table_says():
    """A ceiling for each phase, and a table that is not far above what is true; `python -m tests.support.launches`."""
    found = {name: sum(operations.values()) for name, operations in launches.count().items()}
    ceilings = launches.documented()
    assert found.keys() == ceilings.keys()
    for name, number in found.items():
        assert number <= ceilings[name], f"{name}: {number} operations, the table says {ceilings[name]}"
        assert number >= 0.9 * ceilings[name] - 2, f"{name}: {number} operations, the table says {ceilings[name]}"
