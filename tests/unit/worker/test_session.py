"""The Session RPC over real gRPC on loopback, with a handler that writes down what it is asked."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import grpc
import pytest

from core.clock import SystemClock
from core.errors import InvalidRequestError
from core.request import AttemptKey, AttemptTiming, TokenEvent, WorkItem
from core.service import Registration, serve
from core.wire import each_event, item_to_pb, key_to_pb
from tandem.sampling import SamplingParams
from tandem.v1 import common_pb2 as pb
from tandem.v1 import decode_pb2_grpc
from worker.attempts import Peer
from worker.links import RouterLinks
from worker.messages import Joined
from worker.outbox import EVENTS_PER_MESSAGE
from worker.session import SessionServicer

EPOCH = 3


def item(request: str, attempt: int = 1, token_ids: tuple[int, ...] = (1, 2, 3)) -> WorkItem:
    return WorkItem(AttemptKey(request, attempt), token_ids, len(token_ids), SamplingParams(max_tokens=4, seed=1))


def hello(peer_id: str = "router-1", expected_epoch: int = EPOCH, lease_s: float = 30.0) -> pb.SessionCommand:
    body = pb.SessionHello(peer_id=peer_id, epoch=1, expected_epoch=expected_epoch, lease_s=lease_s)
    return pb.SessionCommand(hello=body)


def generate(work: WorkItem) -> pb.SessionCommand:
    return pb.SessionCommand(generate_local=pb.GenerateLocal(item=item_to_pb(work)))


class Recorder:
    """A handler that fails prompts starting with 0, trips over those starting with 99 and notes everything."""

    def __init__(self) -> None:
        self.opened: list[AttemptKey] = []
        self.cancelled: list[AttemptKey] = []
        self.changed = asyncio.Condition()

    def open(self, command) -> None:
        first = command.item.token_ids[0]
        if first == 0:
            raise InvalidRequestError("token 0 is not welcome")
        assert first != 99, "our own mistake"
        self.opened.append(command.key)
        self._notify()

    def open_handoff(self, command) -> None:
        raise InvalidRequestError("no hand-offs here")

    def cancel(self, key: AttemptKey) -> None:
        self.cancelled.append(key)
        self._notify()

    async def until(self, check) -> None:
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(check)

    def _notify(self) -> None:
        async def wake() -> None:
            async with self.changed:
                self.changed.notify_all()

        task = asyncio.get_running_loop().create_task(wake(), name="notify")
        task.add_done_callback(lambda done: done.result())


class Wire:
    """A router's end of one session."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self.call = decode_pb2_grpc.DecodeStub(self.channel).Session()
        self._told: deque[pb.SessionEvent] = deque()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc) -> None:
        self.call.cancel()
        await self.channel.close()

    async def send(self, *commands: pb.SessionCommand) -> None:
        for command in commands:
            await self.call.write(command)

    async def event(self) -> pb.SessionEvent:
        if not self._told:
            async with asyncio.timeout(5):
                answer = await self.call.read()
            assert answer is not grpc.aio.EOF, "the session ended"
            self._told.extend(each_event(answer))
        return self._told.popleft()

    async def greeted(self) -> pb.SessionEvent:
        await self.send(hello())
        return await self.event()


async def expired(links: RouterLinks, handler: Recorder) -> None:
    async with asyncio.timeout(10):
        while not handler.cancelled:
            await asyncio.sleep(0.01)
            links.expire()


@pytest.fixture
def handler():
    return Recorder()


@pytest.fixture
async def links(handler):
    links = RouterLinks(SystemClock())
    links.bind(handler.cancel)
    return links


@pytest.fixture
async def address(links, handler) -> AsyncIterator[str]:
    servicer = SessionServicer("decode-0", EPOCH, links, handler, slow_router_s=0.3)
    registration = Registration("tandem.v1.Decode", decode_pb2_grpc.add_DecodeServicer_to_server, servicer)
    async with serve("127.0.0.1:0", registration, grace_s=0.1) as server:
        yield server.address
        links.close()


async def test_hellos_are_exchanged(address):
    async with Wire(address) as wire:
        answer = await wire.greeted()
        assert (answer.hello.peer_id, answer.hello.epoch) == ("decode-0", EPOCH)


async def test_another_epoch_is_refused(address):
    async with Wire(address) as wire:
        await wire.send(hello(expected_epoch=EPOCH - 1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await wire.event()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert dict(caught.value.trailing_metadata())["tandem-code"] == "stale_epoch"


async def test_a_session_begins_with_a_hello(address):
    async with Wire(address) as wire:
        await wire.send(generate(item("a")))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await wire.event()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_commands_reach_the_handler_and_tokens_the_router(address, links, handler):
    async with Wire(address) as wire:
        await wire.greeted()
        await wire.send(generate(item("a")), generate(item("b")))
        await handler.until(lambda: len(handler.opened) == 2)
        links.send_tokens([TokenEvent(AttemptKey("a", 1), 0, 5, logprob=-0.5), TokenEvent(AttemptKey("b", 1), 0, 6)])
        tokens = (await wire.event()).tokens.tokens
        assert [(t.key.request_id, t.position, t.token_id) for t in tokens] == [("a", 0, 5), ("b", 0, 6)]


async def test_what_waits_together_is_one_message(address, links, handler):
    async with Wire(address) as wire:
        await wire.greeted()
        await wire.send(generate(item("a")))
        await handler.until(lambda: handler.opened)
        key = AttemptKey("a", 1)
        for position in range(EVENTS_PER_MESSAGE + 2):
            links.send_tokens([TokenEvent(key, position, 5)])
        links.send(Joined(key, AttemptTiming()))
        async with asyncio.timeout(5):
            first, second = await wire.call.read(), await wire.call.read()
        told = [event.WhichOneof("event") for event in each_event(first)]
        assert told == ["tokens"] * EVENTS_PER_MESSAGE
        assert [event.WhichOneof("event") for event in each_event(second)] == ["tokens", "tokens", "joined"]
        both = [*each_event(first), *each_event(second)][:-1]
        assert [event.tokens.tokens[0].position for event in both] == list(range(EVENTS_PER_MESSAGE + 2))


async def test_a_refused_item_fails_its_attempt_and_nothing_else(address, links, handler):
    async with Wire(address) as wire:
        await wire.greeted()
        await wire.send(generate(item("bad", token_ids=(0, 1))), generate(item("worse", token_ids=(99,))))
        await wire.send(generate(item("good")))
        first, second = (await wire.event()).failed, (await wire.event()).failed
        assert (first.key.request_id, first.code, first.retryable) == ("bad", "invalid_request", False)
        assert (second.key.request_id, second.code) == ("worse", "internal")
        await handler.until(lambda: handler.opened == [AttemptKey("good", 1)])
        assert links.table.live() == (AttemptKey("good", 1),)


async def test_a_broken_item_is_answered(address):
    async with Wire(address) as wire:
        await wire.greeted()
        broken = item_to_pb(item("a"))
        broken.prompt_len = 9
        await wire.send(pb.SessionCommand(generate_local=pb.GenerateLocal(item=broken)))
        failed = (await wire.event()).failed
        assert (failed.key.request_id, failed.code) == ("a", "invalid_request")


async def test_commands_of_one_message_are_heeded_in_order_and_a_broken_one_harms_no_other(address, handler):
    async with Wire(address) as wire:
        await wire.greeted()
        broken = item_to_pb(item("broken"))
        broken.prompt_len = 9
        message = pb.SessionCommand(cancel=pb.CancelAttempt(key=key_to_pb(AttemptKey("a", 1))))
        message.more.extend([pb.SessionCommand(generate_local=pb.GenerateLocal(item=broken)), pb.SessionCommand()])
        message.more.extend([generate(item("a")), generate(item("b"))])
        await wire.send(message)
        failed = [(await wire.event()).failed for _ in range(2)]
        assert [(each.key.request_id, each.code) for each in failed] == [("broken", "invalid_request"), ("a", "unavailable")]
        await handler.until(lambda: handler.opened == [AttemptKey("b", 1)])


async def test_cancel_before_the_command_refuses_it(address, handler):
    async with Wire(address) as wire:
        await wire.greeted()
        await wire.send(pb.SessionCommand(cancel=pb.CancelAttempt(key=key_to_pb(AttemptKey("a", 1)))))
        await wire.send(generate(item("a")))
        failed = (await wire.event()).failed
        assert (failed.code, failed.retryable) == ("unavailable", True)
        assert handler.opened == []


async def test_a_refused_reservation_is_answered_no(address, links):
    links.accepting = False
    async with Wire(address) as wire:
        await wire.greeted()
        await wire.send(pb.SessionCommand(reserve=pb.Reserve(item=item_to_pb(item("a")))))
        reserved = (await wire.event()).reserved
        assert (reserved.granted, reserved.reason) == (False, "this worker is draining")


async def test_a_hand_off_without_reservation_fails(address):
    async with Wire(address) as wire:
        await wire.greeted()
        await wire.send(pb.SessionCommand(open_handoff=pb.OpenHandoff(key=key_to_pb(AttemptKey("a", 1)))))
        assert (await wire.event()).failed.retryable


async def test_a_broken_session_starts_the_lease_of_its_attempts(address, links, handler):
    async with Wire(address) as wire:
        await wire.send(hello(lease_s=0.0))
        await wire.event()
        await wire.send(generate(item("a")))
        await handler.until(lambda: handler.opened)
    await expired(links, handler)
    assert handler.cancelled == [AttemptKey("a", 1)]


class Line:
    """The server's side of a session whose router goes when it is told to."""

    def __init__(self) -> None:
        self.greeted, self.gone = asyncio.Event(), asyncio.Event()

    async def requests(self) -> AsyncIterator[pb.SessionCommand]:
        yield hello()
        await self.gone.wait()

    async def write(self, event: pb.SessionEvent) -> None:
        self.greeted.set()


@pytest.mark.parametrize("turns", range(8))
async def test_a_session_that_is_cancelled_while_it_ends_still_lets_go(turns, links, handler):
    """gRPC ends the stream of commands, and a moment later cancels the call: that moment may be any."""
    line, peer = Line(), Peer("router-1", 1)
    session = asyncio.create_task(SessionServicer("decode-0", EPOCH, links, handler).Session(line.requests(), line))
    await line.greeted.wait()
    line.gone.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    session.cancel()
    await asyncio.wait({session}, timeout=5)
    assert session.done()
    assert links.backlog(peer) is None, "the worker believes that the router is still there"


async def test_a_router_that_reads_nothing_loses_its_session(address, links, handler):
    async with Wire(address) as wire:
        await wire.send(hello(lease_s=0.0))
        await wire.event()
        await wire.send(generate(item("a")))
        await handler.until(lambda: handler.opened)
        top = tuple((i, -1.0) for i in range(20))
        step = [TokenEvent(AttemptKey("a", 1), n, n, -1.0, top) for n in range(100)]
        for _ in range(800):  # 14 MB, far more than the stream's window grows to
            links.send_tokens(step)
        await expired(links, handler)
        assert handler.cancelled == [AttemptKey("a", 1)]
