"""Draws docs/images/report.png: the page of a run on a desktop, light, and on a phone, dark.

    moefold run compensated --set evaluate.perplexity.gate='{stdlib evaluate: 0.1, prose: 0.1}'
    python docs/draw_report.py .moefold/report.html

Needs Chromium. The page follows the system's setting, which a headless browser has none of: a copy is told.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
PICTURE = HERE / "images" / "report.png"
ASKED = 'matchMedia("(prefers-color-scheme: dark)")'
HEIGHT, DESKTOP, PHONE, GAP = 1560, 1180, 390, 24
SHRINK = 0.6


def main(source: Path) -> None:
    """Both, side by side."""
    page = source.read_text(encoding="utf-8")
    both = Image.new("RGB", (DESKTOP + GAP + PHONE, HEIGHT), "white")
    both.paste(shot(page, DESKTOP, dark=False), (0, 0))
    both.paste(shot(page, PHONE, dark=True), (DESKTOP + GAP, 0))
    small = both.resize((round(both.width * SHRINK), round(both.height * SHRINK)), Image.Resampling.LANCZOS)
    small.quantize(128).save(PICTURE, optimize=True)


def shot(page: str, width: int, dark: bool) -> Image.Image:
    """The top of the page, in a frame of so many pixels: a browser's window is wider than a phone."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("no Chromium on this machine")
    answer = f"({{matches: {'true' if dark else 'false'}, addEventListener() {{}}}})"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = page.replace(f"window.{ASKED}", answer).replace(ASKED, answer)
        (folder / "page.html").write_text(told, encoding="utf-8")
        style = f"width: {width}px; height: {HEIGHT}px; border: 0"
        (folder / "frame.html").write_text(f'<body style="margin: 0"><iframe src="page.html" style="{style}"></iframe>')
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=20000",
        ]
        options += [f"--window-size={max(width, 600)},{HEIGHT}", f"--user-data-dir={folder / 'profile'}"]
        options += [f"--screenshot={folder / 'page.png'}", (folder / "frame.html").as_uri()]
        subprocess.run([browser, *options], check=True, capture_output=True)
        with Image.open(folder / "page.png") as found:
            return found.convert("RGB").crop((0, 0, width, HEIGHT))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
