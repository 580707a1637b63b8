"""Which store node a worker's blocks go to. Deciding code."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from core.blocks import KvSource


def choose_store(stores: Sequence[KvSource], here: KvSource) -> KvSource | None:
    """The store for blocks of this worker: one of its host when there is one; else any, and always the same while the
    stores are the same. Workers spread over several evenly (rendezvous hashing, Thaler and Ravishankar 1998)."""
    near = [store for store in stores if store.host_id == here.host_id] or list(stores)
    if not near:
        return None
    return max(near, key=lambda store: sha256(f"{here.worker_id} {store.worker_id}".encode()).digest())
