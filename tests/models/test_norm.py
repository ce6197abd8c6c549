import pytest
import timm
import torch
from torch import nn

from synco_fast.models.batch_norm import SplitBatchNorm2d, split_batch_norm
from synco_fast.models.shuffle import key_order
from synco_fast.runtime.errors import ConfigError


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_pytorchs_batch_norm_of_each_group_to_the_bit(layout, dtype):
    torch.manual_seed(0)
    x = (torch.randn(12, 5, 4, 6) * 3 + 1).to(dtype, memory_format=layout)
    split, parts = SplitBatchNorm2d(5, groups=3), [nn.BatchNorm2d(5) for _ in range(3)]
    one, other = (x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    out = split(one)
    expected = torch.cat([norm(part) for norm, part in zip(parts, other.chunk(3), strict=True)])
    assert torch.equal(out, expected)
    assert out.is_contiguous(memory_format=layout)
    for result in (out, expected):
        result.float().pow(3).sum().backward()
    assert torch.equal(one.grad, other.grad)
    for name in ("weight", "bias"):
        summed = torch.stack([getattr(norm, name).grad for norm in parts]).sum(0)
        assert torch.allclose(getattr(split, name).grad, summed, rtol=1e-5)


def test_a_compiler_gets_one_formula():
    """The same numbers, and no loop over the groups: as many calls as for one."""
    x = torch.randn(8, 3, 4, 4)
    counts = []
    for groups in (2, 8):
        one, other = SplitBatchNorm2d(3, groups), SplitBatchNorm2d(3, groups)
        graphs = []

        def keep(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph

        compiled = torch.compile(other, backend=keep, fullgraph=True)
        assert torch.allclose(one(x), compiled(x), atol=1e-5)
        assert torch.allclose(one.running_mean, other.running_mean, atol=1e-6)
        assert torch.allclose(one.running_var, other.running_var, atol=1e-6)
        counts.append(len(graphs[0].graph.nodes))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("shuffled", "low", "high"), [(False, 0.99, 1.0), (True, 0.10, 0.18)])
def test_statistics_do_not_tell_a_query_its_key(shuffled, low, high):
    """A cheat that finds a query's key by the company it was normalised in, looking at nothing of the image itself.

    All images have the same black pixel, which batch norm maps to minus the group's mean over its deviation: a
    signature of the group. Two views of the same images have nearly the same one, so unshuffled it leads to the key's
    group; after the shuffle it is right about one time in eight, the number of groups.
    """
    groups, share = 8, 64
    length, right = groups * share, 0
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        image = torch.randn(length, 4, 1, 1, generator=generator)
        views = [image + 0.1 * torch.randn(length, 4, 3, 3, generator=generator) for _ in range(2)]
        for view in views:
            view[:, :, 0, 0] = 0
        order = key_order(length, seed=0, step=step) if shuffled else torch.arange(length)
        norm = SplitBatchNorm2d(4, groups)
        query = norm(views[0])[:, :, 0, 0]
        key = torch.empty_like(query)
        key[order] = norm(views[1][order])[:, :, 0, 0]
        distance = (query[:, None] - key).norm(dim=2)
        right += int((distance.diagonal() <= distance.amin(dim=1) + 1e-5).sum())
    assert low <= right / (8 * length) <= high


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="found a batch of 7, expected a multiple of 2"):
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

    with pytest.raises(ConfigError, match=r"model\.batch_norm_groups: found 2, expected 1 .* Own"):
        split_batch_norm(nn.Sequential(Own(3)), 2)
