import pytest
import yaml

from synco_fast.config import Config, build_config, read_mapping
from synco_fast.explain import known_keys
from synco_fast.kernels import Negatives
from synco_fast.presets import PRESETS, load_config, load_values
from synco_fast.runtime.errors import ConfigError


def test_defaults_are_those_of_the_papers():
    config = build_config({})
    assert (config.method.queue, config.method.temperature, config.method.warmup_epochs) == (65536, 0.2, 10)
    assert config.method.negatives() == Negatives.synco()
    assert (config.model.backbone, config.model.dim, config.model.momentum) == ("resnet50", 128, 0.999)
    assert (config.optimizer.lr, config.optimizer.momentum, config.optimizer.weight_decay) == (0.03, 0.9, 1e-4)
    assert (config.training.epochs, config.training.batch) == (200, 256)
    assert (config.augment.size, config.augment.area, config.augment.blur_sigma) == (224, (0.2, 1.0), (0.1, 2.0))
    assert not config.method.symmetric
    assert not config.method.mask_same_image
    assert config.method.extrapolation == "released"


def test_the_learning_rate_scales_with_the_batch():
    assert build_config({}, {"training.batch": 1024}).learning_rate == pytest.approx(0.12)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve_and_survive_a_round_trip(name, tmp_path):
    config = load_config(name)
    assert config.preset == name
    assert config.about
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert build_config(read_mapping(tmp_path / "config.yaml")) == config


def test_the_papers_presets():
    assert load_config("synco-r50-800").training.epochs == 800
    assert load_config("mochi-r50-200").method.negatives() == Negatives.mochi(1024, 512, 256)
    assert load_config("moco-v2-r50-200").method.negatives() == Negatives.moco()
    for name in ("synco-r50-imagenet100", "synco-r18-cifar", "fashion-mnist", "demo"):
        assert load_config(name).method.mask_same_image, "sets smaller than the queue mask the same image"


def test_the_learning_rate_of_mocos_cifar_demo():
    """0.06 for a batch of 512."""
    config = load_config("synco-r18-cifar")
    assert (config.training.batch, config.learning_rate) == (512, pytest.approx(0.06))
    assert config.optimizer.weight_decay == 5e-4


def test_a_file_changes_the_preset_that_it_names(tmp_path, recwarn):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "preset: demo\nabout: mine\ntraining: {epochs: 3}\nmethod:\nmodel: {backbone_args: {layers: [1]}}\n"
        "evaluation: {neighbours: 5}\n"
    )
    mine = {"about": "mine", "training.epochs": 3, "model.backbone_args": {"layers": [1]}, "evaluation.k": 5}
    expected = load_config("demo", {**mine, "training.batch": 32})
    assert load_config(str(file), {"training.batch": 32}) == expected
    assert [str(one.message).partition(" in")[0] for one in recwarn] == ["configuration"], "the older name, once"
    file.write_text("preset: dmo\n")
    with pytest.raises(ConfigError, match=r"preset: found no preset 'dmo'; did you mean demo\?"):
        load_config(str(file))
    file.write_text("preset: 3\n")
    with pytest.raises(ConfigError, match="preset: found 3, expected a valid string"):
        load_config(str(file))


def test_the_configuration_of_a_run_takes_nothing_from_its_preset(tmp_path):
    """It may be of a version with another preset of that name, or with fewer keys."""
    whole = build_config({}, {"preset": "demo", "training.epochs": 3})
    file = tmp_path / "config.yaml"
    file.write_text(whole.to_yaml())
    assert load_config(str(file)) == whole
    older = whole.model_dump(mode="json")
    older["preset"] = "of-then"
    del older["generated"], older["method"]["count_scale"]
    assert load_values(older) == build_config({}, {"preset": "of-then", "training.epochs": 3})


def test_a_section_without_keys_has_its_defaults():
    assert build_config({"training": None, "augment": None}) == build_config({})
    assert build_config({"training": None}, {"training.epochs": 5}).training.epochs == 5
    with pytest.raises(ConfigError, match="seed: found None"):
        build_config({"seed": None})


def test_one_line_changes_the_method():
    config = load_config("synco-r50-200", {"method.name": "mochi"})
    assert config.method.negatives() == Negatives.mochi()
    assert load_config("demo", {"method.name": "moco"}).method.negatives() == Negatives.moco()
    assert load_config("fashion-mnist", {"method.name": "mochi"}).method.negatives() == Negatives.mochi(2048, 32, 16)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"method.temprature": 0.1}, "method.temprature: found an unknown key; did you mean method.temperature?"),
        ({"methd.temperature": 0.1}, "methd: found an unknown key"),
        ({"temperature": 0.1}, "temperature: found an unknown key; did you mean method.temperature?"),
        ({"augment.sizes": 3}, "augment.sizes: found an unknown key; did you mean augment.size?"),
        ({"method.name": "mocov9"}, "method.name: found 'mocov9', expected 'moco', 'mochi'"),
        ({"method.name": "sinco"}, "'simclr' or 'byol'; did you mean synco?"),
        ({"data.pipeline": "daly"}, "'dali' or 'resident'; did you mean dali?"),
        ({"q8": 3}, "q8: found an unknown key, expected one of preset, about, seed, data, augment, model"),
        ({"training.batch": "many"}, "training.batch: found 'many', expected a whole number, 1 to 1,048,576"),
        ({"optimizer.lr": "x"}, "optimizer.lr: found 'x', expected a number, above 0, up to 1,000,000"),
        ({"augment.area": ["x", 1]}, "augment.area.0: found 'x', expected a number"),
        ({"batch-size": 3}, "batch-size: found an unknown key; did you mean training.batch?"),
        ({"queue_size": 3}, "queue_size: found an unknown key; did you mean method.queue?"),
        ({"weight-decay": 3}, "weight-decay: found an unknown key; did you mean optimizer.weight_decay?"),
        ({"epoch": 3}, "epoch: found an unknown key; did you mean training.epochs?"),
        ({"method": "moco"}, "method: found 'moco', expected a section with keys; did you mean method.name?"),
        ({"training.batch": 0}, "training.batch: found 0, expected 1 to 1,048,576"),
        ({"method.temperature": 0}, "method.temperature: found 0, expected 0.0001 to 100"),
        ({"seed.x": 1}, "seed.x: found no section of that name"),
        ({"method.queue": 128}, "method.queue: found 128, expected 256 or more, the keys of one step"),
        ({"method.queue": 511, "method.symmetric": True}, "method.queue: found 511, expected 512 or more"),
        ({"method.queue": 512}, "method.hard: found 1024, expected up to 512, the queue"),
        ({"method.name": "synco", "method.hard": 0}, "method.hard: found 0, expected 1 or more"),
        ({"training.batch": 252}, "training.batch: found 252, expected a multiple of 8 (model.batch_norm_groups)"),
        ({"augment.area": [0.5, 0.1]}, "augment.area: found (0.5, 0.1)"),
        ({"augment.evaluation_resize": 223}, "augment.evaluation_resize: found 223, expected 224 (size) to 1792"),
        ({"augment.evaluation_resize": 1793}, "augment.evaluation_resize: found 1793, expected 224 (size) to 1792"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(overrides, says):
    values = {"seed": 3} if "seed.x" in overrides else {}
    with pytest.raises(ConfigError) as caught:
        build_config(values, overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_or_file(tmp_path):
    with pytest.raises(ConfigError, match=r"found no preset 'synco-r50-20'; did you mean synco-r50-200\?"):
        load_config("synco-r50-20")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="found list in"):
        load_config(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"broken.yaml, line 2, column 1: expected ',' or '\]'"):
        load_config(str(tmp_path / "broken.yaml"))


def test_every_key_is_known_by_its_dotted_name():
    keys = known_keys(Config)
    assert {"seed", "method.temperature", "augment.blur_sigma", "training.max_steps"} <= set(keys)
    plain = yaml.safe_load(build_config({}).to_yaml())
    flat = set()
    for section, inner in plain.items():
        flat |= {f"{section}.{key}" for key in inner} if isinstance(inner, dict) else {section}
    assert flat == set(keys)


def test_overrides_leave_the_values_they_start_from_alone():
    values = {"method": {"name": "moco"}}
    build_config(values, {"method.name": "mochi"})
    assert values == {"method": {"name": "moco"}}
    before = repr(PRESETS)
    load_config("demo", {"model.backbone_args": {}, "augment.size": 32})
    assert repr(PRESETS) == before


def test_a_configuration_that_is_a_folder_or_another_file_is_named_as_such(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "demo.json").touch()
    for name, says in (
        ("run", f"found the folder {tmp_path}/run, expected {tmp_path}/run/config.yaml, or --resume {tmp_path}/run"),
        ("demo.json", f"found the file {tmp_path}/demo.json, expected a preset or a file named .yaml"),
        ("none.yaml", f"cannot read {tmp_path}/none.yaml (No such file or directory)"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(str(tmp_path / name))
        assert str(caught.value) == f"config: {says}"
