"""The ways in which `mutation.py` breaks the kernels, and the tests that must notice."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BLOCKWISE", "BREAKS", "LOSS", "SELECTION", "Break"]

BLOCKWISE = ("tests/kernels/test_blockwise.py",)
EDGES = ("tests/kernels/test_edges.py",)
OPS = ("tests/kernels/test_ops.py",)
INTERPRETED = ("-o", "python_files=check_*.py")
LOSS = (*INTERPRETED, "tests/kernels/triton/interpreted/check_loss.py")
SELECTION = (*INTERPRETED, "tests/kernels/triton/interpreted/check_selection.py")
FULL = (*INTERPRETED, "tests/kernels/triton/interpreted/check_full_select.py")
FORMATS = (*INTERPRETED, "tests/kernels/triton/interpreted/check_formats.py")
KERNEL_EDGES = (*INTERPRETED, "tests/kernels/triton/interpreted/check_edges.py")


class Break(NamedTuple):
    """What is broken where, by which text for which, and the tests (and their -k) that must fail."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    only: str


BREAKS = (
    Break(
        "blockwise form: ties go to the larger queue index",
        "kernels/topk.py",
        "last = torch.from_numpy(np.partition(packed.numpy(), hard - 1, axis=1)[:, hard - 1 : hard])\n"
        "        kept = packed <= last\n",
        "last = torch.from_numpy(np.partition((packed ^ 0xFFFFFFFF).numpy(), hard - 1, axis=1)[:, hard - 1 : hard])\n"
        "        kept = packed ^ 0xFFFFFFFF <= last\n",
        BLOCKWISE,
        "selection",
    ),
    Break(
        "blockwise form: rows with too many candidates are not selected again",
        "kernels/topk.py",
        "(self._count < needed) | (self._count > self._limit)",
        "self._count < needed",
        BLOCKWISE,
        "selection",
    ),
    Break(
        "blockwise form: vectors are not normalised",
        "kernels/mixing.py",
        "squared.clamp(min=0).sqrt().clamp(min=_SMALLEST).reciprocal()",
        "torch.ones_like(squared)",
        BLOCKWISE,
        "family",
    ),
    Break(
        "blockwise form: the weight of n_j goes to n_i",
        "kernels/mixing.py",
        "Along(self._index[name], part)",
        'Along(self._index["first"], part)',
        BLOCKWISE,
        "family",
    ),
    Break(
        "blockwise form: sums are not rescaled when a larger similarity comes",
        "kernels/blockwise.py",
        "        self.total *= shrink\n",
        "",
        BLOCKWISE,
        "dtypes",
    ),
    Break(
        "operator: the gradient of a row is multiplied by another row's",
        "kernels/ops.py",
        "gradient * loss[:, None]",
        "gradient * loss.flip(0)[:, None]",
        OPS,
        "back_ends",
    ),
    Break(
        "kernels: the last key of each lane and tile is no candidate",
        "kernels/triton/scan.py",
        "for column in tl.static_range(0, KEYS // LANES):",
        "for column in tl.static_range(0, KEYS // LANES - 1):",
        SELECTION,
        "ordinary or boundary",
    ),
    Break(
        "kernels: ties go to the larger queue index",
        "kernels/triton/select.py",
        "_places(b_tie) >= tied - spare",
        "_places(b_tie) < spare",
        SELECTION,
        "boundary",
    ),
    Break(
        "kernels: a segment that has run over is not noticed",
        "kernels/triton/select.py",
        " | (longest > SEGMENT)",
        "",
        SELECTION,
        "unevenly",
    ),
    Break(
        "kernels: masked keys stay in the softmax",
        "kernels/triton/scan.py",
        'tl.where(image[:, None] == queue_image[None, :], float("-inf"), b_similarity)',
        'tl.where(image[:, None] < -1, float("-inf"), b_similarity)',
        LOSS,
        "mask",
    ),
    Break(
        "draws: coefficients of float64 are computed in float32",
        "kernels/rng.py",
        "exact = dtype if dtype in (torch.float32, torch.float64) else torch.float32",
        "exact = torch.float32",
        EDGES,
        "coefficients",
    ),
    Break(
        "draws: coefficients reach the end of their range",
        "kernels/rng.py",
        "            coefficient.clamp_(max=largest_below(low, high, dtype))\n",
        "",
        ("tests/kernels/test_rng.py",),
        "reaches_the_end",
    ),
    Break(
        "kernels: picks without the 16 bits more",
        "kernels/triton/philox.py",
        "carried = low + tl.umulhi(more << 16, size) < low",
        "carried = low < low",
        (*INTERPRETED, "tests/kernels/triton/interpreted/check_rng.py"),
        "picks",
    ),
    Break(
        "blockwise form: no floor under |x|",
        "kernels/mixing.py",
        ".clamp(min=_SMALLEST)",
        "",
        EDGES,
        "nothing_of_nothing",
    ),
    Break(
        "blockwise form: only the first block of cancelled slots comes from vectors",
        "kernels/mixing.py",
        "torch.split(self._cancelled, _AT_ONCE) if",
        "torch.split(self._cancelled, _AT_ONCE)[:1] if",
        EDGES,
        "beyond_one_block",
    ),
    Break(
        "blockwise form: -0 comes after 0 in the selection",
        "kernels/topk.py",
        "torch.nan, similarity + 0.0)",
        "torch.nan, similarity)",
        EDGES,
        "both_signs",
    ),
    Break(
        "blockwise form: NaN with its sign bit comes last in the selection",
        "kernels/topk.py",
        "torch.where(similarity.isnan(), torch.nan, similarity + 0.0)",
        "similarity + 0.0",
        EDGES,
        "either_sign",
    ),
    Break(
        "blockwise form: 256 words of marks are summed before the carry",
        "kernels/topk.py",
        "255, dim=1)",
        "256, dim=1)",
        EDGES,
        "carry",
    ),
    Break(
        "blockwise form: the gradient takes p_0 - 1, whose digits cancel",
        "kernels/blockwise.py",
        "(sums.total - sums.rest * self.k) / (everything * temperature)",
        "(sums.total / everything + (below.exp() / everything - 1) * self.k) / temperature",
        EDGES,
        "tiny_loss",
    ),
    Break(
        "blockwise form: log for log1p",
        "kernels/blockwise.py",
        "torch.log1p(sums.rest + below.expm1())",
        "torch.log(sums.rest + below.exp())",
        EDGES,
        "tiny_loss",
    ),
    Break(
        "blockwise form: the difference is taken after the division by T",
        "kernels/blockwise.py",
        "similarity.sub_(self.top).div_(self.temperature).exp_()",
        "similarity.div_(self.temperature).sub_(self.top / self.temperature).exp_()",
        EDGES,
        "low_temperature",
    ),
    Break(
        "blockwise form: of a narrow queue only the first block of weighted keys",
        "kernels/blockwise.py",
        "keys).squeeze(1)\n    return total",
        "keys).squeeze(1)\n        break\n    return total",
        EDGES,
        "narrow_queue",
    ),
    Break(
        "blockwise form: the sample does not heed the mask",
        "kernels/blockwise.py",
        "self.queue_ids[begin:end:stride]\n",
        "self.queue_ids[begin:end:stride] + (stride > 1) * 2**40\n",
        EDGES,
        "heeds_the_mask",
    ),
    Break(
        "blockwise form: rows selected again are not reported",
        "kernels/blockwise.py",
        "self.fallback[again] = 1",
        "self.fallback[again] = 0",
        BLOCKWISE,
        "reported",
    ),
    Break(
        "blockwise form: a GPU gets the budgets of a CPU",
        "kernels/blockwise.py",
        'budget = CPU if q.device.type == "cpu" else GPU',
        "budget = CPU",
        BLOCKWISE,
        "few_calls",
    ),
    Break(
        "reference: a negative as similar as the positive counts for the rank",
        "kernels/reference.py",
        "everything[:, 1:] > positive",
        "everything[:, 1:] >= positive",
        EDGES,
        "ties and reference",
    ),
    Break(
        "reference: a key as similar as the positive counts for the queue's rank",
        "kernels/reference.py",
        "(similarity > positive)",
        "(similarity >= positive)",
        EDGES,
        "ties and reference",
    ),
    Break(
        "blockwise form: a key as similar as the positive counts for the ranks",
        "kernels/blockwise.py",
        "count_marks(similarity > self.positive)",
        "count_marks(similarity >= self.positive)",
        EDGES,
        "ties and scalars",
    ),
    Break(
        "blockwise form: a synthetic negative as similar as the positive counts for the rank",
        "kernels/blockwise.py",
        "count_marks(similarity > self.positive[rows])",
        "count_marks(similarity >= self.positive[rows])",
        EDGES,
        "ties and scalars",
    ),
    Break(
        "operator: first_row does not reach the draws",
        "kernels/ops.py",
        "            step=step,\n            first_row=first_row,\n",
        "            step=step,\n            first_row=0,\n",
        EDGES,
        "reach_the_draws",
    ),
    Break(
        "operator: the seed does not reach the draws",
        "kernels/ops.py",
        "            seed=seed,\n            step=step,",
        "            seed=3,\n            step=step,",
        EDGES,
        "reach_the_draws",
    ),
    Break(
        "operator: forward-mode derivatives are 0",
        "kernels/tracing.py",
        " or forward_ad._current_level >= 0",
        "",
        ("tests/kernels/test_transforms.py",),
        "forward_mode",
    ),
    Break(
        "operator: a mode sees none",
        "kernels/tracing.py",
        "        or torch._C._len_torch_dispatch_stack() > 0\n",
        "",
        OPS,
        "without_an_onlooker",
    ),
    Break(
        "operator: keys of unknown images are masked for queries of unknown images",
        "kernels/ops.py",
        "image_ids.masked_fill(image_ids == -1, _NO_IMAGE)",
        "image_ids",
        OPS,
        "without_an_image",
    ),
    Break(
        "operator: compilers see what transforms call",
        "kernels/ops.py",
        "torch.compiler.disable(_Transformed.apply)",
        "_Transformed.apply",
        ("tests/kernels/test_transforms.py",),
        "what_is_compiled",
    ),
    Break(
        "kernels: a key as similar as the positive counts for the ranks",
        "kernels/triton/scan.py",
        "b_own > positive[:, None]",
        "b_own >= positive[:, None]",
        KERNEL_EDGES,
        "ties",
    ),
    Break(
        "kernels: a synthetic negative as similar as the positive counts for the rank",
        "kernels/triton/reduce.py",
        "b_similarity > positive",
        "b_similarity >= positive",
        KERNEL_EDGES,
        "ties",
    ),
    Break(
        "kernels: a floor of 0.001 under |x|",
        "kernels/triton/mix.py",
        "other_inverse = tl.rsqrt(tl.maximum(_inner(sums, sums, PIECES), 1e-24))",
        "other_inverse = tl.rsqrt(tl.maximum(_inner(sums, sums, PIECES), 1e-6))",
        KERNEL_EDGES,
        "length_1",
    ),
    Break(
        "kernels: coefficients reach the end of their range",
        "kernels/triton/mix.py",
        "tl.minimum(low + span * uniform(w0), most)",
        "low + span * uniform(w0)",
        KERNEL_EDGES,
        "end_of_their_range",
    ),
    Break(
        "kernels: NaN is no candidate",
        "kernels/triton/scan.py",
        "kept = ~(b_own <= threshold[:, None])",
        "kept = b_own > threshold[:, None]",
        SELECTION,
        "nan",
    ),
    Break(
        "kernels: the slow path takes all ties",
        "kernels/triton/full_select.py",
        "(m_tie & (b_ties <= wanted))",
        "m_tie",
        FULL,
        "two and 63",
    ),
    Break(
        "kernels: the slow path looks at 24 bits",
        "kernels/triton/full_select.py",
        "for digit in range(4):",
        "for digit in range(3):",
        FULL,
        "ordinary and 63",
    ),
    Break(
        "kernels: the slow path ends with its buffer",
        "kernels/triton/full_select.py",
        "for number in range(place, flagged, places):",
        "for number in range(place, tl.minimum(flagged, places), places):",
        FULL,
        "more_rows",
    ),
    Break(
        "kernels: a row that is filled alone ignores the mask",
        "kernels/triton/full_select.py",
        "tl.where(queue_image == tl.load(p_image + row), ",
        "tl.where(queue_image == -5, ",
        FULL,
        "more_rows",
    ),
    Break(
        "kernels: float32 without its low halves",
        "kernels/triton/sample.py",
        "return high, (x - high.to(tl.float32)).to(FORMAT)",
        "return high, (x * 0).to(FORMAT)",
        FORMATS,
        "three",
    ),
    Break(
        "kernels: launches go to the current device",
        "kernels/triton/launch.py",
        "with torch.cuda.device_of(q):",
        "with torch.no_grad():",
        LOSS,
        "device_of_q",
    ),
)
