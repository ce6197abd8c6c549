"""Break the batch norm in seventeen ways, one at a time, and see that the tests catch each.

Works on a copy of the folders, never on this one:

    python tests/kernels/norm/mutation.py

Prints a line for each break; the exit code is 1 where one goes unnoticed or can no longer be made.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("mutation_of_kernels", Path(__file__).parents[1] / "mutation.py")
shared = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = shared
spec.loader.exec_module(shared)

Break, ROOT = shared.Break, shared.ROOT
REFERENCE = ("tests/kernels/norm/test_reference.py",)
NATIVE = ("tests/kernels/norm/test_native.py",)
KERNELS = ("-o", "python_files=check_*.py", "tests/kernels/norm/interpreted/check_norm.py")
TRITON = "kernels/norm/triton"

BREAKS = (
    Break(
        "statistics: groups share the rows of the first",
        f"{TRITON}/statistics.py",
        "base = (group.to(tl.int64) * count + begin) * C",
        "base = begin.to(tl.int64) * C",
        KERNELS,
        "test_dtypes and float32",
    ),
    Break(
        "statistics: the tiles after the first are those of the first group",
        f"{TRITON}/statistics.py",
        "base = (group.to(tl.int64) * count + row) * C",
        "base = row.to(tl.int64) * C",
        KERNELS,
        "test_groups",
    ),
    Break(
        "statistics: every tile weighs as the second does",
        f"{TRITON}/statistics.py",
        "share = 1.0 / (tile + 1)",
        "share = 1.0 / 2",
        KERNELS,
        "no_digits",
    ),
    Break(
        "statistics: what lies between the means of a tile's places is not counted",
        f"{TRITON}/statistics.py",
        "b_squares + slots[:, None] * b_apart * b_apart",
        "b_squares",
        KERNELS,
        "test_dtypes and float32",
    ),
    Break(
        "statistics: the second half of a share's mean is dropped",
        f"{TRITON}/statistics.py",
        "b_one + tl.load(p_share_rest + o_share, m_share, 0)",
        "b_one",
        KERNELS,
        "no_digits",
    ),
    Break(
        "statistics: the running variance is the biased one",
        f"{TRITON}/statistics.py",
        " * (count.to(tl.float32) / (count - 1).to(tl.float32))",
        "",
        KERNELS,
        "test_dtypes and float32",
    ),
    Break(
        "statistics: shares after the first few weigh as if they were the first",
        f"{TRITON}/statistics.py",
        "share = part / seen.to(tl.float32)",
        "share = part / part",
        KERNELS,
        "test_groups",
    ),
    Break(
        "statistics: every program counts the batch",
        f"{TRITON}/statistics.py",
        "tl.load(p_tracked, first, 0) + 1, first)",
        "tl.load(p_tracked) + 1)",
        KERNELS,
        "cumulative",
    ),
    Break(
        "apply: the ReLU turns NaN into 0",
        f"{TRITON}/tile.py",
        "tl.where(b_y <= 0, 0.0, b_value)",
        "tl.where(b_y > 0, b_value, 0.0)",
        KERNELS,
        "test_nan",
    ),
    Break(
        "backward: no mask where there is no residual",
        f"{TRITON}/launch.py",
        '"RECOMPUTE": relu and y is None',
        '"RECOMPUTE": False',
        KERNELS,
        "test_the_mask",
    ),
    Break(
        "backward: the mean of z stays",
        f"{TRITON}/backward.py",
        "b_z - constant[None, :] - (b_x",
        "b_z - (b_x",
        KERNELS,
        "test_dtypes and float32",
    ),
    Break(
        "backward: the slope has one reciprocal deviation too few",
        f"{TRITON}/backward.py",
        "* (b_rstd * b_rstd)",
        "* b_rstd",
        KERNELS,
        "test_dtypes and float32",
    ),
    Break(
        "backward: only the last groups reach the weight's gradient",
        f"{TRITON}/backward.py",
        "of_weight += tl.sum(",
        "of_weight = tl.sum(",
        KERNELS,
        "test_groups",
    ),
    Break(
        "operator: the residual's gradient is not masked",
        "kernels/norm/ops.py",
        "(of_residual if y is not None else gradient)",
        "gradient",
        KERNELS,
        "test_dtypes and float32",
    ),
    Break(
        "PyTorch's kernels: each group moves the running statistics as if it were the only one",
        "kernels/norm/native.py",
        "momentum / (groups - (groups - number) * momentum)",
        "momentum",
        NATIVE,
        "bits",
    ),
    Break(
        "formula: the closed-form gradient forgets that the variance moves",
        "kernels/norm/reference.py",
        " - h * _each_group(of_weight / count)",
        "",
        REFERENCE,
        "closed_form",
    ),
    Break(
        "kernels: launches go to the current device",
        f"{TRITON}/launch.py",
        "with torch.cuda.device_of(first):",
        "with torch.no_grad():",
        KERNELS,
        "go_to_the_device",
    ),
)


def main() -> int:
    """Make each break, print what came of it."""
    runs = ((KERNELS, "test_dtypes and float32 or test_nan or test_the_mask"), (REFERENCE, "closed_form"))
    return shared.report(BREAKS) if shared.unbroken(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
