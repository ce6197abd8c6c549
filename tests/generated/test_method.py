"""The adversarial update: signs, floor, what learns and what does not."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from synco_fast.config import build_config
from synco_fast.generated.adversarial import AdversarialOptimizer
from synco_fast.generated.adversarial_update import pairs_objective
from synco_fast.generated.method import GENERATED, Generated
from synco_fast.kernels.reference import contrast
from synco_fast.methods.base import Encoders, RunInfo, Views
from synco_fast.methods.build import build_method
from synco_fast.methods.contrastive import MomentumContrast
from synco_fast.runtime.errors import ConfigError

from ..conftest import TINY

CPU = torch.device("cpu")
SMALL = {
    "method.name": "moco",
    "generated.pair": "joint",
    "generated.latent": 8,
    "generated.width": 4,
    "generated.batch": 6,
    "training.epochs": 4,
}


class Real:
    """In the place of the real images."""

    def take(self, numbers):
        return (numbers[:, None, None, None] * torch.ones(3, 32, 32, dtype=torch.int64) % 256).to(torch.uint8)


def config(**changes):
    return build_config(TINY, {**SMALL, **changes})


def method(**changes):
    built = build_method(config(**changes)).train()
    assert isinstance(built, Generated)
    return built


def encoders(model):
    """The engine puts pixels in [0, 255] through normalisation; here the scale alone is taken out."""
    return Encoders(lambda x: model.trainable(x / 64 - 2), lambda x: model.target(x / 64 - 2))


def views(seed=0, batch=8):
    first, second = torch.rand(2, batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 255
    return Views(first, second, torch.arange(batch) + 100 * seed)


def begin(model, seed=0, step=0):
    torch.manual_seed(seed)
    inputs = model.shard(views(), step=step)
    model.begin_step(inputs, encoders(model), momentum=0.999)
    return inputs


def generator_batch(model, inputs, epoch=1):
    torch.manual_seed(11)
    return model.generator_batch(model.latents(CPU), inputs, encoders(model), step=0, epoch=epoch)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before, module):
    return all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("base", ["moco", "mochi", "synco"])
def test_a_generators_step_raises_the_loss_on_fixed_noise_and_an_encoders_step_lowers_it(base):
    model = method(**{"method.name": base})
    inputs = begin(model)
    before = generator_batch(model, inputs)
    optimizer = AdversarialOptimizer(model.generators.parameters(), lr=1e-3, betas=(0.0, 0.99), device=CPU)
    objective = pairs_objective(before.loss, before.similarity, hardness=1.0, floor=-1.0, floor_weight=0.0)
    optimizer.learn(objective)
    assert generator_batch(model, inputs).loss.mean() > before.loss.mean() + 1e-3

    output = model.loss(inputs, encoders(model), step=0, epoch=1)
    output.loss.backward()
    torch.optim.SGD(model.encoder.parameters(), lr=0.02).step()
    after = model.loss(inputs, encoders(model), step=0, epoch=1)
    assert after.metrics["generated/loss"] < output.metrics["generated/loss"] - 1e-3


def seeing():
    """With an encoder that tells images apart, which a random network hardly does: their pixels, turned at random."""
    model = method(**{"augment.area": [1.0, 1.0]})
    turn = torch.randn(3 * 8 * 8, 16, generator=torch.Generator().manual_seed(0))

    def embed(x):
        small = torch.nn.functional.avg_pool2d(x / 128 - 1, 4).flatten(1)
        return small @ turn

    return model, Encoders(embed, embed)


def similarities(model, encode, *, floor, floor_weight, steps=60):
    inputs = begin(model)
    optimizer = AdversarialOptimizer(model.generators.parameters(), lr=1e-3, betas=(0.0, 0.99), device=CPU)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        pair = model.generator_batch(model.latents(CPU), inputs, encode, step=step, epoch=0)
        found.append(float(pair.similarity.detach().mean()))
        added = pairs_objective(pair.loss, pair.similarity, hardness=1.0, floor=floor, floor_weight=floor_weight)
        optimizer.learn(added)
    return found


def test_generators_that_are_the_same_would_stay_the_same():
    model, encode = seeing()
    model.generators[1].load_state_dict(model.generators[0].state_dict())
    assert similarities(model, encode, floor=-1.0, floor_weight=0.0, steps=10)[-1] == pytest.approx(1.0, abs=1e-5)
    before = state(model.generators[0])
    model.break_symmetry(0)
    assert same(before, model.generators[0])
    images = model.generate(model.latents(CPU))
    assert 1e-5 < (images[0] - images[1]).abs().mean() < 0.05


def test_the_objective_below_the_floor():
    similarity = torch.tensor([0.9, 0.3], requires_grad=True)
    loss = torch.tensor([1.0, 5.0], requires_grad=True)
    value = pairs_objective(loss, similarity, hardness=0.5, floor=0.5, floor_weight=2.0)
    assert value.item() == pytest.approx(2 * 0.2 / 2 - 0.5 * 1.0 / 2)
    on_loss, on_similarity = torch.autograd.grad(value, (loss, similarity))
    assert on_loss.tolist() == [-0.25, 0.0], "what is below the floor is made no harder"
    assert on_similarity.tolist() == [0.0, -1.0], "and pushed together"


def test_the_update_parts_the_pair_and_the_floor_holds():
    """From the same start: without a floor the pair comes apart, with one it stays near it."""
    free, held = seeing(), seeing()
    for model, _ in (free, held):
        model.break_symmetry(0)
    apart = similarities(*free, floor=-1.0, floor_weight=0.0)
    near = similarities(*held, floor=0.8, floor_weight=50.0)
    assert apart[0] == near[0] > 0.98
    assert sum(apart[-20:]) / 20 < 0.3
    assert sum(near[-20:]) / 20 > 0.8, "a step may go over the edge, the next ones come back"


def test_the_encoders_step_reaches_the_query_encoder_alone():
    model = method()
    before = state(model.generators), state(model.discriminator)
    inputs = begin(model)
    model.loss(inputs, encoders(model), step=0, epoch=1).loss.backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    for part in (model.key_encoder, model.generators, model.discriminator):
        assert all(parameter.grad is None for parameter in part.parameters())
    assert same(before[0], model.generators)
    assert same(before[1], model.discriminator)


def with_images(**changes):
    model = method(**changes)
    model.prepare(RunInfo(CPU, steps_per_epoch=4))
    model.images = Real()
    return model


def extra_step(model, inputs):
    return model.extra_step(inputs, encoders(model), step=3, epoch=1, step_ok=torch.tensor(True))


def test_the_generators_step_moves_nothing_of_the_encoder():
    model = with_images()
    inputs = begin(model)
    before = {name: state(model.get_submodule(name)) for name in ("encoder", "key_encoder", "queue")}
    old = state(model.generators), state(model.discriminator)
    step_ok, figures = extra_step(model, inputs)
    assert step_ok
    for name, values in before.items():
        assert same(values, model.get_submodule(name)), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not same(old[0], model.generators)
    assert not same(old[1], model.discriminator)
    assert model.encoder.training
    assert {"similarity/pair", "generator/loss", "discriminator/loss", "generator/contrastive"} <= figures.keys()


def test_the_discriminators_loss_does_not_reach_the_generators():
    model = with_images()
    old = state(model.generators)
    model.adversarial_update.discriminator_trainer.learn(
        Real().take(torch.arange(6)), model.generate(model.latents(CPU))[0], 0
    )
    assert same(old, model.generators)
    assert all(parameter.grad is None for parameter in model.generators.parameters())


def test_hardness_rises_from_nothing():
    update = with_images(**{"generated.ramp_epochs": 2, "generated.hardness": 0.4}).adversarial_update
    assert [round(update.hardness(step), 3) for step in (0, 4, 8, 100)] == [0.0, 0.2, 0.4, 0.4]


def test_frozen_generators_stay_as_they_are():
    model = with_images(**{"generated.pair": "frozen"})
    old = state(model.generators), state(model.discriminator)
    step_ok, figures = extra_step(model, begin(model))
    assert step_ok
    assert not figures
    assert same(old[0], model.generators)
    assert same(old[1], model.discriminator)


def test_running_statistics_are_those_of_real_images():
    model = method()
    plain = build_method(config(**{"generated.pair": "none"})).train()
    for each in (model, plain):
        each.loss(begin(each), encoders(each), step=0, epoch=1)
    for name, value in plain.named_buffers():
        if "running" in name:
            assert torch.allclose(value, model.get_buffer(name), atol=1e-6), name


def test_without_pairs_it_is_momentum_contrast():
    none = build_method(config(**{"generated.pair": "none", "method.name": "synco"}))
    assert type(none) is MomentumContrast
    synco = build_method(build_config(TINY, {"training.epochs": 4}))
    assert none.settings == synco.settings
    assert all(torch.equal(a, b) for a, b in zip(none.parameters(), synco.parameters(), strict=True))
    joint = build_method(config(**{"method.name": "synco"}))
    assert all(torch.equal(a, b) for a, b in zip(none.encoder.parameters(), joint.encoder.parameters(), strict=True))
    assert config().method.negatives().synthetic == 0


def test_the_loss_is_the_sum_of_both_and_that_of_the_reference():
    model = method(**{"method.name": "synco", "generated.weight": 0.25})
    inputs = begin(model)
    keys, queries = model._generated_keys, model._views
    encode = encoders(model)
    output = model.loss(inputs, encode, step=2, epoch=1)
    generated = output.metrics["generated/loss"]
    assert torch.allclose(output.loss, output.metrics["loss"] + 0.25 * generated, atol=1e-6)
    q = normalize(encode.query(queries), dim=1).detach()
    rows = [(a, b) for a in (0, 1) for b in (0, 1)]
    expected = contrast(
        torch.cat([q.view(2, 6, -1)[a] for a, _ in rows]),
        torch.cat([keys.view(2, 6, -1)[b] for _, b in rows]),
        model.queue.rows,
        model.settings.schedule.at(1),
        temperature=0.2,
        seed=0,
        step=2,
        first_row=8,
    )
    assert torch.allclose(generated, expected.loss.mean(), atol=1e-4)


def test_real_and_generated_keys_enter_the_queue():
    model = method()
    inputs = begin(model)
    keys = model._generated_keys
    model.after_step()
    assert int(model.queue.pointer) == 8 + 6
    assert torch.equal(model.queue.image_ids[:8], inputs.image_ids)
    assert (model.queue.image_ids[8:14] == GENERATED).all()
    assert torch.equal(model.queue.rows[8:14], keys[:6])
    assert torch.allclose(keys.norm(dim=1), torch.ones(12), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"augment.size": 48, "augment.evaluation_resize": 48}, "augment.size: found 48, expected 32 or 64"),
        ({"training.accumulate": 2}, "training.accumulate: found 2, expected 1 with generated pairs"),
        ({"training.engine": "graph"}, "training.engine: found graph, expected auto or eager with generated pairs"),
        ({"generated.batch": 25}, "method.queue: found 32, expected 33 or more"),
        ({"generated.pair": "both"}, "generated.pair: found 'both', expected 'joint', 'frozen' or 'none'"),
    ],
)
def test_what_cannot_work_is_named(changes, says):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert says in str(caught.value)
    with pytest.raises(ConfigError, match="processes: found 2, expected 1"):
        method().prepare(RunInfo(CPU, steps_per_epoch=4, processes=2))
