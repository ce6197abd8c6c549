"""CIFAR's own files, written here byte by byte as its authors' Python 2 wrote them."""

import struct

import numpy as np
import pytest

from synco_fast.data.errors import DataError
from synco_fast.data.sources.identity import digest_of
from synco_fast.data.sources.open import open_source


def text(value):
    return b"U" + bytes([len(value)]) + value


def python2(values):
    """A dictionary in Python 2's second protocol: lists of numbers or texts, and arrays of bytes (n, m)."""
    written = b"\x80\x02}("
    for key, value in values.items():
        written += text(key.encode())
        if isinstance(value, np.ndarray):
            written += b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
            written += b"".join(b"M" + struct.pack("<H", side) for side in value.shape) + b"\x86cnumpy\ndtype\n"
            written += b"U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
            written += struct.pack("<i", value.nbytes) + value.tobytes() + b"tb"
        else:
            members = (b"K" + bytes([one]) if isinstance(one, int) else text(one.encode()) for one in value)
            written += b"](" + b"".join(members) + b"e"
    return written + b"u."


#: Version, its folder, files of the training images, and the rest.
VERSIONS = {
    "python": ("cifar-10-batches-py", [f"data_batch_{n}" for n in range(1, 6)], "test_batch", "batches.meta"),
    "binary": (
        "cifar-10-batches-bin",
        [f"data_batch_{n}.bin" for n in range(1, 6)],
        "test_batch.bin",
        "batches.meta.txt",
    ),
    "python100": ("cifar-100-python", ["train"], "test", "meta"),
    "binary100": ("cifar-100-binary", ["train.bin"], "test.bin", "fine_label_names.txt"),
}
NAMES = ["airplane", "automobile", "bird"]


def write(root, version):
    """The folder, and the pixels (n, 32, 32, 3) and labels of both splits."""
    folder, train, test, names = VERSIONS[version]
    hundred, folder = version.endswith("100"), root / folder
    folder.mkdir(parents=True)
    rng, expected = np.random.default_rng(0), []
    for files in (train, [test]):
        pixels = rng.integers(0, 256, (2 * len(files), 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 3, len(pixels)).tolist()
        planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        for part, file in enumerate(files):
            rows = slice(2 * part, 2 * part + 2)
            if version.startswith("python"):
                key = "fine_labels" if hundred else "labels"
                values = {"coarse_labels": [9, 9], key: labels[rows], "data": planes[rows]}
                (folder / file).write_bytes(python2(values))
            else:
                coarse = b"\x09" if hundred else b""
                pairs = zip(labels[rows], planes[rows], strict=True)
                (folder / file).write_bytes(b"".join(coarse + bytes([label]) + row.tobytes() for label, row in pairs))
        expected.append((pixels, labels))
    if version.startswith("python"):
        (folder / names).write_bytes(python2({"fine_label_names" if hundred else "label_names": NAMES}))
    else:
        (folder / names).write_text("\n".join(NAMES) + "\n\n")
    return folder, expected


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version(tmp_path, version):
    folder, expected = write(tmp_path, version)
    source, around = open_source(f"cifar:{folder}"), open_source(f"cifar:{tmp_path}")
    for split, (pixels, labels) in zip((source.train, source.validation), expected, strict=True):
        np.testing.assert_array_equal([np.asarray(split.read(index)) for index in range(len(split))], pixels)
        assert (split.labels.tolist(), split.classes) == (labels, tuple(NAMES))
    assert digest_of(source.train) == digest_of(around.train) != digest_of(source.validation)
    with pytest.raises(DataError, match=rf"found no image in .*, but perhaps CIFAR's files, expected cifar:{folder}"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"cos\nsystem\n(S'exit 1'\ntR.", "found another format or a damaged file"),
        (b"\x80\x02](e.", "found another format"),
        (python2({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "found another format"),
        (python2({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 7]}), "found another format"),
        (python2({"data": np.zeros((2, 3000), np.uint8), "labels": [0, 1]}), "found another format"),
        (python2({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]})[:-99], "found another format"),
        (b"", "found another format"),
        (None, "found no files of CIFAR in .*, expected those of cifar-10-batches-py, "),
    ],
)
def test_what_is_not_cifar(tmp_path, content, says):
    folder, _ = write(tmp_path, "python")
    (folder / "data_batch_3").unlink()
    if content is not None:
        (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=says):
        open_source(f"cifar:{folder}")


def test_a_binary_file_that_is_cut_short(tmp_path):
    folder, _ = write(tmp_path, "binary100")
    (folder / "test.bin").write_bytes((folder / "test.bin").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test\.bin: found another format or a damaged file"):
        open_source(f"cifar:{folder}")
