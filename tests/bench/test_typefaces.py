"""The set of typefaces: deterministic, split by character, one font per design, and named errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from synco_fast.bench.experiments import raw_pixels, typefaces
from synco_fast.data.sources.open import open_source
from synco_fast.runtime.errors import DataError

#: Fonts that matplotlib carries, in the place of Debian's.
CARRIED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture
def fonts(tmp_path) -> Path:
    folder = tmp_path / "fonts" / "truetype"
    folder.mkdir(parents=True)
    for name, found in (
        ("Upright.ttf", "DejaVuSans.ttf"),
        ("uprightbold.ttf", "DejaVuSans-Bold.ttf"),
        ("mono.ttf", "DejaVuSansMono.ttf"),
        # Symbols alone: none of the characters.
        ("symbols.ttf", "STIXSizOneSymReg.ttf"),
    ):
        shutil.copy(CARRIED / found, folder / name)
    return folder.parent


def test_the_set_is_a_source_and_the_same_again(fonts, tmp_path, capsys):
    typefaces.main([str(tmp_path / "one"), "--fonts", str(fonts)])
    said = capsys.readouterr().out
    assert "2 typefaces, 64 training and 16 held-out images" in said
    about = json.loads((tmp_path / "one" / "typefaces.json").read_text())
    assert about["skipped"] == ["symbols.ttf"]
    again = typefaces.draw_set(fonts, tmp_path / "two")
    assert again == about
    source = open_source(str(tmp_path / "one"))
    assert source.train.classes == source.validation.classes == ("mono", "upright")
    assert (len(source.train), len(source.validation)) == (64, 16)
    pixels = np.asarray(source.train.read(0))
    assert pixels.shape == (48, 48, 3)
    assert 0 < (pixels > 0).mean() < 0.7


def test_raw_pixels_are_measured_by_both_protocols(fonts, tmp_path, capsys):
    typefaces.draw_set(fonts, tmp_path / "set")
    config = tmp_path / "set.yaml"
    config.write_text(
        "preset: demo\naugment: {size: 32, grayscale_probability: 1.0, evaluation_resize: 32}\nevaluation: {k: 20}\n"
    )
    file = tmp_path / "raw.json"
    raw_pixels.main([str(config), "--data", str(tmp_path / "set"), "--json", str(file)])
    found = json.loads(file.read_text())
    assert list(found["accuracies"]) == ["20"], "200 are more than there are"
    assert found["accuracies"]["20"] == found["knn_in_training"] > 0.5, "both take all images of so small a set"
    assert f"kNN, k 20, all labels {found['accuracies']['20']:.1%}" in capsys.readouterr().out


def test_no_character_is_in_both_splits_and_a_design_has_one_font(fonts):
    train, held_out = (set(typefaces.CHARACTERS[split]) for split in ("train", "val"))
    assert not {one.upper() for one in train} & {one.upper() for one in held_out}
    assert len(train | held_out) == 62
    assert [file.name for file in typefaces.typefaces(fonts)] == ["mono.ttf", "symbols.ttf", "Upright.ttf"]


def test_glyphs_are_cropped_and_images_follow_from_the_seed(fonts):
    known = typefaces.glyphs(fonts / "truetype" / "mono.ttf")
    assert len(known) == 62
    assert all(glyph.getbbox() == (0, 0, *glyph.size) for glyph in known.values())
    drawn = list(known.values())
    one, same, other = (typefaces.draw_image(drawn, seed) for seed in ("a", "a", "b"))
    assert one.tobytes() == same.tobytes() != other.tobytes()
    assert one.mode == "L"
    assert isinstance(one, Image.Image)


def test_what_is_missing_is_named(tmp_path, fonts, capsys):
    with pytest.raises(DataError, match=r"fonts: found no \.ttf file below .*, expected those of the package"):
        typefaces.draw_set(tmp_path / "fonts" / "nothing", tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        typefaces.main([str(tmp_path), "--fonts", str(fonts)])
    assert stopped.value.code == 2
    assert f"out: found {tmp_path}, expected a new folder" in capsys.readouterr().err
