"""Loss scaling, clipping, and skipped steps."""

import pytest
import torch
from torch import nn

from synco_fast.config import OptimizerConfig
from synco_fast.models.batch_norm import SplitBatchNorm2d
from synco_fast.runtime.optim_step import OptimStep, SkippedSteps
from synco_fast.training.step.optimizer import build_optimizer
from synco_fast.training.step.statistics import RunningStatistics

CPU = torch.device("cpu")


def one_weight(scaled=False, clip=None, lr=1.0):
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    return weight, OptimStep(torch.optim.SGD([weight], lr=lr), scaled=scaled, clip=clip, device=CPU)


def test_the_norm_is_that_of_the_whole_gradient_and_clipping_keeps_the_direction():
    for clip, expected in ((None, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])):
        weight, update = one_weight(clip=clip)
        update.backward(weight.square().sum() / 2)
        step_ok, norm = update.step()
        assert bool(step_ok)
        assert float(norm) == pytest.approx(5)
        assert torch.allclose(torch.tensor([3.0, 4.0]) - weight.detach(), torch.tensor(expected), atol=1e-5)


def test_scaling_changes_no_step_and_backs_off_where_the_gradient_overflows():
    plain, one = one_weight(lr=0.1)
    scaled, other = one_weight(scaled=True, lr=0.1)
    for weight, update in ((plain, one), (scaled, other)):
        update.backward(weight.pow(3).sum())
        assert bool(update.step()[0])
    assert torch.allclose(plain, scaled)
    before, scale = scaled.detach().clone(), float(other.scale)
    scaled.grad = None
    other.backward(scaled.sum() * 1e38)
    step_ok, norm = other.step()
    assert not bool(step_ok)
    assert not torch.isfinite(norm)
    assert torch.equal(scaled.detach(), before)
    assert float(other.scale) == scale / 2
    again = OptimStep(torch.optim.SGD([scaled], lr=1.0), scaled=True, clip=None, device=CPU)
    again.load_state_dict(other.state_dict())
    assert float(again.scale) == scale / 2


def test_the_scale_doubles_after_its_interval_also_across_a_checkpoint():
    weight, update = one_weight(scaled=True, lr=1e-9)
    scale = float(update.scale)
    update.load_state_dict({"scale": scale, "growth": 1998})
    update.descend(weight.sum())
    again = OptimStep(torch.optim.SGD([weight], lr=1e-9), scaled=True, clip=None, device=CPU)
    again.load_state_dict(update.state_dict())
    assert float(again.scale) == scale
    again.descend(weight.sum())
    assert float(again.scale) == 2 * scale


def test_a_step_without_a_finite_gradient_moves_nothing():
    weight, update = one_weight(clip=1.0)
    for bad in (torch.nan, torch.inf):
        weight.grad = None
        update.backward((weight * bad).sum())
        assert not bool(update.step()[0])
        assert weight.tolist() == [3.0, 4.0]


def test_a_gpus_optimizer_skips_steps_by_a_tensor_also_the_first():
    """PyTorch's fused SGD runs on a CPU too; against plain SGD that never meets the bad gradients."""
    plain, fused = (nn.Linear(3, 2) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    config = OptimizerConfig(momentum=0.9, weight_decay=0.1)
    one = OptimStep(build_optimizer(plain, config, lr=0.5, device=CPU), scaled=False, clip=None, device=CPU)
    other = OptimStep(
        build_optimizer(fused, config, lr=0.5, device=torch.device("cuda")), scaled=True, clip=None, device=CPU
    )
    assert one.waits
    other._on_device = True
    for factor in (torch.nan, 1.0, torch.inf, 2.0):
        for module, update in ((plain, one), (fused, other)):
            module.zero_grad()
            update.backward(module(torch.ones(4, 3)).square().sum() * factor)
            assert bool(update.step()[0]) == (factor < 3)
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_skipped_steps_are_counted_and_their_row_begins_at_its_first():
    skipped = SkippedSteps(CPU)
    for step, step_ok in enumerate((True, False, True, False, False)):
        skipped.add(torch.tensor(step_ok), step)
    assert skipped.read() == (3, 2, 3)
    other = SkippedSteps(CPU)
    other.load_state_dict(skipped.state_dict())
    assert other.read() == (3, 2, 3)
    other.add(torch.tensor(False), torch.tensor(5))
    assert other.read() == (4, 3, 3)
    other.add(torch.tensor(True), 6)
    assert other.read() == (4, 0, -1)


def test_statistics_of_a_skipped_step_are_restored():
    norm = SplitBatchNorm2d(3, groups=2)
    norm(torch.randn(4, 3, 2, 2))
    statistics = RunningStatistics(norm)
    before = {name: value.clone() for name, value in norm.named_buffers()}
    copies = statistics.copy()
    norm(torch.full((4, 3, 2, 2), torch.nan))
    assert torch.isnan(norm.running_mean).all()
    statistics.restore(copies, torch.tensor(False))
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(norm, name), before[name])
    copies = statistics.copy()
    norm(torch.randn(4, 3, 2, 2) + 5)
    moved = norm.running_mean.clone()
    statistics.restore(copies, torch.tensor(True))
    assert torch.equal(norm.running_mean, moved)
