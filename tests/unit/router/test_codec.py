"""What waits for one worker goes in few messages, in order."""

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from core.request import AttemptKey, WorkItem
from core.wire import each_command
from router.codec import COMMANDS_PER_MESSAGE, MESSAGE_BYTES, command_to_pb, together
from router.events import SendCancel, SendGenerateLocal
from tandem.sampling import SamplingParams


def command(number: int, tokens: int):
    key = AttemptKey(f"r{number}", 1)
    if not tokens:
        return command_to_pb(SendCancel("w", key))
    return command_to_pb(SendGenerateLocal("w", WorkItem(key, (2**31,) * tokens, tokens, SamplingParams(max_tokens=1, seed=1))))


SIZES = st.lists(st.sampled_from((0, 0, 0, 10, 60_000, 300_000)), min_size=1, max_size=100)


@settings(deadline=None)
@given(SIZES)
def test_nothing_is_lost_or_overtaken_and_no_message_is_larger_than_it_must_be(sizes):
    made = [command(number, tokens) for number, tokens in enumerate(sizes)]
    waiting, found = deque(command(number, tokens) for number, tokens in enumerate(sizes)), []
    while waiting:
        message = together(waiting)
        commands = list(each_command(message))
        assert len(commands) <= COMMANDS_PER_MESSAGE
        assert len(commands) == 1 or sum(each.ByteSize() for each in commands[1:]) <= MESSAGE_BYTES
        assert not any(each.more for each in commands[1:])
        found += commands
    for each in found:
        del each.more[:]
    assert found == made


def test_small_ones_share_a_message():
    waiting = deque(command(number, 0) for number in range(COMMANDS_PER_MESSAGE + 1))
    assert len(together(waiting).more) == COMMANDS_PER_MESSAGE - 1
    assert len(waiting) == 1
