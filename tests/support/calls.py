"""Counting the operators of PyTorch that a function calls."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Counts the operators that compute or allocate, not views: on a GPU a launch or more each, or a buffer."""

    def __init__(self):
        super().__init__()
        self.names = []

    @property
    def count(self):
        return len(self.names)

    def __torch_dispatch__(self, operator, kinds, args=(), options=None):
        if not any(one.alias_info is not None and not one.alias_info.is_write for one in operator._schema.arguments):
            self.names.append(operator._schema.name.partition("::")[2])
        return operator(*args, **(options or {}))
