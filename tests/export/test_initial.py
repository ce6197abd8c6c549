"""``--init``: what a run starts from, and what is refused."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from synco_fast.config import ModelConfig
from synco_fast.export.import_checkpoint import import_checkpoint
from synco_fast.export.initial import InitialWeights, load_initial, read_initial
from synco_fast.export.layouts import backbone_in, plain_state
from synco_fast.export.load import load_backbone
from synco_fast.export.save import export_checkpoint
from synco_fast.methods import METHODS
from synco_fast.methods.build import build_method
from synco_fast.models.encoder import Encoder, build_backbone
from synco_fast.runtime.checkpoint import find_checkpoint
from synco_fast.runtime.errors import ConfigError, UserError
from synco_fast.training.pretraining import Pretraining
from synco_fast.training.run.loop import Trainer

from ..support.runs import STOCK, published
from ..support.training import screen


def equal(module, state, prefix=""):
    own = {f"{prefix}{name}": value for name, value in module.state_dict().items()}
    return own.keys() <= state.keys() and all(torch.equal(value, state[name]) for name, value in own.items())


def start(config, folder, **settings):
    """A trainer before its first step, and what it said."""
    console, text = screen()
    settings.setdefault("console", console)
    return Trainer(Pretraining(config), folder, **settings), text


def test_a_run_starts_from_a_run(tiny, make_run, tmp_path):
    run = make_run()
    state = find_checkpoint(run)[0]["method"]
    config = tiny({"model.init": str(run), "seed": 7, "evaluation.every": 0, "training.max_steps": 5})
    trainer, text = start(config, tmp_path / "new")
    method = trainer.task.method
    assert equal(method.encoder, state, "encoder.")
    assert equal(method.key_encoder, method.encoder.state_dict()), "the target begins as a copy of the encoder"
    assert not torch.equal(method.queue.rows, state["queue.rows"]), "the queue is a new one"
    file = run / "checkpoints" / "step-00000008.pt"
    backbone = len(method.encoder.backbone.state_dict())
    expected = f"initial weights: backbone ({backbone} tensors) and projection head (4 tensors) from {file}, epoch 2"
    assert text.getvalue().splitlines() == [expected]
    trainer.run()
    assert find_checkpoint(tmp_path / "new")[0]["config"]["model"]["init"] == str(run)
    (run / "checkpoints" / file.name).rename(tmp_path / "elsewhere.pt")
    resumed, text = start(config, tmp_path / "new", resume=tmp_path / "new")
    assert "initial weights" not in text.getvalue(), "a resumed run has its own"
    assert equal(resumed.task.method.encoder, find_checkpoint(tmp_path / "new")[0]["method"], "encoder.")
    resumed.run()
    with pytest.raises(ConfigError, match=r"model\.init: found 'other', expected .* cannot change in the middle"):
        start(tiny({"model.init": "other", "seed": 7}), tmp_path / "new", resume=tmp_path / "new")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_from_a_backbone(tiny, make_run, name, tmp_path):
    export_checkpoint(make_run(), "safetensors", tmp_path / "out")
    config = tiny({"method.name": name, "model.init": str(tmp_path / "out")})
    method = build_method(config)
    head = {key: value.clone() for key, value in method.encoder.head.state_dict().items()}
    line = load_initial(method.encoder, read_initial(config.model.init, config.model), config.model)
    method.start_from_encoder()
    assert "projection head" not in line
    assert equal(method.encoder.head, head), "the method's own head stays"
    state = find_checkpoint(tmp_path / "run")[0]["method"]
    assert equal(method.encoder, {**state, **{f"encoder.head.{key}": value for key, value in head.items()}}, "encoder.")
    if method.target is not None:
        assert equal(method.target, method.encoder.state_dict())


def test_other_shapes_are_one_line(tiny, make_run, tmp_path):
    run = make_run()
    for changes, says in (
        (
            {"model.dim": 8},
            r"model\.init: .*\.pt, epoch 2: found weights of another architecture than the projection head "
            r"\(model\.dim 8\): it has other shapes in 2\.weight, 2\.bias: 2\.weight is .*; --model\.init_head false",
        ),
        (
            {"model.backbone_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 32]}},
            r"another architecture than timm/resnet18: it has other shapes in layer4",
        ),
        ({"method.name": "byol"}, r"the projection head .*it lacks 1\.bias, .*--model\.init_head false"),
        ({"model.init": str(tmp_path / "none.pt")}, r"model\.init: found '.*none\.pt', expected a run, a checkpoint"),
        ({"model.init": "timm/resnet1"}, r"model\.init: found timm/resnet1, whose weights cannot be had \(Unknown mod"),
        ({"model.init": "torchvision/resnet1"}, r"found torchvision/resnet1, whose weights cannot be had"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            start(tiny({"model.init": str(run), **changes}), tmp_path / "new")
        assert len(str(caught.value).splitlines()) == 1
        assert not (tmp_path / "new").exists()
    config = tiny({"model.init": str(run), "method.name": "byol", "model.init_head": False})
    assert "projection head" not in start(config, tmp_path / "new")[1].getvalue()


@pytest.mark.parametrize("kind", ["torchvision", "timm", "moco", "imported", "safetensors", "torchvision/"])
def test_published_weights(tiny, kind, tmp_path, monkeypatch):
    """The layouts of authors and libraries, classifier included, and a library's own cache of published weights."""
    config = tiny({**STOCK, "model.backbone": "resnet18" if kind != "timm" else "timm/resnet18", "model.dim": 16})
    model = torchvision.models.resnet18()
    state, path = model.state_dict(), tmp_path / "weights.pth"
    if kind in ("torchvision", "timm"):
        torch.save({"model": state} if kind == "timm" else state, path)
    elif kind in ("moco", "imported"):
        content = published(mlp=True)
        state = {name.removeprefix("module.encoder_q."): value for name, value in content["state_dict"].items()}
        torch.save(content, path)
        if kind == "imported":
            import_checkpoint(path, tmp_path / "imported.pt", method="moco")
            path = tmp_path / "imported.pt"
    elif kind == "torchvision/":
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        torch.save(state, tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
        path = "torchvision/resnet18"
    else:
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    method = build_method(config)
    initial = read_initial(str(path), config.model)
    line = load_initial(method.encoder, initial, config.model)
    assert equal(method.encoder.backbone, state)
    assert ("projection head" in line) == (kind in ("moco", "imported"))
    assert line.endswith(f"from {path}" + (", epoch 200" if kind in ("moco", "imported") else ""))


def of_others(state):
    """Checkpoints of other projects, by the names of their files."""
    features = {name: value for name, value in state.items() if not name.startswith("fc.")}
    children = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}

    def numbered(name):
        first, _, rest = name.partition(".")
        return f"{children[first]}.{rest}"

    def below(prefix, tensors=features):
        return {f"{prefix}{name}": value for name, value in tensors.items()}

    ema = {name: value + 1 for name, value in features.items()}
    sequential = {numbered(name): value for name, value in features.items()}
    head = {"projector.0.weight": torch.ones(2, 512), "classifier.weight": torch.ones(3, 512), "queue": torch.ones(2)}
    lightly = below("backbone.", sequential) | {"projection_head.layers.0.weight": torch.ones(2, 512)}
    return {
        "solo-learn.ckpt": {"state_dict": below("momentum_backbone.", ema) | below("backbone.") | head, "epoch": 5},
        "solo-learn-1.ckpt": {"state_dict": below("encoder.") | head},
        "lightly.ckpt": {"state_dict": below("backbone_momentum.", ema) | lightly},
        "lightly.pth": sequential,
        "moco-v3.pth.tar": {
            "state_dict": below("module.momentum_encoder.", ema)
            | below("module.base_encoder.", {**features, "fc.0.weight": torch.ones(2, 512)})
            | {"module.predictor.0.weight": torch.ones(2, 2)},
            "arch": "resnet18",
        },
        "swav.pth.tar": below("module.")
        | {"module.projection_head.0.weight": features["bn1.weight"], "module.prototypes.weight": torch.ones(3, 2)},
        "dino.pth": {
            "student": below("module.backbone.", ema),
            "teacher": below("backbone.") | {"head.mlp.0.bias": torch.ones(1)},
        },
        "vissl.torch": {"classy_state_dict": {"base_model": {"model": {"trunk": below("_feature_blocks.")}}}},
        "compiled.pth": {"model": below("_orig_mod.module.", state)},
        "pytorch-examples.pth.tar": {"state_dict": below("module.", state), "arch": "resnet18"},
    }


def test_checkpoints_of_other_projects(tmp_path):
    model, config = torchvision.models.resnet18(), ModelConfig(backbone="resnet18")
    state = model.state_dict()
    model.fc = torch.nn.Identity()
    others, own = of_others(state), model.state_dict().keys()
    for name, content in others.items():
        found = backbone_in(plain_state(content), own)
        assert found.keys() == own, name
        assert all(found[key] is state[key] for key in own), name
    path = tmp_path / "lightly.ckpt"
    torch.save(others[path.name], path)
    encoder = Encoder(build_backbone("resnet18")[0], 512, 16)
    line = load_initial(encoder, read_initial(str(path), config), config)
    assert line == f"initial weights: backbone (120 tensors) from {path}"
    assert equal(encoder.backbone, state)
    import_checkpoint(path, tmp_path / "ours.pt", method="moco", backbone="resnet18")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(load_backbone(tmp_path / "ours.pt")(images), model.eval()(images))
    deeper = {f"backbone.{key}": value for key, value in state.items()} | {"backbone.layer1.2.bn1.bias": torch.ones(64)}
    with pytest.raises(UserError, match=r"another architecture than resnet18: it has besides layer1\.2\.bn1\.bias$"):
        load_initial(encoder, InitialWeights(deeper, {}, "solo-learn.ckpt"), config)


def test_a_library_of_names_reads_a_folder_of_its_own(make_run, tiny, tmp_path):
    export_checkpoint(make_run(), "timm", tmp_path / "out")
    config = tiny()
    initial = read_initial(f"timm/local-dir:{tmp_path / 'out'}", ModelConfig())
    load_initial(build_method(config).encoder, initial, config.model)
    assert initial.head == {}


@pytest.mark.parametrize("kind", ["checkpoint", "weights"])
def test_a_file_is_read_once(tiny, make_run, tmp_path, monkeypatch, kind):
    """A checkpoint of a large encoder takes seconds."""
    config, file = tiny(), make_run() / "checkpoints" / "step-00000008.pt"
    if kind == "weights":
        backbone = build_method(config).encoder.backbone.state_dict()
        file = tmp_path / "weights.pth"
        torch.save(backbone, file)
    reads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **settings: reads.append(path) or load(path, **settings))
    assert read_initial(str(file), config.model).backbone
    assert reads == [file]
