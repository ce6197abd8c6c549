"""STL-10's own files, written here in their layout, against torchvision's reader."""

import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import STL10

from synco_fast.cli import main
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.errors import DataError
from synco_fast.data.pipelines.build import build_pipeline, choose_pipeline, has_dali
from synco_fast.data.pipelines.resident import load_pixels
from synco_fast.data.sources.identity import digest_of
from synco_fast.data.sources.open import open_source
from synco_fast.data.sources.splits import ArraySplit, share_of
from synco_fast.evaluation.context import check_labels

COUNTS = {"train": 8, "test": 6, "unlabeled": 12}
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """The unpacked archive, with few images."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in COUNTS.items():
        planes = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        (folder / f"{name}_X.bin").write_bytes(planes.tobytes())
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes(1 + number % 2 for number in range(count)))
    (folder / "class_names.txt").write_text("airplane\nbird\n\n")
    (folder / "fold_indices.txt").write_text("0 1 2 \n")
    return folder


def pixels(split):
    return np.stack([np.asarray(split.read(index)) for index in range(len(split))])


def test_pixels_and_labels_are_torchvisions(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)  # of the real files
    source, around = open_source(f"stl10:{folder}"), open_source(f"stl10:{tmp_path}")
    splits = {"train+unlabeled": source.train, "test": source.validation, "train": source.labelled}
    for name, split in splits.items():
        expected = STL10(tmp_path, name)
        np.testing.assert_array_equal(pixels(split), np.stack([np.asarray(image) for image, _ in expected]))
        if split is not source.train:
            assert split.labels.tolist() == [label for _, label in expected]
            assert split.classes == ("airplane", "bird")
    assert source.train.labels is None
    assert digest_of(source.train) == digest_of(around.train)
    assert len({digest_of(split) for split in splits.values()}) == 3
    with pytest.raises(DataError, match=rf"found no image in .*, but perhaps STL-10's files, expected stl10:{folder}"):
        open_source(str(folder))


def test_images_stay_in_their_files(folder):
    split = open_source(f"stl10:{folder}").train
    assert split.images[3].base is not None, "a view"
    assert len(pickle.dumps(split)) < 4000, "names alone, for workers that are not forked"
    part = share_of(split, 0.5)
    assert isinstance(part, ArraySplit), "or the resident pipeline would not be chosen"
    assert not isinstance(part.images, np.ndarray), "no copy"
    for one in (part, pickle.loads(pickle.dumps(part))):
        np.testing.assert_array_equal(pixels(one), np.asarray(part.images))
        assert digest_of(one) == digest_of(ArraySplit(np.asarray(part.images), None, "in memory"))
    whole = np.asarray(split.images)
    np.testing.assert_array_equal(np.asarray(split.images[::3][1:]), whole[::3][1:])
    np.testing.assert_array_equal(split.images[-1], whole[-1])
    np.testing.assert_array_equal(np.asarray(part.images, np.int64), pixels(part))
    assert len(list(part.images)) == len(part) == 10
    with pytest.raises(ValueError, match="copy: found False"):
        part.images.__array__(copy=False)


@pytest.mark.parametrize("name", ["resident", "torchvision", "dali"])
def test_pipelines(folder, name):
    if name == "dali" and not has_dali():
        pytest.skip("DALI is not installed")
    source = open_source(f"stl10:{folder}")
    never = dict.fromkeys(("jitter", "grayscale", "blur", "flip"), 0.0)
    whole = {f"{name}_probability": value for name, value in never.items()} | {"area": (1.0, 1.0), "ratio": (1.0, 1.0)}
    pipe = build_pipeline(source.train, Recipe(size=96, **whole), batch=10, seed=0, name=name, workers=0)
    found = {}
    for batch in pipe:
        assert torch.equal(batch.first, batch.second)
        found |= zip(batch.image_ids.tolist(), batch.first.permute(0, 2, 3, 1).numpy(), strict=True)
    pipe.close()
    np.testing.assert_array_equal([found[number] for number in range(20)], pixels(source.train))
    assert choose_pipeline("auto", source.train, CPU) == "resident"


def test_the_resident_pixels_are_copied_in_parts(folder, monkeypatch):
    monkeypatch.setattr("synco_fast.data.pipelines.resident._COPIED", 7)
    split = open_source(f"stl10:{folder}").train
    found, rows, corrupt = load_pixels(split, CPU, 0)
    np.testing.assert_array_equal(found.permute(0, 2, 3, 1), pixels(split))
    assert (rows.tolist(), corrupt) == (list(range(20)), {})


def test_evaluations_take_the_labelled_images(folder):
    train, held_out = check_labels(open_source(f"stl10:{folder}"))
    assert (len(train), len(held_out)) == (8, 6)


def test_commands(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["data", "check", f"stl10:{folder}", "--workers", "0"]) == 0
    assert "26" in capsys.readouterr().out, "all images once"
    shown = ["data", "show", f"stl10:{folder}", "--out", str(tmp_path / "pairs.png"), "--data.workers", "0"]
    assert main([*shown, "--training.device", "cpu", "--augment.size", "96"]) == 0
    assert "of 20 images by resident on cpu" in " ".join(capsys.readouterr().out.split())
    assert main(["data", "pack", f"stl10:{folder}", str(tmp_path / "pack")]) == 2
    assert "arrays need no pack" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train_y.bin", bytes([1] * 7), r"train_X\.bin: found another format"),
        ("train_y.bin", bytes([0] * 8), r"train_y\.bin: found another format"),
        ("test_y.bin", bytes([3] * 6), r"test_y\.bin: found another format"),
        ("test_y.bin", b"", r"test_y\.bin: found another format"),
        ("unlabeled_X.bin", bytes(27647), r"unlabeled_X\.bin: found another format"),
        ("unlabeled_X.bin", b"", r"unlabeled_X\.bin: found another format"),
        ("unlabeled_X.bin", None, r"found no unlabeled_X\.bin of STL-10 in .*stl10_binary, expected those of"),
    ],
)
def test_what_is_not_stl10(folder, name, content, says):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    for place in (folder, folder.parent):
        with pytest.raises(DataError, match=says):
            open_source(f"stl10:{place}")


def test_a_folder_without_it(tmp_path):
    with pytest.raises(DataError, match=r"found no files of STL-10 in .*, expected those of stl10_binary\.tar\.gz"):
        open_source(f"stl10:{tmp_path / 'nothing'}")
