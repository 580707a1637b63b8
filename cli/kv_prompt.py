"""A prompt as the KV plane knows it: text from a file, keys of its full blocks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.errors import InvalidRequestError, UnavailableError

if TYPE_CHECKING:
    from cluster.report import ClusterSnapshot


def prompt_text(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{file} is not text in UTF-8") from None


def prompt_keys(snapshot: ClusterSnapshot, text: str) -> list[bytes]:
    """Keys of the prompt's full blocks, as the workers compute them."""
    from core.blocks import block_keys, root_key
    from core.text import Tokenizer

    for member in snapshot.members:
        layout, model = member.report.layout, member.report.model
        if layout is not None and model is not None:
            return block_keys(root_key(layout.fingerprint), Tokenizer.load(model.path).encode(text), layout.block_size)
    raise UnavailableError("no worker is ready; `tandem status` shows what they are doing")
