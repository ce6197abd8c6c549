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
#: Backends that are validated against the reference in float64.
VALIDATED = ("reference", "blockwise", "triton")

#: Backends of the whole loss, and two baselines.
BACKENDS = {
    "released": "baseline with the cost of the released code",
    "reference": "plain PyTorch, vectorised over negatives",
    "compiled": "the reference under torch.compile",
    "blockwise": "in blocks, without synthetic vectors",
    "triton": "the fused kernels",
}
#: Other implementations of parts of the loss. Each computes only what its text names.
FIELD = {
    "topk": "one matrix product, torch.topk and cross-entropy",
    "topk-flashinfer": "one matrix product, FlashInfer's top-k and cross-entropy",
    "linear-ce": "PyTorch's fused linear cross-entropy, no selection",
    "linear-ce-liger": "Liger's fused linear cross-entropy, no selection",
}
LOSS_BACKENDS = tuple(BACKENDS | FIELD)
#: Top-N selection of each row. Names with ``-only`` start from a matrix of similarities.
SELECTIONS = {
    "topk": "one matrix product and torch.topk",
    "topk-only": "torch.topk",
    "topk-flashinfer": "one matrix product and FlashInfer's top-k",
    "topk-flashinfer-only": "FlashInfer's top-k",
    "blockwise": "the blockwise loss without synthetic negatives, including the softmax",
    "triton": "the fused loss without synthetic negatives, including the softmax",
}

#: Implementations of norm, add and ReLU.
NORMS = {
    "grouped": "one call of PyTorch's batch norm per group and a concatenation, then add and ReLU",
    "split": "`SplitBatchNorm2d`, which on a CPU copies nothing, then add and ReLU: a step with model.norm plain",
    "plain": "torch.nn.BatchNorm2d of the whole batch, then add and ReLU",
    "compiled": "the grouped formula under torch.compile",
    "folded": "one call of PyTorch's batch norm, groups folded into channels by a copy each way, then add and ReLU",
    "native": "PyTorch's kernels, on a CPU group by group in the cache",
    "triton": "the kernels of synco_fast.kernels.norm",
    "apex": "NVIDIA apex's contrib.groupbn, float16, one group",
}

#: Values of ``model.norm``.
NORM_SETTINGS = ("plain", "auto", "fused")

#: Subjects of the step benchmark: two limits, a plain loop and the methods.
STEPS = ("encoder", "encoder-plain", "plain", *METHODS)
#: The default subjects, the most informative first, in case time runs out.
STEPS_BY_DEFAULT = ("encoder", "encoder-plain", "synco", "plain", *(name for name in with_queue() if name != "synco"))
#: Engines of a step, as `training.engine` names them.
ENGINES = ("eager", "graph", "compile", "compile+graph")

#: Optimizers: those of `optimizer.name`, and other implementations.
OPTIMIZERS = {
    "sgd": "PyTorch's, fused on a GPU: used in training",
    "sgd-foreach": "PyTorch's, foreach",
    "adamw": "PyTorch's, fused on a GPU: used in training",
    "adamw-foreach": "PyTorch's, foreach",
    "lars": "foreach, skips bad steps on the device: used in training",
    "lars-timm": "timm's",
    "lamb": "foreach, skips bad steps on the device: used in training",
    "lamb-timm": "timm's",
    "apex_sgd": "NVIDIA apex's FusedSGD",
    "apex_adam": "NVIDIA apex's FusedAdam, capturable",
    "apex_lamb": "NVIDIA apex's FusedLAMB",
    "apex_mixed_lamb": "NVIDIA apex's FusedMixedPrecisionLamb",
}

#: Data pipelines. The others are compared with the first. Those that end in ``-fused`` make their views
#: by the kernels, on a GPU; ``-stream`` reads the same files from tar shards, front to back.
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
    "torchvision-stream",
)
#: The default pipelines, by source.
PIPELINES_OF = {
    "photos": PIPELINES[:7],
    "packed": ("pil", "torchvision", "dali", "torchvision-packed", "dali-packed"),
    "stream": ("pil", "torchvision", "torchvision-stream"),
}
