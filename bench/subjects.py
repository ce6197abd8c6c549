"""Names of what the benchmarks measure, for parsing commands without importing PyTorch."""

from __future__ import annotations

from synco_fast.methods import METHODS, with_queue

__all__ = [
    "BACKENDS",
    "CAPABILITIES",
    "DTYPES",
    "ENGINES",
    "FIELD",
    "LOSS_BACKENDS",
    "NORMS",
    "NORM_SETTINGS",
    "OPTIMIZERS",
    "PIPELINES",
    "PIPELINES_OF",
    "SELECTIONS",
    "STEPS",
    "STEPS_BY_DEFAULT",
    "VALIDATED",
]

DTYPES = ("float32", "bfloat16", "float16")
#: Compute capabilities that the kernels are compiled for.
CAPABILITIES = (80, 90, 100)
#: Backends that are compared with the reference in float64.
VALIDATED = ("reference", "blockwise", "triton")

#: Forms of the whole loss.
BACKENDS = {
    "released": "the baseline: the released code's cost model",
    "reference": "plain PyTorch, vectorised over negatives",
    "compiled": "the reference under torch.compile",
    "blockwise": "in blocks, without synthetic vectors",
    "triton": "the fused kernels",
}
#: Other implementations of parts of the loss; each omits what its text does not name.
FIELD = {
    "topk": "one matrix product, torch.topk and cross-entropy",
    "topk-flashinfer": "one matrix product, FlashInfer's top-k and cross-entropy",
    "linear-ce": "PyTorch's fused linear cross-entropy, no selection",
    "linear-ce-liger": "Liger's fused linear cross-entropy, no selection",
}
LOSS_BACKENDS = tuple(BACKENDS | FIELD)
#: The N largest similarities of each row. Those that end in ``-only`` start from a matrix of similarities.
SELECTIONS = {
    "topk": "one matrix product and torch.topk",
    "topk-only": "torch.topk",
    "topk-flashinfer": "one matrix product and FlashInfer's top-k",
    "topk-flashinfer-only": "FlashInfer's top-k",
    "blockwise": "the blockwise form without synthetic negatives: it sums the softmax as well",
    "triton": "the kernels without synthetic negatives: they sum the softmax as well",
}

#: Forms of norm, add and ReLU.
NORMS = {
    "grouped": "a call of PyTorch's batch norm a group, put together by a copy, then add and ReLU",
    "split": "`SplitBatchNorm2d`, which on a CPU copies nothing, then add and ReLU: a step with model.norm plain",
    "plain": "torch.nn.BatchNorm2d of the whole batch, then add and ReLU",
    "compiled": "the formula in groups under torch.compile",
    "folded": "one call of PyTorch's batch norm, groups folded into channels by a copy each way, then add and ReLU",
    "native": "PyTorch's kernels, on a CPU group by group in the cache",
    "triton": "the kernels of synco_fast.kernels.norm",
    "apex": "NVIDIA apex's contrib.groupbn, float16, one group",
}

#: Values of ``model.norm``.
NORM_SETTINGS = ("plain", "auto", "fused")

#: Steps: two limits, a plain loop and the methods.
STEPS = ("encoder", "encoder-plain", "plain", *METHODS)
#: What is measured unless asked otherwise, what says most first, in case the time ends early.
STEPS_BY_DEFAULT = ("encoder", "encoder-plain", "synco", "plain", *(name for name in with_queue() if name != "synco"))
#: Engines of a step, as `training.engine` names them.
ENGINES = ("eager", "graph", "compile", "compile+graph")

#: Optimizer steps: those of `optimizer.name`, and other forms of the same.
OPTIMIZERS = {
    "sgd": "PyTorch's, fused on a GPU: what training takes",
    "sgd-foreach": "PyTorch's, over lists of tensors",
    "adamw": "PyTorch's, fused on a GPU: what training takes",
    "adamw-foreach": "PyTorch's, over lists of tensors",
    "lars": "over lists of tensors, skipped on the device: what training takes",
    "lars-timm": "timm's",
    "lamb": "over lists of tensors, skipped on the device: what training takes",
    "lamb-timm": "timm's",
    "apex_sgd": "NVIDIA apex's FusedSGD",
    "apex_adam": "NVIDIA apex's FusedAdam, capturable",
    "apex_lamb": "NVIDIA apex's FusedLAMB",
    "apex_mixed_lamb": "NVIDIA apex's FusedMixedPrecisionLamb",
}

#: Data pipelines; the first is the one that the others are held against.
#: those that end in ``-fused`` make their views by the kernels, on a GPU.
PIPELINES = (
    "pil",
    "torchvision",
    "dali",
    "dali-windows",
    "dali-fused",
    "resident-32",
    "resident-32-fused",
    "torchvision-packed",
    "dali-packed",
)
#: What is measured unless asked otherwise, by source.
PIPELINES_OF = {"photos": PIPELINES[:7], "packed": ("pil", "torchvision", "dali", *PIPELINES[7:])}
