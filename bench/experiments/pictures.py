"""The pictures of the README: parts of a run's HTML report as a browser shows them.

``python -m synco_fast.bench.experiments.pictures RUN`` writes the report of a run, opens it in headless Chromium, cuts
the parts out and writes ``docs/report-*.png`` with few colours. The README shows those of
``synco-fast pretrain --config demo --data datasets/demo``.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from synco_fast.report.page import write_report

#: Width of the page in pixels, and more than its height.
WIDTH, HEIGHT = 1120, 8000
#: Name of a picture, and the headings it reaches from and to; None for the top of the page.
PARTS = {"report-curves": (None, "Augmented pairs"), "report-neighbours": ("Nearest neighbours", "Map of")}
#: Pixels of a line over a heading, and of the margin at a picture's right and lower edge.
_LINE, _MARGIN = 2, 16

#: Writes the top of every heading where ``--dump-dom`` shows it.
_PROBE = """<script>addEventListener("load", () => {
    const found = [...document.querySelectorAll("h2")].map(e => [e.textContent, e.getBoundingClientRect().top]);
    const note = document.body.appendChild(document.createElement("p"));
    note.id = "found";
    note.textContent = JSON.stringify(found);
})</script>"""


def show(page: Path, folder: Path, *words: str) -> str:
    """Open a page in headless Chromium; what it prints."""
    browser = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
    if browser is None:
        raise SystemExit("error: found no browser, expected chromium: apt-get install chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},{HEIGHT}"]
    command += ["--virtual-time-budget=5000", *words, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def cut(page: Path, out: Path) -> list[Path]:
    """Write each of `PARTS` below ``out``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        probed, whole = folder / "page.html", folder / "whole.png"
        probed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
        found = re.search(r'<p id="found">(.*?)</p>', show(probed, folder, "--dump-dom"), re.DOTALL)
        assert found is not None, "the page's script did not run"
        tops = json.loads(html.unescape(found[1]))
        show(page, folder, f"--screenshot={whole}")
        written = []
        with Image.open(whole) as picture:
            for part, ends in PARTS.items():
                first, last = (next((y for title, y in tops if end and title.startswith(end)), 0) for end in ends)
                written.append(out / f"{part}.png")
                # Below the line over a heading, and without what is empty at the right and below.
                piece = picture.convert("RGB").crop((0, round(first) + _LINE, WIDTH, round(last) - _LINE))
                _, _, right, bottom = ImageChops.invert(piece).getbbox() or (0, 0, *piece.size)
                piece = piece.crop((0, 0, min(WIDTH, right + _MARGIN), bottom + _MARGIN))
                piece.quantize(128, dither=Image.Dither.NONE).save(written[-1], optimize=True)
    return written


def main() -> None:
    """Write the report and the pictures, and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="the folder of the pictures")
    options = parser.parse_args()
    for file in cut(write_report(options.run).resolve(), options.out):
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
