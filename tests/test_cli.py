"""The commands as a person meets them: what they print and how they exit."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from synco_fast.cli import main
from synco_fast.commands.pretrain import _print_summary
from synco_fast.presets import PRESETS
from tests.support.rotation import in_turn


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def config_file(tiny, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny().to_yaml())
    return tmp_path / "tiny.yaml"


def test_pretrain_evaluate_and_resume(run, config_file, tmp_path):
    folder = tmp_path / "lr[red]=1:dog:"  # neither markup nor emoji
    summary = tmp_path / "not" / "there" / "summary.json"
    code, out, _ = run("pretrain", "--config", config_file, "--out", folder, "--json", summary, "--method.name=mochi")
    assert code == 0
    for words in ("kNN before", "kNN after", "images per second", "run folder", "checkpoint", "curves.png"):
        assert words in out
    figures = json.loads(summary.read_text())
    assert figures["method"] == "mochi"
    assert figures["environment"]["torch"]

    assert figures["checkpoint"] in out.replace(" ", "").replace("│", "").replace("\n", ""), "a path is not cut"

    code, out, _ = run("evaluate", "knn", folder, "--json", tmp_path / "knn.json")
    assert code == 0
    assert json.loads((tmp_path / "knn.json").read_text())["knn"] == figures["knn_after"]

    code, out, _ = run("pretrain", "--resume", folder, "--training.epochs", "3")
    assert code == 0
    assert "resumed from" in out
    assert "mochi on" in out

    code, _, err = run("pretrain", "--config", config_file, "--out", folder)
    assert code == 2
    assert f"--resume {folder}" in err


def test_what_a_resumed_run_is_given_is_kept_and_said(run, config_file, tmp_path):
    """But for the limits of one start; and what may not change in the middle is refused."""
    folder = tmp_path / "run"

    def kept(key: str):
        section, name = key.split(".")
        return yaml.safe_load((folder / "config.yaml").read_text())[section][name]

    words = ["--training.checkpoint_every", "1", "--evaluation.every", "0"]
    assert run("pretrain", "--config", config_file, "--out", folder, "--max-steps", "1", *words)[0] == 0
    assert (kept("training.max_steps"), kept("training.epochs"), kept("training.checkpoint_every")) == (None, 2, 1)
    code, out, _ = run("pretrain", "--resume", folder, "--training.epochs", "3", "--max-steps", "2")
    assert code == 0
    assert "changed since step-00000001.pt: training.epochs 2 -> 3" in out
    assert "resumed from" in out
    assert (kept("training.max_steps"), kept("training.epochs")) == (None, 3)
    for words, says in (
        (["--seed", "9"], "seed: found 9, expected 0 as in "),
        (["--method.name", "mochi"], "method.name: found 'mochi', expected 'synco' as in "),
        (["--method.temperature", "0.1"], "method.temperature: found 0.1, expected 0.2 as in "),
        (["--model.dim", "8"], "model.dim: found 8, expected 16 as in "),
        (["--optimizer.name", "adamw"], "optimizer.name: found 'adamw', expected 'sgd' as in "),
        (["--max-steps", "1"], "of step 2, beyond the 1 steps that are asked for"),
    ):
        code, _, err = run("pretrain", "--resume", folder, *words)
        assert code == 2
        assert says in err
        assert err.count("\n") == 1
    assert kept("training.epochs") == 3, "what was refused is not kept"
    (folder / "config.yaml").unlink()
    code, out, _ = run("pretrain", "--resume", folder, "--method.backend", "reference")
    assert code == 0
    assert "changed since step-00000002.pt: method.backend auto -> reference" in out
    assert "12 steps" in out
    assert kept("method.backend") == "reference"


def test_continue_leaves_the_config_of_another_program_alone(run, config_file, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("learning_rate: 3\n")
    code, _, err = run("pretrain", "--config", config_file, "--out", tmp_path, "--continue")
    assert code == 2
    assert f"found {file} cut short" in err
    assert "it does not begin as a run's, choose another folder" in err
    assert file.read_text() == "learning_rate: 3\n"


def test_continue_starts_anew_where_a_kill_left_no_whole_config(run, config_file, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config_file.read_text()[:300])
    code, _, err = run("pretrain", "--resume", folder)
    assert code == 2
    assert "start over, by --config with --continue or another --out" in err
    words = ["--config", config_file, "--out", folder, "--continue", "--max-steps", "1"]
    code, out, err = run("pretrain", *words, "--evaluation.every", "0")
    assert code == 0
    assert "; --continue starts over" in err
    assert "holds no checkpoint yet: starting at the first step" in out
    (folder / "config.yaml").write_text(config_file.read_text()[:300])
    code, _, err = run("pretrain", *words)
    assert code == 2
    assert ": remove it, and its settings are taken from the newest checkpoint" in err
    assert "found no run in" in run("pretrain", "--out", tmp_path / "none", "--continue")[2]


def test_presets(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("presets")
    assert code == 0
    assert all(name in out for name in PRESETS)
    code, out, _ = run("presets", "demo")
    assert code == 0
    assert "backbone: timm/resnet18" in out


def test_data_demo(run, tmp_path):
    code, out, _ = run("data", "demo", tmp_path / "set", "--train", "1", "--validation", "1")
    assert code == 0
    assert "11 classes" in out
    assert len(list((tmp_path / "set").rglob("*.jpg"))) == 22


def test_validate(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shape = ["--device", "cpu", "--rows", "3", "--length", "200", "--dim", "16", "32", "--hard", "9"]
    code, out, _ = run("validate", *shape, "--dtypes", "float32", "--json", tmp_path / "cases.json")
    assert code == 0
    assert "3, 200, 32, 9" in out
    assert "28 of 28 cases within their bounds" in out
    assert "…" not in out, "nothing is cut at 80 columns"
    assert len(json.loads((tmp_path / "cases.json").read_text())["cases"]) == 28

    from synco_fast.kernels import blockwise

    true = blockwise.contrast_and_gradient
    wrong = lambda *a, **n: (found := true(*a, **n))._replace(loss=found.loss + 1)  # noqa: E731
    monkeypatch.setattr(blockwise, "contrast_and_gradient", wrong)
    code, out, _ = run("validate", *shape, "--dtypes", "float32", "--backends", "blockwise")
    assert code == 1
    assert "7 bad" in out
    assert "14 of 14 cases missed" in out
    assert "missed blockwise torch.float32 B=3" in out
    assert run("validate", *shape, "--backends", "triton")[0] == 2
    assert "hard: found 900, expected up to 200" in run("validate", *shape[:-1], "900")[2]


@pytest.mark.slow
@in_turn(1, 3)
def test_bench_and_profile_loss(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shape = ["--device", "cpu", "--rows", "4", "--dim", "16", "--hard", "16"]
    files = ["--json", tmp_path / "loss.json", "--plot", tmp_path / "loss.png"]
    words = [
        "--backends",
        "released",
        "blockwise",
        "--repeats",
        "2",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--length",
        "256",
    ]
    code, out, _ = run("bench", "loss", *shape, *words, *files)
    assert code == 0
    assert "1.00x" in out
    figures = json.loads((tmp_path / "loss.json").read_text())
    assert {result["backend"] for result in figures["results"]} == {"released", "blockwise"}
    assert figures["environment"]["torch"]
    assert (tmp_path / "loss.png").exists()
    assert run("bench", "loss", *shape, "--backends", "triton")[0] == 2

    trace = tmp_path / "trace.json"
    code, out, _ = run(
        "profile", "loss", *shape, "--length", "256", "--trace", trace, "--json", tmp_path / "lines.json"
    )
    assert code == 0
    assert "aten::mul" in out
    assert trace.exists()
    assert json.loads((tmp_path / "lines.json").read_text())["lines"]
    assert "found no folder" in run("profile", "loss", *shape, "--trace", tmp_path / "no" / "trace.json")[2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config", "snyco-r50-200"], "did you mean synco-r50-200?"),
        (
            ["--config", "synco-r50-200"],
            "data: found none, expected --data SOURCE: the preset synco-r50-200 names no images",
        ),
        (["--config", "demo", "--method.temprature", "1"], "did you mean method.temperature?"),
        (["--config", "demo", "--data", "/no/such/folder"], "found no folder /no/such/folder"),
        (["--config", "demo", "--data", "gone"], "found no folder gone in /"),
        (["--config", "demo", "--method.queue", "32"], "method.queue: found 32, expected 64 or more"),
        (["--config", "demo", "--method.queue"], "--method.queue: found no value"),
        (["--config", "demo", "stray"], "found 'stray'"),
        (["--config", "demo", "--training.device", "cuda"], "found cuda, expected cpu"),
        (["--resume", "/no/run"], "found no run in /no/run"),
        ([], "found none, expected --config PRESET"),
        (["--config", "demo", "--out", ""], "out: found '', expected the name of a file or folder"),
        (["--config", "demo", "--out", "l\udce4ufe"], "out: found 'l\\udce4ufe', a name that is not UTF-8"),
        (["--config", "demo", "--out=~nobody-here/run"], "out: found '~nobody-here/run', whose user is not here"),
        (["--config", "demo", "--out", "a\nb"], "out: found 'a\\nb', expected the name of a file or folder"),
        (["--config", "demo", "--resume", " "], "resume: found ' ', expected the name of a file or folder"),
        (["--config", "demo", "--out", "/etc/hostname/run"], "below /etc/hostname, which is a file"),
        (["--config", "demo", "--out", "/proc/run"], "expected a place where this user can write (/proc is not)"),
        (["--config", "demo", "--json", "/proc/a.json"], "expected a place where this user can write (/proc is not)"),
        (["--config", "demo", "--json", "/etc/hostname/a.json"], "below /etc/hostname, which is a file"),
        (["--config", "demo", "--json", "/tmp"], "json: found a folder /tmp, expected a file"),
    ],
)
def test_bad_input_is_one_line_and_code_2(run, words, says, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, _, err = run("pretrain", *words)
    assert code == 2
    assert says in err
    assert err.strip().count("\n") == 0
    assert "Traceback" not in err


def test_a_run_takes_no_images_whose_name_a_configuration_cannot_keep(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l\udce4ufe" / "cat").mkdir(parents=True)
    code, _, err = run("pretrain", "--config", "demo", "--data", "l\udce4ufe")
    assert code == 2
    assert "data.source: found 'l\\udce4ufe', a name that is not UTF-8" in err
    assert not (tmp_path / "runs").exists()


def test_the_folder_of_a_run_without_a_name_is_checked_too(run, config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    code, _, err = run("pretrain", "--config", config_file)
    assert code == 2
    assert f"below {tmp_path / 'runs'}, which is a file, expected a folder" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data", "demo", "FILE"], "folder: found a file FILE, expected a folder"),
        (["profile", "step", "--out", "FILE"], "out: found a file FILE, expected a folder"),
        (["bench", "data", "--folder", "FILE"], "folder: found a file FILE, expected a folder"),
        (["bench", "loss", "--rows", "0"], "rows: found 0, expected 1 or more; see 'synco-fast bench loss --help'"),
        (["data", "show", "demo", "--epoch", "-1"], "epoch: found -1, expected 0 or more; see"),
        (["data", "pack", "demo", "pack", "--quality", "101"], "quality: found 101, expected 1 to 100; see"),
        (["study", "demo", "--seeds", "a", "--out", "study"], "seeds: found 'a', expected a whole number; see"),
    ],
)
def test_wrong_values_of_arguments_are_one_line(run, words, says, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    code, _, err = run(*(str(file) if word == "FILE" else word for word in words))
    assert code == 2
    assert err.startswith(f"error: {says.replace('FILE', str(file))}")
    assert err.count("\n") == 1


def test_a_run_that_cannot_start_leaves_no_folder(run, config_file, tmp_path):
    code, _, _ = run("pretrain", "--config", config_file, "--data", "/no/such/folder", "--out", tmp_path / "run")
    assert code == 2
    assert not (tmp_path / "run").exists()


def test_a_command_of_one_process_runs_on_rank_0(run, config_file, tmp_path, monkeypatch):
    """Every rank of a job would compute the same, and write the same file."""
    run("pretrain", "--config", config_file, "--out", tmp_path / "run", "--training.max_steps", "1")
    for rank, files in (("1", []), ("0", ["a.npz"])):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(name, value)
        code, out, err = run("embed", tmp_path / "run", "--out", tmp_path / "new" / "a.npz")
        assert (code, err) == (0, "")
        assert bool(out) == bool(files)
        assert [path.name for path in (tmp_path / "new").glob("*")] == files
    code, _, err = run("study", "demo", "--out", tmp_path / "study")
    assert code == 2
    assert err == "error: processes: found 2, expected 1 for a study: it starts one for each of its runs\n"


def test_a_killed_worker_is_one_line(run, config_file, tmp_path, monkeypatch):
    def killed(*arguments, **options):
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")

    monkeypatch.setattr("synco_fast.training.run.loop.Trainer.run", killed)
    code, _, err = run("pretrain", "--config", config_file, "--out", tmp_path / "run")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: data.workers: found a worker process that was killed (Killed)")


def test_divergence_on_the_command_line(run, config_file, tmp_path):
    bad = ["--optimizer.lr", "1e6", "--optimizer.weight_decay", "100"]
    code, _, err = run("pretrain", "--config", config_file, "--out", tmp_path / "run", *bad)
    assert code == 2
    assert "training diverged: non-finite gradients from step" in err


def test_other_words_are_refused(run):
    assert run("presets", "--colour")[0] == 2
    assert run("dance")[0] == 2
    assert run("--help")[0] == 0
    for command in (
        ["pretrain"],
        ["presets"],
        ["evaluate", "knn"],
        ["data", "demo"],
        ["validate"],
        ["bench", "loss"],
        ["profile", "loss"],
    ):
        code, out, _ = run(*command, "--help")
        assert code == 0
        assert "example:" in out


def test_data_check(run, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    assert run("data", "check", image_folder, "--workers", "1")[0] == 0
    (image_folder / "val" / "class1" / "3.jpg").write_bytes(b"")
    code, out, _ = run("data", "check", image_folder, "--workers", "1", "--json", tmp_path / "check.json")
    assert code == 1
    assert "val/class1/3.jpg: the file is empty" in out
    assert "manifest, training" in out
    assert "manifest, held-out" in out
    assert "1 (2.22%)" in out
    figures = json.loads((tmp_path / "check.json").read_text())
    assert (figures["images"], len(figures["corrupt"]), len(figures["lists"])) == (45, 1, 2)
    assert run("data", "check", tmp_path / "nowhere")[0] == 2


def test_data_show(run, image_folder, tmp_path):
    out_file = tmp_path / "pairs.png"
    words = ["--augment.size", "24", "--data.workers", "0", "--training.device", "cpu", "--out", out_file]
    code, out, _ = run("data", "show", image_folder, "--pairs", "5", *words)
    assert code == 0
    assert "5 pairs of 33 images by torchvision on cpu" in out
    assert out_file.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("data", "show", image_folder, *words, "--data.pipeline", "resident")
    assert "by resident on cpu" in out
    code, _, error = run("data", "show", image_folder, "--augment.siz", "24")
    assert code == 2
    assert "did you mean augment.size?" in error


@pytest.mark.slow
@in_turn(0, 3)
def test_bench_data(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = ["--photos", "3", "--folder", tmp_path, "--batch", "2", "--seconds", "1", "--rounds", "1", "--workers", "0"]
    code, out, _ = run("bench", "data", *words, "--device", "cpu", "--json", tmp_path / "data.json")
    assert code == 0
    assert "1.00x" in out
    figures = json.loads((tmp_path / "data.json").read_text())
    assert {result["pipeline"] for result in figures["results"]} >= {"pil", "torchvision", "resident-32"}
    assert all(result["images_per_second"] > 0 for result in figures["results"])
    assert 50 < figures["kilobytes"] < 200


def test_a_shell_gets_completions(tmp_path):
    pytest.importorskip("argcomplete")
    found = tmp_path / "found"
    # What argcomplete's shell function sets: the line, the cursor's place in it, and where the answer goes.
    shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(found), "_ARGCOMPLETE_IFS": " "}
    line = "synco-fast bench st"
    done = subprocess.run(
        [sys.executable, "-m", "synco_fast"],
        env={**os.environ, **shell, "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert found.read_text().split() == ["step"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrian"], "COMMAND: found 'pretrian', expected pretrain, "),
        (["pretrian"], "; did you mean pretrain?; see 'synco-fast --help'"),
        (["evaluate", "kn"], "found 'kn', expected knn, linear, finetune, detection; did you mean knn?; see"),
        (["export", "run", "--format", "tim"], "did you mean timm?"),
        (
            ["evaluate", "knn", "run", "--temperture", "1"],
            "the unknown argument --temperture; did you mean --temperature?",
        ),
        (["presets", "--xyzzy"], "the unknown argument --xyzzy; see 'synco-fast presets --help'"),
    ],
)
def test_a_wrong_word_is_answered_by_the_nearest_one(words, said, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("epochs", "title"), [(0.450855, "0.45 epochs"), (1.0, "1 epoch"), (199.5, "199.5 epochs"), (24.0, "24 epochs")]
)
def test_the_closing_table_counts_epochs_as_people_do(epochs, title):
    known = dict.fromkeys(("knn_before", "knn_after", "chance"), 0.5) | {"finished": True, "forms": {}}
    known |= dict.fromkeys(("images_per_second", "data_wait", "training_seconds", "steps", "corrupt_images"), 0)
    known |= dict.fromkeys(("run", "checkpoint", "curves", "pairs"), "x")
    known |= {"best": None, "feature_rank": None, "images_per_second_by_size": {}}
    out = io.StringIO()
    _print_summary(SimpleNamespace(method="synco", source="demo", epochs=epochs, **known), Console(file=out, width=80))
    assert out.getvalue().splitlines()[0].strip() == f"synco on demo: {title}"
    assert "images per second │ not measured" in out.getvalue(), "too few steps to time"


def test_help_says_every_default(capsys):
    for words, says in (
        ("data demo", "training images per class; 200 by default"),
        ("data show", "pairs to draw, 24 by default\n"),
        ("compare", "the picture to write; comparison.png by default"),
    ):
        with pytest.raises(SystemExit):
            main([*words.split(), "--help"])
        assert says in capsys.readouterr().out


def test_a_name_that_the_terminal_s_encoding_lacks_is_escaped(tmp_path, monkeypatch):
    """In a locale without UTF-8 the table at the end of a run was a traceback."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["data", "demo", str(tmp_path / "größe"), "--train", "1", "--validation", "1"]) == 0
    sys.stdout.flush()
    assert rb"gr\xf6\xdfe" in raw.getvalue().replace(b"\n", b"")
