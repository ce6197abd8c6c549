"""Plain JPEG files decoded by simplejpeg have Pillow's pixels, bit for bit."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from synco_fast.data.errors import CorruptImageError
from synco_fast.data.pipelines import pixels
from synco_fast.data.pipelines.pixels import pixels_of, read_pixels
from synco_fast.data.sources.decode import decode_image, plain_jpeg_size
from synco_fast.data.sources.splits import LIMITS
from tests.data.photos import photo


class Bytes:
    """A split of one file."""

    limits = LIMITS

    def __init__(self, content):
        self.content = content

    def name(self, index):
        return "photo.jpg"

    def read_bytes(self, index):
        return self.content


@pytest.fixture
def decoded(monkeypatch):
    """The files that simplejpeg decodes, one entry each."""
    pytest.importorskip("simplejpeg")
    calls = []
    decode = pixels.decode_jpeg
    monkeypatch.setattr(pixels, "decode_jpeg", lambda *args, **options: calls.append(1) or decode(*args, **options))
    return calls


def jpeg(width=81, height=61, mode="RGB", orientation=1, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    photo(width, height).convert(mode).save(file, "JPEG", exif=exif, **({"quality": 85} | options))
    return file.getvalue()


CASES = [
    *[
        {"subsampling": subsampling, "progressive": progressive, "mode": mode}
        for subsampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")
        for progressive in (False, True)
        for mode in ("RGB", "L")
    ],
    *[{"orientation": orientation} for orientation in range(10)],
    *[{"width": width, "height": height} for width, height in ((2, 2), (17, 9), (3, 200), (200, 3))],
    *[{"quality": quality} for quality in (5, 100)],
]


def test_every_kind_of_plain_jpeg(decoded):
    for case in CASES:
        content = jpeg(**case)
        found = read_pixels(Bytes(content), 0)
        assert torch.equal(found, pixels_of(decode_image(content, "photo.jpg"))), case
        assert found.stride(0) == 1, "channels innermost, for the resize"
    turned = sum(2 <= case.get("orientation", 1) <= 8 for case in CASES)
    assert turned == 7
    assert len(decoded) == len(CASES) - turned, "Pillow turns what lies"


def outcome(read):
    try:
        return read().tolist()
    except CorruptImageError as error:
        return str(error)


def test_damaged_files_have_the_same_pixels_or_the_same_reason(decoded, capfd):
    content, rng = jpeg(64, 48), np.random.default_rng(0)
    found = []
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(20, len(content) - 2, 3):
            damaged[place] = rng.integers(256)
        damaged = bytes(damaged)
        found.append(outcome(lambda damaged=damaged: read_pixels(Bytes(damaged), 0)))
        assert found[-1] == outcome(lambda damaged=damaged: pixels_of(decode_image(damaged, "photo.jpg")))
    assert 0 < sum(isinstance(one, str) for one in found) < 40
    assert len(decoded) > 30
    assert capfd.readouterr().err == "", "libjpeg's warnings"


def test_what_is_no_plain_jpeg_is_pillows(decoded):
    for mode, suffix in (("CMYK", "JPEG"), ("RGB", "PNG")):
        file = io.BytesIO()
        photo(30, 20).convert(mode).save(file, suffix)
        expected = pixels_of(decode_image(file.getvalue(), "photo"))
        assert torch.equal(read_pixels(Bytes(file.getvalue()), 0), expected)
    assert not decoded


def test_stored_rgb_is_pillows_also_without_adobes_marker(decoded):
    """Components named R, G and B are no YCbCr where no marker says otherwise, which not every decoder knows."""
    file = io.BytesIO()
    photo(30, 20).save(file, "JPEG", quality=100, keep_rgb=True)
    content = file.getvalue()
    start = content.index(b"\xff\xee\x00\x0eAdobe")
    for stored in (content, content[:start] + content[start + 16 :]):
        assert plain_jpeg_size(stored) is None
        found = read_pixels(Bytes(stored), 0).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - np.asarray(photo(30, 20))).mean() < 2
    assert not decoded
    assert plain_jpeg_size(jpeg(30, 20)) == (20, 30)


def test_without_simplejpeg_pillow_decodes(monkeypatch):
    monkeypatch.setattr(pixels, "decode_jpeg", None)
    content = jpeg()
    assert torch.equal(read_pixels(Bytes(content), 0), pixels_of(decode_image(content, "photo.jpg")))
