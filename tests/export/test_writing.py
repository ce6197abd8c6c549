import json
import os
import pickle

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import load_file

import synco_fast
from synco_fast.export.card import known_results
from synco_fast.export.import_checkpoint import import_checkpoint
from synco_fast.export.layouts import from_moco, to_detectron2, to_moco
from synco_fast.export.load import read_weights
from synco_fast.export.save import export_checkpoint
from synco_fast.runtime.errors import CheckpointError, ConfigError
from tests.support.runs import STOCK, published


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize(
    ("format", "backbone"),
    [
        ("torchvision", "resnet18"),
        ("torchvision", "timm/resnet18"),
        ("timm", "timm/resnet18"),
        ("safetensors", "resnet18"),
        ("moco", "resnet18"),
    ],
)
def test_round_trips_are_bit_equal(make_run, tmp_path, format, backbone):
    run = make_run({**STOCK, "model.backbone": backbone})
    before = read_weights(run)
    done = export_checkpoint(run, format, tmp_path / "out")
    assert sorted(done.files) == sorted(path.name for path in (tmp_path / "out").iterdir())
    again = tmp_path / "again.pt"
    import_checkpoint(tmp_path / "out" / done.files[0], again, method="synco", backbone=backbone)
    assert same(read_weights(again).backbone, before.backbone)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(synco_fast.load_backbone(again)(images), synco_fast.load_backbone(run)(images))


def test_an_encoder_that_a_user_registered(make_run, tmp_path):
    """docs/python.md: it has none of timm's own description."""

    @timm.models.register_model
    def plain_encoder(pretrained=False, num_classes=0, width=8, **_):
        layers = torch.nn.Conv2d(3, width, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        model = torch.nn.Sequential(*layers)
        model.num_features = width
        return model

    run = make_run({**STOCK, "model.backbone": "timm/plain_encoder", "model.backbone_args": {"width": 4}})
    export_checkpoint(run, "timm", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in state.items()} == {"0.weight": (4, 3, 3, 3), "0.bias": (4,)}
    assert json.loads((tmp_path / "config.json").read_text())["model_args"] == {"width": 4}


def test_the_libraries_load_what_is_theirs(make_run, tmp_path):
    statistics = {"augment.mean": [0.1, 0.2, 0.3], "augment.std": [0.4, 0.5, 0.6], "augment.evaluation_resize": 80}
    run = make_run({**STOCK, **statistics})
    images = torch.randn(2, 3, 64, 64)
    expected = synco_fast.load_backbone(run)(images)

    export_checkpoint(run, "torchvision", tmp_path / "torchvision")
    model = torchvision.models.resnet18()
    state = torch.load(tmp_path / "torchvision" / "backbone.pth", weights_only=True)
    found = model.load_state_dict(state, strict=False)
    assert set(found.missing_keys) == {"fc.weight", "fc.bias"}
    assert not found.unexpected_keys
    model.fc = torch.nn.Identity()
    assert torch.equal(model.eval()(images), expected)

    export_checkpoint(run, "timm", tmp_path / "timm")
    file = tmp_path / "timm" / "model.safetensors"
    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(file))
    assert torch.allclose(model.eval()(images), expected, atol=1e-6)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert torch.allclose(model.eval()(images), expected, atol=1e-6)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=3)
    features = model.eval().forward_head(model.forward_features(images), pre_logits=True)
    assert torch.allclose(features, expected, atol=1e-6)
    assert model(images).shape == (2, 3)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, in_chans=1)
    of_gray = synco_fast.load_backbone(run)(images[:, :1].expand(-1, 3, -1, -1))
    assert torch.allclose(model.eval()(images[:, :1]), of_gray, atol=1e-5)
    card = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert (card["architecture"], card["num_features"]) == ("resnet18", 512)
    said = card["pretrained_cfg"]
    assert (said["input_size"], said["crop_pct"]) == ([3, 64, 64], 0.8)
    assert (said["mean"], said["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert torch.equal(synco_fast.load_backbone(tmp_path / "timm")(images), expected)
    # safetensors writes private files by itself; what is exported is for others.
    assert file.stat().st_mode & 0o077 == 0o066 & ~current_umask()

    export_checkpoint(run, "safetensors", tmp_path / "safetensors")
    file = tmp_path / "safetensors" / "backbone.safetensors"
    assert torch.equal(synco_fast.load_backbone(file)(images), expected)
    assert torch.equal(synco_fast.load_backbone(tmp_path / "safetensors")(images), expected)


def current_umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def test_timm_loads_a_model_with_a_layer_behind_the_pooling(make_run, tmp_path):
    """Its features are not as wide as ``num_features``."""
    name = "mobilenetv3_small_050"
    run = make_run({**STOCK, "model.backbone": f"timm/{name}", "model.batch_norm_groups": 1})
    export_checkpoint(run, "timm", tmp_path / "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    card = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert card["num_features"] == model.num_features == 288
    images = torch.randn(2, 3, 64, 64)
    expected = synco_fast.load_backbone(run)(images)
    assert expected.shape == (2, 1024)
    assert torch.equal(model.eval()(images), expected)


@pytest.mark.parametrize(("size", "resize"), [(32, None), (32, 32), (96, 118)])
def test_timms_own_transforms_make_the_same_crop(make_run, tmp_path, size, resize):
    run = make_run({**STOCK, "augment.size": size, "augment.evaluation_resize": resize})
    export_checkpoint(run, "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}")
    chain = timm.data.create_transform(**timm.data.resolve_model_data_config(model)).transforms
    recipe = read_weights(run).config.augment
    assert (chain[0].size, tuple(chain[1].size)) == (recipe.resize, (size, size))


def test_a_thin_timm_model_keeps_its_arguments(make_run, tmp_path):
    run = make_run()
    export_checkpoint(run, "timm", tmp_path / "timm")
    card = json.loads((tmp_path / "timm" / "config.json").read_text())
    model = timm.create_model(card["architecture"], num_classes=0, **card["model_args"])
    model.load_state_dict(load_file(tmp_path / "timm" / "model.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), synco_fast.load_backbone(run)(images))
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert torch.equal(model.eval()(images), synco_fast.load_backbone(run)(images))
    for format in ("torchvision", "detectron2", "moco"):
        with pytest.raises(CheckpointError, match="--format timm takes it"):
            export_checkpoint(run, format, tmp_path / format)
        assert not (tmp_path / format).exists()


def test_the_authors_scripts_know_no_small_stem(make_run, tmp_path):
    run = make_run({**STOCK, "model.small_stem": True})
    with pytest.raises(CheckpointError, match=r"a small stem, .*--format torchvision takes it"):
        export_checkpoint(run, "moco", tmp_path / "moco")
    assert not (tmp_path / "moco").exists()


def test_a_small_stem_comes_back_by_its_shape(make_run, tmp_path):
    """As a CIFAR checkpoint of solo-learn comes in; images of 224 pixels would be those of another network."""
    run = make_run({**STOCK, "model.small_stem": True})
    export_checkpoint(run, "torchvision", tmp_path / "out")
    exported = tmp_path / "out" / "backbone.pth"
    for size, expected in ((None, 32), (40, 40)):
        weights = import_checkpoint(exported, tmp_path / "ours.pt", method="moco", backbone="resnet18", size=size)
        assert weights.config.model.small_stem
        assert (weights.config.augment.size, weights.config.augment.resize) == (expected, expected)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(synco_fast.load_backbone(tmp_path / "ours.pt")(images), synco_fast.load_backbone(run)(images))
    with pytest.raises(CheckpointError, match=r"another architecture than resnet50"):
        import_checkpoint(exported, tmp_path / "ours.pt", method="moco", backbone="resnet50")
    torch.save(torchvision.models.resnet18().state_dict(), exported)
    stock = import_checkpoint(exported, tmp_path / "ours.pt", method="moco", backbone="resnet18", size=64).config
    assert (stock.model.small_stem, stock.augment.size) == (False, 64)


def authors_linear_evaluation(file) -> torchvision.models.ResNet:
    """What facebookresearch/moco's main_lincls.py does with a checkpoint: encoder_q without fc, all but fc must fit."""
    prefix, state = "module.encoder_q.", torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    kept = {
        name[len(prefix) :]: value
        for name, value in state.items()
        if name.startswith(prefix) and not name.startswith(f"{prefix}fc")
    }
    model = torchvision.models.resnet18()
    found = model.load_state_dict(kept, strict=False)
    assert set(found.missing_keys) == {"fc.weight", "fc.bias"}
    assert not found.unexpected_keys
    return model


def test_the_authors_layout_holds_everything(make_run, tmp_path):
    run = make_run(STOCK)
    export_checkpoint(run, "moco", tmp_path / "moco")
    file = tmp_path / "moco" / "checkpoint.pth.tar"
    model = authors_linear_evaluation(file)
    model.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), synco_fast.load_backbone(run)(images))
    content = torch.load(file, weights_only=True)
    assert (content["arch"], content["epoch"]) == ("resnet18", 2)
    assert content["state_dict"]["module.queue"].shape == (16, 32)
    assert content["state_dict"]["module.queue_ptr"].tolist() == [8]
    assert content["state_dict"]["module.encoder_k.fc.2.weight"].shape == (16, 512)
    state = read_weights(run).state
    back = from_moco(to_moco(state), "here")
    back["queue.image_ids"] = state["queue.image_ids"]
    assert same(back, state)
    half = to_moco({"queue.rows": state["queue.rows"].bfloat16()})["module.queue"]
    assert (half.dtype, half.shape) == (torch.float32, (16, 32)), "the authors' scripts know no other"


@pytest.mark.parametrize("mlp", [True, False], ids=["v2", "v1"])
def test_published_checkpoints_come_in_and_go_out_unchanged(tmp_path, mlp):
    content = published(mlp=mlp)
    torch.save(content, tmp_path / "published.pth.tar")
    weights = import_checkpoint(tmp_path / "published.pth.tar", tmp_path / "ours.pt", method="mochi")
    assert (weights.config.method.name, weights.config.model.backbone, weights.epochs) == ("mochi", "resnet18", 200)
    export_checkpoint(tmp_path / "ours.pt", "moco", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "checkpoint.pth.tar", weights_only=True)
    assert same(back["state_dict"], content["state_dict"])
    assert back["epoch"] == 200
    card = (tmp_path / "back" / "README.md").read_text()
    assert "| imported from | published.pth.tar, sha256 " in card
    assert "| epochs | 200 |" in card


def test_the_queue_of_synco_has_its_keys_in_rows(tmp_path):
    content = published(mlp=True, keys_first=True)
    torch.save(content, tmp_path / "synco.pth.tar")
    weights = import_checkpoint(tmp_path / "synco.pth.tar", tmp_path / "ours.pt", method="synco")
    assert torch.equal(weights.state["queue.rows"], content["state_dict"]["module.queue"])
    assert weights.state["queue.image_ids"].shape == (64,)
    assert (weights.config.method.queue, weights.config.method.hard) == (64, 64)
    moco = to_moco(weights.state)["module.queue"]
    assert torch.equal(moco, content["state_dict"]["module.queue"].T), "an export has MoCo's layout"


@pytest.mark.parametrize(
    ("backbone", "classifier"),
    [
        ("torchvision/mobilenet_v3_small", "classifier.3."),
        ("timm/test_convnext", "head.fc."),
        ("timm/test_vit", "head."),
    ],
)
def test_a_librarys_own_file_comes_in_without_its_classifier(tmp_path, backbone, classifier):
    """Also where the classifier is the last of several layers, or beside a norm that stays."""
    library, name = backbone.split("/")
    state = (timm.create_model if library == "timm" else torchvision.models.get_model)(name).state_dict()
    file, ours = tmp_path / "published.pth", tmp_path / "ours.pt"
    torch.save(state, file)
    import_checkpoint(file, ours, method="moco", backbone=backbone)
    stays = {name: value for name, value in state.items() if not name.startswith(classifier)}
    assert len(stays) == len(state) - 2
    assert same(read_weights(ours).backbone, stays)
    torch.save(state | {"tail.weight": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"it has besides tail\.weight"):
        import_checkpoint(file, ours, method="moco", backbone=backbone)


def test_names_that_the_layout_lacks(tmp_path):
    content = published(mlp=True)
    content["state_dict"]["module.predictor.weight"] = torch.ones(1)
    torch.save(content, tmp_path / "other.pth.tar")
    with pytest.raises(CheckpointError, match=r"found module\.predictor\.weight \(1 in all\)"):
        import_checkpoint(tmp_path / "other.pth.tar", tmp_path / "ours.pt", method="moco")
    torch.save({"state_dict": {"module.encoder_k.conv1.weight": torch.ones(1)}}, tmp_path / "key.pth.tar")
    with pytest.raises(CheckpointError, match="found no encoder"):
        import_checkpoint(tmp_path / "key.pth.tar", tmp_path / "ours.pt", method="moco")
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match="--backbone NAME"):
        import_checkpoint(tmp_path / "bare.pth", tmp_path / "ours.pt", method="moco")


def test_detectron2(make_run, tmp_path):
    run = make_run({**STOCK, "model.backbone": "resnet50"})
    done = export_checkpoint(run, "detectron2", tmp_path / "d2")
    content = pickle.loads((tmp_path / "d2" / "backbone.pkl").read_bytes())
    assert content["matching_heuristics"] is True
    names = content["model"]
    for name in (
        "stem.conv1.weight",
        "stem.conv1.norm.running_var",
        "res2.0.shortcut.weight",
        "res5.2.conv3.norm.bias",
        "res5.0.shortcut.norm.weight",
    ):
        assert name in names
    tensors = {name: torch.from_numpy(value) for name, value in names.items()}
    backbone = {k: v for k, v in read_weights(run).backbone.items() if "num_batches_tracked" not in k}
    assert len(tensors) == len(backbone), "no two tensors have one name"
    assert same(dict(zip(backbone, tensors.values(), strict=True)), backbone)
    half = to_detectron2({"layer1.0.bn2.bias": torch.ones(2, dtype=torch.bfloat16)})
    assert half["res2.0.conv2.norm.bias"].numpy().dtype == "float32", "NumPy has no bfloat16"
    voc = yaml.safe_load((tmp_path / "d2" / done.files[1]).read_text())
    assert voc["MODEL"]["ROI_HEADS"] == {"NAME": "Res5ROIHeadsExtraNorm", "NUM_CLASSES": 20}
    assert voc["MODEL"]["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert voc["MODEL"]["PIXEL_STD"] == [58.395, 57.12, 57.375]
    assert voc["INPUT"]["FORMAT"] == "RGB"
    assert voc["SOLVER"]["MAX_ITER"] == 24000
    with pytest.raises(CheckpointError, match="made of bottlenecks"):
        export_checkpoint(make_run(STOCK, "small"), "detectron2", tmp_path / "other")


@pytest.mark.slow
def test_onnx_agrees_with_pytorch(make_run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    run = make_run()
    done = export_checkpoint(run, "onnx", tmp_path / "onnx")
    assert len(list((tmp_path / "onnx").iterdir())) == 2
    assert 0 <= next(iter(done.checks.values())) < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "backbone.onnx"))
    for batch, height, width in ((1, 32, 32), (5, 32, 32), (2, 96, 80)):
        images = torch.randn(batch, 3, height, width)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        assert torch.allclose(found, synco_fast.load_backbone(run)(images), atol=1e-4)


def test_the_card_says_what_the_weights_are(make_run, tmp_path):
    run = make_run()
    (run / "evaluation").mkdir()
    (run / "evaluation" / "knn.json").write_text(json.dumps({"headline": {"kNN, k 20": 0.5}, "chance": 1 / 3}))
    forms = {"loss": {"name": "blockwise", "why": "on a CPU"}, "norm": {"name": "native", "why": "on a CPU"}}
    (run / "environment.json").write_text(json.dumps({"torch": torch.__version__, "forms": forms}))
    done = export_checkpoint(run, "safetensors", licence="CC-BY-4.0")
    assert done.folder == run / "export" / "safetensors"
    card = (done.folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "cc-by-4.0"
    assert head["pipeline_tag"] == "image-feature-extraction"
    assert "synco" in head["tags"]
    for words in ("SynCo", "timm/resnet18", "| epochs | 2 |", "kNN, k 20: 50.0% (chance 33.3%)", "75.0%", "CC-BY-4.0"):
        assert words in card
    assert str(torch.__version__).split("+")[0] in card
    assert "; loss blockwise, norm native\n" in card


def test_the_card_has_only_results_of_these_weights_and_names_other_images(make_run):
    run = make_run()
    (run / "evaluation").mkdir()
    for name, values in {
        "knn": {"headline": {"kNN, k 20": 0.97}, "chance": 0.5, "source": "two", "step": 8, "checkpoint": "best.pt"},
        "linear": {"headline": {"linear top-1": 0.2}, "epochs": 2, "checkpoint": "step-00000008.pt"},
        "finetune_1": {"headline": {"fine-tuned": 0.1}, "checkpoint": "step-00000004.pt"},
    }.items():
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(values))
    (run / "summary.json").write_text(json.dumps({"knn_after": 0.75, "chance": 0.5, "steps": 12}))
    assert known_results(read_weights(run)) == {
        "linear top-1 (2 epochs)": "20.0%",
        "kNN, k 20 on two": "97.0% (chance 50.0%)",
    }, "the kNN in training is that of step 12"


def test_bad_words(make_run, tmp_path):
    with pytest.raises(ConfigError, match=r"format: found 'keras', expected detectron2, moco"):
        export_checkpoint(make_run(), "keras")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="found a file"):
        export_checkpoint(tmp_path / "run", "safetensors", tmp_path / "file")


def test_a_readme_that_is_no_model_card_stays(make_run, tmp_path):
    """As in the folder of a project, by ``--out .``."""
    run = make_run()
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(ConfigError, match=r"out: found a README\.md in .* that is no model card"):
        export_checkpoint(run, "safetensors", tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert not (tmp_path / "backbone.safetensors").exists()
    for _ in range(2):
        export_checkpoint(run, "safetensors", tmp_path / "again")
