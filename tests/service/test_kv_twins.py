"""Two workers that were given one id: on one host the second is refused; elsewhere it serves, and nobody is sent to it."""

from __future__ import annotations

import pytest
from plane_rig import COLOCATED, converse, finished_keys, local, met, plane
from worker_harness import again, until

from core.errors import ConfigError

pytestmark = pytest.mark.service


async def test_on_one_host_the_second_is_told_what_to_change():
    async with plane() as p, p.worker(COLOCATED, "decode-0"):
        with pytest.raises(ConfigError, match="belongs to a live worker; give each worker its own id or epoch"):
            async with p.worker(COLOCATED, "decode-0"):
                pass


async def test_elsewhere_the_second_serves_alone_until_the_first_is_gone(caplog):
    """As on two hosts: nothing is shared but the directory."""
    turns, answers = await converse()
    far = {"transfer__transport": "tcp"}
    async with plane() as p, p.worker(COLOCATED, "decode-1", **far) as other:
        async with p.worker(COLOCATED, "decode-0", **far) as first:
            await met(first, 1)
            assert await local(first, turns[0]) == (answers[0], 0)
            kept = finished_keys(first, turns[0], answers[0])
            await p.knows(kept, "decode-0")
            async with p.worker(COLOCATED, "decode-0", **far) as second:
                await until(lambda: "this worker is not announced" in caplog.text)
                assert first.info.grpc_address in caplog.text
                assert (await local(second, turns[0]))[0] == answers[0]
                addresses = {node.source.grpc_address for node in await p.table.nodes()}
                assert addresses == {first.info.grpc_address, other.info.grpc_address}
                tokens, cached = await local(other, turns[1])
                assert (tokens, cached) == (answers[1], len(kept) * 16), "from the first"
            assert first.info.grpc_address in {node.source.grpc_address for node in await p.table.nodes()}
        async with p.worker(COLOCATED, "decode-0", **far) as third:
            await met(third, 1)
            tokens, _ = await local(third, again(turns[2], 2))
            assert tokens == answers[2]
