"""The parts of linear evaluation, fine-tuning and kNN, each against its definition: modes, rates, labels, confusion."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from synco_fast.config import EvaluationConfig
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.base import epoch_order
from synco_fast.data.sources.open import ArraySplit, open_source
from synco_fast.evaluation import classifier, knn, linear
from synco_fast.evaluation import features as cache
from synco_fast.evaluation.classifier import ClassifierProtocol, train_classifier
from synco_fast.evaluation.context import EvalOptions, open_context, source_of
from synco_fast.evaluation.features import Features
from synco_fast.evaluation.knn import evaluate_knn, knn_accuracy, periodic_knn
from synco_fast.evaluation.labelled import LabelledBatches, _Crops
from synco_fast.evaluation.linear import evaluate_linear_fast, sweep_heads
from synco_fast.evaluation.monitor import feature_figures
from synco_fast.export.load import read_weights
from synco_fast.runtime.optim_step import OptimStep
from synco_fast.runtime.precision import Precision

CPU = torch.device("cpu")


class Constant(nn.Module):
    """The same logits for every image; remembers its mode."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.modes = torch.tensor(logits), []

    def forward(self, images):
        self.modes.append(self.training)
        return self.logits.expand(len(images), -1)


def test_the_test_counts_in_evaluation_mode_and_true_classes_are_rows(make_run):
    context = open_context(make_run(), EvalOptions(workers=0))
    seven = SimpleNamespace(**{name: getattr(context, name) for name in context.__dataclass_fields__}, classes=7)
    # Class 0 comes first, class 2 fifth and class 1 sixth.
    model = Constant([7.0, 2.0, 3.0, 6.0, 5.0, 4.0, 1.0]).train()
    top1, top5, confusion = classifier._test(seven, model)
    assert (top1, top5) == (4 / 12, 8 / 12)
    assert [row[0] for row in confusion] == [4, 4, 4, 0, 0, 0, 0]
    assert np.sum(confusion) == 12
    assert not any(model.modes)


def test_an_epoch_trains_and_gives_the_mean_loss():
    recipe = Recipe(size=8)
    context = SimpleNamespace(device=CPU, recipe=recipe, precision=Precision("fp32", CPU))
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 2))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    model.eval()
    optim = OptimStep(torch.optim.SGD(model.parameters(), lr=0.0), scaled=False, device=CPU)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    batches = [(images, torch.tensor([0, 1, 0, 1]))] * 3
    bar = SimpleNamespace(advance=lambda: None)
    assert classifier._epoch(context, model, optim, iter(batches), bar) == pytest.approx(np.log(2))
    assert model.training
    assert int(model[0].num_batches_tracked) == 3


def test_rates_decay_and_the_best_of_a_training_are_those_of_the_protocol(make_run, tmp_path, monkeypatch):
    context = open_context(make_run(), EvalOptions(workers=0))
    seen, accuracies = [], iter([0.25, 0.75, 0.5])

    def epoch(context, model, optim, batches, bar):
        seen.append([(group["lr"], group["weight_decay"]) for group in optim.optimizer.param_groups])
        return 1.0

    monkeypatch.setattr(classifier, "_epoch", epoch)
    monkeypatch.setattr(classifier, "_test", lambda context, model: (next(accuracies), 1.0, [[1]]))
    protocol = ClassifierProtocol(
        epochs=3, batch=8, head_lr=0.5, backbone_lr=0.01, weight_decay=1e-3, drops=(0.34, 0.67)
    )
    found = train_classifier(context, list(range(33)), protocol, tmp_path / "state.pt", "probe")
    assert (found.top1, found.best) == (0.5, 0.75)
    for lines, factor in zip(seen, (1, 0.1, 0.01), strict=True):
        assert lines == [(pytest.approx(0.5 * factor), 1e-3), (pytest.approx(0.01 * factor), 1e-3)]


def test_a_frozen_backbone_has_no_gradient_and_stays_in_evaluation_mode():
    def make(frozen, seed=0):
        return classifier._Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), 4, 3, frozen, seed)

    frozen, trained = make(True).train(), make(False).train()
    assert (frozen.backbone.training, frozen.head.training, trained.backbone.training) == (False, True, True)
    for model in (frozen, trained):
        model(torch.ones(2, 3, 2, 2)).sum().backward()
        needed = {parameter.requires_grad for parameter in model.backbone.parameters()}
        assert needed == {model is trained}
        assert (model.backbone[1].weight.grad is not None) == (model is trained)
    assert torch.equal(make(True).head.weight, make(True).head.weight)
    assert not torch.equal(make(True).head.weight, make(True, seed=1).head.weight)


@pytest.fixture
def alike():
    """Equal images, dark on the left and bright on the right, of classes that a number does not tell."""
    row = np.linspace(0, 255, 24, dtype=np.uint8)
    return ArraySplit(np.broadcast_to(row, (12, 24, 24)).copy(), np.arange(12) * 5 % 4, "alike")


def test_labelled_crops_follow_seed_epoch_and_image_and_leave_the_generator_alone(alike):
    numbers = [10, 3, 6, 1]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = LabelledBatches(alike, Recipe(size=16), numbers, batch=4, seed=0, workers=0)
    found = [next(loader.epoch(epoch))[1].tolist() for epoch in (0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    orders = [epoch_order(4, seed=0, epoch=epoch).tolist() for epoch in (0, 1)]
    assert found == [[int(alike.labels[numbers[place]]) for place in order] for order in orders]
    assert found[0] != found[1]
    crops, others = (_Crops(alike, Recipe(size=16), seed, numbers) for seed in (0, 1))
    one = crops._crop(0, 0)[0]
    assert torch.equal(one, crops._crop(0, 0)[0])
    for other in (crops._crop(1, 0), crops._crop(0, 1), others._crop(0, 0)):
        assert not torch.equal(one, other[0])
    rising = [bool(crop[0, 8, 0] < crop[0, 8, -1]) for crop, _ in (crops._crop(epoch, 0) for epoch in range(20))]
    assert 4 < sum(rising) < 16, "half of them are flipped"


def test_a_head_is_that_of_sgd_written_out():
    generator = torch.Generator().manual_seed(0)
    values, labels = torch.randn(70, 5, generator=generator), torch.arange(70) % 3
    queries = torch.randn(3000, 5, generator=generator)
    protocol = ClassifierProtocol(epochs=6, batch=16, head_lr=1, drops=(0.5,), weight_decay=0.05, seed=4)
    head = nn.Linear(5, 3)
    head.weight.data = 0.01 * torch.randn(3, 5, generator=torch.Generator().manual_seed(4))
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9, weight_decay=0.05)
    for epoch in range(6):
        optimizer.param_groups[0]["lr"] = 0.5 * (1.0 if epoch < 3 else 0.1)
        for chosen in epoch_order(70, seed=4, epoch=epoch).split(16):
            optimizer.zero_grad()
            cross_entropy(head(values[chosen]), labels[chosen]).backward()
            optimizer.step()
    found = sweep_heads(values, labels, queries, classes=3, rates=(0.5,), protocol=protocol)[0]
    assert (found == head(queries).argmax(dim=1)).float().mean() > 0.999


def test_the_fast_probes_confusion_has_true_classes_as_rows(make_run, monkeypatch):
    def zeros(values, labels, queries, *, rates, **named):
        return torch.zeros(len(rates), len(queries), dtype=torch.int64)

    monkeypatch.setattr(linear, "sweep_heads", zeros)
    found = evaluate_linear_fast(make_run(), EvalOptions(workers=0))
    assert found["confusion"] == [[4, 0, 0]] * 3
    assert found["top1"] == pytest.approx(1 / 3)


class Chunks(list):
    """Features as `cached_features` gives them."""

    def load(self):
        return self[0]


def test_knn_takes_the_runs_own_k_and_temperature_and_the_nearest_of_more(make_run, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    bank, queries = (
        Features(torch.randn(size, 3, generator=generator), torch.arange(size) % 3, {}) for size in (33, 12)
    )
    parts = iter([Chunks([bank]), Chunks([queries])])
    monkeypatch.setattr(knn, "cached_features", lambda *arguments: next(parts))
    run = make_run({"evaluation.k": 5, "evaluation.temperature": 0.9})
    found = evaluate_knn(run, EvalOptions(workers=0), k=(2, 5, 11))
    expected = {
        str(k): knn_accuracy(bank.values, bank.labels, queries.values, queries.labels, k=k, temperature=0.9)
        for k in (2, 5, 11)
    }
    assert found["accuracies"] == expected
    assert len(set(expected.values())) == 3, "else a wrong k would not show"
    assert (found["knn"], found["temperature"]) == (expected["5"], 0.9)


def test_the_periodic_knn_is_that_of_the_configuration(image_folder, monkeypatch):
    source, limits = open_source(str(image_folder)), {}
    # Two near neighbours of class 1 against one nearer of class 0: who wins depends on the temperature.
    bank = Features(torch.tensor([[1.0, 0.05], [1.0, 0.5], [1.0, -0.5], [-1.0, 0.0]]), torch.tensor([0, 1, 1, 4]), {})
    queries = Features(torch.tensor([[2.0, 0.0]]), torch.tensor([1]), {3: "cut"})

    def extract(backbone, split, recipe, *, limit, **named):
        limits[len(split)] = limit
        return bank if split is source.train else queries

    monkeypatch.setattr(knn, "extract_features", extract)
    for temperature, accuracy in ((1.0, 1.0), (0.02, 0.0)):
        settings = EvaluationConfig(k=3, temperature=temperature, train_images=20, images=7)
        found = periodic_knn(nn.Identity(), source, Recipe(size=8), settings, device=CPU)
        assert found.accuracy == accuracy
    assert limits == {33: 20, 12: 7}
    assert (found.bank, found.queries, found.corrupt) == (4, 1, ("cut",))
    assert found.chance == 1 / 3
    assert found.figures == feature_figures(bank.values)


def test_cached_features_are_of_one_crop_precision_and_set_of_labels(make_run):
    context = open_context(make_run(), EvalOptions(workers=0, precision="fp32"))
    other = ArraySplit(np.zeros((3, 8, 8), np.uint8), np.array([0, 1, 2]), "set")
    relabelled = ArraySplit(other.images, np.array([0, 2, 1]), "set")
    recipe = context.recipe
    keys = [
        cache._key(context, other),
        cache._key(context, relabelled),
        cache._key(replace(context, recipe=recipe.model_copy(update={"mean": (0.1, 0.2, 0.3)})), other),
        cache._key(replace(context, recipe=recipe.model_copy(update={"evaluation_resize": 40})), other),
        cache._key(replace(context, precision=Precision("bf16", CPU)), other),
    ]
    assert len(set(keys)) == 5
    assert cache._key(context, other) == keys[0]


def test_images_are_those_asked_for_else_of_the_runs_evaluation_else_its_own(make_run, image_folder):
    for name, changes, own in (("a", {"evaluation.source": "demo"}, "demo"), ("b", {}, str(image_folder))):
        weights = read_weights(make_run(changes, name))
        assert source_of(weights, EvalOptions()) == own
        assert source_of(weights, EvalOptions(data="tar:elsewhere")) == "tar:elsewhere"
