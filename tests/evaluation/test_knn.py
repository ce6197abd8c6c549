import numpy as np
import pytest
import torch
from torch import nn

from synco_fast.config import EvaluationConfig
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import DataError
from synco_fast.data.sources.open import ArraySplit, open_source
from synco_fast.evaluation.features import evenly_spaced, extract_features
from synco_fast.evaluation.knn import knn_accuracy, knn_predict, periodic_knn
from synco_fast.runtime.errors import ConfigError, DivergedError


def test_votes_by_hand():
    """Two near neighbours of class 1 against one nearer of class 0: who wins depends on the temperature."""
    bank = torch.tensor([[1.0, 0.05], [1.0, 0.5], [1.0, -0.5], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 2])
    query = torch.tensor([[2.0, 0.0]])
    for temperature, winner in ((1.0, 1), (0.02, 0)):
        found = knn_predict(bank, labels, query, classes=3, k=3, temperature=temperature)
        assert found.tolist() == [winner]
    assert knn_predict(bank, labels, query, classes=3, k=1, temperature=1.0).tolist() == [0]


def test_length_does_not_matter_and_chunks_join():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(60, 8, generator=generator), torch.randn(1500, 8, generator=generator)
    labels = torch.arange(60) % 3
    one = knn_predict(bank, labels, queries, classes=3, k=5, temperature=0.1)
    scaled = knn_predict(bank * torch.rand(60, 1).add(0.1), labels, queries * 7, classes=3, k=5, temperature=0.1)
    assert torch.equal(one, scaled)
    assert len(one) == 1500


def test_accuracy_is_a_share():
    features = torch.eye(4)
    labels = torch.tensor([0, 1, 2, 3])
    assert knn_accuracy(features, labels, features, labels, k=1, temperature=0.1) == 1
    wrong = torch.tensor([0, 1, 2, 0])
    assert knn_accuracy(features, labels, features, wrong, k=1, temperature=0.1) == 0.75


def test_k_larger_than_the_bank():
    with pytest.raises(ConfigError, match=r"k: found 5, expected up to 4"):
        knn_predict(torch.eye(4), torch.arange(4), torch.eye(4), classes=4, k=5, temperature=1.0)


def test_a_subset_is_spread_over_all():
    assert evenly_spaced(10, None) == list(range(10))
    assert evenly_spaced(10, 5) == [0, 2, 4, 6, 8]
    assert len(set(evenly_spaced(1000, 77))) == 77


def test_features_are_those_of_evaluation_mode(image_folder):
    split = open_source(str(image_folder)).validation
    (image_folder / "val" / "class0" / "0.jpg").write_bytes(b"")
    backbone = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(3 * 16 * 16, 5))
    seen = []
    found = extract_features(
        backbone, split, Recipe(size=16), device=torch.device("cpu"), batch=4, workers=0, tick=seen.append
    )
    again = extract_features(backbone, split, Recipe(size=16), device=torch.device("cpu"), batch=5, workers=0)
    assert found.values.shape == (11, 5)
    assert torch.allclose(found.values, again.values, atol=1e-6)
    assert found.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 4
    assert sum(seen) == 11
    assert list(found.corrupt) == [0]
    assert backbone.training


def test_features_that_are_no_numbers_are_refused(image_folder):
    """In a bank, one row of NaN would be the nearest neighbour of every image."""
    split = open_source(str(image_folder)).validation

    def backbone(images):
        features = images.flatten(1)
        features[2, 0] = float("inf")
        return features

    module = nn.Module()
    module.forward = backbone
    with pytest.raises(DivergedError, match=rf"of 1 of 12 images, such as {split.name(2)}, .*--precision fp32"):
        extract_features(module, split, Recipe(size=16), device=torch.device("cpu"), workers=0)
    found = periodic_knn(
        module,
        open_source(str(image_folder)),
        Recipe(size=16),
        EvaluationConfig(k=2),
        device=torch.device("cpu"),
        workers=0,
    )
    assert found.accuracy == 0, "during training, it is the trainer that says why"
    assert found.figures == {}


def test_labels_are_needed():
    split = ArraySplit(np.zeros((2, 8, 8), np.uint8), None, "zeros")
    with pytest.raises(DataError, match="found no class folders"):
        extract_features(nn.Identity(), split, Recipe(size=8), device=torch.device("cpu"))
