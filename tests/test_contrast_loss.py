import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import normalize

from synco_fast import SynthContrastLoss
from synco_fast.kernels import Negatives, synthetic_contrast
from synco_fast.runtime.errors import ConfigError

SMALL = Negatives.synco(16, interpolated=4, extrapolated=4, mixed=4, noisy=2, perturbed=2, adversarial=2)


def embeddings(seed: int = 0, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=generator), torch.randn(rows, 8, generator=generator)


@pytest.mark.parametrize("negatives", [Negatives.moco(), Negatives.mochi(16, 4, 4), SMALL])
def test_it_is_the_head_over_its_own_queue(negatives):
    loss = SynthContrastLoss(negatives, dim=8, queue=32, temperature=0.3, seed=5)
    for step in range(3):
        q, k = embeddings(step)
        q.requires_grad_()
        rows = loss.queue.rows.clone()
        expected = synthetic_contrast(
            normalize(q, dim=1), normalize(k, dim=1), rows, negatives, temperature=0.3, seed=5, step=step
        ).loss.mean()
        found = loss(q, k)
        assert torch.equal(found, expected)
        assert torch.equal(*(torch.autograd.grad(part, q)[0] for part in (found, expected)))
        assert torch.equal(loss.queue.rows[step * 6 : step * 6 + 6], normalize(k, dim=1))
    assert int(loss.step) == 3


def test_the_reference_form_gives_the_same_gradient_though_the_keys_have_entered():
    gradients = []
    for backend in ("auto", "reference"):
        loss = SynthContrastLoss(SMALL, dim=8, queue=32, backend=backend)
        q, k = embeddings()
        loss(q.requires_grad_(), k).backward()
        gradients.append(q.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_only_the_query_learns_and_evaluation_leaves_no_trace():
    loss = SynthContrastLoss(SMALL, dim=8, queue=32)
    q, k = embeddings()
    loss(q.requires_grad_(), k.requires_grad_()).backward()
    assert k.grad is None
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.eval()(q, k)
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())
    assert loss.statistics.positive.shape == (6,)


def test_it_goes_on_from_its_state():
    one = SynthContrastLoss(SMALL, dim=8, queue=32)
    one(*embeddings(0))
    other = SynthContrastLoss(SMALL, dim=8, queue=32)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(*embeddings(1)), other(*embeddings(1)))


def test_it_loads_a_state_with_the_older_name_of_a_tensor():
    one, other = (SynthContrastLoss(SMALL, dim=8, queue=32) for _ in range(2))
    one(*embeddings(0), torch.arange(6))
    state = one.state_dict()
    state["queue.images"] = state.pop("queue.image_ids")
    other.load_state_dict(state)
    assert torch.equal(other.queue.image_ids, one.queue.image_ids)
    assert "queue.images" in state, "what was given is not changed"


def test_keys_of_the_same_image_are_masked():
    loss = SynthContrastLoss("moco", dim=8, queue=6)
    q, k = embeddings()
    images = torch.arange(6)
    loss(q, k, images)
    masked, unmasked = loss.eval()(q, k, images), loss(q, k)
    assert masked < unmasked


def test_bad_settings():
    with pytest.raises(ValueError, match="method: found 'simclr', expected moco"):
        SynthContrastLoss("simclr")
    with pytest.raises(ValueError, match="queue: found 64, expected 1024 or more"):
        SynthContrastLoss("synco", queue=64)
    loss = SynthContrastLoss("moco", dim=8, queue=4)
    with pytest.raises(ConfigError, match="found 4, expected 6"):
        loss(*embeddings())


def _rank(rank: int, store: str, found) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    loss = SynthContrastLoss(SMALL, dim=8, queue=32)
    q, k = embeddings()
    value = loss(q[rank * 3 : rank * 3 + 3], k[rank * 3 : rank * 3 + 3])
    found.put((rank, value.item(), loss.queue.rows.tolist()))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one_batch(tmp_path):
    context = mp.get_context("spawn")
    found = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(rank, str(tmp_path / "store"), found)) for rank in (0, 1)]
    for process in processes:
        process.start()
    results = sorted(found.get() for _ in processes)
    for process in processes:
        process.join()
    whole = SynthContrastLoss(SMALL, dim=8, queue=32)
    value = whole(*embeddings())
    assert sum(result[1] for result in results) / 2 == pytest.approx(value.item(), rel=1e-5)
    for result in results:
        assert torch.allclose(torch.tensor(result[2]), whole.queue.rows)
