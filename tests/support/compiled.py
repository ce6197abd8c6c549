"""What a kernel that Triton has compiled takes of a device."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

from synco_fast.bench.cost.launches import tool


def resources(binary: Any) -> tuple[int, int, int]:
    """Registers, bytes of stack and bytes of local memory a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(tool("cuobjdump")), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return int(registers), int(stack), int(local)
