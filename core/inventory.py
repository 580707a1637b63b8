"""A node's one table of blocks: who holds them, which are findable by key, which may be evicted.

Deciding code: no clock of its own and no memory of KV here, only numbers. Engine, puller and exports of a worker share
one Inventory; every change is serialised by one lock and costs time in proportion to the blocks named, not to the table.

A block is in exactly one state:

    free ── allocate ──▶ active, uncommitted ── commit ──▶ active, committed ◀── match, find, retain, lease ── cached
     ▲                         │ last release                    │ last release                                 ▲ │
     └─────────────────────────┘                                 └──────────────────────────────────────────────┘ │
     └── evicted, in the order of the policy, when `allocate` finds nothing free ◀────────────────────────────────┘

What the papers call begin → commit | revoke is allocate → commit | release here: an uncommitted block is findable by
nobody, and releasing it takes it back. A reference is anonymous: whoever took it releases it. A lease is a bag of
references with a holder and an end. A pin is no reference: a pinned block that nobody holds stays, and counts as active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableSequence, Sequence

from core.blocks import KEY_BYTES, BlockKey
from core.errors import OutOfBlocksError, PinLimitError
from core.inventory_changes import Changes
from core.inventory_table import BlockCounts, Entry, Evictions, Victim
from core.inventory_view import TableView
from core.request import AttemptKey

__all__ = ["BlockCounts", "Changes", "Entry", "Evictions", "Inventory", "Victim"]


class Inventory(TableView):
    """Allocation, references, keys, leases, pins and eviction of `num_blocks` blocks.

    `generations` is where the generation words live, one per block; a shared-memory arena passes its own so that readers
    in other processes can check them before and after a copy. A word changes before a block's next owner can write to it
    and never while the block is held or cached, so a record (block, generation) names the same bytes as long as the word
    is unchanged. Misuse (releasing what is not held, committing twice under two keys) is an AssertionError.

    `policy` names an order of eviction of `core.eviction`; raises ConfigError when there is none of that name.
    `tenant_share` is the part of all blocks beyond which a tenant's committed ones are evicted before anybody else's.
    `pinned_max` is how many blocks can be pinned at a time, half of all for None. `clock` tells seconds, for ages alone.
    """

    def __init__(
        self,
        num_blocks: int,
        generations: MutableSequence[int] | None = None,
        *,
        policy: str = "lru",
        tenant_share: float = 1.0,
        pinned_max: int | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(num_blocks, generations, policy, tenant_share, pinned_max, clock)

    def allocate(self, count: int, *, tenant: bytes | None = None) -> list[int]:
        """`count` blocks of undefined content, one reference each for the caller. All or nothing.

        A `tenant` for whom they are does not push out others when they take it beyond its share: what must be evicted
        is its own, as far as it has something idle. Raises OutOfBlocksError when fewer are free or evictable.
        """
        with self._lock:
            free = self._free
            if count > (room := len(free) + len(self._idle) - len(self._parked)):
                raise OutOfBlocksError(
                    f"{count} KV blocks are needed and {room} of {self._total} can be had; "
                    "retry later, or raise engine.kv_bytes"
                )
            blocks = free[: -count - 1 : -1]
            del free[len(free) - len(blocks) :]
            if len(blocks) < count:
                blocks += self._evict_for(count, len(blocks), tenant)
            refs, digest, generation = self._refs, self._digest, self._generation
            for block in blocks:
                generation[block] += 1  # before the new owner can write
                refs[block] = 1
                digest[block] = 0
            if self._words is not None:
                for block in blocks:
                    self._words[block] = generation[block]
            return blocks

    def _evict_for(self, count: int, had: int, tenant: bytes | None) -> list[int]:
        """What is missing to `count` blocks, out of the cache."""
        now, own = self._now(), self._shares if tenant is not None else None
        self.evictions.for_space += count - had
        if self._ranks is None and self._shares is None and not self._parked:
            return self._leave_all([self._idle.pop() for _ in range(count - had)], now)
        evicted = []
        for n in range(had + 1, count + 1):
            block, since = self._idle.pop() if own is None else own.pop_for(tenant or b"", n)
            if self._parked and block in self._parked:
                block, since = self._pop_past(block, since, tenant, n)
            self._leave(block, since, now)
            evicted.append(block)
        return evicted

    def commit(
        self,
        block: int,
        key: BlockKey,
        digest: int = 0,
        *,
        tenant: bytes = b"",
        cost_s: float = 0.0,
        shared: bool = True,
    ) -> int:
        """Makes a held block findable under `key`; its content must be final. Returns the block to use from now on.

        When the key is already resident the caller's reference moves to that block and `block` loses it. Committing a
        block again under its own key changes nothing. `tenant` is whom the block is charged to; the first who commits a
        key is. `cost_s` is what computing the block again takes, known to the policy `cost` alone; 0: not known,
        `typical_cost_s` is taken, and without it the block goes first.
        What is not `shared` is for this node alone: `changes` does not name it.
        """
        assert len(key) == KEY_BYTES, "only full blocks have keys"
        with self._lock:
            assert self._refs[block] > 0, f"block {block} is committed by nobody who holds it"
            had = self._key[block]
            assert had is None or had == key, f"block {block} is committed under another key"
            resident = self._by_key.get(key)
            if resident is None:
                self._key[block] = key
                self._by_key[key] = block
                if self._tenanted(tenant):
                    self._tenant[block] = tenant
                if self._costed(cost_s := cost_s or self.typical_cost_s):
                    self._cost_s[block] = cost_s
                if self._shares is not None:
                    self._shares.charge(tenant, 1)
                if self._clock is not None:
                    self._committed_at[block] = self._clock()
                if not shared:
                    self._unshared.add(block)
                for log in self._logs if shared else ():
                    if log.followed:
                        log.came(key)
            elif resident != block:
                self._take(resident)
                self._hits[resident] += 1
                self._used((resident,))
                self._release((block,))
                return resident
            if digest:
                self._digest[block] = digest
            return block

    def commit_run(
        self, blocks: list[int], keys: Sequence[BlockKey], first: int, last: int, *, tenant: bytes = b"", shared: bool = True
    ) -> bool:
        """As `commit` of `blocks[first:last]`, each under its key of `keys`, at a third of the time; the list is put right.

        True when a block was resident already, and stands in the place of ours now.
        """
        swapped, fresh = False, []
        with self._lock:
            refs, names, by_key = self._refs, self._key, self._by_key
            for place, block, key in zip(range(first, last), blocks[first:last], keys[first:last], strict=True):
                had = names[block]
                assert refs[block] > 0, f"block {block} is committed by nobody who holds it"
                assert had is None or had == key, f"block {block} is committed under another key"
                resident = by_key.setdefault(key, block)
                if had is None and resident == block:
                    names[block] = key
                    fresh.append(block)
                elif resident != block:
                    self._take(resident)
                    self._hits[resident] += 1
                    self._used((resident,))
                    self._release((block,))
                    blocks[place], swapped = resident, True
            self._came(fresh, tenant, shared)
        return swapped

    def _came(self, fresh: list[int], tenant: bytes, shared: bool) -> None:
        """What else is noted of blocks that have become findable."""
        tenants, costs = self._tenant, self._cost_s
        if self._tenanted(tenant):
            for block in fresh:
                tenants[block] = tenant
        if self._costed(cost_s := self.typical_cost_s):
            for block in fresh:
                costs[block] = cost_s
        if fresh and self._shares is not None:
            self._shares.charge(tenant, len(fresh))
        if self._clock is not None:
            now = self._clock()
            for block in fresh:
                self._committed_at[block] = now
        if not shared:
            self._unshared.update(fresh)
            return
        for log in self._logs:
            if log.followed:
                log.came_all([self._key[block] or b"" for block in fresh])

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        """The blocks of the longest resident prefix of `keys`, a reference taken on each for the caller."""
        found: list[int] = []
        with self._lock:
            by_key, refs, hits, pinned, wake = self._by_key, self._refs, self._hits, self._pinned, self._idle.remove
            for key in keys:
                block = by_key.get(key)
                if block is None:
                    break
                if not refs[block] and block not in pinned:
                    wake(block)
                refs[block] += 1
                hits[block] += 1
                found.append(block)
            if self._looked_at or self._parked:
                self._used(found)
        return found

    def find(self, keys: Sequence[BlockKey]) -> list[int | None]:
        """The block of each of `keys`, None where it is not resident; a reference taken on each for the caller."""
        with self._lock:
            found = [self._by_key.get(key) for key in keys]
            used = [block for block in found if block is not None]
            for block in used:
                self._take(block)
                self._hits[block] += 1
            self._used(used)
            return found

    def look(self, keys: Sequence[BlockKey]) -> list[int | None]:
        """As `find`, for whoever copies or checks blocks: no use, so the order of eviction stays as it is.

        A block that is let go keeps its place, unless somebody used it meanwhile.
        """
        with self._lock:
            found = [self._by_key.get(key) for key in keys]
            for block in found:
                if block is None:
                    continue
                if not self._refs[block] and block not in self._pinned:
                    self._parked.add(block)
                self._refs[block] += 1
            return found

    def retain(self, blocks: Iterable[int]) -> None:
        """One more reference on each block; they must be held or cached."""
        with self._lock:
            for block in blocks:
                self._take(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference on each block. Unreferenced, a committed block stays as cache, another becomes free.

        Blocks given in the order of their sequence are evicted last first: a prefix is useful without its tail, never
        the other way round.
        """
        with self._lock:
            self._release(blocks)

    def lease(self, holder: AttemptKey, blocks: Iterable[int], until: float) -> None:
        """Takes one more reference on each block for `holder`. Leasing again adds blocks and never shortens the lease."""
        blocks = list(blocks)
        with self._lock:
            refs = self._refs
            for block in blocks:
                if refs[block]:
                    refs[block] += 1
                else:
                    self._take(block)
            self._leases.add(holder, blocks, until)

    def renew(self, holder: AttemptKey, until: float) -> bool:
        """Lengthens a lease; False when the holder has none (any more)."""
        with self._lock:
            return self._leases.renew(holder, until)

    def end(self, holder: AttemptKey) -> bool:
        """Ends a lease and drops its references. Idempotent; False when there was none."""
        with self._lock:
            blocks = self._leases.end(holder)
            self._release(blocks or ())
            return blocks is not None

    def expire(self, now: float) -> list[AttemptKey]:
        """Ends every lease whose time is up (`until <= now`) and says whose."""
        with self._lock:
            expired = self._leases.due(now)
            for holder in expired:
                self._release(self._leases.end(holder) or ())
            return expired

    def pin(self, keys: Iterable[BlockKey]) -> int:
        """Keeps what is resident of `keys` from eviction until it is unpinned; idempotent. Returns how many of them are pinned.

        Raises PinLimitError when more than `pinned_max` blocks would be; nothing is pinned then.
        """
        with self._lock:
            blocks = dict.fromkeys(block for key in keys if (block := self._by_key.get(key)) is not None)
            fresh = [block for block in blocks if block not in self._pinned]
            if (count := len(self._pinned) + len(fresh)) > self._pinned_max:
                raise PinLimitError(
                    f"{count} of {self._total} blocks would be pinned here and {self._pinned_max} may be;"
                    " unpin others, or raise store.pinned_share or the node's memory"
                )
            for block in fresh:
                self._pinned[block] = 0.0 if self._refs[block] else self._idle.remove(block)
                self._used((block,))
            return len(blocks)

    def unpin(self, keys: Sequence[BlockKey]) -> int:
        """Lets blocks be evicted again, those of a prefix last first. Returns how many of `keys` were pinned."""
        with self._lock:
            blocks = [block for key in keys if (block := self._by_key.get(key)) is not None and block in self._pinned]
            blocks = list(dict.fromkeys(blocks))
            for block in blocks:  # a reference of ours, so that they come to rest as released ones do
                self._take(block)
                del self._pinned[block]
            self._release(blocks)
            return len(blocks)

    def evict(self, keys: Iterable[BlockKey]) -> int:
        """Frees the cached ones among `keys` now and says how many that were; what is held or pinned stays."""
        with self._lock:
            count, now = 0, self._now()
            for key in keys:
                block = self._by_key.get(key)
                if block is None or self._refs[block] or block in self._pinned:
                    continue
                self._leave(block, self._idle.remove(block), now)
                if self._shares is not None:
                    self._shares.charge(self._tenant[block], -1)
                self._free_up(block)
                count += 1
            self.evictions.asked += count
            return count

    def victims(self, count: int) -> list[Victim]:
        """The next `count` blocks to be evicted, fewer when fewer are cached, a reference taken on each for the caller.

        Looking at them is no use: released, they are the next to go again, unless somebody used them meanwhile.
        """
        with self._lock:
            keys, digests = self._key, self._digest
            return [Victim(block, keys[block] or b"", digests[block]) for block in self._look_at_next(count)]

    def set_digest(self, block: int, digest: int, generation: int | None = None) -> bool:
        """Notes a block's digest. With `generation`, only if the block still is the one that was read; False otherwise."""
        with self._lock:
            if generation is not None and generation != self._generation[block]:
                return False
            self._digest[block] = digest
            return True
