"""Files that a command writes in the end: what would keep it from that is said in the beginning."""

from __future__ import annotations

import os
from pathlib import Path

from core.errors import ConfigError


def check_writable(*paths: str | None) -> None:
    """Before an hour of work, not after it; None and `-` (standard output) are fine. Raises ConfigError."""
    for path in paths:
        if path is None or path == "-":
            continue
        place = Path(path)
        folder = place.parent
        if place.is_dir():
            raise ConfigError(f"cannot write {path}: it is a folder; name a file in it")
        if not folder.is_dir():
            raise ConfigError(f"cannot write {path}: there is no folder {folder}; make it first")
        if not os.access(place if place.exists() else folder, os.W_OK):
            raise ConfigError(f"cannot write {path}: permission denied")


def write_text(path: str, text: str) -> None:
    """Raises ConfigError."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
