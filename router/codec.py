"""Session messages ⇄ the journey's events and commands. The one place where the router's sessions touch protobuf."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from core import errors
from core.errors import InternalError, TandemError
from core.request import AttemptKey, TokenEvent
from core.wire import finish_from_pb, item_to_pb, key_to_pb, ticket_from_pb, ticket_to_pb, timing_from_pb
from router import events as ev
from tandem.v1 import common_pb2 as pb

_ERRORS: dict[str, type[TandemError]] = {
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TandemError)
}

COMMANDS_PER_MESSAGE, MESSAGE_BYTES = 32, 2**20
"""What waits together is sent together, as far as that: a message costs both ends more than what it says."""

Addressed = tuple[str, ev.WorkerEvent]
"""A worker's event and the request id of the journey it belongs to."""


def error_from_code(code: str, message: str) -> TandemError:
    """The error a worker named; one that this version does not know is an InternalError."""
    return _ERRORS.get(code, InternalError)(message)


def hello_to_pb(router_id: str, epoch: int, expected_epoch: int, lease_s: float) -> pb.SessionCommand:
    hello = pb.SessionHello(peer_id=router_id, epoch=epoch, expected_epoch=expected_epoch, lease_s=lease_s)
    return pb.SessionCommand(hello=hello)


def follow_kv_to_pb(stream: int) -> pb.SessionCommand:
    return pb.SessionCommand(follow_kv=pb.FollowKv(stream=stream))


def together(waiting: deque[pb.SessionCommand]) -> pb.SessionCommand:
    """Takes the next commands and makes one message of them, a large one alone."""
    message = waiting.popleft()
    if waiting and (room := MESSAGE_BYTES - message.ByteSize()) > 0:
        more: list[pb.SessionCommand] = []
        while waiting and len(more) < COMMANDS_PER_MESSAGE - 1 and (room := room - waiting[0].ByteSize()) > 0:
            more.append(waiting.popleft())
        message.more.extend(more)
    return message


def command_to_pb(command: ev.Send, scope: str = "") -> pb.SessionCommand:
    """`scope` ends every request id that workers see, so that the same id at two routers is two requests to them."""
    message = _unscoped(command)
    if scope:
        inner = getattr(message, message.WhichOneof("command") or "")
        key = inner.item.key if hasattr(inner, "item") else inner.key
        key.request_id += scope
    return message


def _unscoped(command: ev.Send) -> pb.SessionCommand:
    match command:
        case ev.SendReserve(_, item):
            return pb.SessionCommand(reserve=pb.Reserve(item=item_to_pb(item)))
        case ev.SendStartPrefill(_, item):
            return pb.SessionCommand(start_prefill=pb.StartPrefill(item=item_to_pb(item)))
        case ev.SendOpenHandoff(_, key, ticket):
            return pb.SessionCommand(open_handoff=pb.OpenHandoff(key=key_to_pb(key), ticket=ticket_to_pb(ticket)))
        case ev.SendGenerateLocal(_, item):
            return pb.SessionCommand(generate_local=pb.GenerateLocal(item=item_to_pb(item)))
        case ev.SendCancel(_, key):
            return pb.SessionCommand(cancel=pb.CancelAttempt(key=key_to_pb(key)))


def events_from_pb(worker: str, message: pb.SessionEvent, scope: str = "") -> Iterable[Addressed]:
    """What one message says, journey by journey, their ids without `scope`. A kind of message newer than this router says
    nothing to it."""
    kind = message.WhichOneof("event")
    if kind == "tokens":
        found = _tokens(worker, message.tokens)
        return [(request_id.removesuffix(scope), event) for request_id, event in found] if scope else found
    event = _one_event(worker, kind, message)
    return () if event is None else ((event[0].removesuffix(scope), event[1]),)


def _tokens(worker: str, step: pb.StepTokens) -> list[Addressed]:
    """One event per attempt. A step has a token of each sequence: this runs per token, so it stays flat."""
    by_attempt: dict[AttemptKey, list[TokenEvent]] = {}
    for token in step.tokens:
        named = token.key
        key = AttemptKey(named.request_id, named.attempt)
        reason = token.finish_reason
        finish = finish_from_pb(reason) if reason else None
        if token.HasField("logprob"):
            top = tuple((top.token_id, top.logprob) for top in token.top_logprobs)
            event = TokenEvent(key, token.position, token.token_id, token.logprob, top, finish)
        else:
            event = TokenEvent(key, token.position, token.token_id, None, (), finish)
        if key in by_attempt:
            by_attempt[key].append(event)
        else:
            by_attempt[key] = [event]
    return [(key.request_id, ev.Tokens(worker, key.attempt, tuple(events))) for key, events in by_attempt.items()]


def _one_event(worker: str, kind: str | None, message: pb.SessionEvent) -> Addressed | None:
    match kind:
        case "reserved":
            reserved = message.reserved
            return reserved.key.request_id, ev.Reserved(
                worker, reserved.key.attempt, reserved.granted, reserved.reason, reserved.cached_tokens
            )
        case "opened":
            opened = message.opened
            return opened.key.request_id, ev.Opened(
                worker, opened.key.attempt, ticket_from_pb(opened.ticket), opened.cached_tokens
            )
        case "prefill_done":
            done = message.prefill_done
            return done.key.request_id, ev.PrefillDone(
                worker, done.key.attempt, timing_from_pb(done.timing), done.cached_tokens
            )
        case "joined":
            joined = message.joined
            return joined.key.request_id, ev.Joined(worker, joined.key.attempt, timing_from_pb(joined.timing))
        case "failed":
            failed = message.failed
            error = error_from_code(failed.code, failed.message)
            return failed.key.request_id, ev.AttemptFailed(worker, failed.key.attempt, error, failed.retryable)
    return None
