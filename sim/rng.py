"""A tree of random streams under one seed: what one part draws never changes what another one does."""

from __future__ import annotations

import random
from hashlib import sha256


class Streams:
    """Streams by name. The same seed and name give the same numbers, whoever else draws how much."""

    def __init__(self, seed: int, path: str = "") -> None:
        self.seed = seed
        self._path = path

    def stream(self, name: str) -> random.Random:
        return random.Random(int.from_bytes(sha256(f"{self.seed}{self._path}/{name}".encode()).digest()[:8], "little"))

    def below(self, name: str) -> Streams:
        """The branch of that name."""
        return Streams(self.seed, f"{self._path}/{name}")
