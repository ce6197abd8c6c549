"""Which of a run's files its figures come from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from synco_fast.report.runs import read_run
from synco_fast.runtime.files import write_json
from synco_fast.runtime.results import Result
from synco_fast.study.evaluations import Evaluation


def result(name, values, source=None, folder=None):
    return Result(name, values, source, folder)


@pytest.fixture
def run(told_run):
    return read_run(told_run({"evaluation.k": 5, "evaluation.temperature": 0.2}))


@pytest.mark.parametrize(
    ("values", "source", "expected"),
    [
        (None, None, 0.75),
        ({"temperature": 0.2, "accuracies": {"3": 0.1, "5": 0.6, "20": 0.2}}, None, 0.6),
        ({"temperature": 0.2, "accuracies": {"3": 0.1, "20": 0.2}}, None, 0.75),
        ({"temperature": 0.07, "accuracies": {"5": 0.6}}, None, 0.75),
        ({"knn": 0.5}, None, 0.5),
        ({"temperature": 0.2, "accuracies": {"5": 0.6}}, "elsewhere", 0.75),
    ],
    ids=["none", "its own k", "another k", "another temperature", "older", "other images"],
)
def test_knn_is_that_of_the_runs_own_k_temperature_and_images(run, values, source, expected):
    results = [] if values is None else [result("knn", values, source)]
    assert replace(run, results=results).knn == expected


def test_the_published_probe_comes_first_and_other_images_have_another_chance(run):
    fast, full = result("linear_fast", {"top1": 0.5}), result("linear", {"top1": 0.4})
    assert replace(run, results=[fast, full]).probe is full
    assert replace(run, results=[fast]).probe is fast
    assert replace(run, results=[replace(full, source="elsewhere")]).probe is None
    without = replace(run, summary={}, results=[result("knn", {"chance": 0.1}, "elsewhere")])
    assert without.chance is None
    assert replace(without, results=[*without.results, result("linear", {"chance": 0.2})]).chance == 0.2


def test_results_are_of_the_newest_checkpoint_and_of_the_images_evaluated_on(told_run, image_folder):
    folder = told_run({"evaluation.source": str(image_folder / "train")})
    (folder / "checkpoints" / "step-00000004.pt").touch()
    for name, step, data in (("knn", 8, "train"), ("linear", 4, "train"), ("linear_fast", 8, "")):
        values = {"evaluation": name, "step": step, "checkpoint": f"step-{step:08d}.pt", "top1": 0.5}
        write_json(folder / "evaluation" / f"{name}.json", {**values, "source": str(image_folder / data)})
    run = read_run(folder)
    assert {found.name: found.source for found in run.results} == {"knn": None, "linear_fast": str(image_folder)}
    assert run.notes == ["linear.json: skipped, since it is of step-00000004.pt, expected step 8"]
    for words, data, name in ((("knn",), None, "knn"), (("linear", "--fast"), str(image_folder), "linear_fast")):
        for given in {data, data or str(image_folder / "train")}:
            found = Evaluation(words, name, given, {}).result(run)
            assert found is not None
            assert found.name == name
    assert Evaluation(("knn",), "knn", str(image_folder), {}).result(run) is None
