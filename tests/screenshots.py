"""Take the documentation's screenshots of m2-nano's report: `make screenshots` compresses, compares, reports and photographs.

    python tests/screenshots.py OUT FILE.html

OUT is the folder for the pictures.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from browser import DESKTOP, PHONE, browser

SHOTS = {"report-desktop": (DESKTOP, False, 2700), "report-phone": (PHONE, True, 2600)}


def main(folder: Path, report: Path) -> None:
    with browser() as page, tempfile.TemporaryDirectory() as scratch:
        for name, (size, dark, height) in SHOTS.items():
            page.open(report, size=size, dark=dark)
            page.screenshot(Path(scratch) / "shot.png")
            picture = Image.open(io.BytesIO((Path(scratch) / "shot.png").read_bytes())).convert("RGB")
            picture = picture.crop((0, 0, picture.width, min(height, picture.height)))
            picture.save(folder / f"{name}.webp", quality=70, method=6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).resolve())
