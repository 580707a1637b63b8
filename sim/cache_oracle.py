"""What a cache of so many blocks would have found of a trace: the yardstick for caches that are built.

`LruOracle` is the least recently used cache of the Mooncake paper (Qin et al., FAST 2025, figure 9; arXiv 2407.00079, table 1):
one cache for all requests, blocks one by one, touched when found, put in when not. `InventoryCache` is the shipped table of
blocks under a policy of `core.eviction`: it finds leading blocks only, and lets a prompt go from its end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256

from core.blocks import KEY_BYTES, BlockKey
from core.inventory import Inventory
from sim.workload import Arrival

_LINEAR, _QUADRATIC, _HIDDEN = 22, 4, 8192
"""Of the Mooncake paper's equation 2, and the width of Llama-70B."""


class LruOracle:
    """Share of blocks that caches of each capacity (in blocks), and one without bound, would have found.

    Holds as many block names as the capacities come to, and every different one once.
    """

    def __init__(self, capacities: Sequence[int]) -> None:
        self.blocks = 0
        self._found = dict.fromkeys(capacities, 0)
        self._caches: list[tuple[int, OrderedDict[int, None]]] = [(capacity, OrderedDict()) for capacity in capacities]
        self._ever: set[int] = set()
        self._found_ever = 0

    @property
    def distinct(self) -> int:
        return len(self._ever)

    def add(self, blocks: Sequence[int]) -> None:
        self.blocks += len(blocks)
        ever = self._ever
        before = len(ever)
        ever.update(blocks)
        self._found_ever += len(blocks) - (len(ever) - before)
        for capacity, cache in self._caches:
            found = 0
            touch, drop = cache.move_to_end, cache.popitem
            for block in blocks:
                if block in cache:
                    found += 1
                    touch(block)
                else:
                    cache[block] = None
                    if len(cache) > capacity:
                        drop(last=False)
            self._found[capacity] += found

    def hit_ratio(self) -> dict[str, float]:
        """By capacity, and `unbounded`; to four digits, as papers print it. Empty when there were no blocks."""
        if not self.blocks:
            return {}
        found = {str(capacity): count for capacity, count in self._found.items()} | {"unbounded": self._found_ever}
        return {name: round(count / self.blocks, 4) for name, count in found.items()}


class InventoryCache:
    """`core.inventory` of `capacity` blocks under a policy, asked as a worker would: match, allocate, commit, release.

    Blocks are those of the trace. A prompt longer than the cache leaves only what fits. The cost of a block is that of
    computing it behind all before it, in units that cancel out: Mooncake's equation 2 for a 70B model.
    """

    def __init__(self, capacity: int, policy: str) -> None:
        self._inventory = Inventory(capacity, policy=policy)
        self._capacity = capacity
        self.blocks = 0
        self.found = 0

    @property
    def hit_ratio(self) -> float:
        return self.found / self.blocks if self.blocks else 0.0

    def add(self, arrival: Arrival) -> None:
        keys = _chained(arrival.blocks)
        held = self._inventory.match(keys[: self._capacity])
        self.blocks += len(keys)
        self.found += len(held)
        missing = keys[len(held) : self._capacity]
        for block, (place, key) in zip(self._inventory.allocate(len(missing)), enumerate(missing, len(held)), strict=True):
            cost = _LINEAR * _HIDDEN + 2 * _QUADRATIC * place * arrival.block_tokens
            held.append(self._inventory.commit(block, key, cost_s=float(cost)))
        self._inventory.release(held)


def _chained(names: Sequence[int]) -> list[BlockKey]:
    """A key for each name and all before it."""
    keys: list[BlockKey] = []
    parent = b""
    for name in names:
        parent = sha256(parent + name.to_bytes(KEY_BYTES, "little", signed=True)).digest()[:KEY_BYTES]
        keys.append(parent)
    return keys
