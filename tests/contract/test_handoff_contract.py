"""A whole hand-off, over each transport and through everything that can go wrong with it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import pytest
from handoff_pair import EPOCH, LAYOUT, Line, destination_end, source_end
from transport_suite import until

from core.blocks import Closing
from core.errors import (
    DigestMismatchError,
    LayoutMismatchError,
    LeaseExpiredError,
    StaleEpochError,
    TransferError,
)
from core.request import AttemptKey
from kvtransfer.handoff import ExportState
from kvtransfer.loopback import LoopbackHub

KEY = AttemptKey("request", 1)
TOKENS = list(range(100, 190))  # five full blocks and ten tokens


def pulling(destination, ticket, plan):
    return asyncio.create_task(destination.puller.pull(ticket, plan))


async def ended(source, state=ExportState.DONE):
    await until(lambda: not len(source.exports) and not source.inventory.leases_open())
    assert source.exports.ended == {state: 1}
    source.inventory.check()
    assert source.inventory.counts().active == 0


@pytest.mark.parametrize("transport", ["shm", "grpc", "loopback"])
async def test_blocks_are_pulled_while_prefill_goes_on(transport, tmp_path):
    hub = LoopbackHub()
    async with (
        source_end(shm_dir=str(tmp_path)) as source,
        destination_end(hub, transport=transport, shm_dir=str(tmp_path)) as destination,
    ):
        hub.register("prefill-0", EPOCH, source.arena)
        ticket = source.open(KEY)
        source.announce(KEY, TOKENS, 0, 2)
        plan = destination.plan(TOKENS)
        task = pulling(destination, ticket, plan)
        await until(lambda: destination.fetcher.stats.blocks[transport] == 2)
        source.announce(KEY, TOKENS, 2, 5)
        await until(lambda: destination.fetcher.stats.blocks[transport] == 5)
        source.close(KEY, TOKENS)
        result = await task
        assert result.closing == Closing(90, (42,), False, 0.5)
        assert result.transport == transport
        assert result.bytes == 6 * LAYOUT.block_bytes
        assert 0 <= result.transfer_exposed_s < 5
        destination.expect(plan, TOKENS)
        await ended(source)
        destination.expect_all_free(plan)


async def test_auto_takes_shared_memory_on_one_host(tmp_path):
    async with source_end(shm_dir=str(tmp_path)) as source, destination_end(shm_dir=str(tmp_path)) as destination:
        ticket = source.open(KEY)
        source.announce(KEY, TOKENS, 0, 5)
        source.close(KEY, TOKENS)
        result = await destination.puller.pull(ticket, destination.plan(TOKENS))
        assert result.transport == "shm"


async def test_what_is_resident_is_not_pulled_again():
    async with source_end() as source, destination_end() as destination:
        plans = []
        for attempt, pulled in ((1, 6), (2, 1)):
            key = AttemptKey(f"request-{attempt}", 1)
            ticket = source.open(key)
            source.announce(key, TOKENS, 0, 5)
            source.close(key, TOKENS)
            plans.append(destination.plan(TOKENS))
            result = await destination.puller.pull(ticket, plans[-1])
            assert result.bytes == pulled * LAYOUT.block_bytes
            destination.expect(plans[-1], TOKENS)
        assert plans[0].blocks[:5] == plans[1].blocks[:5]


async def test_two_pulls_of_one_prompt_end_in_the_same_blocks():
    async with source_end() as source, destination_end() as destination:
        keys = [AttemptKey(f"request-{n}", 1) for n in range(4)]
        plans = [destination.plan(TOKENS) for _ in keys]
        tasks = [pulling(destination, source.open(key), plan) for key, plan in zip(keys, plans, strict=True)]
        for key in keys:
            source.announce(key, TOKENS, 0, 5)
            source.close(key, TOKENS)
        await asyncio.gather(*tasks)
        for plan in plans:
            destination.expect(plan, TOKENS)
            assert plan.blocks[:5] == plans[0].blocks[:5]
            destination.inventory.release(plan.blocks)
        destination.inventory.check()
        assert destination.inventory.counts().active == 0


async def test_a_request_that_ended_with_prefill_needs_no_blocks():
    async with source_end() as source, destination_end() as destination:
        ticket = source.open(KEY)
        source.exports.close_(KEY, Closing(90, (2,), True))
        result = await destination.puller.pull(ticket, destination.plan(TOKENS))
        assert result.closing.finished
        assert result.bytes == 0
        await ended(source)


# -- refusals ----------------------------------------------------------------------------------------------------------


async def test_corrupted_blocks_are_not_committed():
    async with source_end() as source, destination_end() as destination:
        ticket = source.open(KEY)
        records = source.announce(KEY, TOKENS, 0, 5)
        source.arena.bytes_view()[records[1].block_id, 7] ^= 0x10
        plan = destination.plan(TOKENS)
        with pytest.raises(DigestMismatchError):
            await destination.puller.pull(ticket, plan)
        assert not destination.inventory.match(plan.keys)
        destination.expect_all_free(plan)
        await ended(source)


async def test_a_source_that_computed_other_tokens_is_refused():
    async with source_end() as source, destination_end() as destination:
        ticket = source.open(KEY)
        source.announce(KEY, [1, *TOKENS[1:]], 0, 5)
        plan = destination.plan(TOKENS)
        with pytest.raises(TransferError, match="not that of our tokens"):
            await destination.puller.pull(ticket, plan)
        assert not destination.inventory.match(plan.keys)
        destination.expect_all_free(plan)


@pytest.mark.parametrize(("change", "field"), [({"kv_heads": 4}, "kv_heads"), ({"fingerprint": b"\x02" * 16}, "fingerprint")])
async def test_a_layout_that_differs_is_named(change, field):
    async with source_end() as source, destination_end() as destination:
        ticket = replace(source.open(KEY), layout=replace(LAYOUT, **change))
        with pytest.raises(LayoutMismatchError, match=f"{field} differs"):
            await destination.puller.pull(ticket, destination.plan(TOKENS))


async def test_an_unknown_codec_is_named():
    async with source_end() as source, destination_end() as destination:
        ticket = replace(source.open(KEY), codec="int3")
        with pytest.raises(LayoutMismatchError, match="codec differs: raw, planes, int8 here, int3 there"):
            await destination.puller.pull(ticket, destination.plan(TOKENS))


async def test_a_hand_off_nobody_opened_is_refused():
    async with source_end() as source, destination_end() as destination:
        with pytest.raises(LeaseExpiredError, match="not on offer"):
            await destination.puller.pull(source.ticket(KEY), destination.plan(TOKENS))


async def test_another_incarnation_is_refused():
    async with source_end() as source, destination_end() as destination:
        ticket = source.open(KEY)
        old = replace(ticket, source=replace(ticket.source, epoch=EPOCH - 1))
        new = replace(ticket, source=replace(ticket.source, epoch=EPOCH + 1))
        for wrong in (old, new, ticket):  # once a newer one was seen, the older is refused without asking it
            with pytest.raises(StaleEpochError):
                await destination.puller.pull(wrong, destination.plan(TOKENS[:16]))


# -- endings -----------------------------------------------------------------------------------------------------------


async def test_a_revoked_hand_off_fails_with_the_reason():
    async with source_end() as source, destination_end() as destination:
        ticket = source.open(KEY)
        source.announce(KEY, TOKENS, 0, 2)
        plan = destination.plan(TOKENS)
        task = pulling(destination, ticket, plan)
        await until(lambda: destination.fetcher.stats.blocks["grpc"] == 2)
        source.exports.revoke(KEY, "the client went away")
        with pytest.raises(TransferError, match="the client went away"):
            await task
        await ended(source, ExportState.REVOKED)
        destination.expect_all_free(plan)


async def test_a_higher_attempt_takes_over():
    async with source_end() as source, destination_end() as destination:
        first, second = destination.plan(TOKENS), destination.plan(TOKENS)
        task = pulling(destination, source.open(KEY), first)
        await until(lambda: bool(source.exports._followers))
        newer = source.open(AttemptKey("request", 2))
        with pytest.raises(TransferError, match="superseded by attempt 2"):
            await task
        with pytest.raises(TransferError, match="superseded"):
            source.open(KEY)
        source.announce(newer.key, TOKENS, 0, 5)
        source.close(newer.key, TOKENS)
        await destination.puller.pull(newer, second)
        destination.expect(second, TOKENS)


async def test_a_cancelled_pull_tells_the_source_and_keeps_its_references():
    async with source_end() as source, destination_end() as destination:
        ticket = source.open(KEY)
        source.announce(KEY, TOKENS, 0, 3)
        plan = destination.plan(TOKENS)
        task = pulling(destination, ticket, plan)
        await until(lambda: destination.fetcher.stats.blocks["grpc"] == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ended(source)
        destination.expect_all_free(plan)


async def test_the_lease_is_renewed_while_prefill_takes_its_time():
    async with source_end(lease_s=0.6) as source, destination_end() as destination:
        ticket = source.open(KEY)
        source.announce(KEY, TOKENS, 0, 1)
        task = pulling(destination, ticket, plan := destination.plan(TOKENS))
        await asyncio.sleep(1.5)  # the passing of time is what is tested
        source.announce(KEY, TOKENS, 1, 5)
        source.close(KEY, TOKENS)
        await task
        destination.expect(plan, TOKENS)
        await ended(source)


async def test_an_export_nobody_follows_expires():
    async with source_end(lease_s=0.2) as source:
        source.open(KEY)
        source.announce(KEY, TOKENS, 0, 5)
        source.close(KEY, TOKENS)
        await ended(source, ExportState.EXPIRED)


async def test_a_source_that_falls_silent_loses_its_lease():
    async with source_end(lease_s=0.6) as source, destination_end() as destination:
        line = Line(source.server.address)
        async with line as address:
            ticket = source.open(KEY)
            ticket = replace(ticket, source=replace(ticket.source, grpc_address=address))
            plan = destination.plan(TOKENS)
            source.announce(KEY, TOKENS, 0, 2)
            task = pulling(destination, ticket, plan)
            await until(lambda: destination.fetcher.stats.blocks["grpc"] == 2)
            line.freeze()
            async with asyncio.timeout(5):
                with pytest.raises(LeaseExpiredError, match="has not renewed"):
                    await task
            await until(lambda: source.exports.ended[ExportState.EXPIRED] == 1)
            destination.expect_all_free(plan)
            line.cut()


async def test_a_broken_line_is_mended_and_each_block_pulled_once():
    async with source_end() as source, destination_end() as destination:
        line = Line(source.server.address)
        async with line as address:
            ticket = source.open(KEY)
            ticket = replace(ticket, source=replace(ticket.source, grpc_address=address))
            plan = destination.plan(TOKENS)
            task = pulling(destination, ticket, plan)
            for index in range(3):
                source.announce(KEY, TOKENS, index, index + 1)
                await until(lambda: destination.fetcher.stats.blocks["grpc"] == index + 1)  # noqa: B023
                line.cut()
            source.announce(KEY, TOKENS, 3, 5)
            source.close(KEY, TOKENS)
            result = await task
            assert result.bytes == 6 * LAYOUT.block_bytes
            assert line.connections > 1
            destination.expect(plan, TOKENS)
            await ended(source)


async def test_a_source_that_is_gone_fails_soon_and_is_forgotten():
    async with destination_end() as destination:
        async with source_end() as source:
            ticket = source.open(KEY)
            source.announce(KEY, TOKENS, 0, 2)
            plan = destination.plan(TOKENS)
            task = pulling(destination, ticket, plan)
            await until(lambda: destination.fetcher.stats.blocks["grpc"] == 2)
            await source.server._server.stop(0)
            async with asyncio.timeout(8):
                with pytest.raises(TransferError):
                    await task
        assert not destination.puller.channels._channels
        destination.expect_all_free(plan)


# -- other ways --------------------------------------------------------------------------------------------------------


async def test_a_failing_transport_falls_back_and_says_so(tmp_path):
    async with source_end(shm_dir=str(tmp_path)) as source, destination_end(shm_dir=str(tmp_path)) as destination:
        os.unlink(source.arena.path)
        ticket = source.open(KEY)
        plan = destination.plan(TOKENS)
        source.announce(KEY, TOKENS, 0, 5)
        source.close(KEY, TOKENS)
        result = await destination.puller.pull(ticket, plan)
        assert result.transport == "grpc"
        assert destination.fetcher.stats.fallbacks == {("shm", "grpc"): 1}
        assert destination.fetcher.order(ticket.source) == ["grpc", "shm"]
        destination.expect(plan, TOKENS)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_a_block_computed_anew_after_it_was_lost_is_pulled_from_its_new_place(transport, tmp_path):
    async with (
        source_end(shm_dir=str(tmp_path)) as source,
        destination_end(transport=transport, shm_dir=str(tmp_path)) as destination,
    ):
        ticket = source.open(KEY)
        (lost,) = source.compute(KEY, TOKENS, 0, 1)
        source.exports.announce(KEY, [replace(lost, generation=lost.generation - 1, digest=5)])
        source.announce(KEY, TOKENS, 1, 3)
        plan = destination.plan(TOKENS)
        task = pulling(destination, ticket, plan)
        await until(lambda: destination.fetcher.stats.blocks[transport] == 2)
        source.announce(KEY, TOKENS, 0, 1)
        source.announce(KEY, TOKENS, 3, 5)
        source.close(KEY, TOKENS)
        await task
        destination.expect(plan, TOKENS)


async def test_a_block_that_stays_lost_fails_cleanly():
    async with source_end() as source, destination_end() as destination:
        ticket = source.open(KEY)
        records = source.compute(KEY, TOKENS, 0, 5)
        source.exports.announce(KEY, [replace(records[2], generation=99, digest=5), *records[:2], *records[3:]])
        source.close(KEY, TOKENS)
        plan = destination.plan(TOKENS)
        with pytest.raises(TransferError, match=r"without a readable block for places \[2\]"):
            await destination.puller.pull(ticket, plan)
        destination.expect_all_free(plan)
        await ended(source)
