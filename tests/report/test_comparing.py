import json
import shutil
from contextlib import nullcontext

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from synco_fast.cli import main
from synco_fast.evaluation.context import EvalOptions
from synco_fast.evaluation.knn import evaluate_knn
from synco_fast.report.compare import Group, compare_runs, draw_comparison, shown_figures
from synco_fast.report.runs import mean_and_deviation, read_run
from synco_fast.runtime.errors import ConfigError, UserError
from synco_fast.runtime.style import COLOURS


@pytest.mark.usefixtures("rendered")
def test_seeds_are_put_together_and_settings_apart(told_run, tmp_path):
    runs = [
        told_run({"seed": 0}, "a", knn=0.7),
        told_run({"seed": 1, "evaluation.every": 2, "training.keep_best": True}, "b", knn=0.8),
        told_run({"method.name": "moco"}, "c", knn=0.6),
        told_run({"method.name": "moco", "method.temperature": 0.1}, "d", knn=0.5),
    ]
    (runs[0] / "evaluation").mkdir()
    (runs[0] / "evaluation" / "linear.json").write_text(json.dumps({"top1": 0.9}))
    (runs[0] / "evaluation" / "linear_fast.json").write_text(json.dumps({"top1": 0.8}))
    (runs[0] / "evaluation" / "knn.json").write_text(json.dumps({"knn": 0.6}))
    (runs[1] / "evaluation").mkdir()
    (runs[1] / "evaluation" / "linear.json").write_text(json.dumps({"top1": 0.5, "epochs": 2}))
    groups = compare_runs(runs)
    assert [group.title for group in groups] == [
        "synco, temperature 0.2",
        "moco, temperature 0.2",
        "moco, temperature 0.1",
    ]
    assert groups[0].values("kNN in training") == [0.7, 0.8]
    assert groups[0].values("linear") == [0.9]
    assert groups[0].values("linear (2 epochs)") == [0.5]
    assert groups[0].values("linear, cached") == [0.8], "a column does not mix protocols"
    assert groups[0].values("kNN") == [0.6]
    assert groups[0].budget == "2 x 8"
    assert groups[1].values("linear") == []
    draw_comparison(groups, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_runs_on_other_images_have_their_own_chance(told_run, tmp_path, monkeypatch):
    runs = [told_run({"method.name": name}, name) for name in ("moco", "synco")]
    drawn = []
    line = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda *at, **how: drawn.append((at[1], how["color"])) or line(*at, **how))
    told = json.loads((runs[1] / "summary.json").read_text())
    for chance, expected in (
        (told["chance"], [(told["chance"], "gray")]),
        (0.01, [(told["chance"], COLOURS[0]), (0.01, COLOURS[1])]),
        (None, [(told["chance"], "gray")]),
    ):
        drawn.clear()
        (runs[1] / "summary.json").write_text(json.dumps(told | {"chance": chance}))
        draw_comparison(compare_runs(runs), tmp_path / "picture.png")
        assert sorted(set(drawn), key=lambda found: found[1]) == expected


def test_many_groups_are_told_apart_and_leave_the_curves_their_room(told_run, tmp_path, monkeypatch):
    run = read_run(told_run())
    groups = [Group(f"a long title of a group of runs, number {number}", (run,)) for number in range(12)]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *at, **how: drawn.append(figure))
    monkeypatch.setattr("synco_fast.report.compare.atomic_write", nullcontext)
    draw_comparison(groups, tmp_path / "picture.png")
    (figure,) = drawn
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in figure.axes[1].patches}
    assert len(looks) == 12
    figure.draw_without_rendering()
    assert figure.axes[0].get_window_extent().height > 0.6 * figure.bbox.height
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_results_of_other_images_and_of_older_checkpoints_are_not_mixed_in(
    told_run, image_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("synco_fast.report.compare.draw_comparison", lambda groups, path: None)
    run, other = told_run(), tmp_path / "two"
    shutil.copytree(image_folder, other)
    for data in (None, str(other)):
        evaluate_knn(run, EvalOptions(data=data, workers=0), k=(5,))
    group = compare_runs([run])[0]
    assert shown_figures([group]) == ["kNN in training", "kNN, k 5", f"kNN, k 5 on {other}", "images per second"]
    (run / "checkpoints" / "step-00000008.pt").rename(run / "checkpoints" / "step-00000016.pt")
    assert main(["compare", str(run), "--out", str(tmp_path / "picture.svg")]) == 0
    said = capsys.readouterr().out
    assert f"note: {run}/evaluation/knn.json: skipped, since it is of step-00000008.pt, expected step 16" in said
    assert "k 5" not in said


def test_runs_that_differ_in_many_settings_keep_short_titles(told_run):
    other = {"optimizer.lr": 0.5, "optimizer.weight_decay": 0.1, "method.temperature": 0.1, "model.momentum": 0.5}
    groups = compare_runs([told_run(name="a"), told_run({**other, "training.epochs": 3}, "b")])
    assert [group.title for group in groups] == ["synco, preset tiny, run a", "synco, preset tiny, run b"]


def test_mean_and_deviation():
    assert mean_and_deviation([]) is None
    assert mean_and_deviation([0.5]) == (0.5, 0.0)
    assert mean_and_deviation([0.4, 0.6]) == (pytest.approx(0.5), pytest.approx(0.1414, abs=1e-3))


def test_what_is_no_run(told_run, tmp_path):
    run = told_run()
    with pytest.raises(ConfigError, match="run: found no run in"):
        compare_runs([run, tmp_path])
    with pytest.raises(ConfigError, match=r"found .* twice"):
        compare_runs([run, run])
    (run / "summary.json").write_text("{")
    with pytest.raises(UserError, match="JSON that cannot be read"):
        compare_runs([run])
