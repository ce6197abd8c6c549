import pytest
import torch
from safetensors.torch import save_file

import synco_fast
from synco_fast.export.import_checkpoint import import_checkpoint
from synco_fast.export.load import read_weights
from synco_fast.methods.build import build_encoder
from synco_fast.models.batch_norm import SplitBatchNorm2d
from synco_fast.runtime.checkpoint import load_checkpoint, save_checkpoint
from synco_fast.runtime.errors import CheckpointError
from tests.support.runs import Bomb


def test_the_backbone_is_plain_and_the_same(make_run, tiny):
    folder = make_run()
    backbone = synco_fast.load_backbone(folder)
    assert not backbone.training
    weights = read_weights(folder)
    assert (weights.step, weights.epochs, weights.run) == (8, 2.0, folder.resolve())
    assert not any(isinstance(part, SplitBatchNorm2d) for part in backbone.modules())
    state = load_checkpoint(folder / "checkpoints" / "step-00000008.pt")
    encoder = build_encoder(tiny())
    encoder.load_state_dict({name[8:]: value for name, value in state["method"].items() if name.startswith("encoder.")})
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(backbone(images), encoder.eval().backbone(images))
    assert torch.equal(
        synco_fast.load_backbone(str(folder / "checkpoints" / "step-00000008.pt"))(images), backbone(images)
    )


def test_an_older_checkpoint_in_place_of_a_damaged_one_is_said(make_run):
    """Otherwise an export or features would silently be of an earlier step."""
    folder = make_run()
    newer = folder / "checkpoints" / "step-00000009.pt"
    newer.write_bytes((folder / "checkpoints" / "step-00000008.pt").read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"step-00000009.pt: found .* damaged .*; taking step-00000008.pt"):
        assert read_weights(folder).step == 8


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"format": 1, "step": 1}, "found no encoder"),
        ({"format": 1, "step": 1, "config": {}, "method": {"queue.rows": torch.ones(1)}}, "found no encoder"),
        ({"state_dict": {"module.encoder_q.conv1.weight": torch.ones(1)}}, "'synco-fast import"),
        ({"weights": Bomb()}, "found exec in its pickle, expected tensors"),
        ({"weights": Bomb}, "in its pickle, expected tensors"),
        (3, "found no encoder"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, says):
    file = tmp_path / "file.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=says) as caught:
        synco_fast.load_backbone(file)
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_files(tmp_path):
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "cut.safetensors").write_bytes(b"\x01")
    save_file({"x": torch.ones(1)}, tmp_path / "bare.safetensors")
    for name, says in (
        ("cut.pt", "cut short or damaged"),
        ("cut.safetensors", "cut short or damaged"),
        ("bare.safetensors", "no description"),
        ("none.pt", "found no file"),
        ("none.safetensors", "found no file"),
    ):
        with pytest.raises(CheckpointError, match=says):
            synco_fast.load_backbone(tmp_path / name)


def test_differing_names_are_listed(make_run, tmp_path):
    folder = make_run()
    state = load_checkpoint(folder / "checkpoints" / "step-00000008.pt")
    method = state["method"]
    del method["encoder.backbone.bn1.weight"], method["encoder.backbone.bn1.bias"]
    method["encoder.backbone.wings"] = torch.ones(1)
    method["encoder.backbone.conv1.weight"] = torch.ones(2, 2)
    file = save_checkpoint(tmp_path / "other", 8, state, keep=1)
    with pytest.raises(CheckpointError) as caught:
        synco_fast.load_backbone(file)
    assert "another architecture than timm/resnet18: it lacks bn1.bias, bn1.weight" in str(caught.value)
    assert "it has besides wings" in str(caught.value)
    assert "conv1.weight is (2, 2), the model's (64, 3, 7, 7)" in str(caught.value)


def test_another_architecture_in_an_import(make_run, tmp_path):
    state = load_checkpoint(make_run() / "checkpoints" / "step-00000008.pt")
    backbone = {key[17:]: value for key, value in state["method"].items() if key.startswith("encoder.backbone.")}
    torch.save(backbone, tmp_path / "thin.pth")
    with pytest.raises(CheckpointError, match="another architecture than resnet50: it lacks"):
        import_checkpoint(tmp_path / "thin.pth", tmp_path / "out.pt", method="moco", backbone="resnet50")
    assert not (tmp_path / "out.pt").exists()
