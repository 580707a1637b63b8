"""What goes wrong around groups: helpers that die, hang or are fed nonsense, halves that never come, requests out of bounds."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio
from transport_suite import EPOCH, KEY, UNTOUCHED, Pair, new_exports, settle, source_of, until

from core.errors import LeaseExpiredError, TransferError
from core.inventory import Inventory
from core.request import AttemptKey
from core.service import Registration, serve
from core.wire import key_to_pb
from kvtransfer import collective_helper
from kvtransfer.channels import Channels
from kvtransfer.collective import CollectiveTransport
from kvtransfer.collective_helper import ABANDONED_MAX, Helper
from kvtransfer.collective_orders import Meet, Span
from kvtransfer.collective_service import CollectiveServicer
from kvtransfer.shared_arena import SharedArena
from tandem.v1 import kv_pb2
from tandem.v1.kv_pb2_grpc import add_KvCollectiveServicer_to_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUMBERS = count()
ROOT = Path(__file__).resolve().parents[2]
BLOCKS, BLOCK_BYTES = 32, 2**20


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tmp_path_factory.mktemp("arenas"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def helpers(directory):
    pair = [Helper("gloo", "127.0.0.1", directory, restart_s=0.0) for _ in range(2)]
    await ready(pair)
    yield pair
    for helper in pair:
        await helper.close()


class Longer(CollectiveServicer):
    """Sends one block more per piece than was agreed."""

    def _order(self, request, timeout_s):
        order = super()._order(request, timeout_s)
        blocks = [block for block in request.block_ids for _ in range(2)]
        span = Span(order.span.arena, order.span.epoch, blocks, [2 * piece for piece in order.span.pieces])
        return type(order)(order.group, order.seq, span, [0] * len(blocks), timeout_s)


@asynccontextmanager
async def pair_of(helpers, directory, servicer=CollectiveServicer, timeout_s=30.0):
    await ready(helpers)
    arena, dest = (SharedArena(directory, f"{n}{next(NUMBERS)}", EPOCH, BLOCKS, BLOCK_BYTES) for n in ("source", "dest"))
    inventory = Inventory(BLOCKS, arena.generation_words())
    exports, channels = new_exports(arena, inventory), Channels()
    exports.open(KEY, 60.0)
    served = Registration("tandem.v1.KvCollective", add_KvCollectiveServicer_to_server, servicer(exports, helpers[0]))
    async with serve("127.0.0.1:0", served, grace_s=0.0) as server:
        transport = CollectiveTransport(dest, channels, helpers[1], digest=True, timeout_s=timeout_s)
        pair = Pair(arena, inventory, exports, source_of(arena, server.address), dest.bytes_view(), transport)
        pair.stub, pair.helpers = channels.collective(pair.source), helpers
        yield pair
        await transport.close()
        await channels.close()
        await exports.close()
    arena.close()
    dest.close()


async def ready(helpers):
    """One that is started anew imports torch."""
    async with asyncio.timeout(100):
        await asyncio.gather(*(helper.backend() for helper in helpers))


async def works(pair, records):
    await ready(pair.helpers)
    await pair.pull(records, list(range(len(records))))
    assert np.array_equal(pair.dest[: len(records)], pair.source_bytes(records))


# -- helpers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", [0, 1])
async def test_a_helper_that_dies_half_way(helpers, directory, whose):
    async with pair_of(helpers, directory) as pair:
        records = pair.offer(BLOCKS)
        await works(pair, records)
        pair.dest[:] = UNTOUCHED
        pulling = asyncio.create_task(pair.pull(records, list(range(BLOCKS))))
        await until(lambda: bool((pair.dest[0] != UNTOUCHED).any()))
        helpers[whose].kill()
        with suppress(TransferError):  # it may have been through
            await pulling
        pair.dest[:] = UNTOUCHED
        await settle()
        assert (pair.dest == UNTOUCHED).all()
        with suppress(TransferError):  # if the pull was through, nobody has noticed the death yet
            await works(pair, records)
        await works(pair, records)


async def test_a_message_longer_than_agreed_costs_a_helper_and_no_worker(helpers, directory):
    starts = helpers[1].stats.starts
    async with pair_of(helpers, directory, Longer) as pair:
        records = pair.offer(4)
        with pytest.raises(TransferError):
            await pair.pull(records, list(range(4)))
    async with pair_of(helpers, directory) as pair:
        await works(pair, pair.offer(4))
    assert helpers[1].stats.starts == starts + 1


async def test_a_helper_that_hangs_is_killed(helpers, directory, monkeypatch):
    """Stopped, it does not let go of the arena: when the pull comes back, it cannot write any more."""
    monkeypatch.setattr(collective_helper, "DROP_S", 0.4)
    monkeypatch.setattr(collective_helper, "GRACE_S", 0.2)
    kills = helpers[1].stats.kills
    async with pair_of(helpers, directory, timeout_s=1.0) as pair:
        records = pair.offer(BLOCKS)
        await pair.pull(records[:1], [0])
        stopped = helpers[1]._process.popen.pid
        os.kill(stopped, signal.SIGSTOP)
        async with asyncio.timeout(10):
            with pytest.raises(TransferError):
                await pair.pull(records, list(range(BLOCKS)))
        assert helpers[1].stats.kills == kills + 1
        with pytest.raises(ProcessLookupError):
            os.kill(stopped, 0)
    async with pair_of(helpers, directory) as pair:
        await works(pair, pair.offer(4))


async def test_a_helper_is_not_started_over_and_over(directory):
    helper = Helper("gloo", "127.0.0.1", directory, restart_s=3600.0)
    await helper.backend()
    helper.kill()
    await until(lambda: helper._process.ended)
    with pytest.raises(TransferError, match="at the earliest"):
        await helper.backend()
    await helper.close()
    await helper.close()
    with pytest.raises(TransferError, match="closed"):
        await helper.backend()


async def test_a_helper_that_cannot_start_says_why(directory):
    helper = Helper("gloo", "no.such.host.invalid", directory)
    with pytest.raises(TransferError, match=r"cannot start: .*no\.such\.host"):
        await helper.backend()
    await helper.close()


async def test_a_helper_ends_with_its_worker(directory):
    """However the worker dies."""
    script = (
        "import asyncio, sys\nfrom kvtransfer.collective_helper import Helper\n"
        "async def main():\n"
        f"    helper = Helper('gloo', '127.0.0.1', {directory!r})\n"
        "    await helper.backend()\n"
        "    print(helper._process.popen.pid, flush=True)\n"
        "    sys.stdin.read()\n"
        "asyncio.run(main())\n"
    )
    pipe = asyncio.subprocess.PIPE
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdin=pipe, stdout=pipe, cwd=ROOT)
    pid = int(await worker.stdout.readline())
    worker.kill()
    await worker.wait()
    await until(lambda: not alive(pid))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


# -- groups ------------------------------------------------------------------------------------------------------------


async def test_halves_that_never_come_are_bounded(helpers, directory):
    helper, kills = helpers[0], helpers[0].stats.kills
    for number in range(ABANDONED_MAX + 1):
        group = f"nobody comes {number}"
        await helper.make(Meet(group, 60.0))
        await helper.drop(group)
    assert helper.stats.kills == kills + 1
    await helper.backend()
    assert not helper._process.groups


async def test_a_half_that_never_comes_is_over_at_its_deadline(helpers):
    await helpers[0].make(Meet("late", 0.3))
    await until(lambda: not helpers[0].knows("late"))


async def test_the_group_unused_longest_goes_for_a_new_one(helpers, directory, monkeypatch):
    monkeypatch.setattr(collective_helper, "GROUPS_MAX", 1)
    async with pair_of(helpers, directory) as one, pair_of(helpers, directory) as other:
        for pair in (one, other, one, other):
            await works(pair, pair.offer(1))
            assert all(len(helper._process.groups) == 1 for helper in helpers)


async def test_a_group_that_the_source_has_dropped_is_made_again(helpers, directory):
    async with pair_of(helpers, directory) as pair:
        records = pair.offer(3)
        await works(pair, records)
        for group in list(helpers[0]._process.groups):
            await helpers[0].drop(group)
        await works(pair, records)


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096), b"\xff" * 4096])
async def test_noise_at_the_door_harms_nobody(helpers, directory, noise):
    async with pair_of(helpers, directory) as pair:
        records = pair.offer(2)
        await works(pair, records)
        for helper in helpers:
            for port in listening(helper._process.popen.pid):
                with socket.create_connection(("127.0.0.1", port), 5.0) as stranger:
                    stranger.sendall(noise)
        await settle()
        await works(pair, records)


def listening(pid: int) -> list[int]:
    inodes = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    ports = [int(row[1].partition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
    assert ports, "gloo listens somewhere"
    return ports


# -- requests ----------------------------------------------------------------------------------------------------------


async def test_only_announced_blocks_of_a_live_export_are_sent(helpers, directory):
    async with pair_of(helpers, directory) as pair:
        records = pair.offer(2)
        with pytest.raises(LeaseExpiredError):
            await pair.transport.pull(pair.source, AttemptKey("another", 1), records, [0, 1])
        pair.exports.done(KEY)
        with pytest.raises(LeaseExpiredError):
            await pair.pull(records, [0, 1])


@pytest.mark.parametrize(
    ("pieces", "count", "words"),
    [
        ([1], 2, "pieces of 1 blocks in all for 2"),
        ([0, 2], 2, "1 to 4 blocks"),
        ([17], 17, "1 to 4 blocks"),
        ([], 5000, "at most 4096"),
    ],
)
async def test_requests_out_of_bounds(helpers, directory, pieces, count, words):
    async with pair_of(helpers, directory) as pair:
        (record,) = pair.offer(1)
        request = kv_pb2.CollectRequest(
            group="g",
            key=key_to_pb(KEY),
            epoch=EPOCH,
            block_bytes=BLOCK_BYTES,
            block_ids=[record.block_id] * count,
            generations=[record.generation] * count,
            piece_blocks=pieces,
        )
        with pytest.raises(grpc.aio.AioRpcError, match=words):
            await pair.stub.Collect(request, timeout=5.0)


async def test_calls_without_a_deadline_or_of_another_backend(helpers, directory):
    async with pair_of(helpers, directory) as pair:
        with pytest.raises(grpc.aio.AioRpcError, match="deadline"):
            await pair.stub.Meet(kv_pb2.MeetRequest(epoch=EPOCH, group="g", backend="gloo"))
        with pytest.raises(grpc.aio.AioRpcError, match="gloo here, of nccl there"):
            await pair.stub.Meet(kv_pb2.MeetRequest(epoch=EPOCH, group="g", backend="nccl"), timeout=5.0)
        with pytest.raises(grpc.aio.AioRpcError, match="1 to 64 characters"):
            await pair.stub.Meet(kv_pb2.MeetRequest(epoch=EPOCH, group="g" * 65, backend="gloo"), timeout=5.0)
