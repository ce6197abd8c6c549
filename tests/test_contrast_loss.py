import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from synco_fast import SynthContrastLoss
from synco_fast.kernels import Negatives, synthetic_contrast

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


@pytest.mark.parametrize("negatives", [Negatives.moco(), SMALL])
def test_a_symmetric_step_contrasts_both_directions_with_the_same_queue(negatives):
    loss = SynthContrastLoss(negatives, dim=8, queue=32, temperature=0.3, seed=5)
    rows = loss.queue.rows.clone()
    (q1, k2), (q2, k1) = embeddings(0), embeddings(1)
    found = loss(q1.requires_grad_(), k2, swapped=(q2.requires_grad_(), k1))
    directions = [
        synthetic_contrast(
            normalize(q, dim=1), normalize(k, dim=1), rows, negatives, temperature=0.3, seed=5, step=0, first_row=first
        )
        for first, (q, k) in ((0, (q1, k2)), (6, (q2, k1)))
    ]
    expected = sum(contrast.loss.mean() for contrast in directions) / 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(part, (q1, q2)) for part in (found, expected)))
    assert torch.equal(loss.statistics.rank, torch.cat([part.statistics.rank for part in directions]))
    assert torch.equal(loss.queue.rows[:12], normalize(torch.cat([k2, k1]), dim=1))
    assert int(loss.step) == 1


def test_two_calls_in_one_step_are_remarked_once():
    loss = SynthContrastLoss("moco", dim=8, queue=32)
    (q1, k2), (q2, k1) = embeddings(0), embeddings(1)
    q1.requires_grad_(), q2.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            loss(q1, k2).backward()
            (loss(q1, k2, torch.arange(6)) + loss(q2, k1, torch.arange(6))).backward()
            loss(q1.detach(), k2)
    loss(q1, k2)
    with pytest.warns(UserWarning, match="found a second call before the backward pass of the first") as said:
        loss(q2, k1)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(q2, k1)


def test_only_the_query_learns_and_evaluation_leaves_no_trace():
    loss = SynthContrastLoss(SMALL, dim=8, queue=32)
    q, k = embeddings()
    loss(q.requires_grad_(), k.requires_grad_()).backward()
    assert k.grad is None
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.eval()(q, k)
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())
    assert loss.statistics.positive.shape == (6,)


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_nothing_enters_where_no_gradient_is_taken(quiet):
    loss = SynthContrastLoss(SMALL, dim=8, queue=32)
    before = copy.deepcopy(loss.state_dict())
    with quiet():
        value = loss(*embeddings())
    assert value.isfinite()
    assert all(torch.equal(before[name], tensor) for name, tensor in loss.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_key_that_is_not_finite_adds_none(value):
    loss = SynthContrastLoss(SMALL, dim=8, queue=32)
    loss(*embeddings(0))
    rows, pointer = loss.queue.rows.clone(), int(loss.queue.pointer)
    q, k = embeddings(1)
    k[2, 3] = value
    assert loss(q, k).isnan()
    assert torch.equal(loss.queue.rows, rows)
    assert int(loss.queue.pointer) == pointer == 6
    assert int(loss.step) == 2
    assert loss(*embeddings(2)).isfinite()
    assert torch.equal(loss.queue.rows[6:12], normalize(embeddings(2)[1], dim=1))


def test_it_goes_on_from_its_state():
    one = SynthContrastLoss(SMALL, dim=8, queue=32)
    one(*embeddings(0))
    other = torch.nn.ModuleDict({"criterion": SynthContrastLoss(SMALL, dim=8, queue=32)})
    file = io.BytesIO()
    torch.save(torch.nn.ModuleDict({"criterion": one}).state_dict(), file)
    file.seek(0)
    # An exchange of the negatives is the loop's schedule, and no other module.
    other["criterion"].negatives = Negatives.moco()
    other.load_state_dict(torch.load(file, weights_only=True))
    other["criterion"].negatives = SMALL
    assert torch.equal(one(*embeddings(1)), other["criterion"](*embeddings(1)))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 6, "temperature": 0.5}, "found temperature 0.2, seed 5 in the state, expected temperature 0.5, seed"),
        ({"method": Negatives.moco()}, "found hard 16, interpolated 4, extrapolated 4, mixed 4, noisy 2"),
        ({"method": Negatives.synco(16, sigma=1.0)}, "found interpolated 4"),
        ({"queue": 64}, "found queue 32 in the state, expected queue 64"),
        ({"dim": 16}, "found dim 8 in the state, expected dim 16"),
    ],
)
def test_a_state_of_other_settings_is_refused_in_one_line(change, line):
    one = SynthContrastLoss(SMALL, dim=8, queue=32, temperature=0.2, seed=5)
    one(*embeddings())
    other = SynthContrastLoss(**{"method": SMALL, "dim": 8, "queue": 32, "temperature": 0.2, "seed": 5} | change)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=f"^settings: {line}") as caught:
        other.load_state_dict(one.state_dict())
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("damaged", [torch.arange(3, dtype=torch.uint8), {"seed": 5}, torch.tensor([91, 49, 93])])
def test_damaged_settings_are_refused_in_one_line(damaged):
    loss = SynthContrastLoss(SMALL, dim=8, queue=32)
    with pytest.raises(ValueError, match=r"^settings: found _extra_state that cannot be read, expected"):
        loss.load_state_dict(loss.state_dict() | {"_extra_state": damaged})


def test_a_state_without_settings_is_loaded_with_a_remark():
    one, other = (SynthContrastLoss(SMALL, dim=8, queue=32, seed=seed) for seed in (0, 1))
    state = one.state_dict()
    del state["_extra_state"]
    with pytest.warns(UserWarning, match="found a state without settings: they are not compared"):
        other.load_state_dict(state)
    assert torch.equal(other.queue.rows, one.queue.rows)
    assert other.seed == 1


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


def test_rows_without_an_image_are_masked_by_nothing():
    loss = SynthContrastLoss(SMALL, dim=8, queue=32).eval()
    q, k = embeddings()
    assert torch.equal(loss(q, k, torch.full((6,), -1)), loss(q, k))
    loss.queue.image_ids[:] = 4
    some = loss(q, k, torch.tensor([-1, 4, -1, 4, -1, -1]))
    assert 0 < some < loss(q, k)


@pytest.mark.parametrize(
    ("settings", "error", "line"),
    [
        ({"method": "simclr"}, ValueError, "method: found 'simclr', expected moco"),
        ({"method": 5}, TypeError, "method: found int, expected moco"),
        ({"method": None}, TypeError, "method: found NoneType, expected moco"),
        ({"method": "synco", "queue": 64}, ValueError, "queue: found 64, expected 1024 or more"),
        ({"queue": 0}, ValueError, "queue: found 0, expected a whole number from 1 up"),
        ({"queue": 64.0}, ValueError, "queue: found 64.0, expected a whole number"),
        ({"dim": True}, ValueError, "dim: found True, expected a whole number"),
        ({"temperature": 0}, ValueError, "temperature: found 0, expected a finite number above 0"),
        ({"temperature": float("inf")}, ValueError, "temperature: found inf, expected a finite number above 0"),
        ({"temperature": True}, ValueError, "temperature: found True, expected a finite number above 0"),
        ({"seed": -1}, ValueError, "seed: found -1, expected a whole number from 0 to"),
        ({"seed": 2**32}, ValueError, "seed: found 4294967296, expected a whole number from 0 to"),
        ({"queue_dtype": "bfloat16"}, TypeError, "queue_dtype: found 'bfloat16', expected a floating-point dtype"),
        ({"queue_dtype": torch.int64}, TypeError, "queue_dtype: found torch.int64, expected a floating-point dtype"),
        ({"backend": "cuda"}, ValueError, "backend: found 'cuda', expected auto, reference, blockwise, triton"),
    ],
)
def test_bad_settings_are_found_when_it_is_made(settings, error, line):
    with pytest.raises(error, match=f"^{line}") as caught:
        SynthContrastLoss(**{"method": "moco", "dim": 8, "queue": 32} | settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "line"),
    [
        ({"query": [[1.0]]}, TypeError, "query: found list, expected a floating-point tensor"),
        ({"query": torch.ones(6, 8, dtype=torch.int64)}, TypeError, "query: found torch.int64, expected a floating"),
        ({"query": torch.ones(6, 9)}, ValueError, r"query: found shape \(6, 9\), expected \(B, 8\)"),
        ({"query": torch.ones(8)}, ValueError, r"query: found shape \(8,\), expected \(B, 8\)"),
        ({"key": torch.ones(5, 8)}, ValueError, r"key: found shape \(5, 8\), expected \(6, 8\), as query"),
        ({"key": torch.ones(6, 8, device="meta")}, TypeError, "key: found on meta, expected cpu, where the queue is"),
        ({"images": [1] * 6}, TypeError, "images: found list, expected an int64 tensor on cpu"),
        ({"images": torch.arange(6).int()}, TypeError, "images: found torch.int32 on cpu, expected an int64 tensor"),
        ({"images": torch.arange(5)}, ValueError, r"images: found shape \(5,\), expected \(6,\)"),
        ({"swapped": torch.ones(2, 6, 8)}, TypeError, "swapped: found Tensor, expected a pair of query and key"),
        ({"swapped": (torch.ones(6, 8), 3)}, TypeError, r"swapped\[1\]: found int, expected a floating-point tensor"),
        ({"swapped": embeddings(1)}, ValueError, "queue: found 8, expected 12 or more, the keys of a step"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(change, error, line):
    loss = SynthContrastLoss("moco", dim=8, queue=8)
    before = copy.deepcopy(loss.state_dict())
    query, key = embeddings()
    with pytest.raises(error, match=f"^{line}") as caught:
        loss(**{"query": query, "key": key} | change)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in loss.state_dict().items())


def test_it_is_not_called_inside_a_backward_pass():
    loss = SynthContrastLoss(SMALL, dim=8, queue=32)
    q, k = embeddings()
    value = checkpoint(loss, q.requires_grad_(), k, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"^SynthContrastLoss: found a call inside a backward pass"):
        value.backward()


COPIES = {
    "copied": copy.deepcopy,
    "pickled": lambda loss: pickle.loads(pickle.dumps(loss)),
    "compiled": lambda loss: torch.compile(loss, fullgraph=True, backend="aot_eager"),
}


@pytest.mark.parametrize("name", COPIES)
def test_what_is_made_of_it_goes_on_like_it(name):
    loss = SynthContrastLoss(SMALL, dim=8, queue=32)
    q, k = embeddings()
    loss(q.requires_grad_(), k).backward()
    plain, other = copy.deepcopy(loss), COPIES[name](loss)
    for step in range(1, 3):
        q, k = embeddings(step)
        values = [module(q.requires_grad_(), k) for module in (plain, other)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, q) for value in values))
    for one, two in zip(plain.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)


def test_autocast_and_half_precision_embeddings():
    q, k = (part.bfloat16() for part in embeddings())
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(SynthContrastLoss(SMALL, dim=8, queue=32)(q, k))
    assert torch.equal(*losses)
    assert losses[0].dtype == torch.float32


def _rank(rank: int, store: str, found) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    loss = SynthContrastLoss(SMALL, dim=8, queue=32)
    q, k = embeddings()
    value = loss(q[rank * 3 : rank * 3 + 3], k[rank * 3 : rank * 3 + 3])
    try:
        loss(q[: 3 + rank], k[: 3 + rank])
    except ValueError as error:
        said = str(error)
    found.put((rank, value.item(), loss.queue.rows.tolist(), said))
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
        assert result[3] == "query: found batches of [3, 4] rows on the ranks, expected as many on each"
