from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from synco_fast.config import build_config
from synco_fast.kernels import Negatives
from synco_fast.kernels.reference import contrast
from synco_fast.methods import contrastive
from synco_fast.methods.base import Encoders, Views
from synco_fast.methods.build import build_method
from synco_fast.methods.contrastive import ContrastSettings, SlowPathMonitor
from synco_fast.methods.schedule import NegativeSchedule, note_without_synthetic
from synco_fast.models.shuffle import key_order

from ..conftest import TINY


def method(**overrides):
    return build_method(build_config(TINY, {"training.epochs": 4, **overrides}))


def views(seed=0, batch=8):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, batch, 3, 32, 32, generator=generator)
    return Views(first, second, torch.arange(batch) + 100 * seed)


def encoders(model):
    return Encoders(model.trainable, model.target)


def begin(model, batch, step=0, *, momentum=0.999, micro_batches=1):
    inputs = model.shard(batch, step=step)
    model.begin_step(inputs, encoders(model), momentum=momentum, micro_batches=micro_batches)
    return inputs


def training_step(model, batch, *, step, epoch, momentum=0.999):
    inputs = begin(model, batch, step, momentum=momentum)
    return model.loss(inputs, encoders(model), step=step, epoch=epoch)


def advance(model, optimizer, step, epoch=1, **settings):
    output = training_step(model, views(step), step=step, epoch=epoch, **settings)
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    model.after_step()
    return output


def test_every_setting_of_the_loss_is_that_of_the_configuration():
    changes = {
        "seed": 3,
        "model.dim": 24,
        "method.queue": 48,
        "method.temperature": 0.07,
        "method.symmetric": True,
        "method.mask_same_image": True,
        "method.backend": "blockwise",
        "method.warmup_epochs": 2,
        "method.cooldown_epochs": 1,
    }
    config = build_config(TINY, {"training.epochs": 4, **changes})
    schedule = NegativeSchedule(config.method.negatives(), epochs=4, warmup=2, cooldown=1)
    assert ContrastSettings.of(config) == ContrastSettings(
        48, 24, schedule, 0.07, symmetric=True, mask_same_image=True, seed=3, backend="blockwise"
    )


def test_the_seed_decides_the_weights_the_queue_the_shuffle_and_the_draws():
    one, other = method(), method(seed=1)
    assert not torch.equal(one.queue.rows, other.queue.rows)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    orders = {
        tuple(order.tolist())
        for model in (method(**{"method.symmetric": True}), method(seed=1, **{"method.symmetric": True}))
        for step in (0, 1)
        for order in model.shard(views(), step=step).orders
    }
    assert len(orders) == 8, "another order for every seed, step and direction"
    for step in (1, 70, 128):
        assert torch.equal(key_order(9, seed=3, step=step), key_order(9, seed=3, step=torch.tensor(step)))
    losses = {}
    for seed in (0, 1):
        model = method(**{"model.batch_norm_groups": 1}).eval()
        model.settings = replace(model.settings, seed=seed)
        losses[seed] = [training_step(model, views(), step=0, epoch=epoch).loss for epoch in (0, 1)]
    assert torch.allclose(losses[0][0], losses[1][0], atol=1e-6), "without synthetic negatives nothing is drawn"
    assert not torch.allclose(losses[0][1], losses[1][1], atol=1e-6)


def test_the_loss_is_that_of_the_reference():
    model = method(**{"model.batch_norm_groups": 1}).eval()
    batch = views()
    q = normalize(model.encoder(batch.first), dim=1)
    k = normalize(model.key_encoder(batch.second), dim=1)
    # Keys near those of the batch, so that some queries have nearer ones than their own, and some have none.
    noise = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    model.queue.rows[:8] = normalize(k.detach() + 0.05 * noise, dim=1)
    output = training_step(model, batch, step=5, epoch=2)
    expected = contrast(q, k, model.queue.rows, model.settings.schedule.at(2), temperature=0.2, seed=0, step=5)
    assert torch.allclose(output.loss, expected.loss.mean(), atol=1e-6)
    found = expected.statistics
    assert output.metrics["top1"] == (found.rank == 0).float().mean()
    assert output.metrics["queue_top1"] == (found.queue_rank == 0).float().mean()
    assert [int((rank == 0).sum()) for rank in (found.rank, found.queue_rank)] == [2, 3]
    assert int((found.rank == 1).sum()) == 1
    assert torch.allclose(output.metrics["similarity/hard"], found.hard.mean(), atol=1e-6)
    assert torch.allclose(output.metrics["similarity/positive"], expected.statistics.positive.mean(), atol=1e-6)
    assert torch.allclose(output.metrics["similarity/mixed"], expected.statistics.synthetic[:, 2].mean(), atol=1e-6)


def test_keys_enter_the_queue_after_the_loss_and_in_order():
    model = method()
    before = model.queue.rows.clone()
    batch = views()
    training_step(model, batch, step=0, epoch=0)
    assert torch.equal(model.queue.rows, before), "a key must not be a negative of its own query"
    model.after_step(torch.tensor(False))
    assert torch.equal(model.queue.rows, before), "nor be kept where the step was skipped"
    training_step(model, batch, step=0, epoch=0)
    model.after_step()
    assert int(model.queue.pointer) == 8
    assert torch.equal(model.queue.image_ids[:8], batch.image_ids)
    assert torch.equal(model.queue.rows[8:], before[8:])
    assert torch.allclose(model.queue.rows[:8].norm(dim=1), torch.ones(8))
    model.after_step()
    assert int(model.queue.pointer) == 8, "keys are written once"


def keys_of(model, batch, step=3):
    begin(model, batch, step)
    return model._keys[0][0]


def test_the_key_batch_is_shuffled_and_put_back():
    """Without batch statistics the shuffle must be invisible; with them it must change what a key is."""
    model = method(**{"model.batch_norm_groups": 1})
    batch = views()
    model.key_encoder.eval()
    assert torch.allclose(keys_of(model, batch), normalize(model.key_encoder(batch.second), dim=1), atol=1e-6)
    split = method(**{"model.batch_norm_groups": 4})
    assert not torch.allclose(keys_of(split, batch), normalize(split.key_encoder(batch.second), dim=1), atol=1e-4)


def test_the_gradient_reaches_the_query_encoder_alone():
    model = method()
    training_step(model, views(), step=0, epoch=1).loss.backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert all(parameter.grad is None for parameter in model.key_encoder.parameters())
    assert model.queue.rows.grad is None
    assert not model.recent(1).queries.requires_grad, "what monitors look at keeps no graph alive"


def test_monitors_see_the_last_step_of_an_epoch_of_its_kind():
    model = method(**{"method.name": "moco", "method.queue": 256})
    training_step(model, views(1), step=0, epoch=0)
    assert model.recent(0).hard == 256 // 64, "the published proportion where a method has none of its own"
    model = method()
    assert model.recent(0) is None
    for number, epoch in ((1, 0), (2, 1), (3, 2)):
        training_step(model, views(number), step=number, epoch=epoch)
        assert torch.equal(model.recent(epoch).query_ids, views(number).image_ids)
    assert model.recent(1).hard == model.settings.schedule.negatives.hard


def test_the_key_encoder_follows_by_its_momentum():
    model = method()
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=0.5)
    old = [parameter.clone() for parameter in model.key_encoder.parameters()]
    advance(model, optimizer, 0, momentum=0.75)
    assert all(torch.equal(a, b) for a, b in zip(old, model.key_encoder.parameters(), strict=True))
    leader = [parameter.clone() for parameter in model.encoder.parameters()]
    advance(model, optimizer, 1, momentum=0.75)
    for now, before, query in zip(model.key_encoder.parameters(), old, leader, strict=True):
        assert torch.allclose(now, 0.75 * before + 0.25 * query, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"method.name": "moco"}, Negatives.moco()),
        ({"method.name": "mochi"}, Negatives.mochi()),
        ({"method.name": "synco"}, Negatives.synco()),
        ({"method.name": "mochi", "method.hard": 64, "method.mixed": 8}, Negatives.mochi(64, 8, 256)),
        ({"method.name": "synco", "method.noisy": 0}, Negatives.synco(noisy=0)),
        ({"method.extrapolation": "paper"}, Negatives.synco(extrapolation="paper")),
        ({"method.delta": 0, "method.eta": 0.0, "method.sigma": 0.1}, Negatives.synco(sigma=0.1, delta=0.0, eta=0.0)),
        ({"method.name": "mochi", "method.count_scale": 0.25}, Negatives.mochi(256, 128, 64)),
        ({"method.count_scale": 0.0, "method.hard": 64}, Negatives.moco()),
    ],
)
def test_three_methods_are_one_loss_with_three_settings(overrides, expected):
    assert build_config({}, overrides).method.negatives() == expected


def test_warm_up_and_cool_down():
    negatives = Negatives.synco()
    schedule = NegativeSchedule(negatives, epochs=10, warmup=3, cooldown=2)
    assert [schedule.at(epoch).synthetic > 0 for epoch in range(10)] == [False] * 3 + [True] * 5 + [False] * 2
    assert schedule.at(0).hard == negatives.hard, "hardness is measured all the same"
    assert [schedule.graph_key(epoch) for epoch in range(10)] == [0] * 3 + [3] * 5 + [0] * 2
    model = method()
    assert torch.isnan(training_step(model, views(), step=0, epoch=0).metrics["similarity/mixed"])
    assert torch.isfinite(training_step(model, views(), step=1, epoch=1).metrics["similarity/mixed"])


@pytest.mark.parametrize(
    ("changes", "begun", "says"),
    [
        ({"training.epochs": 4, "method.warmup_epochs": 3}, None, None),
        ({"training.epochs": 4, "method.warmup_epochs": 4}, None, "whole run of 4 epochs (method.warmup_epochs=4), so"),
        ({"training.epochs": 1}, None, "whole run of 1 epoch (method.warmup_epochs=1), so"),
        (
            {"training.epochs": 4, "method.cooldown_epochs": 3},
            None,
            "(method.warmup_epochs=1 and method.cooldown_epochs=3), so",
        ),
        ({"training.epochs": 4}, 1, "whole run of 1 epoch that training.max_steps leaves (method.warmup_epochs=1), so"),
        ({"training.epochs": 4}, 2, None),
        ({"training.epochs": 4}, 0, None),
        ({"training.epochs": 1, "method.name": "moco"}, None, None),
        ({"training.epochs": 1, "method.name": "simclr"}, None, None),
        ({"training.epochs": 1, "method.count_scale": 0}, None, None),
        ({"training.epochs": 1, "method.name": "mochi"}, None, "mochi: no synthetic negatives in the whole run of 1"),
    ],
)
def test_a_run_that_never_reaches_its_synthetic_negatives_says_so(changes, begun, says):
    found = note_without_synthetic(build_config(TINY, changes), begun)
    assert (found is None) if says is None else (says in found)


def test_synthetic_negatives_raise_the_loss():
    """They are further terms of the same sum, so with the same encoders the loss can only grow."""
    moco, synco = (method(**{"method.name": name}) for name in ("moco", "synco"))
    assert all(torch.equal(a, b) for a, b in zip(moco.parameters(), synco.parameters(), strict=True))
    plain, harder = (training_step(model, views(), step=0, epoch=1).loss for model in (moco, synco))
    assert harder > plain + 0.1


def test_the_symmetric_loss_is_the_mean_of_both_directions():
    batch = views()
    symmetric = method(**{"method.symmetric": True, "model.batch_norm_groups": 1}).eval()
    inputs, encode = begin(symmetric, batch), encoders(symmetric)
    there, back = (symmetric._direction(inputs, encode, way, 0, 1).loss for way in (0, 1))
    one_way = training_step(method(**{"model.batch_norm_groups": 1}).eval(), batch, step=0, epoch=1)
    assert torch.allclose(there.mean(), one_way.loss, atol=1e-6)
    whole = symmetric.loss(inputs, encode, step=0, epoch=1)
    assert torch.allclose(whole.loss, torch.cat([there, back]).mean(), atol=1e-6)
    swapped = Views(batch.second, batch.first, batch.image_ids)
    other_way = training_step(method(**{"model.batch_norm_groups": 1}).eval(), swapped, step=0, epoch=0)
    assert torch.allclose(symmetric._direction(inputs, encode, 1, 0, 0).loss.mean(), other_way.loss, atol=1e-6)
    hard = [run.metrics["similarity/hard"] for run in (one_way, other_way)]
    assert torch.allclose(whole.metrics["similarity/hard"], sum(hard) / 2, atol=1e-6)
    assert not torch.allclose(*hard, atol=1e-4)
    symmetric.after_step()
    assert int(symmetric.queue.pointer) == 16
    assert symmetric.figures({}, 100)[0] == {"queue_age": 32 / 16}, "a queue of 32, and 16 keys a step"
    assert torch.equal(symmetric.queue.image_ids[:16], batch.image_ids.repeat(2))


def test_directions_draw_different_negatives():
    """With both views the same, nothing but the draws tells one direction from the other."""
    model = method(**{"model.batch_norm_groups": 1, "method.symmetric": True}).eval()
    batch = views()
    inputs, encode = begin(model, Views(batch.first, batch.first, batch.image_ids)), encoders(model)
    one, other = (model._direction(inputs, encode, way, 0, 1).loss for way in (0, 1))
    assert not torch.allclose(one, other, atol=1e-6)
    without = [model._direction(inputs, encode, way, 0, 0).loss for way in (0, 1)]
    assert torch.allclose(*without, atol=1e-5)


def test_micro_batches_are_the_batch():
    """Accumulation changes neither the loss nor the gradient nor the keys, where a group is not cut."""
    batch = views()
    whole, parts = (method(**{"model.batch_norm_groups": groups, "method.mask_same_image": True}) for groups in (4, 2))
    for model in (whole, parts):
        model.queue.image_ids[:8] = batch.image_ids
    training_step(whole, batch, step=2, epoch=1).loss.backward()
    inputs, encode = begin(parts, batch, 2, micro_batches=2), encoders(parts)
    for part in range(2):
        (parts.loss(inputs, encode, step=2, epoch=1, micro_batch=part, micro_batches=2).loss / 2).backward()
    assert torch.allclose(whole._keys[0][0], parts._keys[0][0], atol=1e-6)
    for one, other in zip(whole.encoder.parameters(), parts.encoder.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_the_mask_takes_out_keys_of_the_same_image():
    batch = views()
    masked, plain = (
        method(**{"method.mask_same_image": mask, "model.batch_norm_groups": 1}).eval() for mask in (True, False)
    )
    for model in (masked, plain):
        training_step(model, batch, step=0, epoch=0)
        model.after_step()
    again = [training_step(model, batch, step=1, epoch=0).loss for model in (masked, plain)]
    assert again[0] < again[1] - 0.01
    other = [training_step(model, views(7), step=1, epoch=0).loss for model in (masked, plain)]
    assert torch.allclose(*other)


def test_the_loss_is_computed_in_float32_whatever_the_encoder(monkeypatch):
    """Under autocast the encoders return bfloat16, which would round similarities to two digits."""
    model = method(**{"model.batch_norm_groups": 1})
    seen, true = [], contrastive.synthetic_contrast

    def watched(q, k, *arguments, **named):
        seen.append((q.dtype, k.dtype, torch.is_autocast_enabled("cpu")))
        return true(q, k, *arguments, **named)

    monkeypatch.setattr(contrastive, "synthetic_contrast", watched)
    monkeypatch.setattr(model.encoder, "forward", lambda x: x.flatten(1)[:, :16].bfloat16().requires_grad_())
    monkeypatch.setattr(model.key_encoder, "forward", lambda x: x.flatten(1)[:, :16].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        training_step(model, views(), step=0, epoch=1)
    assert seen == [(torch.float32, torch.float32, False)]


def test_steps_are_repeatable():
    runs = []
    for _ in range(2):
        model = method()
        optimizer = torch.optim.SGD(model.encoder.parameters(), lr=0.1)
        runs.append([advance(model, optimizer, step).loss.item() for step in range(3)])
    assert runs[0] == runs[1]


def test_a_slow_path_that_stays_is_warned_of_once():
    monitor = SlowPathMonitor(lines=3)
    said = [monitor.look(share) for share in (1.0, 1.0, 0.2, 0.9, 0.9, 0.75, 1.0)]
    assert said[:5] == [[], [], [], [], []]
    assert said[5][0].startswith("slow path: 75% of the queries")
    assert said[6] == []


def test_the_method_reads_the_slow_path_from_the_log():
    method = build_method(build_config(TINY))
    said = [method.figures({"slow_path": 1.0}, step)[1] for step in range(6)]
    assert [len(lines) for lines in said] == [0, 0, 0, 0, 1, 0]
