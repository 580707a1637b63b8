"""What the router believes of all nodes' blocks."""

from __future__ import annotations

from core.kv_changes import KvChanges
from router.block_index import BlockIndex

KEYS = [bytes([n]) * 16 for n in range(1, 4)]


def test_when_every_node_has_gone_its_answer_is_still_as_wide_as_its_places():
    index = BlockIndex(10_000)
    index.heard("prefill-0", KvChanges(1, 1, b"".join(KEYS)))
    assert index.match(KEYS).depths[index.places(["prefill-0"])].tolist() == [3]
    index.forget("prefill-0")
    assert index.match(KEYS).depths[index.places(["prefill-0", "prefill-1"])].tolist() == [0, 0]
