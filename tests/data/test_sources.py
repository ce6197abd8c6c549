import gzip
import os
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from synco_fast.cli import main
from synco_fast.data.errors import CorruptImageError, DataError
from synco_fast.data.sources import decode
from synco_fast.data.sources.check import keep_list
from synco_fast.data.sources.columns import number_labels
from synco_fast.data.sources.layout import split_of
from synco_fast.data.sources.open import ArraySplit, open_source
from synco_fast.data.sources.splits import SubsetSplit, share_of
from tests.data.photos import read_image


def pixels(height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_idx(path, values, cut=0, kind=8):
    content = struct.pack(">HBB", 0, kind, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    content += values.tobytes()
    path.write_bytes(gzip.compress(content[: len(content) - cut]))


def write_fashion(folder, images=6, labels=6):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (images, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(labels, dtype=np.uint8) % 3)
    return folder


def test_folder_with_classes(image_folder):
    source = open_source(str(image_folder))
    assert source.train.classes == ("class0", "class1", "class2")
    assert (len(source.train), len(source.validation)) == (33, 12)
    assert source.train.labels.tolist() == [0] * 11 + [1] * 11 + [2] * 11
    image = source.train.read(0)
    assert (image.mode, image.size) == ("RGB", (44, 40))
    assert "class0" in source.train.name(0)


def test_a_folder_says_what_it_does_not_read(image_folder, tmp_path, monkeypatch):
    """Also from a kept manifest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_source(str(image_folder)).notes == []
    for name in ("test", "extra"):
        shutil.copytree(image_folder / "val" / "class0", image_folder / name / "class0")
    shutil.copy(image_folder / "val" / "class0" / "0.jpg", image_folder / "train")
    expected = [
        f"{image_folder}: not read: extra/, test/",
        f"{image_folder}: not read: 1 image outside the class folders",
    ]
    source = open_source(str(image_folder))
    assert source.notes == expected
    shutil.copy(image_folder / "val" / "class0" / "0.jpg", image_folder / "train" / "1.jpg")
    assert open_source(str(image_folder)).notes[1].endswith(": 2 images outside the class folders")
    (image_folder / "train" / "1.jpg").unlink()
    source = open_source(str(image_folder))
    keep_list(source.train, {})
    assert open_source(str(image_folder)).notes == expected
    (image_folder / "val").rename(image_folder / "valid")
    assert len(open_source(str(image_folder)).validation) == 12
    (image_folder / "train").rename(image_folder / "train2017")
    (note,) = open_source(str(image_folder)).notes
    assert note.endswith(": found test, train2017, valid among the classes, expected train/ and val/ for splits")


def test_labels_follow_the_training_classes_where_the_held_out_split_lacks_one(image_folder):
    for file in (image_folder / "val" / "class0").iterdir():
        file.unlink()
    assert set(open_source(str(image_folder)).validation.labels.tolist()) == {1, 2}


def test_a_held_out_class_that_training_does_not_have(image_folder):
    (image_folder / "val" / "class9").mkdir()
    Image.fromarray(pixels()).save(image_folder / "val" / "class9" / "a.png")
    with pytest.raises(DataError, match=r"found the class class9 in .*, expected only .*, such as class0"):
        open_source(str(image_folder))


def test_tiny_imagenet_as_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, pairs = tmp_path / "tiny", [("val_0", "n02"), ("val_1", "n01"), ("val_10", "n02")]
    files = [*(f"train/{name}/images/{name}_0.JPEG" for name in ("n01", "n02", "n03"))]
    for file in (*files, *(f"val/images/{name}.JPEG" for name, _ in pairs), "test/images/test_0.JPEG"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels()).save(root / file)
    annotations = root / "val" / "val_annotations.txt"
    annotations.write_text("".join(f"{name}.JPEG\t{label}\t0\t32\t44\t62\n" for name, label in reversed(pairs)))
    source = open_source(str(root))
    assert source.notes == [f"{root}: not read: test/"]
    assert source.train.labels.tolist() == [0, 1, 2]
    assert source.validation.labels.tolist() == [1, 0, 1]
    assert source.validation.classes == ("n01", "n02", "n03")
    keep_list(source.validation, {2: "it is corrupt"})
    assert open_source(str(root)).validation.labels.tolist() == [1, 0]
    annotations.write_text(annotations.read_text().replace("val_1.JPEG\tn01", "val_1.JPEG\tn03"))
    os.utime(annotations, ns=(1, 1))
    assert open_source(str(root)).validation.labels.tolist() == [1, 2, 1], "other classes than when it was checked"
    annotations.write_text("val_0.JPEG\tn02\n")
    os.utime(annotations, ns=(2, 2))
    with pytest.raises(DataError, match=r"found no class of images/val_1\.JPEG in .*val_annotations\.txt"):
        open_source(str(root))


def test_splits_deeper_in_the_folder_are_named(image_folder, tmp_path):
    """As in Kaggle's archive of ImageNet: all images would be one class, the held-out ones among them."""
    (tmp_path / "all" / "Data").mkdir(parents=True)
    image_folder.rename(tmp_path / "all" / "Data" / "CLS-LOC")
    inside = f"{tmp_path}/all/Data/CLS-LOC"
    source = open_source(f"{tmp_path}/all")
    assert source.train.classes == ("Data",)
    (note,) = source.notes
    assert f"found train/ and held-out images in {inside}" in note
    assert note.endswith(f"expected --data {inside}")


def test_images_without_classes(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    assert (source.train.labels, source.train.classes, source.validation) == (None, None, None)
    assert len(source.train) == 1


@pytest.mark.parametrize(
    ("spec", "says"),
    [("/no/such/folder", "found no folder /no/such/folder"), ("s3:bucket", "found 's3:bucket'")],
)
def test_a_source_that_is_not_there(spec, says):
    with pytest.raises(DataError, match=says):
        open_source(spec)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.png", "a folder or another source, such as {}"),
        ("a.tar", "such as tar:{}"),
        ("train-images-idx3-ubyte.gz", "such as idx:{}"),
        ("a.txt", "such as list:{}/a.txt"),
        ("a.zip", "another source"),
    ],
)
def test_a_file_in_place_of_a_folder(tmp_path, name, source):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / name))
    assert str(caught.value).startswith(f"data: found a file {tmp_path / name}, expected a folder")
    assert str(caught.value).endswith(source.format(tmp_path))


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match="found no image in"):
        open_source(str(tmp_path))


def test_idx(tmp_path):
    source = open_source(f"idx:{write_fashion(tmp_path)}")
    assert (len(source.train), len(source.validation)) == (6, 6)
    assert source.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.train.read(3).mode == "RGB"
    assert np.array_equal(np.asarray(source.train.read(3))[..., 1], source.train.images[3])


def test_idx_that_is_missing_broken_or_of_two_lengths(tmp_path):
    with pytest.raises(DataError, match=r"found no train-images-idx3-ubyte\.gz"):
        open_source(f"idx:{tmp_path}")
    write_fashion(tmp_path, labels=5)
    with pytest.raises(DataError, match="found 6 train images and 5 labels"):
        open_source(f"idx:{tmp_path}")
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((6, 28, 28), np.uint8), cut=7)
    with pytest.raises(DataError, match="truncated"):
        open_source(f"idx:{tmp_path}")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="corrupt IDX"):
        open_source(f"idx:{tmp_path}")


def test_every_kind_of_image_becomes_rgb(tmp_path):
    colour = Image.fromarray(pixels())
    grey16 = np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)
    files = {
        "gray.jpg": colour.convert("L"),
        "cmyk.jpg": colour.convert("CMYK"),
        "palette.png": colour.convert("P"),
        "transparent.png": colour.convert("RGBA"),
        "gray-alpha.png": colour.convert("LA"),
        "sixteen.png": Image.fromarray(grey16),
        "one-bit.png": colour.convert("1"),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
        read = read_image(tmp_path / name)
        assert (read.mode, read.size) == ("RGB", (30, 20)), name
    values = np.asarray(read_image(tmp_path / "sixteen.png")).astype(int)
    assert np.abs(values[..., 0] - grey16 / 257).max() <= 0.5, "sixteen bits are scaled, not clipped"
    assert (values[..., 0] == values[..., 2]).all()


def test_pixels_of_more_bits_keep_their_range(tmp_path):
    grey = np.linspace(0, 255, 20 * 30).reshape(20, 30)
    eight, sixteen, dark = grey.round().astype(int), grey * 257, grey.astype(np.uint16)
    cases = {
        "float-255.tif": (grey.astype(np.float32), eight),
        "float-1.tif": ((grey / 255).astype(np.float32), eight),
        "float-65535.tif": (sixteen.astype(np.float32), eight),
        "float-signed.tif": ((grey / 127.5 - 1).astype(np.float32), (2 * grey - 255).clip(0, 255)),
        "float-nan.tif": (np.where(grey > 250, np.nan, grey / 255).astype(np.float32), np.where(grey > 250, 0, grey)),
        "float-infinite.tif": (
            np.where(grey > 250, np.inf, np.where(grey < 5, -np.inf, grey / 255)).astype(np.float32),
            np.where(grey > 250, 255, np.where(grey < 5, 0, grey)),
        ),
        "int-255.tif": (grey.round().astype(np.int32), eight),
        "int-65535.tif": (sixteen.astype(np.int32), eight),
        "sixteen.tif": (sixteen.astype(np.uint16), eight),
        "dark.png": (dark, dark / 257),
        "dark.pgm": (dark, dark / 257),
    }
    for name, (stored, expected) in cases.items():
        Image.fromarray(stored).save(tmp_path / name)
        if name.endswith("pgm"):
            (tmp_path / name).write_bytes(b"P5\n30 20\n65535\n" + stored.astype(">u2").tobytes())
        read = np.asarray(read_image(tmp_path / name)).astype(float)
        assert np.abs(read[..., 1] - expected).max() <= 1, name


def test_pixels_of_more_bits_are_converted_in_little_memory(monkeypatch):
    large = np.random.default_rng(0).integers(0, 65536, (1000, 1100)).astype(np.uint16)
    whole = decode._eight_bits(large, scaled=True)
    np.testing.assert_array_equal(whole, (large / 257).round())
    monkeypatch.setattr(decode, "_CONVERTED", 40_000)
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(decode._eight_bits(large, scaled=True), whole)
        assert tracemalloc.get_traced_memory()[1] < 4 * large.nbytes, "as float64 it would take several times that"
    finally:
        tracemalloc.stop()


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(pixels())
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 30)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "missing", "huge"])
def test_what_cannot_be_read_says_so(tmp_path, kind, monkeypatch):
    file = tmp_path / "x.jpg"
    Image.fromarray(pixels(200, 200)).save(file)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:1500])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("I am no picture")
    elif kind == "missing":
        file.unlink()
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(CorruptImageError, match=r"x\.jpg") as caught:
        read_image(file)
    assert "\n" not in str(caught.value)
    if kind == "empty":
        assert "is empty" in str(caught.value)


def test_arrays():
    split = ArraySplit(pixels(8, 8)[None].repeat(2, 0), np.array([0, 1]), "noise")
    assert split.name(1) == "noise[1]"
    assert split.classes == ("0", "1")
    assert split.read(1).size == (8, 8)


def test_a_pipe_with_the_name_of_an_image_is_broken_and_stalls_nothing(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(CorruptImageError, match=r"x\.jpg: not a regular file"):
        read_image(tmp_path / "x.jpg")


def test_a_share_is_part_of_every_larger_one_and_looks_like_a_split(image_folder):
    whole = open_source(str(image_folder)).train
    few, more = share_of(whole, 0.2), share_of(whole, 0.5)
    assert (len(few), len(more)) == (round(0.2 * len(whole)), round(0.5 * len(whole)))
    number = {whole.name(index): index for index in range(len(whole))}
    chosen = [number[more.name(index)] for index in range(len(more))]
    assert chosen == sorted(set(chosen))
    assert {few.name(index) for index in range(len(few))} < {more.name(index) for index in range(len(more))}
    assert more.classes == whole.classes
    assert more.labels.tolist() == whole.labels[chosen].tolist()
    for index in (0, len(more) - 1):
        assert more.read_bytes(index) == whole.read_bytes(chosen[index])
        assert more.read(index).tobytes() == whole.read(chosen[index]).tobytes()
    assert share_of(whole, 1.0) is whole
    assert len(share_of(whole, 1e-6)) == 1


def test_a_share_of_an_array_stays_an_array_and_is_the_same_images():
    whole = ArraySplit(np.arange(60 * 4, dtype=np.uint8).reshape(60, 2, 2), np.arange(60) % 3, "numbers")
    part = share_of(whole, 0.5)
    assert isinstance(part, ArraySplit), "or the resident pipeline would not be chosen"
    listed = SubsetSplit(whole, np.arange(60)[::7])
    assert listed.read(2).tobytes() == whole.read(14).tobytes()
    assert part.classes == whole.classes
    found = [int(np.flatnonzero((whole.images == image).all(axis=(1, 2)))[0]) for image in part.images]
    assert part.labels.tolist() == whole.labels[found].tolist()
    assert len(set(found)) == 30


def test_data_check_says_which_files_are_in_no_split(image_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (image_folder / "test").mkdir()
    assert main(["data", "check", str(image_folder), "--workers", "0"]) == 0
    assert f"{image_folder}: not read: test/" in capsys.readouterr().out


def test_the_split_is_told_by_the_innermost_name_that_names_one():
    told = {
        "train/val/a": "val",
        "val/train/a": "train",
        "train-test-split/a": None,
        "train/train-test-split/a": "train",
        "images/val2017": "val",
        "images/trainset": "train",
        "images/constrain": None,
    }
    assert {name: split_of(name.split("/")) for name in told} == told


def test_labels_without_a_name_are_classes_of_their_own():
    """Names by number hold where every number has one, or numbers would stand for the wrong names."""
    labels, classes = number_labels([1, 0, 1], ["cat", "dog"], "set")
    assert (labels.tolist(), classes) == ([1, 0, 1], ("cat", "dog"))
    labels, classes = number_labels([10, 2, 10], ["cat", "dog"], "set")
    assert (labels.tolist(), classes) == ([1, 0, 1], ("2", "10"))
    labels, classes = number_labels([-1, 0], ["cat", "dog"], "set")
    assert (labels.tolist(), classes) == ([0, 1], ("-1", "0"))
