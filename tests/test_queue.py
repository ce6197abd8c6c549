import pytest
import torch
from torch.nn.functional import normalize

from synco_fast.loss import SynthContrastLoss
from synco_fast.models.queue import KeyQueue
from synco_fast.runtime.errors import ConfigError


def test_it_starts_with_unit_rows_of_its_seed():
    queue = KeyQueue(50, 8, seed=1)
    assert torch.allclose(queue.rows.norm(dim=1), torch.ones(50))
    assert torch.equal(queue.rows, KeyQueue(50, 8, seed=1).rows)
    assert not torch.equal(queue.rows, KeyQueue(50, 8, seed=2).rows)
    assert (queue.image_ids == -1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_its_rows_do_not_depend_on_the_default_dtype(dtype, request):
    expected = KeyQueue(50, 8, seed=1)
    assert expected.rows[0, :3].tolist() == pytest.approx([-0.4864, -0.2392, -0.2085], abs=1e-4)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(dtype)
    assert all(torch.equal(*pair) for pair in zip(expected.buffers(), KeyQueue(50, 8, seed=1).buffers(), strict=True))


def test_it_is_made_on_the_default_device(monkeypatch):
    """Lightning's and Accelerate's way on a GPU, where PyTorch refuses to draw with the CPU's generator."""
    draw, drawn = torch.randn, []
    monkeypatch.setattr(torch, "randn", lambda *size, **words: drawn.append(draw(*size, **words)) or drawn[-1])
    with torch.device("meta"):
        made = [KeyQueue(50, 8), SynthContrastLoss("moco", dim=8, queue=50)]
    assert [value.device.type for value in drawn] == ["cpu", "cpu"]
    assert {value.device.type for module in made for value in module.buffers()} == {"meta"}
    assert {name: value.dtype for name, value in made[0].named_buffers()} == {
        "rows": torch.float32,
        "image_ids": torch.int64,
        "pointer": torch.int64,
    }


def test_first_in_first_out_with_wrapping():
    queue = KeyQueue(7, 4)
    written = []
    for step in range(6):
        keys, images = normalize(torch.randn(3, 4), dim=1), torch.arange(3) + 10 * step
        queue.enqueue(keys, images)
        written += zip(keys, images.tolist(), strict=True)
        newest = written[-7:]
        place = (int(queue.pointer) - len(newest)) % 7
        for offset, (key, image) in enumerate(newest):
            assert torch.equal(queue.rows[(place + offset) % 7], key)
            assert int(queue.image_ids[(place + offset) % 7]) == image
    assert int(queue.pointer) == 18 % 7


def test_a_batch_may_fill_it_but_not_more():
    queue = KeyQueue(4, 4)
    keys = normalize(torch.randn(4, 4), dim=1)
    queue.enqueue(keys, torch.arange(4))
    assert torch.equal(queue.rows, keys)
    with pytest.raises(ConfigError, match=r"method\.queue: found 4, expected 5 or more"):
        queue.enqueue(torch.randn(5, 4), torch.arange(5))


def test_rows_and_pointer_are_part_of_the_state():
    queue, other = KeyQueue(6, 4), KeyQueue(6, 4, seed=9)
    queue.enqueue(normalize(torch.randn(4, 4), dim=1), torch.arange(4))
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.rows, queue.rows)
    assert int(other.pointer) == 4


def test_an_enqueue_that_is_not_accepted_changes_nothing():
    queue = KeyQueue(6, 4)
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    bad = torch.full((4, 4), torch.nan)
    queue.enqueue(bad, torch.arange(4), torch.tensor(False))
    assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())
    good = normalize(torch.randn(4, 4), dim=1)
    queue.enqueue(good, torch.arange(4), torch.tensor(True))
    assert torch.equal(queue.rows[:4], good)
    assert int(queue.pointer) == 4
