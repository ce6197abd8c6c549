"""Proofs of fused kernels, with forms that run anywhere in the place of the kernels: what is compared, and noticed."""

from __future__ import annotations

import itertools
import json
from io import StringIO

import pytest
import torch

from synco_fast.kernels import Negatives, blockwise, ops, proof, validation
from synco_fast.kernels.norm import ops as norm_ops
from synco_fast.kernels.norm import validation as norm_validation
from synco_fast.kernels.proof import KERNELS, answer, augment_shapes, loss_shapes, momentum_shapes, norm_shapes
from synco_fast.kernels.views.reference import plain_views
from synco_fast.kernels.views.validation import ViewsCase, validate_views

CPU = torch.device("cpu")
JITTER = ("brightness", "contrast", "saturation", "hue")
LOSS = {
    "calls": [(5, True), (140, False)],
    "length": 150,
    "dim": 16,
    "negatives": [Negatives.moco(), Negatives.mochi(12, 4, 3), Negatives.moco()],
    "temperature": 0.2,
    "dtype": torch.bfloat16,
}


@pytest.fixture
def stand_in(monkeypatch):
    """Let the blockwise form and PyTorch's batch norm answer for the kernels."""
    monkeypatch.setattr(validation, "unserved_by_triton", lambda *_: None)
    monkeypatch.setattr(norm_validation, "unserved_by_triton", lambda *_: None)
    monkeypatch.setattr(ops, "_note", lambda reason: None)
    monkeypatch.setattr(norm_ops, "_note", lambda line: None)


def prove(name, shapes):
    """Through JSON, as a run's process gets them."""
    return list(KERNELS[name].prove(json.loads(json.dumps(shapes)), CPU))


def misses(name, shapes):
    return {miss for comparison in prove(name, shapes) for miss in comparison.misses}


def test_the_loss_is_compared_at_every_call_of_the_run(stand_in, monkeypatch):
    assert not misses("loss", loss_shapes(**LOSS))
    cases = [comparison.about for comparison in prove("loss", loss_shapes(**LOSS))]
    assert len(cases) == len(set(cases)) == 2 * 2 * 2
    assert cases[0] == "B = 5, K = 150, D = 16, N = 0, 0 synthetic, bfloat16, flat, masked"
    assert cases[-1].startswith("B = 140, K = 150, D = 16, N = 12,")
    assert cases[-1].endswith("synthetic, bfloat16, peaked")
    true = blockwise.contrast_and_gradient

    def wrong_behind_the_first_block(*arguments, **named):
        found = true(*arguments, **named)
        scale = torch.ones(len(found.loss), 1)
        scale[130:] = 1.1
        return found._replace(gradient=found.gradient * scale)

    monkeypatch.setattr(ops.blockwise, "contrast_and_gradient", wrong_behind_the_first_block)
    assert misses("loss", loss_shapes(**LOSS)) == {"gradient"}


def test_the_step_on_the_device_must_give_the_same_bits(stand_in, monkeypatch):
    true = blockwise.contrast_and_gradient

    def drawn_otherwise(*arguments, step, **named):
        found = true(*arguments, step=step, **named)
        return found._replace(loss=found.loss * (1 + 1e-7)) if isinstance(step, torch.Tensor) else found

    monkeypatch.setattr(ops.blockwise, "contrast_and_gradient", drawn_otherwise)
    assert misses("loss", loss_shapes(**LOSS)) == {"a repeat gives other bits"}


LAYERS = [(6, 4, 4, 2, True, True), (6, 4, 4, 2, True, False), (6, 4, 4, 2, True, True), (3, 2, 2, 2, True, True)]


def test_batch_norm_is_compared_at_every_layer_once(stand_in, monkeypatch):
    shapes = norm_shapes(images=8, dtype=torch.bfloat16, layers=LAYERS)
    found = prove("norm", shapes)
    assert not any(comparison.misses for comparison in found)
    # Three layers, and evaluation once for each kind.
    assert len(found) == 3 + 2
    assert found[0].about == "8 x 3 x 2 x 2, 2 groups, bfloat16, ReLU, residual"
    assert sum("evaluation" in comparison.about for comparison in found) == 2
    monkeypatch.setattr(proof, "_LARGEST_LAYER", 6 * 4 * 4 * 4)
    images = {comparison.about.split(" ")[0] for comparison in prove("norm", shapes)}
    assert images == {"8", "4"}, "a layer that is too large is compared on fewer images, whole groups of them"

    by_operators = norm_ops._by_operators

    def wrong(*arguments, **named):
        return by_operators(*arguments, **named) * 1.1

    monkeypatch.setattr(norm_ops, "_by_operators", wrong)
    assert {"y", "dx"} <= misses("norm", shapes)


def test_the_momentum_update_is_compared_number_by_number(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.BatchNorm1d(9), torch.nn.Linear(9, 9).bfloat16())
    shapes = momentum_shapes([*model.parameters(), *model.buffers()], 0.9)
    assert shapes["sizes"] == [
        ["bfloat16", 9, 1],
        ["bfloat16", 81, 1],
        ["float32", 9, 5],
        ["float32", 63, 1],
    ]
    true = proof.momentum_update

    def acting(change):
        def update(keys, queries, m, backend):
            before = [key.clone() for key in keys]
            true(keys, queries, m, backend="foreach")
            if backend == "triton":
                change(keys, before, m)

        monkeypatch.setattr(proof, "momentum_update", update)
        return misses("momentum", shapes)

    assert acting(lambda keys, before, m: None) == set()
    assert "k" in acting(lambda keys, before, m: keys[-1].copy_(before[-1]))

    def one_more(keys, before, m):
        # Right behind the last tensor, in the room that they share.
        keys[-1].as_strided((1,), (1,), keys[-1].storage_offset() + keys[-1].numel()).add_(1)

    assert acting(one_more) == {"memory beside a tensor", "k, where it equals q"}

    def only_a_number(keys, before, m):
        if isinstance(m, torch.Tensor):
            keys[0].copy_(before[0])

    assert acting(only_a_number) == {"k, with the momentum on the device"}
    calls = itertools.count()

    def every_fourth(keys, before, m):
        # Found, again, on the device, where q equals k.
        if next(calls) % 4 == 1:
            keys[-1].mul_(1 + 2e-7)

    assert acting(every_fourth) == {"a repeat gives other bits"}
    assert "k, where it equals q" in acting(lambda keys, before, m: keys[0].mul_(1 + 1e-7))


AUGMENT = {"sides": [12, 8, 12], "views": 6, "dtype": torch.bfloat16, "image": (14, 10), "channels": 3}
AUGMENT |= {"planar": True, "sigma": 1.5}


def test_views_are_compared_at_every_side_of_the_run(monkeypatch):
    def acting(change=lambda views: views):
        monkeypatch.setattr(
            proof,
            "validate_views",
            lambda case, device: validate_views(case, device, lambda *a, **k: change(plain_views(*a, **k))),
        )
        return prove("augment", augment_shapes(**AUGMENT))

    found = acting()
    assert [case.about for case in found] == [
        f"6 views of {side} pixels from images of 14 x 10, 3 channels planar, bfloat16" for side in (8, 12)
    ]
    assert not any(case.misses for case in found)
    assert {"pixel", "mean of a view"} == set(found[0].errors) == set(found[0].bounds)
    for wrong in (lambda views: views.flip(3), lambda views: views.roll(1, 1), lambda views: views + views.isnan() + 1):
        assert {"pixel", "mean of a view"} <= {miss for case in acting(wrong) for miss in case.misses}
    calls = itertools.count()
    again = acting(lambda views: views * (1 + (next(calls) % 2) * 2**-7))
    assert all("a repeat gives other bits" in case.misses for case in again)
    assert any("pixel" in case.misses for case in acting(lambda views: views * float("nan"))), "NaN misses"
    monkeypatch.setattr(proof, "_MOST_VIEWS", 4)
    assert acting()[0].about.startswith("4 views of 8 pixels")


@pytest.mark.parametrize("part", ["brightness", "contrast", "saturation", "hue", "blur", "grayscale", "solarize"])
def test_an_operation_that_is_missing_is_noticed(part, monkeypatch):
    """For one of each, with the right ones as the truth."""

    def without(pixels, offsets, sizes, images, parameters, **options):
        changed = {name: values.clone() for name, values in parameters.items()}
        if part in JITTER:
            changed["factors"][:, JITTER.index(part)] = float(part != "hue")
        else:
            changed["sigma" if part == "blur" else part].zero_()
        return plain_views(pixels, offsets, sizes, images, changed, **options)

    case = ViewsCase(16, 24, torch.uint8)
    assert "pixel" in validate_views(case, CPU, without).misses
    assert not validate_views(case, CPU, plain_views).misses


def test_on_a_cpu_no_kernel_serves(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    shapes = {
        "loss": loss_shapes(**LOSS),
        "norm": norm_shapes(images=8, dtype=torch.float32, layers=LAYERS),
        "momentum": momentum_shapes([torch.empty(3)], 0.9),
        "augment": augment_shapes(**AUGMENT),
    }
    assert shapes.keys() == KERNELS.keys()
    for name, kernel in KERNELS.items():
        assert "cpu" in kernel.unserved(shapes[name], CPU) or "Triton" in kernel.unserved(shapes[name], CPU)


def test_answers_come_one_by_one_and_end_with_the_first_failure(monkeypatch):
    def fails(shapes, device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setitem(KERNELS, "norm", KERNELS["norm"]._replace(prove=fails))
    momentum = momentum_shapes([torch.empty(3)], 0.9)
    true = proof.momentum_update
    monkeypatch.setattr(
        proof,
        "momentum_update",
        lambda keys, queries, m, backend: true(keys, queries, m if backend == "foreach" else 1.0),
    )
    out = StringIO()
    answer({"device": "cpu", "wanted": [["momentum", momentum], ["norm", {}], ["loss", {}]]}, out)
    first, second = map(json.loads, out.getvalue().splitlines())
    assert (first["kernel"], first["compared"][0]["misses"]) == (
        "momentum",
        ["k", "k, with the momentum on the device"],
    )
    assert (second["kernel"], second["raised"]) == ("norm", "RuntimeError: an illegal memory access was encountered")
