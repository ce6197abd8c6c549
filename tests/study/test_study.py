"""Whole studies on a set that trains in seconds."""

import json
import os
import signal
import time

import pytest
import yaml

from synco_fast.cli import main
from synco_fast.commands.evaluations import parse_evaluations, parse_supervised
from synco_fast.report.runs import read_run
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.files import write_json
from synco_fast.study.execute import execute, run_folder, state_of
from synco_fast.study.plan import plan
from synco_fast.study.results import collect, student_t
from synco_fast.study.write import draw_learning_curves, page, write_record
from tests.support.rotation import in_turn

from ..conftest import TINY

#: More than can be done before a test interrupts it, without the measurements of a long run.
LONG = {"training.epochs": 2000, "training.engine": "eager", "data.pipeline": "torchvision"}


@pytest.fixture
def tiny(tmp_path, image_folder):
    file = tmp_path / "tiny.yaml"
    values = {**TINY, "data": {**TINY["data"], "source": str(image_folder)}}
    del values["preset"]
    file.write_text(yaml.safe_dump(values))
    return str(file)


def pretend(folder, trial, accuracy, finished=True, **results):
    """A run folder as a run leaves it."""
    run = run_folder(folder, trial)
    (run / "evaluation").mkdir(parents=True)
    (run / "config.yaml").write_text(trial.resolved().to_yaml())
    lines = [{"kind": "evaluation", "step": e, "epoch": e, "knn": accuracy * e / 2} for e in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(run / "summary.json", {"knn_before": 0.1, "knn_after": accuracy, "finished": finished, "chance": 0.05})
    for name, values in results.items():
        write_json(run / "evaluation" / f"{name}.json", values)


def test_means_spread_and_paired_differences(tmp_path):
    trials = plan(["demo"], methods=["moco", "synco"], seeds=[0, 1, 2])
    moco, synco = {0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.52, 1: 0.61}
    for trial in trials:
        values = moco if trial.method == "moco" else synco
        if trial.seed in values:
            pretend(tmp_path, trial, values[trial.seed], knn={"accuracies": {"20": 0.3}})
    study = collect(tmp_path, trials)
    assert study.figures == ["kNN in training", "kNN, k 20"]
    assert study.rows[0].summary("kNN in training") == pytest.approx((0.6, 0.1))
    found = next(row for row in study.differences if row.figure == "kNN in training")
    assert (found.method, found.baseline) == ("synco", "moco")
    assert found.values == pytest.approx({0: 0.02, 1: 0.01}), "seed 2 has no partner"
    assert found.mean == pytest.approx(0.015)
    assert found.error == pytest.approx(found.deviation / 2**0.5) == pytest.approx(0.005)
    assert found.interval == pytest.approx((0.015 - 12.706 * 0.005, 0.015 + 12.706 * 0.005), abs=1e-5)
    assert study.missing == ("demo-synco-seed2",)
    text = page(study, "synco-fast study")
    assert "| moco | 0, 1, 2 | 10.0% ± 0.0 | 60.0% ± 10.0 | 30.0% ± 0.0 |" in text
    assert "| synco - moco | kNN in training | +1.5 | 0.7 | 0.5 | -4.9 to +7.9 | 2 | +2.0, +1.0 |" in text
    assert "Not finished: demo-synco-seed2." in text
    assert "| moco | kNN in training | 50.0% | 70.0% | 0: 50.0%, 1: 60.0%, 2: 70.0% |" in text


def test_one_seed_has_no_deviation(tmp_path):
    trials = plan(["demo"], methods=["moco", "synco"], seeds=[0])
    for trial, accuracy in zip(trials, (0.5, 0.52), strict=True):
        pretend(tmp_path, trial, accuracy)
    assert "| synco - moco | kNN in training | +2.0 |  |  |  | 1 | +2.0 |" in page(collect(tmp_path, trials), "study")


def test_students_t_is_that_of_the_tables():
    for freedom, expected in {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423}.items():
        assert student_t(freedom) == pytest.approx(expected, abs=1e-4)


def test_each_panel_of_the_curves_has_the_chance_of_its_images(tmp_path, monkeypatch):
    trials = plan(["demo"], methods=["moco"], seeds=[0], vary={"data.source": ["one", "two"]})
    for trial, chance in zip(trials, (0.5, 0.25), strict=True):
        pretend(tmp_path, trial, 0.6)
        summary = run_folder(tmp_path, trial) / "summary.json"
        write_json(summary, {**json.loads(summary.read_text()), "chance": chance})
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.axhline", lambda axes, y, **how: drawn.append((axes.get_title(), y)))
    draw_learning_curves(collect(tmp_path, trials), trials, tmp_path / "curves.png")
    assert [chance for _, chance in drawn] == [0.5, 0.25]
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axes, title, **how: titles.append(title))
    long = plan(["demo"], methods=["moco"], seeds=[0], vary={"data.source": ["a folder of images " * 9, "two"]})
    draw_learning_curves(collect(tmp_path, long), long, tmp_path / "curves.png")
    assert max(map(len, titles[0].splitlines())) <= 54


def test_methods_are_compared_in_a_setting_and_settings_in_a_method(tmp_path):
    trials = plan(["demo"], methods=["moco", "synco"], seeds=[0], vary={"training.precision": ["fp32", "bf16"]})
    figures = dict(zip([trial.name for trial in trials], (0.5, 0.6, 0.7, 0.9), strict=True))
    for trial in trials:
        pretend(tmp_path, trial, figures[trial.name])
    study = collect(tmp_path, trials, baseline="synco")
    assert {(row.setting, round(row.mean, 3)) for row in study.differences} == {
        ("precision fp32", -0.1),
        ("precision bf16", -0.2),
    }
    assert study.differences[0].error is None
    assert {(row.method, row.setting, row.baseline, round(row.mean, 3)) for row in study.setting_differences} == {
        ("moco", "precision bf16", "precision fp32", 0.2),
        ("synco", "precision bf16", "precision fp32", 0.3),
    }
    text = page(study, "synco-fast study")
    assert "| precision fp32 | moco - synco | kNN in training | -10.0 |  |  |  | 1 | -10.0 |" in text
    assert "| synco | precision bf16 - precision fp32 | kNN in training | +30.0 |  |  |  | 1 | +30.0 |" in text


def test_settings_are_compared_within_a_configuration(tmp_path):
    trials = plan(["demo", "fashion-mnist"], methods=["moco"], seeds=[0], vary={"training.precision": ["fp32", "bf16"]})
    for trial, accuracy in zip(trials, (0.5, 0.6, 0.1, 0.4), strict=True):
        pretend(tmp_path, trial, accuracy)
    found = collect(tmp_path, trials).setting_differences
    assert {(row.config, row.baseline, round(row.mean, 3)) for row in found} == {
        ("demo", "precision fp32", 0.1),
        ("fashion-mnist", "precision fp32", 0.3),
    }


def test_settings_that_concern_training_share_an_untrained_encoder():
    vary = {"method.count_scale": [0.5, 1.0], "augment.size": [16, 32]}
    trials = plan(["demo"], methods=["moco", "synco"], seeds=[0, 1], vary=vary, untrained=True)
    bounds = [trial for trial in trials if not trial.trained]
    assert [(trial.seed, dict(trial.setting)) for trial in bounds] == [
        (seed, {"augment.size": size}) for seed in (0, 1) for size in (16, 32)
    ]
    assert {trial.resolved().training.max_steps for trial in bounds} == {0}
    assert len(trials) == len(bounds) + 16


def test_settings_without_synthetic_negatives_are_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("synco_fast.study.execute.execute", lambda *given, **more: None)
    words = ["study", "demo", "--methods", "moco", "synco", "--training.epochs", "3", "--out", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("no synthetic negatives in the whole run of 3 epochs") == 1, "not for each seed"
    assert "synco: no synthetic" in said
    assert main([*words, "--table"]) == 2, "nothing has run"
    assert "no synthetic negatives" not in capsys.readouterr().out


def test_untrained_and_supervised_rows_are_bounds_and_no_baseline(tmp_path):
    trials = plan(["demo"], methods=["moco", "synco"], seeds=[0], untrained=True)
    assert [trial.method for trial in trials] == ["untrained", "moco", "synco"]
    for trial, accuracy in zip(trials, (0.1, 0.5, 0.52), strict=True):
        labelled = {} if trial.trained else {"finetune_100": {"top1": 0.9}}
        pretend(tmp_path, trial, accuracy, linear_fast={"top1": accuracy}, **labelled)
    study = collect(tmp_path, trials, supervised=parse_supervised("finetune --percent=100.0", ()))
    assert [row.method for row in study.rows] == ["untrained", "moco", "synco", "supervised"]
    assert study.rows[-1].values == {"100 % labels": {0: 0.9}}
    assert "100 % labels" not in study.rows[0].values
    found = {(row.method, row.figure): row.mean for row in study.differences}
    assert found["untrained", "linear, cached"] == pytest.approx(-0.4)
    assert {row.baseline for row in study.differences} == {"moco"}
    assert "| supervised | 0 |  |  |  | 90.0% |" in page(study, "synco-fast study")


@pytest.mark.parametrize(
    ("words", "name", "options"),
    [
        ("knn --k 5 20 --workers 0", "knn", {"k": [5, 20]}),
        ("linear --epochs 3 --fast", "linear_fast", {"fast": True, "epochs": 3}),
        ("finetune --percent=10", "finetune_10", {"percent": 10.0}),
        ("finetune --perc 10.0 --device cpu", "finetune_10", {"percent": 10.0}),
        ("finetune --list FILE", "finetune_some", {"list": "FILE"}),
        ("detection --data voc:there --steps 3", "detection_voc", {"steps": 3}),
    ],
)
def test_the_words_of_an_evaluation_are_read_by_its_own_subcommand(tmp_path, words, name, options):
    file = tmp_path / "some.txt"
    file.write_text("0\n")
    found = parse_evaluations([words.replace("FILE", str(file))])[0]
    assert found.name == name
    assert found.options == {key: str(file) if value == "FILE" else value for key, value in options.items()}


def test_a_result_counts_as_done_by_its_options_and_its_checkpoint(tmp_path):
    """One that does not say how it was made counts, as in folders of older versions."""
    trial = plan(["demo"], seeds=[0])[0]
    result = {"top1": 0.4, "epochs": 1, "checkpoint": "x/checkpoints/step-00000020.pt", "source": "demo"}
    pretend(tmp_path, trial, 0.5, linear_fast=result)
    run = run_folder(tmp_path, trial)
    short, long = (parse_evaluations([f"linear --fast --epochs {epochs}"])[0] for epochs in (1, 30))
    assert long.done(read_run(run))
    assert not long.told(read_run(run))
    short.remember(read_run(run))
    assert short.done(read_run(run))
    assert not long.done(read_run(run))
    study = collect(tmp_path, [trial], evaluations=[long])
    assert study.missing == (f"{trial.name}, linear --fast --epochs 30",)
    assert study.figures == ["kNN in training", "linear, cached (1 epoch)"]
    elsewhere = parse_evaluations([f"linear --fast --epochs 1 --data {tmp_path}"])[0]
    assert not elsewhere.done(read_run(run)), "its images are others"
    write_json(run / "summary.json", {"finished": True, "steps": 40})
    assert not short.done(read_run(run)), "the run has gone on"
    study = collect(tmp_path, [trial], evaluations=[short])
    assert "of step-00000020.pt, expected step 40" in study.notes[0]


def test_studies_of_other_methods_share_an_untrained_encoder(tmp_path):
    first = plan(["demo"], methods=["moco"], untrained=True)[0]
    pretend(tmp_path, first, 0.1)
    other = {"training.epochs": 3, "method.temperature": 0.5}
    for trial in plan(["demo"], methods=["simclr", "synco"], overrides=other, untrained=True)[:1]:
        assert (trial.name, state_of(tmp_path, trial)) == (first.name, "finished")
    for trial in plan(["demo"], overrides={"augment.size": 16}, untrained=True)[:1]:
        with pytest.raises(ConfigError, match=r"another augment\.size than this study"):
            state_of(tmp_path, trial)


def test_an_encoder_that_was_not_trained_on_labels_is_missing(tmp_path):
    trials = plan(["demo"], seeds=[0, 1], untrained=True)
    for trial in trials:
        results = {"finetune_100": {"top1": 0.9}} if (trial.trained, trial.seed) == (False, 0) else {}
        pretend(tmp_path, trial, 0.5, **results)
    study = collect(tmp_path, trials, supervised=parse_supervised("finetune --percent 100", ()))
    assert study.missing == ("demo-untrained-seed1, finetune --percent 100",)
    assert "Not finished: demo-untrained-seed1, finetune --percent 100." in page(study, "synco-fast study")
    assert not collect(tmp_path, trials).missing


def test_a_record_names_the_commits_of_all_runs(tmp_path):
    trials = plan(["demo"], methods=["moco", "synco"], seeds=[0, 1])
    for trial, commit in zip(trials, ("a1", "a1", "b2", "a1"), strict=True):
        pretend(tmp_path, trial, 0.5)
        write_json(run_folder(tmp_path, trial) / "environment.json", {"device": "CPU", "cores": 2, "commit": commit})
    write_record(tmp_path / "record", trials, collect(tmp_path, trials), "synco-fast study")
    assert json.loads((tmp_path / "record" / "study.json").read_text())["environment"]["commit"] == "a1, b2"
    assert "Measured on CPU, 2 cores; commit a1, b2." in (tmp_path / "record" / "README.md").read_text()


def test_a_readme_that_is_not_of_a_study_stays(tmp_path, capsys):
    """As in the folder of a project, by ``--out .``."""
    readme = tmp_path / "README.md"
    readme.write_text("# My project\n")
    pretend(tmp_path, plan(["demo"], seeds=[0])[0], 0.9)
    words = ["study", "demo", "--seeds", "0", "--table", "--out", str(tmp_path)]
    assert main(words) == 2
    assert f"record: found a README.md in {tmp_path} but no study.json" in capsys.readouterr().err
    assert readme.read_text() == "# My project\n"
    for _ in range(2):
        assert main([*words, "--record", str(tmp_path / "record")]) == 0


def test_a_table_without_runs_is_refused(tmp_path, capsys):
    assert main(["study", "demo", "--seeds", "0", "--table", "--out", str(tmp_path / "typo")]) == 2
    assert "table: found no finished run of this study in" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_a_run_that_is_not_finished_does_not_count(tmp_path):
    trials = plan(["demo"], seeds=[0])
    pretend(tmp_path, trials[0], 0.9, finished=False)
    study = collect(tmp_path, trials)
    assert study.missing == (trials[0].name,)
    assert study.rows[0].summary("kNN in training") is None
    assert state_of(tmp_path, trials[0]) == "begun"


def test_another_study_in_the_same_folder_is_refused(tmp_path, capsys):
    trials = plan(["demo"], seeds=[0])
    pretend(tmp_path, trials[0], 0.9)
    code = main(["study", "demo", "--seeds", "0", "--out", str(tmp_path), "--training.epochs", "3"])
    assert code == 2
    assert "with another training.epochs than this study asks for" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vary", "training.precision"], "vary: found 'training.precision', expected KEY=A,B"),
        (["--baseline", "mochi"], "baseline: found mochi, expected one of synco"),
        (["--training.epoch", "3"], "training.epoch: found an unknown key"),
        (["--supervised", "linear"], "supervised: found 'linear', expected 'finetune --percent N'"),
        (["--supervised", "finetune --percent 0"], "supervised 'finetune --percent 0': percent: found 0, expected"),
        (["--evaluate", "linaer --fast"], "evaluate 'linaer --fast': COMMAND: found 'linaer', expected knn"),
        (["--evaluate", "linear --epoch 3 --slow"], "found the unknown argument --slow"),
        (["--evaluate", "linear --epochs 0"], "evaluate 'linear --epochs 0': epochs: found 0, expected 1 or more"),
        (["--evaluate", "knn --out x"], "out: found one, expected none: each result goes into its run's folder"),
        (["--evaluate", "detection"], "data: found none, expected voc:FOLDER or coco:FOLDER"),
        (["--evaluate", "finetune --list none.txt"], "list: cannot read none.txt"),
        (["--evaluate", "knn", "--evaluate", "knn --k 5"], "found 'knn' and 'knn --k 5', expected one: both write knn"),
        (["--evaluate", "finetune", "--supervised", "finetune --lr 1"], "expected one: both write finetune_1.json"),
        (["--evaluate", "'"], "found words that cannot be split"),
        (["--evaluate", "knn --help"], "found a call for help"),
    ],
)
def test_bad_words_end_with_one_line(tmp_path, capsys, words, said):
    assert main(["study", "demo", "--seeds", "0", "--out", str(tmp_path / "s"), *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@in_turn(1, 3)
@pytest.mark.usefixtures("rendered")
def test_a_study_runs_resumes_and_leaves_finished_runs_alone(tmp_path, tiny, capsys):
    folder = tmp_path / "study"
    words = ["study", tiny, "--methods", "moco", "synco", "--seeds", "0", "--out", str(folder), "--parallel", "2"]
    tuned = "finetune --percent 100 --lr 0.1 --epochs 1 --batch 8 --workers 0"
    assert main([*words, "--evaluate", "knn --k 3 --workers 0", "--supervised", tuned]) == 0
    capsys.readouterr()
    record = json.loads((folder / "study.json").read_text())
    assert [row["method"] for row in record["rows"]] == ["untrained", "moco", "synco", "supervised"]
    assert record["missing"] == []
    assert list(record["rows"][-1]["figures"]) == ["100 % labels (1 epoch, batch 8, lr 0.1)"]
    assert len(record["differences"]) >= 1
    assert (folder / "curves.png").stat().st_size > 1000
    runs = sorted(folder.glob("runs/*-seed0"))
    assert all((run / "evaluation" / "knn.json").is_file() for run in runs)
    before = [(run / "summary.json").stat().st_mtime_ns for run in runs]
    (runs[1] / "summary.json").unlink()
    assert main([*words, "--supervised", tuned]) == 0
    after = [(run / "summary.json").stat().st_mtime_ns for run in runs]
    assert after[0] == before[0], "what is finished is not run again"
    assert json.loads((folder / "study.json").read_text())["rows"] == record["rows"], "and what is run again agrees"


@pytest.mark.slow
def test_an_interrupted_study_leaves_runs_that_go_on(tmp_path, tiny):
    """The second trial's start interrupts the study while the first one trains."""
    trials = plan([tiny], methods=["moco", "synco"], seeds=[0], overrides=LONG)
    first = run_folder(tmp_path, trials[0])

    def interrupt(line):
        if line.startswith(trials[1].name):
            deadline = time.monotonic() + 120
            while not list(first.glob("checkpoints/*.pt")) and time.monotonic() < deadline:
                time.sleep(0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, trials, parallel=2, note=interrupt)
    assert state_of(tmp_path, trials[0]) == "begun"
    assert json.loads((first / "summary.json").read_text())["finished"] is False
    assert state_of(tmp_path, trials[1]) == "new"


def test_sigterm_interrupts_as_ctrl_c_does(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        "synco_fast.study.execute.execute", lambda *words, **options: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert main(["study", "demo", "--seeds", "0", "--out", str(tmp_path / "study")]) == 130
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@in_turn(2, 3)
def test_a_failing_trial_is_named_and_the_others_run(tmp_path, tiny, capsys):
    folder = tmp_path / "study"
    trials = plan([tiny], methods=["moco", "synco"], seeds=[0])
    run_folder(folder, trials[0]).parent.mkdir(parents=True)
    run_folder(folder, trials[0]).write_text("in the way")
    assert main(["study", tiny, "--methods", "moco", "synco", "--seeds", "0", "--out", str(folder)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "tiny" in said
    assert "ended with exit code 2" in said
    assert (run_folder(folder, trials[1]) / "summary.json").is_file()
    notes: list[str] = []
    execute(folder, trials[1:], note=notes.append)
    assert notes == [], "nothing is left to do for the other"
