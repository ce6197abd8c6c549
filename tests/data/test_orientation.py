"""Orientation in EXIF and XMP: every pipeline turns an image as Pillow does, whatever else the metadata holds."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.build import build_pipeline, has_dali
from synco_fast.data.pipelines.pixels import decode_pixels
from synco_fast.data.pipelines.torchvision import evaluation_loader
from synco_fast.data.sources.decode import decode_image, plain_jpeg_size
from synco_fast.data.sources.open import open_folder
from synco_fast.kernels.views.reference import plain_views

RECIPE = Recipe(
    size=16, jitter_probability=0, grayscale_probability=0, blur_probability=0, flip_probability=0, area=(0.5, 1.0)
)


def exif(*entries, values=b""):
    """EXIF with these entries of tag, type, count and value, whatever they are."""
    rows = b"".join(struct.pack("<HHL4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + rows + bytes(4) + values


TURNED = 0x112, 3, 1, b"\x06\0\0\0"
XMP = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
CASES = {
    "plain": {"exif": exif(TURNED)},
    "xmp": {"xmp": XMP},
    "xmp-beside-exif": {"xmp": XMP, "exif": exif((0x10F, 2, 4, b"abc\0"))},
    "value-cut": {"exif": exif(TURNED, (0x10F, 2, 100, struct.pack("<L", 4000)))},
    "resolution-as-text": {"exif": exif(TURNED, (0x11A, 2, 4, b"72\0\0"))},
    "width-as-float": {"exif": exif((0x100, 11, 1, struct.pack("<f", 3.5)), TURNED)},
    "sampling-as-text": {"exif": exif(TURNED, (0x213, 2, 3, b"ab\0\0"))},
}
UPRIGHT = {
    "none": {},
    "no-exif": {"exif": b"Exif\0\0garbage"},
    "text": {"exif": exif((0x112, 2, 2, b"6\0\0\0"))},
    "exif-before-xmp": {"xmp": XMP, "exif": exif((0x112, 3, 1, b"\x01\0\0\0"))},
    "nine": {"exif": exif((0x112, 3, 1, b"\x09\0\0\0"))},
}


def jpeg(**metadata):
    """A gradient of 60 x 20 pixels, as it is stored."""
    y, x = np.mgrid[:20, :60]
    file = io.BytesIO()
    Image.fromarray(np.stack([4 * x, 12 * y, 0 * x + 90], -1).astype(np.uint8)).save(
        file, "JPEG", quality=95, **metadata
    )
    return file.getvalue()


STORED = np.asarray(Image.open(io.BytesIO(jpeg())))


@pytest.mark.filterwarnings("error")
def test_pixels_are_turned_and_nothing_else_of_the_metadata_matters():
    for name, metadata in (CASES | UPRIGHT).items():
        content, turned = jpeg(**metadata), name in CASES
        expected = np.rot90(STORED, 3) if turned else STORED
        assert np.array_equal(decode_image(content, name), expected), name
        assert np.array_equal(decode_pixels(content, name).permute(1, 2, 0), expected), name
        assert plain_jpeg_size(content) == (None if turned else (20, 60)), name
        assert plain_jpeg_size(content, turned=True) == ((60, 20) if turned else (20, 60)), name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(orientation):
    content = jpeg(exif=exif((0x112, 3, 1, bytes([orientation, 0, 0, 0]))))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(decode_image(content, "photo"), expected)
    assert plain_jpeg_size(content, turned=True) == expected.size[::-1]


def test_metadata_that_cannot_be_read_leaves_an_image_as_it_is():
    file = io.BytesIO()
    Image.fromarray(STORED).save(file, "PNG")
    broken = b"exif\n   9\nno hexadecimal digits"
    chunk = b"tEXtRaw profile type exif\0" + broken
    crc = struct.pack(">L", zlib.crc32(chunk))
    content = file.getvalue()
    content = content[:33] + struct.pack(">L", len(chunk) - 4) + chunk + crc + content[33:]
    assert np.array_equal(decode_image(content, "photo"), STORED)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turned")
    for name, metadata in (CASES | UPRIGHT).items():
        (folder / f"{name}.jpg").write_bytes(jpeg(**metadata))
    return open_folder(folder).train


@pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
def test_dali_makes_the_views_of_the_portable_pipeline(split):
    from synco_fast.data.pipelines.dali.pipeline import dali_evaluation

    def views(name, decode="once", make=None):
        pipe = build_pipeline(split, RECIPE, name=name, batch=len(split), seed=0, workers=0, decode=decode)
        if make is not None:
            pipe.use_kernels(make)
        pipe.set_epoch(0)
        (batch,) = pipe
        pipe.close()
        assert not batch.corrupt
        return batch.as_pixels(RECIPE).first[batch.image_ids.argsort()].float()

    expected = views("torchvision")
    for options in ({"decode": "once"}, {"decode": "windows"}, {"make": plain_views}):
        assert (views("dali", **options) - expected).abs().mean((1, 2, 3)).max() < 2, options
    ((images, *_),), ((others, *_),) = (
        [*evaluated]
        for evaluated in (evaluation_loader(split, RECIPE, workers=0), dali_evaluation(split, RECIPE, workers=0))
    )
    assert (images.float() - others.float()).abs().mean((1, 2, 3)).max() < 2
