"""However an attempt ends, everything it held on both workers is free or cached afterwards."""

import asyncio
import contextlib
import glob
from dataclasses import replace

import pytest
from tiny_llama import tiny_llama
from worker_harness import DEADLINE_S, NOBODY, RunningWorker, TestRouter, again, connected, item, running, until

from cluster.serving_worker import run
from core.config import load
from core.errors import InternalError
from core.hostspec import HostSpec
from core.request import AttemptKey, WorkerRole
from core.wire import item_to_pb, key_to_pb
from tandem.v1 import common_pb2 as pb
from worker import shell

pytestmark = pytest.mark.service
PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
LONG = 400  # a dozen chunks


async def both_settled(*workers: RunningWorker) -> None:
    for worker in workers:
        await worker.settled()


async def test_a_cancel_at_any_stage_frees_everything():
    async with running(PREFILL) as prefill, running(DECODE) as decode, connected(prefill, decode) as router:
        stages = {"reserved": 0, "opened": 1, "handed off": 2, "first token": 3, "joined": 4, "streaming": 5}
        for name, stage in stages.items():
            one = item(name, LONG, max_tokens=200)
            await walk(router, one, stage)
            await router.cancel(one.key)
            await both_settled(prefill, decode)
        assert (await router.split(item("afterwards", 20)))[:1]
        await both_settled(prefill, decode)
        metrics = await decode.metrics()
        assert metrics['tandem_worker_attempts_total{outcome="cancelled"}'] == len(stages)
        assert metrics['tandem_worker_attempts_total{outcome="finished"}'] == 1


async def walk(router: TestRouter, one, stage: int) -> None:
    """Takes a request `stage` steps along its way."""
    assert (await router.reserve(one)).granted
    if stage >= 1:
        opened = await router.start(one)
    if stage >= 2:
        await router.hand_off(one, opened)
    if stage >= 3:
        await router.prefill.tokens(one.key, 1)
    if stage >= 4:
        await router.decode.expect(one.key, pb.Joined)
    if stage >= 5:
        await router.decode.tokens(one.key, 3)


async def test_cancels_in_a_crowd_spare_the_others():
    async with running(PREFILL) as prefill, running(DECODE) as decode, connected(prefill, decode) as router:
        kept = [item(f"kept {i}", 30 + 9 * i) for i in range(4)]
        expected = [await router.split(one) for one in kept]
        doomed = [item(f"doomed {i}", 50 + 5 * i, max_tokens=100) for i in range(8)]
        walking = [asyncio.create_task(walk(router, one, i % 6)) for i, one in enumerate(doomed)]
        finishing = asyncio.gather(*(router.split(again(one, 2)) for one in kept))
        for one, task in zip(doomed, walking, strict=True):
            await task
            await router.cancel(one.key)
        assert await finishing == expected
        await both_settled(prefill, decode)


async def test_attempts_end_when_their_router_stays_away():
    async with running(PREFILL) as prefill, running(DECODE) as decode:
        async with connected(prefill, decode, lease_s=0.2) as router:
            one, two = item("streaming", 40, max_tokens=1500), item("reserved", 40)
            await walk(router, one, 5)
            await walk(router, two, 1)
        await both_settled(prefill, decode)
        assert (await decode.metrics())['tandem_worker_attempts_total{outcome="orphaned"}'] == 2


async def test_the_same_router_finds_its_stream_again():
    one = item("streaming", 40, max_tokens=120)
    async with running(COLOCATED) as worker:
        async with connected(worker) as undisturbed:
            expected = await undisturbed.local(item("streaming", 40, attempt=1, max_tokens=120))
        async with connected(worker) as router:
            await router.decode.send(generate_local=pb.GenerateLocal(item=item_to_pb(again(one, 2))))
            before = await router.decode.tokens(AttemptKey("streaming", 2), 5)
        async with connected(worker) as router:
            after = await router.decode.tokens(AttemptKey("streaming", 2))
        heard = {token.position: token.token_id for token in [*before, *after]}
        assert after[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert all(expected[position] == token_id for position, token_id in heard.items())
        await worker.settled()


async def test_a_newer_attempt_takes_the_place_of_the_older():
    async with running(PREFILL) as prefill, running(DECODE) as decode, connected(prefill, decode) as router:
        one = item("twice", 60, max_tokens=400)
        await walk(router, one, 5)
        expected = await router.split(again(replace(one, sampling=replace(one.sampling, max_tokens=12)), 2))
        assert len(expected) == 12
        old = [event for event in drain(router, one.key) if isinstance(event, pb.GeneratedToken)]
        assert all(token.finish_reason == pb.FINISH_REASON_UNSPECIFIED for token in old), "the older one never finished"
        reserved = await router.reserve(one)
        assert not reserved.granted
        await both_settled(prefill, decode)


def drain(router: TestRouter, key: AttemptKey) -> list[object]:
    queue = router.decode.events[key]
    return [queue.get_nowait() for _ in range(queue.qsize())]


async def test_a_full_worker_refuses_to_reserve_and_gives_victims_back():
    # 64 blocks of 16 tokens: two growing streams cannot both stay, and the older one grows long enough to meet the younger.
    async with (
        running(PREFILL) as prefill,
        running(DECODE, engine__kv_bytes=64 * 4096) as decode,
        connected(prefill, decode) as router,
    ):
        total = decode.inventory.counts().total
        room = total * 16
        refused = await router.reserve(item("too long", room + 1))
        assert not refused.granted
        assert "KV blocks" in refused.reason
        one, two = item("one", room // 2 - 100, max_tokens=500), item("two", room // 2 - 100, max_tokens=500)
        await walk(router, one, 4)
        await walk(router, two, 4)
        failed = await last_of(router, two.key)
        assert (failed.code, failed.retryable) == ("out_of_blocks", True), failed.message
        assert len(await router.decode.tokens(one.key)) == 499, "the older stream stays"
        await both_settled(prefill, decode)


async def last_of(router: TestRouter, key: AttemptKey) -> pb.AttemptFailed:
    while not isinstance(event := await router.decode.event(key), pb.AttemptFailed):
        assert isinstance(event, pb.GeneratedToken)
    return event


async def test_a_prompt_that_can_never_fit_fails_at_once():
    async with running(PREFILL, engine__kv_bytes=2**16) as prefill, connected(prefill) as router:
        one = item("huge", 2000)
        await router.prefill.send(start_prefill=pb.StartPrefill(item=item_to_pb(one)))
        failed = await router.prefill.expect(one.key, pb.AttemptFailed)
        assert (failed.code, failed.retryable) == ("invalid_request", False)
        await prefill.settled()


async def test_a_hand_off_from_a_dead_source_fails_and_frees():
    async with running(DECODE) as decode:
        async with running(PREFILL) as prefill, connected(prefill, decode) as router:
            one = item("ghost", 40)
            opened = await router.start(one)
        async with connected(decode) as router:
            assert (await router.reserve(one)).granted
            await router.hand_off(one, opened)
            failed = await router.decode.expect(one.key, pb.AttemptFailed)
            assert failed.retryable
            await decode.settled()


async def test_a_ticket_of_another_epoch_is_refused():
    async with running(PREFILL) as prefill, running(DECODE) as decode, connected(prefill, decode) as router:
        one = item("stale", 40)
        assert (await router.reserve(one)).granted
        opened = await router.start(one)
        opened.ticket.source.epoch -= 1
        await router.hand_off(one, opened)
        failed = await router.decode.expect(one.key, pb.AttemptFailed)
        assert failed.code in ("stale_epoch", "transfer")
        await router.cancel(one.key)
        await both_settled(prefill, decode)


async def test_an_unfollowed_hand_off_expires():
    async with running(PREFILL, transfer__lease_s=0.6) as prefill, connected(prefill) as router:
        one = item("forgotten", 40)
        await router.start(one)
        await router.prefill.expect(one.key, pb.GeneratedToken)
        await prefill.settled()
        assert (await prefill.metrics())['tandem_kv_exports_total{state="expired"}'] == 1


async def test_a_stopping_worker_finishes_what_runs_and_leaves_no_file():
    async with running(COLOCATED, transfer__transport="shm", name="leaver") as worker, connected(worker) as router:
        assert glob.glob("/dev/shm/tandem-leaver-*")
        one = item("last", 30, max_tokens=100)
        await router.decode.send(generate_local=pb.GenerateLocal(item=item_to_pb(one)))
        await router.decode.tokens(one.key, 1)
        worker.stop.set()
        late = 0
        while (answer := await router.reserve(item("late", 5, attempt=late + 1))).granted:
            late += 1
        assert answer.reason == "this worker is draining"
        await router.cancel(AttemptKey("late", late))
        assert len(await router.decode.tokens(one.key)) == 99
        await until(worker.task.done)
        assert not glob.glob("/dev/shm/tandem-leaver-*")


async def test_the_grace_time_ends_what_does_not_finish():
    async with (
        running(COLOCATED, cluster__grace_s=0.5) as worker,
        connected(worker) as router,
    ):
        one = item("endless", 30, max_tokens=1500)
        await router.decode.send(generate_local=pb.GenerateLocal(item=item_to_pb(one)))
        await router.decode.tokens(one.key, 1)
        worker.stop.set()
        await until(worker.task.done)


async def test_cancel_of_an_unseen_attempt_refuses_it_later():
    async with running(COLOCATED) as worker, connected(worker) as router:
        one = item("never", 30)
        await router.decode.send(cancel=pb.CancelAttempt(key=key_to_pb(one.key)))
        await router.decode.send(generate_local=pb.GenerateLocal(item=item_to_pb(one)))
        assert (await router.decode.expect(one.key, pb.AttemptFailed)).retryable
        assert len(await router.local(again(one, 2))) == 12
        await worker.settled()


async def test_a_deadline_that_passes_in_the_queue_is_named():
    async with running(COLOCATED, engine__max_running=1) as worker, connected(worker) as router:
        one, two = item("running", 30, max_tokens=400), replace(item("late", 30), remaining_s=0.05)
        for work in (one, two):
            await router.decode.send(generate_local=pb.GenerateLocal(item=item_to_pb(work)))
        failed = await router.decode.expect(two.key, pb.AttemptFailed)
        assert (failed.code, failed.retryable) == ("deadline_exceeded", False)
        await router.decode.send(cancel=pb.CancelAttempt(key=key_to_pb(one.key)))
        await worker.settled()


async def test_a_broken_engine_ends_the_worker_and_its_sessions():
    with pytest.raises(InternalError, match="no such kernel"):
        await break_engine()


async def break_engine() -> None:
    def broken(plan):
        raise RuntimeError("no such kernel")

    async with running(COLOCATED) as worker, connected(worker) as router:
        worker.node.executor.run = broken
        for n in range(3):
            one = item(f"unlucky {n}", 20)
            await router.decode.send(generate_local=pb.GenerateLocal(item=item_to_pb(one)))
            if n < 2:
                assert (await router.decode.expect(one.key, pb.AttemptFailed)).code == "internal"
        await until(worker.task.done)
        await until(router.decode.ended)


async def test_a_worker_told_to_go_while_it_loads_leaves_no_file(tmp_path):
    config = load(overrides={"model.path": tiny_llama(), "transfer.shm_dir": str(tmp_path)})
    spec = HostSpec("hasty", COLOCATED, 1, config, controller=NOBODY)
    for share in (0.0, 0.5, 0.9):
        reached = asyncio.Event()
        task = asyncio.create_task(run(spec, asyncio.Event()), name="hasty")
        with watching(share, reached):
            async with asyncio.timeout(DEADLINE_S):
                await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.get_running_loop().shutdown_default_executor()
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def watching(share: float, reached: asyncio.Event):
    """Sets `reached` when a worker that loads has come so far."""
    aio, build = asyncio.get_running_loop(), shell.build_node

    def watched(spec, progress):
        def telling(done: float, detail: str) -> None:
            if done >= share:
                aio.call_soon_threadsafe(reached.set)
            progress(done, detail)

        return build(spec, telling)

    shell.build_node = watched
    try:
        yield
    finally:
        shell.build_node = build
