import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from synco_fast.data.errors import DataError
from synco_fast.data.files import locked
from synco_fast.data.sources.demo import CLASSES, SIDE, demo_image, make_demo
from synco_fast.data.sources.open import open_source


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo") / "set", train=4, validation=2, seed=5)


def test_the_layout_is_that_of_imagenet(demo):
    source = open_source(str(demo))
    assert source.train.classes == CLASSES
    assert source.validation.classes == CLASSES
    assert len(CLASSES) >= 10
    assert np.bincount(source.train.labels).tolist() == [4] * len(CLASSES)
    assert np.bincount(source.validation.labels).tolist() == [2] * len(CLASSES)
    assert all(path.read_bytes()[:2] == b"\xff\xd8" for path in demo.rglob("*.jpg")), "every file is a JPEG"


def test_the_same_seed_draws_the_same_files(demo, tmp_path):
    again = make_demo(tmp_path / "again", train=4, validation=2, seed=5)
    other = make_demo(tmp_path / "other", train=4, validation=2, seed=6)
    content = [{file.relative_to(root): file.read_bytes() for file in root.rglob("*.*")} for root in (demo, again)]
    assert content[0] == content[1]
    same = [file for file in demo.rglob("*.jpg") if file.read_bytes() == (other / file.relative_to(demo)).read_bytes()]
    assert not same


def test_a_larger_set_contains_the_smaller_one(demo, tmp_path):
    larger = make_demo(tmp_path / "larger", train=5, validation=2, seed=5)
    for file in demo.rglob("*.jpg"):
        assert file.read_bytes() == (larger / file.relative_to(demo)).read_bytes()


def test_no_two_images_are_the_same_and_splits_share_none(demo):
    contents = [file.read_bytes() for file in demo.rglob("*.jpg")]
    assert len(set(contents)) == len(contents)


def test_a_script_without_a_main_guard_draws_the_images(tmp_path):
    """As the first line of many: ``synco_fast.pretrain("demo")``. A spawned process would run the script again."""
    script = tmp_path / "train.py"
    script.write_text(
        "from pathlib import Path\n"
        "from synco_fast.data.sources.demo import make_demo\n"
        "print('begins', flush=True)\n"
        f"make_demo(Path({str(tmp_path / 'set')!r}), train=1, validation=1)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "begins\n"
    assert done.stderr == ""
    assert len([*(tmp_path / "set").rglob("*.jpg")]) == 2 * len(CLASSES)


def test_a_set_that_is_there_is_kept(demo):
    before = {file: file.stat().st_mtime_ns for file in demo.rglob("*.jpg")}
    make_demo(demo, train=4, validation=2, seed=5)
    assert before == {file: file.stat().st_mtime_ns for file in demo.rglob("*.jpg")}


def test_a_damaged_set_in_the_cache_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "synco-fast" / "demo"
    folder.mkdir(parents=True)
    (folder / "demo.json").write_bytes(b"")  # as a power failure leaves it
    with pytest.raises(DataError, match=rf"demo\.json: found a damaged file; remove {folder} if"):
        open_source("demo")
    (folder / "demo.json").rename(folder / "mine.txt")
    with pytest.raises(DataError, match="found a folder with other files"):
        open_source("demo")


def test_a_set_that_another_process_just_writes_is_waited_for(demo, tmp_path):
    """Both found none; the first one's is not replaced while it is read."""
    folder, drawn, done = tmp_path / "demo", [], threading.Event()

    def second():
        make_demo(folder, train=4, validation=2, seed=5, tick=drawn.append)
        done.set()

    with locked(tmp_path / ".demo.lock"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not done.wait(0.2), "it waits"
        shutil.copytree(demo, folder)
    thread.join(60)
    assert done.is_set()
    assert drawn == []
    assert [path.name for path in tmp_path.iterdir()] == ["demo"], "no lock stays"


def test_a_lock_is_held_by_one_at_a_time_and_ends_with_its_process(tmp_path):
    inside, most = [], []

    def hold(number):
        for _ in range(20):
            with locked(tmp_path / "folder" / "lock"):
                inside.append(number)
                most.append(len(inside))
                inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, range(4)))
    assert most == [1] * 80
    (tmp_path / "folder" / "lock").write_text("left by a killed process")
    with locked(tmp_path / "folder" / "lock"):
        pass


def test_another_set_replaces_an_earlier_one(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("synco_fast.data.sources.demo.ProcessPoolExecutor", lambda **_: ThreadPoolExecutor(1))
    folder = tmp_path / "demo"
    shutil.copytree(demo, folder)
    make_demo(folder, train=1, validation=1, seed=5)
    assert len(list(folder.rglob("*.jpg"))) == 2 * len(CLASSES)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_all_have_one_size_and_colour_tells_no_class():
    """A classifier that sees an image's mean colours and their spread does no better than guessing, within noise."""
    rng = np.random.default_rng(0)
    images = [[demo_image(name, rng) for _ in range(24)] for name in CLASSES]
    assert {image.size for row in images for image in row} == {(SIDE, SIDE)}
    colours = np.array(
        [[np.concatenate([np.asarray(i).mean((0, 1)), np.asarray(i).std((0, 1))]) for i in row] for row in images]
    )
    colours = (colours - colours.mean((0, 1))) / colours.std((0, 1))
    centres = colours[:, ::2].mean(axis=1)
    held_out = colours[:, 1::2]
    nearest = ((held_out[:, :, None] - centres) ** 2).sum(-1).argmin(-1)
    accuracy = (nearest == np.arange(len(CLASSES))[:, None]).mean()
    # 132 guesses at chance 1/11: three standard deviations above chance is 17 %.
    assert accuracy < 0.22


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="found a folder with other files"):
        make_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_counts_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="found 0 train"):
        make_demo(tmp_path / "x", train=0)


def test_an_image_is_rgb():
    image = demo_image("dots", np.random.default_rng(1))
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    with pytest.raises(KeyError):
        demo_image("clouds", np.random.default_rng(1))
