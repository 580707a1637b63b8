"""Copies of hot blocks: made when they pay, given up when they do not, and never more memory than allowed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.replication import KEEP_WINDOWS, Replication

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


@pytest.mark.parametrize(
    ("hits", "fetches", "now", "made"),
    [
        (3, [(0, A), (1, A)], 2, ()),
        (3, [(0, A), (1, A), (2, A)], 2, (A,)),
        (3, [(0, A), (1, A), (2, A), (2, A), (2, A)], 2, (A,)),
        (2, [(0, A), (0, B), (1, A), (1, B), (1, C)], 2, (A, B)),
        (1, [(0, C)], 2, (C,)),
        (0, [(0, A), (1, A), (2, A)], 2, ()),
        (3, [(0, A), (1, A), (61, A)], 61, ()),  # spread over more than a minute
        (3, [(0, A), (1, A), (2, A)], 61, ()),  # hot once, and that was a minute ago
        (3, [(20, A), (40, A), (60, A)], 64, (A,)),
    ],
)
def test_a_copy_is_made_of_what_is_fetched_often_enough_within_a_minute(hits, fetches, now, made) -> None:  # type: ignore[no-untyped-def]
    replication = Replication(hits)
    for at, key in fetches:
        replication.fetched(at, [key])
    assert replication.decide(now) == (made, ())


def test_a_key_is_asked_for_once_and_again_only_when_it_was_fetched_anew() -> None:
    replication = Replication(2)
    replication.fetched(0, [A, A])
    assert replication.decide(0).make == (A,)
    assert replication.decide(0).make == ()
    replication.fetched(1, [A])
    assert replication.decide(1).make == ()
    replication.fetched(2, [A])
    assert replication.decide(2).make == (A,)
    replication.made(3, [A])
    replication.fetched(3, [A, A, A])  # fetches that were under way
    assert replication.decide(4) == ((), ())


@pytest.mark.parametrize(("uses", "kept"), [(0, False), (2, False), (3, True), (9, True)])
def test_a_copy_stays_while_it_is_used(uses: int, kept: bool) -> None:
    replication = Replication(3, window_s=10.0)
    replication.made(0, [A, B])
    replication.used([A] * uses)
    replication.gone([B])
    assert replication.decide(10 * KEEP_WINDOWS - 0.1) == ((), ())
    assert replication.decide(10 * KEEP_WINDOWS).give_up == (() if kept else (A,))
    assert len(replication) == kept
    assert replication.decide(20 * KEEP_WINDOWS).give_up == ((A,) if kept else ()), "old uses do not count again"


def test_no_more_copies_than_allowed() -> None:
    replication = Replication(1, window_s=10.0, replicas_max=2)
    replication.fetched(0, [A, B, C])
    make = replication.decide(0).make
    assert make == (A, B)
    replication.made(0, make)
    assert replication.decide(1).make == ()
    replication.gone([A])
    assert replication.decide(2).make == (C,), "it is still hot"


def test_a_hot_key_is_found_among_a_scan_of_cold_ones() -> None:
    replication = Replication(20, keys_max=400)
    for n in range(5000):
        replication.fetched(n / 100, [n.to_bytes(16, "big")])
        if n % 10 == 0:
            replication.fetched(n / 100, [A])
        assert replication.counted <= 400
    assert replication.decide(50.0).make == (A,)


EVENTS = st.tuples(
    st.floats(0, 7),  # seconds since the event before
    st.sampled_from(["fetched", "fetched", "fetched", "used", "gone", "decide"]),
    st.lists(st.sampled_from([bytes([n]) * 16 for n in range(6)]), max_size=4),
)


@settings(max_examples=150, deadline=None)
@given(hits=st.integers(1, 4), events=st.lists(EVENTS, max_size=60), small=st.booleans())
def test_decisions_are_those_of_the_whole_history(hits, events, small) -> None:  # type: ignore[no-untyped-def]
    window_s, now = 20.0, 0.0
    replication = Replication(hits, window_s=window_s, keys_max=8 if small else 1000, replicas_max=3)
    fetches: list[tuple[float, bytes]] = []  # of keys without a copy, since they were last asked for
    copies: dict[bytes, float] = {}  # since when, or since when they were found worth keeping
    uses: Counter[bytes] = Counter()
    for wait_s, what, keys in events:
        now += wait_s
        if what == "fetched":
            replication.fetched(now, keys)
            fetches += [(now, key) for key in keys if key not in copies]
        elif what == "used":
            replication.used(keys)
            uses.update(keys)
        elif what == "gone":
            replication.gone(keys)
            copies = {key: since for key, since in copies.items() if key not in keys}
        else:
            make, give_up = replication.decide(now)
            due = {key for key, since in copies.items() if now - since >= KEEP_WINDOWS * window_s}
            assert set(give_up) == {key for key in due if uses[key] < hits}
            for key in due:
                copies[key], uses[key] = now, 0
            for key in give_up:
                del copies[key]
            at_most = Counter(key for at, key in fetches if now - at < window_s)
            at_least = Counter(key for at, key in fetches if now - at < window_s * 3 / 4)
            assert all(at_most[key] >= hits for key in make), "a copy of what nobody asked for often enough"
            assert len(make) == len(set(make))
            assert not set(make) & copies.keys()
            missed = {key for key, count in at_least.items() if count >= hits} - set(make)
            assert small or not missed or len(make) + len(copies) == 3
            replication.made(now, make)
            fetches = [(at, key) for at, key in fetches if key not in make]
            copies |= dict.fromkeys(make, now)
            uses -= Counter({key: uses[key] for key in make})
        assert len(replication) == len(copies) <= 3
        assert replication.counted <= (8 if small else 6)
