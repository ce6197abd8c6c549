from __future__ import annotations

import pytest
import torch

from synco_fast.bench.stages import index_and_similarity
from synco_fast.kernels.triton import full_select as module
from synco_fast.kernels.triton.config import compact_ids, form_of, generation_of, overlap_of


def exact(similarity, hard):
    """The N largest in the order of the queue; masked keys, -inf, last, with index 0."""
    index = similarity.argsort(dim=1, descending=True, stable=True)[:, :hard].sort(dim=1).values
    masked = similarity.gather(1, index).isneginf()
    index = index.gather(1, masked.to(torch.uint8).argsort(dim=1, stable=True))
    values = similarity.gather(1, index)
    return values, index.masked_fill(values.isneginf(), 0)


def select(inputs, hard, flag=None, ids=None, every=False):
    rows, length = len(inputs.q), len(inputs.queue)
    flag = torch.ones(rows, dtype=torch.int32) if flag is None else flag
    images, queue_images, available = compact_ids(*ids) if ids else (None, None, None)
    room = torch.full((module.rows_at_once(rows, length), length), 5, dtype=torch.int32)
    packed = torch.full((rows, hard), -7)
    form = form_of(inputs.q.dtype, inputs.q.shape[1], generation_of(inputs.q.device), masked=bool(ids))
    given = (inputs.q, inputs.queue, images, queue_images, available, flag, room, packed, form, overlap_of(0), every)
    module.full_select(*given)
    index, similarity = index_and_similarity(packed)
    # As a signed word, for what a row had before.
    return similarity, index.to(torch.int32).long()


CASES = {
    "ordinary": lambda queue: queue,
    "all equal": lambda queue: queue[:1].expand(len(queue), -1).contiguous(),
    "two values": lambda queue: queue[torch.arange(len(queue)) % 2],
    "nearly equal": lambda queue: queue[:1] + (torch.arange(len(queue))[:, None] * 37 % 101) / 2.0**20,
    "zeros of both signs": lambda queue: queue * (torch.arange(len(queue))[:, None] % 97 == 0) * -1,
    "mostly negative": lambda queue: -queue.abs() * (torch.arange(len(queue))[:, None] % 50 != 0),
    "infinities": lambda queue: torch.where(torch.arange(len(queue))[:, None] % 40 == 7, queue * torch.inf, queue),
    "NaN of both signs": lambda queue: torch.where(
        torch.arange(len(queue))[:, None] % 40 == 7,
        torch.tensor([0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32)[
            torch.arange(len(queue)) % 2, None
        ],
        queue,
    ),
}


@pytest.mark.parametrize("hard", [1, 63, 700])
@pytest.mark.parametrize("case", CASES)
def test_exact(make, case, hard):
    inputs = make(2, 700, 16)
    if case == "infinities":
        inputs.q[:, 1:] = 0
    inputs = inputs._replace(queue=CASES[case](inputs.queue)).guarded()
    values, index = select(inputs, hard)
    # One column at a time, so that both sum alike.
    similarity = sum(inputs.q[:, column, None] * inputs.queue[:, column] for column in range(16))
    similarity = similarity if case != "nearly equal" else (inputs.q.double() @ inputs.queue.double().T).float()
    expected, order = exact(similarity, hard)
    if case == "nearly equal":
        torch.testing.assert_close(values, expected, rtol=0, atol=2e-7)
        return
    assert torch.equal(index, order.masked_fill(expected.isneginf(), 0) if case != "infinities" else order)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def test_only_flagged_rows_are_touched(make, monkeypatch):
    # Room for two of them.
    monkeypatch.setattr(module, "_ROOM", 2 * 4 * 300)
    inputs = make(5, 300, 16)
    flag = torch.tensor([0, 3, 0, 0, 1], dtype=torch.int32)
    assert module.rows_at_once(5, 300) == 2
    values, index = select(inputs, 20, flag)
    expected, order = exact(inputs.q @ inputs.queue.T, 20)
    for row in (1, 4):
        assert torch.equal(index[row], order[row])
        assert torch.equal(values[row], expected[row])
    assert index[[0, 2, 3]].eq(-7).all()
    assert values[[0, 2, 3]].isnan().all()


@pytest.mark.parametrize(("masked", "every"), [(False, False), (True, False), (True, True)])
def test_more_rows_than_there_is_room_for(make, monkeypatch, masked, every):
    # Over two blocks of rows where few are flagged; whole numbers, so that every way of adding up gives the same.
    monkeypatch.setattr(module, "_ROOM", 2 * 4 * 130)
    rows = 5 if every else 70
    inputs = make(rows, 130, 16)
    inputs = inputs._replace(q=(inputs.q * 16).round(), queue=(inputs.queue * 16).round()).guarded()
    flag = torch.zeros(rows, dtype=torch.int32)
    flag[torch.arange(5) if every else [3, 20, 63, 64, 69]] = 1
    image_ids, queue_ids = torch.arange(rows), torch.arange(130) // 2 + 3
    values, index = select(inputs, 20, flag, (image_ids, queue_ids) if masked else None, every)
    similarity = inputs.q @ inputs.queue.T
    if masked:
        similarity = similarity.masked_fill(image_ids[:, None] == queue_ids, -torch.inf)
    expected, order = exact(similarity, 20)
    assert torch.equal(index[flag == 1], order[flag == 1])
    assert torch.equal(values[flag == 1], expected[flag == 1])
    assert index[flag == 0].eq(-7).all()


def test_masked_rows_with_fewer_keys_than_wanted(make):
    inputs = make(3, 300, 16)
    image_ids, queue_ids = torch.tensor([5, 6, 7]), torch.full((300,), 5)
    queue_ids[::50] = 6
    values, index = select(inputs, 20, ids=(image_ids, queue_ids))
    similarity = (inputs.q @ inputs.queue.T).masked_fill(image_ids[:, None] == queue_ids, -torch.inf)
    expected, order = exact(similarity, 20)
    assert torch.equal(index, order)
    assert torch.equal(values, expected)
    assert expected.isneginf().sum(dim=1).tolist() == [14, 0, 0]


def test_room():
    assert module.rows_at_once(256, 65536) == 128
    assert module.rows_at_once(64, 65536) == 64
    assert module.rows_at_once(1000, 1 << 18) == 32
    assert module.rows_at_once(1000, 1 << 29) == 1
    assert module.rows_at_once(7, 100) == 7
