"""A small trained Mixture-of-Experts model of Python source, the text it knows, and the script that made it."""

from pathlib import Path

PATH = Path(__file__).parent / "model"
