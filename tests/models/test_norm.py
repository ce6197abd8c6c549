import pytest
import timm
import torch
from torch import nn

from synco_fast.errors import ConfigError
from synco_fast.models.norm import SplitBatchNorm2d, split_batch_norm


def test_each_group_is_normalised_on_its_own():
    x = torch.randn(12, 5, 4, 4) * torch.arange(1, 13).view(12, 1, 1, 1)
    split, parts = SplitBatchNorm2d(5, groups=3), [nn.BatchNorm2d(5) for _ in range(3)]
    expected = torch.cat([norm(part) for norm, part in zip(parts, x.chunk(3), strict=True)])
    assert torch.allclose(split(x), expected, atol=1e-6)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in parts]).mean(0)
        assert torch.allclose(getattr(split, name), mean, atol=1e-6)
    assert int(split.num_batches_tracked) == 1


def test_the_statistics_do_not_tell_where_a_sample_is():
    """A sample's output depends on its own group alone: what the other groups hold changes nothing."""
    split = SplitBatchNorm2d(3, groups=2)
    x = torch.randn(8, 3, 2, 2)
    other = x.clone()
    other[4:] = torch.randn(4, 3, 2, 2) * 9
    assert torch.equal(split(x)[:4], split(other)[:4])
    assert not torch.equal(nn.BatchNorm2d(3)(x)[:4], nn.BatchNorm2d(3)(other)[:4])


def test_evaluation_is_that_of_batch_norm():
    plain = nn.BatchNorm2d(4)
    plain(torch.randn(16, 4, 3, 3) * 3 + 1)
    split = SplitBatchNorm2d(4, groups=4)
    split.load_state_dict(plain.state_dict())
    x = torch.randn(5, 4, 3, 3)
    assert torch.equal(split.eval()(x), plain.eval()(x))


def test_gradient_is_that_of_the_groups():
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SplitBatchNorm2d(2, groups=2).double(), (x,))


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="found a batch of 7, allowed a multiple of 2"):
        SplitBatchNorm2d(3, groups=2)(torch.randn(7, 3, 2, 2))


def test_a_model_keeps_its_weights_and_its_state_names():
    model = timm.create_model("resnet18", num_classes=0, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split_batch_norm(model, 4)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    assert kinds == {SplitBatchNorm2d}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_one_group_changes_nothing_and_other_norms_are_refused():
    model = nn.Sequential(nn.BatchNorm2d(3))
    assert type(split_batch_norm(model, 1)[0]) is nn.BatchNorm2d

    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(ConfigError, match=r"model\.batch_norm_groups: found 2, allowed 1 .* Own"):
        split_batch_norm(nn.Sequential(Own(3)), 2)
