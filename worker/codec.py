"""Session messages ⇄ protobuf. A command that cannot be a value of ours is an InvalidRequestError naming its attempt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from core.errors import InvalidRequestError
from core.kv_changes import KvChanges
from core.request import AttemptKey, TokenEvent
from core.wire import (
    changes_to_pb,
    finish_to_pb,
    item_from_pb,
    key_from_pb,
    key_to_pb,
    ticket_from_pb,
    ticket_to_pb,
    timing_to_pb,
)
from tandem.v1 import common_pb2 as pb
from worker.messages import (
    AttemptFailed,
    CancelAttempt,
    Command,
    Event,
    FollowKv,
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


def command_from_pb(message: pb.SessionCommand) -> Command:
    match message.WhichOneof("command"):
        case "hello":
            hello = message.hello
            return Hello(hello.peer_id, hello.epoch, hello.expected_epoch, hello.lease_s)
        case "start_prefill":
            return StartPrefill(item_from_pb(message.start_prefill.item))
        case "reserve":
            return Reserve(item_from_pb(message.reserve.item))
        case "generate_local":
            return GenerateLocal(item_from_pb(message.generate_local.item))
        case "open_handoff":
            return OpenHandoff(key_from_pb(message.open_handoff.key), ticket_from_pb(message.open_handoff.ticket))
        case "cancel":
            return CancelAttempt(key_from_pb(message.cancel.key))
        case "follow_kv":
            return FollowKv(message.follow_kv.stream)
    raise InvalidRequestError("the command is empty or newer than this worker; are both sides the same version?")


def key_of(message: pb.SessionCommand) -> AttemptKey | None:
    """Whom a command is about, also when the rest of it is broken."""
    match message.WhichOneof("command"):
        case "start_prefill" | "reserve" | "generate_local" as name:
            return key_from_pb(getattr(message, name).item.key)
        case "open_handoff" | "cancel" as name:
            return key_from_pb(getattr(message, name).key)
    return None


def events_to_pb(events: Sequence[Event]) -> pb.SessionEvent:
    """One message for at least one event."""
    message = event_to_pb(events[0])
    if len(events) > 1:
        message.more.extend(event_to_pb(event) for event in events[1:])
    return message


def event_to_pb(event: Event) -> pb.SessionEvent:
    match event:
        case StepTokens(tokens):
            return _step_to_pb(tokens)
        case Hello(peer_id, epoch):
            return pb.SessionEvent(hello=pb.SessionHello(peer_id=peer_id, epoch=epoch))
        case Reserved(key, granted, reason, cached):
            body = pb.Reserved(key=key_to_pb(key), granted=granted, reason=reason, cached_tokens=cached)
            return pb.SessionEvent(reserved=body)
        case Opened(key, ticket, cached):
            return pb.SessionEvent(opened=pb.Opened(key=key_to_pb(key), ticket=ticket_to_pb(ticket), cached_tokens=cached))
        case PrefillDone(key, timing, cached):
            done = pb.PrefillDone(key=key_to_pb(key), timing=timing_to_pb(timing), cached_tokens=cached)
            return pb.SessionEvent(prefill_done=done)
        case Joined(key, timing):
            return pb.SessionEvent(joined=pb.Joined(key=key_to_pb(key), timing=timing_to_pb(timing)))
        case AttemptFailed(key, code, text, retryable):
            failed = pb.AttemptFailed(key=key_to_pb(key), code=code, message=text, retryable=retryable)
            return pb.SessionEvent(failed=failed)
        case KvChanges():
            return pb.SessionEvent(kv_changes=changes_to_pb(event))


def _step_to_pb(tokens: Iterable[TokenEvent]) -> pb.SessionEvent:
    """What every step of every stream pays for. Filling messages in place takes a third of the time of building them."""
    event = pb.SessionEvent()
    add = event.tokens.tokens.add
    for token in tokens:
        message = add()
        key = message.key
        key.request_id, key.attempt = token.key
        message.position = token.position
        message.token_id = token.token_id
        if token.logprob is not None:
            message.logprob = token.logprob
            for token_id, logprob in token.top_logprobs:
                top = message.top_logprobs.add()
                top.token_id, top.logprob = token_id, logprob
        if token.finish_reason is not None:
            message.finish_reason = finish_to_pb(token.finish_reason)
    return event
