"""Tokens to text with stop strings held back; the token log; what admission checks and resolves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequestError, PromptTooLongError
from core.request import AttemptKey, FinishReason, TokenEvent
from router.admission import UsedIds, check_request_id, check_sampling, resolve
from router.choice import ChoiceText
from router.frontend_types import ModelCard
from router.tokenlog import TokenLog
from tandem.sampling import SamplingParams

CARD = ModelCard("m", "1", max_model_len=100, vocab_size=50, fingerprint="", dtype="float32")


class Letters:
    """Token n is the letter n; 0 has no text until the next letter comes."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, token_id: int) -> str:
        if token_id == 0:
            self._held += "~"
            return ""
        text, self._held = self._held + chr(token_id), ""
        return text

    def flush(self) -> str:
        return self._held


def event(position: int, token_id: int, reason: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(AttemptKey("r", 1), position, token_id, finish_reason=reason)


def events(text: str) -> list[TokenEvent]:
    return [event(i, 0 if c == "~" else ord(c)) for i, c in enumerate(text)]


def choice(*stops: str, stop_ids: frozenset[int] = frozenset()) -> ChoiceText:
    return ChoiceText(0, Letters(), stops, stop_ids)


def test_text_that_may_begin_a_stop_string_is_held_back():
    text = choice("END", "e!")
    assert [t.text for t in text.take(events("abEN"))] == ["a", "b", "", ""]
    assert [t.text for t in text.take([event(4, ord("x"))])] == ["ENx"]
    assert text.end(FinishReason.LENGTH) == (FinishReason.LENGTH, "")


def test_a_match_truncates_and_swallows_the_rest():
    text = choice("END")
    taken = text.take(events("abENDef"))
    assert "".join(t.text for t in taken) == "ab"
    assert [t.token_id for t in taken] == [ord(c) for c in "abEND"]
    assert text.stopped
    assert text.num_tokens == 5
    assert text.take(events("more")) == []
    assert text.end(FinishReason.CANCELLED) == (FinishReason.STOP, "")


def test_what_was_held_back_comes_at_the_end():
    text = choice("END")
    text.take(events("aEN"))
    assert text.end(FinishReason.LENGTH) == (FinishReason.LENGTH, "EN")
    unfinished = choice()
    unfinished.take(events("a~"))
    assert unfinished.end(FinishReason.STOP) == (FinishReason.STOP, "~")


def test_a_stop_string_completed_by_the_tail_still_stops():
    text = choice("a~")
    assert text.take(events("xa~"))[0].text == "x"
    assert text.end(FinishReason.LENGTH) == (FinishReason.STOP, "")


def test_a_stop_id_has_no_text_but_is_a_token():
    text = choice(stop_ids=frozenset({ord("!")}))
    taken = text.take(events("ab!"))
    assert "".join(t.text for t in taken) == "ab"
    assert text.num_tokens == 3


@given(st.text("ab~", max_size=30), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_never_holds_a_stop_string(said: str, stops: list[str]):
    text = choice(*stops)
    shown = "".join(t.text for t in text.take(events(said)))
    shown += text.end(FinishReason.LENGTH)[1]
    assert said.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert text.stopped or shown == said or any(stop in said for stop in stops)


# ---- the log


def test_each_position_once_and_in_order():
    log = TokenLog(4, stop_ids=())
    assert log.accept([event(0, 5), event(0, 6)], hold=False) == ((event(0, 5),), False)
    assert log.accept([event(2, 7)], hold=False) == ((), True)
    assert log.accept([event(2, 7)], hold=True) == ((), False)
    assert log.waits_for_earlier
    assert log.accept([event(1, 6)], hold=True) == ((event(1, 6), event(2, 7)), False)
    assert not log.waits_for_earlier
    assert log.ids == [5, 6, 7]


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([event(0, 1, FinishReason.STOP)], FinishReason.STOP),
        ([event(0, 9)], FinishReason.STOP),
        ([event(0, 1), event(1, 1)], FinishReason.LENGTH),
        ([event(0, 1)], None),
    ],
)
def test_the_log_knows_the_end(tokens: list[TokenEvent], reason: FinishReason | None):
    log = TokenLog(2, stop_ids={9})
    log.accept(tokens, hold=False)
    assert log.finished is reason
    if reason is not None:
        assert log.accept([event(len(log), 3)], hold=False) == ((), False), "nothing after the end"


def test_a_position_beyond_the_limit_is_a_gap():
    assert TokenLog(2, ()).accept([event(2, 1)], hold=True) == ((), True)


@given(st.permutations(range(12)), st.data())
def test_any_order_of_held_tokens_gives_the_same_log(order: list[int], data: st.DataObject):
    log = TokenLog(12, ())
    delivered: list[int] = []
    for position in order:
        repeat = data.draw(st.integers(1, 2))
        accepted, gap = log.accept([event(position, 30 + position)] * repeat, hold=True)
        assert not gap
        delivered += [t.position for t in accepted]
    assert delivered == list(range(12))
    assert log.ids == [30 + i for i in range(12)]
    assert log.finished is FinishReason.LENGTH


# ---- admission


def test_what_is_open_is_resolved():
    params = resolve(SamplingParams(), 40, CARD, "r")
    assert params.max_tokens == 60
    assert params.seed is not None
    assert 0 <= params.seed < 2**53
    assert resolve(SamplingParams(max_tokens=60, seed=3), 40, CARD, "r") == SamplingParams(max_tokens=60, seed=3)


@pytest.mark.parametrize(("length", "max_tokens"), [(100, None), (150, 1), (40, 61)])
def test_what_cannot_fit_is_refused(length: int, max_tokens: int | None):
    with pytest.raises(PromptTooLongError):
        resolve(SamplingParams(max_tokens=max_tokens), length, CARD, "r")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (SamplingParams(temperature=-1, n=0), ("temperature", "n must")),
        (SamplingParams(stop_token_ids=(50,)), ("stop_token_ids", "49")),
        (SamplingParams(logit_bias={-1: 0.0}), ("logit_bias",)),
    ],
)
def test_problems_are_named(bad: SamplingParams, words: tuple[str, ...]):
    with pytest.raises(InvalidRequestError) as caught:
        check_sampling(bad, CARD)
    assert all(word in caught.value.message for word in words)


@pytest.mark.parametrize("bad", ["a/b", "x" * 129, "new\nline", "\x00"])
def test_request_ids(bad: str):
    check_request_id("fine-id_0@1")
    with pytest.raises(InvalidRequestError):
        check_request_id(bad)


def test_an_id_used_again_counts_on():
    used = UsedIds()
    assert used.first_attempt("a") == 1
    used.ended("a", 3)
    used.ended("a", 2)
    assert used.first_attempt("a") == 4
    for index in range(5000):
        used.ended(f"other{index}", 1)
    assert used.first_attempt("a") == 1, "bounded: the oldest is forgotten"


@given(
    start=st.integers(0, 3),
    made=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4), st.sampled_from([None, FinishReason.STOP])), max_size=4),
)
def test_running_on_takes_what_accept_takes_or_nothing(start, made):
    quick, twin = TokenLog(6, stop_ids={4}), TokenLog(6, stop_ids={4})
    for log in (quick, twin):
        log.accept([event(position, 1) for position in range(start)], hold=False)
    tokens = tuple(event(*each) for each in made)
    if quick.run_on(tokens):
        assert twin.accept(tokens, hold=False) == (tokens, False)
        assert quick.finished is twin.finished is None
    else:
        assert len(quick) == start
        assert twin.accept(tokens, hold=False) != (tokens, False) or twin.finished is not None
