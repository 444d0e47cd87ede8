"""Where things are: what is carried to the machine, what stays on it, and what comes back."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
CARRIED = ROOT / ".gpu_check"
"""Made by `pack`, and ignored by git: wheels, a tokenizer, and later what came back of an earlier machine."""
WHEELS = CARRIED / "wheels"
TOKENIZER = CARRIED / "tokenizer"
BACK = CARRIED / "back"
"""Where what came back is put, so that a new machine needs neither compile nor check it again."""

STATE = ROOT / "build" / "gpu_check"
"""Stays on a machine between commands."""
SITE = STATE / "site"
"""The packages out of the wheels, and the extensions."""
EXTENSIONS = STATE / "extensions"
BUILT = STATE / "built"
MODELS = STATE / "models"
RESULTS = STATE / "results"


def out() -> Path:
    """The folder whose files are brought back from the machine."""
    folder = Path(os.environ.get("OUT") or STATE / "out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
