"""Session messages on the wire are what the shared conversions of `core.wire` say."""

import pytest

from core.blocks import KvLayout, KvSource, KvTicket
from core.errors import InvalidRequestError
from core.request import AttemptKey, AttemptTiming, FinishReason, TokenEvent, WorkItem
from core.wire import item_to_pb, key_to_pb, ticket_from_pb, ticket_to_pb, timing_from_pb, token_from_pb
from tandem.sampling import SamplingParams
from tandem.v1 import common_pb2 as pb
from worker.codec import command_from_pb, event_to_pb, key_of
from worker.messages import (
    AttemptFailed,
    CancelAttempt,
    GenerateLocal,
    Hello,
    Joined,
    Opened,
    OpenHandoff,
    PrefillDone,
    Reserve,
    Reserved,
    StartPrefill,
    StepTokens,
)

KEY = AttemptKey("req", 3)
ITEM = WorkItem(KEY, (1, 2, 3, 4), 3, SamplingParams(max_tokens=5, seed=9))
TICKET = KvTicket(KEY, KvLayout(b"f", "float32", 2, 2, 8, 16), KvSource("prefill-0", 2, "127.0.0.1:1"), 10.0)
TIMING = AttemptTiming(queue_s=0.5, prefill_s=1.5, transfer_bytes=7, transport="shm")


def test_every_token_of_a_step_survives():
    tokens = (
        TokenEvent(KEY, 0, 17),
        TokenEvent(AttemptKey("other", 0), 4, 0, -0.25, ((5, -0.5), (0, -1.5)), FinishReason.STOP),
        TokenEvent(KEY, 1, 18, 0.0, (), FinishReason.LENGTH),
    )
    message = pb.SessionEvent.FromString(event_to_pb(StepTokens(tokens)).SerializeToString())
    assert tuple(token_from_pb(token) for token in message.tokens.tokens) == tokens


@pytest.mark.parametrize(
    ("message", "command"),
    [
        (pb.SessionCommand(start_prefill=pb.StartPrefill(item=item_to_pb(ITEM))), StartPrefill(ITEM)),
        (pb.SessionCommand(reserve=pb.Reserve(item=item_to_pb(ITEM))), Reserve(ITEM)),
        (pb.SessionCommand(generate_local=pb.GenerateLocal(item=item_to_pb(ITEM))), GenerateLocal(ITEM)),
        (pb.SessionCommand(cancel=pb.CancelAttempt(key=key_to_pb(KEY))), CancelAttempt(KEY)),
        (
            pb.SessionCommand(open_handoff=pb.OpenHandoff(key=key_to_pb(KEY), ticket=ticket_to_pb(TICKET))),
            OpenHandoff(KEY, TICKET),
        ),
    ],
)
def test_commands(message, command):
    assert command_from_pb(message) == command
    assert key_of(message) == command.key == KEY


def test_a_hello_and_an_empty_command():
    hello = pb.SessionCommand(hello=pb.SessionHello(peer_id="r", epoch=1, expected_epoch=2, lease_s=3.0))
    assert command_from_pb(hello) == Hello("r", 1, 2, 3.0)
    assert key_of(hello) is None
    with pytest.raises(InvalidRequestError, match="same version"):
        command_from_pb(pb.SessionCommand())


def test_events_about_one_attempt():
    reserved = event_to_pb(Reserved(KEY, granted=False, reason="full", cached_tokens=16)).reserved
    assert (reserved.granted, reserved.reason, reserved.cached_tokens) == (False, "full", 16)
    opened = event_to_pb(Opened(KEY, TICKET, 32)).opened
    assert (ticket_from_pb(opened.ticket), opened.cached_tokens) == (TICKET, 32)
    done = event_to_pb(PrefillDone(KEY, TIMING, 8)).prefill_done
    assert (timing_from_pb(done.timing), done.cached_tokens) == (TIMING, 8)
    assert timing_from_pb(event_to_pb(Joined(KEY, TIMING)).joined.timing) == TIMING
    failed = event_to_pb(AttemptFailed(KEY, "transfer", "lost", True)).failed
    assert (failed.key.request_id, failed.code, failed.message, failed.retryable) == ("req", "transfer", "lost", True)
    assert event_to_pb(Hello("decode-0", 4)).hello.epoch == 4
