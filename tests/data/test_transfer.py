"""Copies between host and device, without one: PyTorch's fake tensors show what is asked of it."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from synco_fast.data.transfer import to_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Copies(TorchDispatchMode):
    """Whether each copy may go on when the call returns."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        if function is torch.ops.aten._to_copy.default:
            self.found.append(bool((options or {}).get("non_blocking")))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(("source", "target", "goes_on"), [(CPU, CUDA, True), (CUDA, CPU, False)])
def test_the_host_waits_for_what_it_gets(source, target, goes_on, monkeypatch):
    """PyTorch's copy to the host without waiting goes to page-locked memory, which is read before it is filled."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(), Copies() as copies:
        moved = to_device(torch.empty(3, dtype=torch.int64, device=source), target)
    assert moved.device == target
    assert copies.found == [goes_on]


def test_on_the_cpu_memory_is_shared():
    values = np.arange(4)
    assert to_device(values, CPU).data_ptr() == values.ctypes.data
