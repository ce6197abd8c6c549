"""A real image set whose classes random features cannot tell: typefaces, from Debian's package fonts-aenigma.

``apt-get install fonts-aenigma && python -m synco_fast.bench.experiments.typefaces datasets/typefaces`` draws the set:
a folder per typeface below ``train`` and ``val``, 32 and 8 grayscale PNG files each. An image shows four characters of
one typeface in a square of two by two. Size, place and ink of the four differ from image to image, so pixels say
little. The letters and digits of the held-out images occur in no training image: only the style of the drawing tells
the class.

The fonts are by Brian Kent (1995 to 2008). He permits use, change and redistribution with attribution; the
package's copyright file quotes him. Variants of a design (outlined, shadowed, second versions) begin with the same four
letters of their file name, and only the first of them is taken. The images depend on the fonts and on FreeType alone;
``typefaces.json`` holds the versions and a checksum of all pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, features
from PIL import __version__ as pillow

from synco_fast.data.files import atomic_write
from synco_fast.runtime.errors import DataError
from synco_fast.runtime.files import write_json

__all__ = ["FONTS", "draw_image", "draw_set", "glyphs", "typefaces"]

#: Where the package puts its fonts.
FONTS = Path("/usr/share/fonts/truetype/aenigma")
SIDE = 48
"""Pixels of an image's side."""
_CELL = SIDE // 2
#: Pixels of the font size that glyphs are drawn at before they are shrunk.
_POINTS = 128
#: Larger glyphs than any letter: a font file's mistake.
_LARGEST = 2000
_ALL = ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", "0123456789")
CHARACTERS = {
    "train": [character for part in _ALL for place, character in enumerate(part) if place % 4],
    "val": [character for part in _ALL for character in part[::4]],
}
"""Characters by split: every fourth letter and digit is held out, in both cases, since many fonts draw both alike."""
IMAGES = {"train": 32, "val": 8}
"""Images of a typeface by split."""
#: Letters of the file name that variants of a design share.
_STEM = 4


def typefaces(fonts: Path) -> list[Path]:
    """One font file per design, in order of name.

    Raises:
        DataError: There is no TrueType file below the folder.
    """
    found: dict[str, Path] = {}
    for file in sorted(fonts.rglob("*.ttf"), key=lambda file: (file.name.lower(), file.name)):
        found.setdefault(file.name.lower()[:_STEM], file)
    if not found:
        raise DataError(f"fonts: found no .ttf file below {fonts}, expected those of the package fonts-aenigma")
    return list(found.values())


def glyphs(file: Path) -> dict[str, Image.Image]:
    """The characters that a font draws, each cropped to its ink: white on black, mode L.

    A picture that stands for several characters, such as the box for a missing one, is skipped; of a letter that is
    drawn alike in both cases the first is kept.
    """
    font = ImageFont.truetype(str(file), _POINTS, layout_engine=ImageFont.Layout.BASIC)
    alike: dict[tuple[tuple[int, int], bytes], dict[str, Image.Image]] = {}
    for character in "".join(_ALL):
        left, top, right, bottom = (round(value) for value in font.getbbox(character))
        if not (0 < right - left <= _LARGEST and 0 < bottom - top <= _LARGEST):
            continue
        canvas = Image.new("L", (right - left, bottom - top), 0)
        ImageDraw.Draw(canvas).text((-left, -top), character, font=font, fill=255)
        ink = canvas.getbbox()
        if ink is not None:
            glyph = canvas.crop(ink)
            alike.setdefault((glyph.size, glyph.tobytes()), {})[character] = glyph
    found = {}
    for group in alike.values():
        first = next(iter(group))
        if {character.upper() for character in group} == {first.upper()}:
            found[first] = group[first]
    return found


def draw_image(drawn: Sequence[Image.Image], seed: str) -> Image.Image:
    """Four different glyphs in a square of `SIDE` pixels, mode L; size, place and ink follow from the seed."""
    draws = random.Random(seed)
    scale, ink = draws.uniform(0.7, 1), draws.uniform(0.5, 1)
    right, down = draws.randint(-3, 3), draws.randint(-3, 3)
    canvas = Image.new("L", (SIDE, SIDE), 0)
    for place, glyph in enumerate(draws.sample(list(drawn), 4)):
        shrink = scale * (_CELL - 2) / max(glyph.size)
        size = max(1, round(glyph.width * shrink)), max(1, round(glyph.height * shrink))
        small = glyph.resize(size, Image.Resampling.BOX).point([round(value * ink) for value in range(256)])
        row, column = divmod(place, 2)
        canvas.paste(
            small,
            (column * _CELL + right + (_CELL - size[0]) // 2, row * _CELL + down + (_CELL - size[1]) // 2),
        )
    return canvas


def draw_set(fonts: Path, folder: Path) -> dict[str, Any]:
    """Draw the whole set; returns what ``typefaces.json`` holds.

    Raises:
        DataError: There are no fonts, or the folder exists.
    """
    files = typefaces(fonts)
    if folder.exists():
        raise DataError(f"out: found {folder}, expected a new folder")
    digest, count, skipped = hashlib.sha256(), dict.fromkeys(IMAGES, 0), []
    for file in files:
        known = glyphs(file)
        drawn = {split: [known[one] for one in characters if one in known] for split, characters in CHARACTERS.items()}
        if min(len(part) for part in drawn.values()) < 4:
            skipped.append(file.name)
            continue
        for split, images in IMAGES.items():
            inside = folder / split / file.stem.lower()
            inside.mkdir(parents=True, exist_ok=True)
            for number in range(images):
                image = draw_image(drawn[split], f"{file.name} {split} {number}")
                digest.update(image.tobytes())
                with atomic_write(inside / f"{number:02d}.png") as temporary:
                    image.save(temporary, format="PNG")
                count[split] += 1
    about = {
        "typefaces": len(files) - len(skipped),
        "images": count,
        "skipped": skipped,
        "sha256": digest.hexdigest(),
        "pillow": pillow,
        "freetype": features.version("freetype2"),
        "source": "fonts-aenigma, Brian Kent; see its copyright file",
    }
    write_json(folder / "typefaces.json", about)
    return about


def main(words: Sequence[str] | None = None) -> None:
    """Draw the set from the command line."""
    parser = argparse.ArgumentParser(description="Draw the typefaces of fonts-aenigma as a set of images.")
    parser.add_argument("folder", type=Path, help="where the set goes; must not exist")
    parser.add_argument("--fonts", type=Path, default=FONTS, help="folder of the font files")
    options = parser.parse_args(words)
    try:
        about = draw_set(options.fonts, options.folder)
    except DataError as error:
        parser.error(str(error))
    print(
        f"{options.folder}: {about['typefaces']} typefaces, {about['images']['train']:,} training and "
        f"{about['images']['val']:,} held-out images, sha256 {about['sha256'][:16]}"
    )


if __name__ == "__main__":
    main()
