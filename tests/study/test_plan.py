import pytest

from synco_fast.runtime.errors import ConfigError
from synco_fast.study.plan import plan


def test_every_combination_once_and_seed_by_seed():
    trials = plan(
        ["demo", "fashion-mnist"],
        methods=["moco", "synco"],
        seeds=[3, 4],
        vary={"training.precision": ["fp32", "bf16"], "method.temperature": [0.1]},
    )
    assert len(trials) == len({trial.name for trial in trials}) == 2 * 2 * 2 * 2
    assert [trial.seed for trial in trials] == [3] * 8 + [4] * 8
    assert trials[0].name == "demo-precision=fp32-temperature=0.1-moco-seed3"
    assert trials[0].group == ("demo", "precision fp32, temperature 0.1")


def test_a_trial_is_what_its_name_says():
    trial = plan(["demo"], methods=["moco"], seeds=[7], vary={"training.precision": ["bf16"]})[0]
    config = trial.resolved()
    assert (config.method.name, config.seed, config.training.precision) == ("moco", 7, "bf16")


def test_the_words_say_the_same_on_the_command_line():
    from synco_fast.commands.overrides import overrides_of

    shared = {"model.backbone_args": {"layers": [1, 1], "zero_init_last": False}, "data.source": "a: b", "seed": 1}
    trial = plan(["demo"], seeds=[2], overrides={key: shared[key] for key in ("data.source",)})[0]
    words = trial.words()
    assert words[:2] == ["--config", "demo"]
    assert overrides_of(words[2:]) == dict(trial.overrides)
    assert trial.overrides["data.source"] == "a: b"


def test_a_configuration_brings_its_own_method():
    assert [trial.method for trial in plan(["moco-v2-r50-200", "demo"])] == ["moco", "synco"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"configs": []}, "config: found nothing"),
        ({"seeds": [1, 1]}, "seeds: found 1 twice"),
        ({"methods": ["moco", "moco"]}, "methods: found moco twice"),
        (
            {"vary": {"training.precison": ["fp32"]}},
            "key training.precison; did you mean training.precision?",
        ),
        ({"vary": {"seed": [1, 2]}}, "seed: found it as a setting, expected --seeds"),
        ({"overrides": {"method.name": "moco"}}, "method.name: found it as a setting, expected --methods"),
        ({"vary": {"method.queue": [512]}, "overrides": {"method.queue": 512}}, "found both varied and fixed"),
        ({"methods": ["mocov9"]}, "method.name: found 'mocov9'"),
        ({"configs": ["dmo"]}, "did you mean demo"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(changes, said):
    with pytest.raises(ConfigError, match=said):
        plan(**{"configs": ["demo"], **changes})
