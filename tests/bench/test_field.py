"""The field's forms of the loss: what they compute, and adapters against stand-ins for packages that need a GPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.functional import normalize

from synco_fast.bench.baselines.field import linear_cross_entropy, product_loss, top_k
from synco_fast.bench.loss import Shape, measure, prepare, prepare_selection
from synco_fast.kernels import Negatives, synthetic_contrast
from synco_fast.runtime.errors import UserError

CPU = torch.device("cpu")
SMALL = Shape(4, 256, 16, 9)
HAS_LINEAR = hasattr(torch.nn.functional, "linear_cross_entropy")


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return [normalize(torch.randn(size, 16), dim=1) for size in (4, 4, 256)]


@pytest.fixture
def flashinfer(monkeypatch):
    """A stand-in with the documented signature: values and int64 indices, unsorted unless asked."""
    calls = []
    module = ModuleType("flashinfer")

    def chosen(input, k, sorted=False):
        calls.append((tuple(input.shape), k, sorted))
        values, indices = input.topk(k, dim=1, sorted=True)
        return values.flip(1), indices.flip(1)

    module.top_k = chosen
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return calls


@pytest.fixture
def liger(monkeypatch):
    """A stand-in that takes weight, input and target in that order."""

    class Loss:
        def __call__(self, lin_weight, _input, target, bias=None):
            return torch.nn.functional.cross_entropy(_input @ lin_weight.T, target)

    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = Loss
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)


def test_a_product_with_cross_entropy_is_mocos_loss(inputs):
    found = product_loss(top_k("torch"), hard=9, temperature=0.2)(*inputs)
    expected = synthetic_contrast(*inputs, Negatives.moco(), temperature=0.2, seed=0, step=0, backend="reference").loss
    torch.testing.assert_close(found, expected)


def test_fused_forms_have_the_other_keys_of_the_batch_as_negatives_too(inputs, liger):
    q, k, queue = inputs
    logits = q @ torch.cat([k, queue]).T / 0.2
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    torch.testing.assert_close(linear_cross_entropy("liger", temperature=0.2)(q, k, queue), expected)
    if HAS_LINEAR:
        torch.testing.assert_close(linear_cross_entropy("torch", temperature=0.2)(q, k, queue), expected)


def test_flashinfer_is_called_as_it_is_documented(inputs, flashinfer):
    similarity = inputs[0] @ inputs[2].T
    values, indices = top_k("flashinfer")(similarity, 9)
    assert flashinfer == [((4, 256), 9, False)]
    torch.testing.assert_close(values.sort(dim=1, descending=True).values, similarity.topk(9, dim=1).values)
    assert torch.equal(similarity.gather(1, indices), values)


@pytest.mark.parametrize("backend", ["topk", "topk-flashinfer", "linear-ce-liger"])
def test_their_gradients_reach_the_queries(backend, flashinfer, liger):
    gradient = prepare(backend, SMALL, CPU)()
    assert gradient.shape == (4, 16)
    assert gradient.abs().sum() > 0
    if backend.startswith("topk"):
        torch.testing.assert_close(gradient, prepare("topk", SMALL, CPU)())
        assert bool(flashinfer) == (backend == "topk-flashinfer")


def test_a_selection_finds_the_largest_similarities(flashinfer):
    expected = prepare_selection("topk", SMALL, CPU)().sort(dim=1).values
    for subject in ("topk-only", "topk-flashinfer", "topk-flashinfer-only"):
        torch.testing.assert_close(prepare_selection(subject, SMALL, CPU)().sort(dim=1).values, expected)


def test_what_is_measured_says_which_part():
    found = measure("topk", SMALL, device=CPU, repeats=1, part="selection")
    assert (found["part"], found["backend"]) == ("selection", "topk")
    assert "bare_s" not in found
    assert measure("blockwise", SMALL, device=CPU, repeats=1)["bare_s"] > 0


@pytest.mark.parametrize(("make", "package"), [(top_k, "flashinfer"), (linear_cross_entropy, "liger")])
def test_a_package_that_is_not_there_is_named(make, package, monkeypatch):
    for name in ("flashinfer", "liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"found no .* of {package}-\w+, expected it installed"):
        make(package) if make is top_k else make(package, temperature=0.2)
