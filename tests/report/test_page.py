"""The report, read as a file and looked at in a browser."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from synco_fast.evaluation.context import EvalOptions, open_context
from synco_fast.report import figures, gallery
from synco_fast.report.figures import draw_confusion, draw_map
from synco_fast.report.gallery import flatten, look_around
from synco_fast.report.page import write_report
from synco_fast.runtime.errors import ConfigError

BROWSER = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)


@pytest.fixture
def page(told_run):
    folder = told_run(probe=True)
    (folder / "plots" / "pairs.png").write_bytes(PIXEL)
    return write_report(folder, options=EvalOptions(workers=0))


#: One gray pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c63680000008200814fd342250000000049454e44ae426082"
)


def test_everything_is_inside(page):
    text = page.read_text()
    for words in (
        "Top-1: positive nearer than the negatives",
        "Hardness: cosine to the query",
        "Throughput, images per second",
        "Time spent waiting for data",
        "kNN accuracy on the held-out split",
        "Pairs of views",
        "Map of the embedding",
        "t-SNE of the frozen features",
        "Confusion matrix of the linear probe",
        "linear top-1, cached features",
        "backbone: timm/resnet18",
        f"<td>{torch.__version__.split('+')[0]}",
    ):
        assert words in text, words
    assert not re.search(r"(src|href)=\"(?!data:)", text), "nothing is asked of the network"
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert text.count('<div class="sheet">') == 10
    assert text.count('<figure class="right">') + text.count('<figure class="wrong">') == 50


def test_neighbours_are_marked_by_class(told_run):
    context = open_context(told_run(), EvalOptions(workers=0))
    found = look_around(context, queries=6, neighbours=4)
    assert [sheet.label for sheet in found.sheets] == ["class0", "class1", "class2"] * 2
    for sheet in found.sheets:
        assert all(one.right == (one.label == sheet.label) for one in sheet.neighbours)
        similarities = [one.similarity for one in sheet.neighbours]
        assert similarities == sorted(similarities, reverse=True)
    assert 0 <= found.right <= 1


def test_a_neighbours_picture_is_that_of_its_number(told_run, monkeypatch):
    """Of a bank that is a part of the training images, rows and numbers differ."""
    context = open_context(told_run(), EvalOptions(workers=0))
    monkeypatch.setattr(gallery, "_thumbnail", lambda split, number: (split is context.train, number))
    found = look_around(context, queries=3, neighbours=2, bank=7, map=6)
    names = context.train.classes
    for sheet in found.sheets:
        for (trained, number), label, split in (
            (sheet.picture, sheet.label, context.held_out),
            *((near.picture, near.label, context.train) for near in sheet.neighbours),
        ):
            assert trained == (split is context.train)
            assert names[split.labels[number]] == label
    assert {near.picture[1] for sheet in found.sheets for near in sheet.neighbours} <= {n * 33 // 7 for n in range(7)}


def test_rows_of_the_confusion_are_true_classes(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_svg", lambda figure: drawn.append(figure.axes[0]) or "")
    draw_confusion([[3, 1], [0, 0]], ["a", "b"])
    (axes,) = drawn
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert [(text.get_position(), text.get_text()) for text in axes.texts] == [((0, 0), "75"), ((1, 0), "25")]


def test_the_map_needs_no_extra_package(monkeypatch):
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    points, by = flatten(features)
    assert (points.shape, by) == ((40, 2), "t-SNE")
    monkeypatch.setattr(gallery.importlib.util, "find_spec", lambda name: None)
    points, by = flatten(features)
    assert (points.shape, by) == ((40, 2), "principal components")


@pytest.mark.parametrize("features", [torch.zeros(30, 6), torch.eye(6)[:1].repeat(30, 1), torch.randn(1, 6)])
def test_a_collapsed_encoder_and_a_single_image_have_a_map(monkeypatch, features):
    monkeypatch.setattr("sklearn.manifold.TSNE", None)  # it ends the process on such features
    points, by = flatten(features)
    assert (points.shape, by) == ((len(features), 2), "principal components")
    assert points.abs().max() < 1e-6
    assert "svg" in draw_map(points, torch.zeros(len(points), dtype=torch.int64), ["one"], "map")


def test_what_is_missing_is_named(told_run, image_folder):
    folder = told_run({"data.source": str(image_folder)})
    shutil.rmtree(image_folder)
    text = write_report(folder).read_text()
    assert f"found no folder {image_folder}" in html.unescape(text)
    assert f"synco-fast evaluate linear {folder} --fast" in text
    assert "holds no plots/pairs.png" in text
    with pytest.raises(ConfigError, match="found no run in"):
        write_report(folder / "plots")


def test_an_older_checkpoint_and_other_images_do_not_pass_for_the_run(told_run, monkeypatch):
    monkeypatch.setattr("synco_fast.report.page.draw_run", lambda run: {})
    nothing = {"gallery": None, "map": None, "map_by": None, "missing": ""}
    monkeypatch.setattr("synco_fast.report.page._gallery", lambda folder, options: nothing)
    folder = told_run()
    (folder / "evaluation").mkdir()
    own = {"headline": {"kNN, k 20": 0.99}, "knn": 0.99, "accuracies": {"20": 0.99}, "chance": 0.5}
    for name, values in {
        "knn": own | {"source": "two", "checkpoint": "step-00000008.pt"},
        "linear": {"headline": {"linear top-1": 0.4}, "epochs": 2, "top1": 0.4, "checkpoint": "step-00000008.pt"},
        "linear_fast": {"headline": {"linear, cached": 0.3}, "top1": 0.3, "checkpoint": "step-00000004.pt"},
    }.items():
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(values))
    text = html.unescape(write_report(folder).read_text())
    assert '<span class="soft">kNN after</span><b>75.0%</b>' in text, "the run's own kNN, not that of other images"
    assert '<span class="soft">linear (2 epochs)</span><b>40.0%</b>' in text
    assert "<tr><td>kNN, k 20 on two</td><td>99.0%</td><td>50.0%</td></tr>" in text
    assert "<tr><td>linear top-1 (2 epochs)</td><td>40.0%</td><td>none</td></tr>" in text
    assert "linear_fast.json: skipped, since it is of step-00000004.pt, expected step 8" in text


def test_names_of_classes_are_no_formulas():
    """Nor is a class missing from the legend whose name begins with an underscore."""
    names = ["cost_$5_to_$10", "_under", "$x^2$"]
    assert draw_confusion([[1, 0, 0], [0, 1, 0], [0, 0, 1]], names).count("<!-- cost_$5_to_$10 -->") == 2
    text = draw_map(torch.rand(6, 2), torch.tensor([0, 1, 2] * 2), names, "map")
    for name in names:
        assert f"{name} -->" in text


@pytest.mark.parametrize(
    "name", ["a long name of a class, such as labels have, {}", "a long name {}, such as labels have"]
)
def test_long_names_of_classes_stay_in_the_picture_and_apart(monkeypatch, name):
    drawn = []
    monkeypatch.setattr(figures, "_svg", lambda figure: drawn.append(figure) or "")
    names = [name.format(number) for number in range(12)]
    draw_map(torch.rand(24, 2), torch.arange(24) % 12, names, "map")
    draw_confusion(torch.eye(12).tolist(), names)
    chart, matrix = drawn
    chart.savefig(io.BytesIO(), format="svg")
    box = chart.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= chart.bbox.width
    assert len({text.get_text() for text in chart.legends[0].get_texts()}) == 12
    labels = [text.get_text() for text in matrix.axes[0].get_xticklabels()]
    assert len(set(labels)) == 12
    assert max(map(len, labels)) == 20
    draw_map(torch.rand(24, 2), torch.arange(24), names * 2, "map")
    assert drawn[-1].axes[0].get_title() == "map; 24 classes share 20 colours"


def test_words_of_the_user_stay_words(told_run):
    folder = told_run({"about": "<script>alert(1)</script>", "preset": "<b>bold</b>"})
    text = write_report(folder, options=EvalOptions(workers=0)).read_text()
    assert "<script>" not in text
    assert "<b>bold" not in text


def browse(page: Path, folder: Path, width: int) -> tuple[dict, str]:
    """What a browser makes of a page at a width: measured inside a frame, as a phone would show it."""
    probe = """<script>addEventListener("load", () => parent.postMessage({
        scroll: document.documentElement.scrollWidth, width: innerWidth,
        broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length, images: document.images.length,
        lines: Math.max(...[...document.querySelectorAll(".facts th")].map(e => {
            const text = document.createRange(); text.selectNodeContents(e); return text.getClientRects().length; })),
        right: Math.max(...[...document.querySelectorAll("figure")].map(e => e.getBoundingClientRect().right)),
        smallest: Math.min(
            ...[...document.querySelectorAll("body *")].map(e => parseFloat(getComputedStyle(e).fontSize)))
    }, "*"))</script>"""
    copy, frame = folder / "copy.html", folder / "frame.html"
    copy.write_text(page.read_text().replace("</body>", f"{probe}</body>"))
    frame.write_text(
        f'<body style="margin:0"><iframe src="copy.html" style="border:0;width:{width}px;height:900px"></iframe>'
        '<p id="found"></p><script>addEventListener("message", '
        'e => document.getElementById("found").textContent = JSON.stringify(e.data))</script></body>'
    )
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    words += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r'<p id="found">(.*?)</p>', done.stdout, re.S)[1])), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_without_complaint(page, tmp_path, width):
    found, log = browse(page, tmp_path, width)
    assert found["width"] == width
    assert found["scroll"] <= width, "nothing sticks out to the right"
    assert found["broken"] == 0
    assert found["images"] > 60
    assert found["smallest"] >= 11
    assert found["lines"] == 1, "the names of packages stay in one line"
    assert found["right"] > 0.7 * width, "neighbours also stand in the right half"
    assert "CONSOLE" not in log, log
