"""Which layout a store's disk holds, remembered beside the blocks: a restarted store announces them before anybody asks."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, fields
from pathlib import Path

from core.blocks import KvLayout

log = logging.getLogger(__name__)
NAME = "layout.json"


def recall(directory: Path) -> KvLayout | None:
    """The layout last remembered; None when there is none, or the file is no longer whole."""
    try:
        found = json.loads((directory / NAME).read_text(encoding="utf-8"))
        layout = KvLayout(**{**found, "fingerprint": bytes.fromhex(found["fingerprint"])})
        if any(type(getattr(layout, f.name)) is not kind for f, kind in zip(fields(layout), _KINDS, strict=True)):
            raise TypeError("a field is of another kind")
        if layout.block_bytes <= 0:
            raise ValueError("a block holds nothing")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be used (%s); the layout is learned from the first offer", directory / NAME, error)
        return None
    return layout


def remember(directory: Path, layout: KvLayout) -> None:
    """Whole or not at all, whenever we are killed. A disk that cannot be written costs a warm restart, nothing else."""
    text = json.dumps({**asdict(layout), "fingerprint": layout.fingerprint.hex()})
    fresh = directory / f"{NAME}.new"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, directory / NAME)
    except OSError as error:
        log.warning("cannot write %s (%s)", directory / NAME, error.strerror)


_KINDS = (bytes, str, int, int, int, int)
