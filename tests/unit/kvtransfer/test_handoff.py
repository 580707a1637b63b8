"""The two state machines of a hand-off: tables of events, then any interleaving of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.blocks import BlockRecord, Closing, block_keys, root_key
from core.errors import TransferError
from core.request import AttemptKey
from kvtransfer.handoff import Export, ExportState, Ingest, News

KEY = AttemptKey("r", 1)
SIZE = 4
TOKENS = list(range(18))  # four full blocks and two tokens
KEYS = block_keys(root_key(b"model"), TOKENS, SIZE)
CLOSING = Closing(18, (5,), False)


def record(index, block_id=None, generation=1):
    full = index < len(KEYS)
    key = KEYS[index] if full else b""
    return BlockRecord(index, key, 10 + index if block_id is None else block_id, generation, 1, SIZE if full else 2)


RECORDS = [record(index) for index in range(5)]


def export(now=0.0):
    return Export(KEY, lease_s=10.0, now=now)


def ingest(local=frozenset()):
    return Ingest(KEYS, len(TOKENS), SIZE, local)


# -- Export ------------------------------------------------------------------------------------------------------------


def test_an_export_tells_everything_to_whoever_comes_late():
    e = export()
    assert e.news(0, False) == News()
    e.announce(RECORDS[:2], 1.0)
    assert e.state is ExportState.ANNOUNCING
    assert e.news(1, False) == News((RECORDS[1],))
    e.announce(RECORDS[2:4], 2.0)
    e.close(CLOSING, RECORDS[4], 3.0)
    assert e.news(0, False) == News(tuple(RECORDS), CLOSING)
    assert e.news(5, True) == News()


def test_signs_of_life_lengthen_an_export_and_silence_ends_it():
    e = export(now=0.0)
    assert not e.expire(9.9)
    assert e.renew(9.0)
    assert not e.expire(18.9)
    e.announce(RECORDS[:1], 18.0)
    e.close(CLOSING, None, 20.0)
    assert e.until == 30.0
    assert e.renew(15.0), "a late renewal is none the worse"
    assert e.until == 30.0
    assert e.expire(30.0)
    assert not e.expire(31.0), "it ends once"
    assert e.state is ExportState.EXPIRED
    assert not e.renew(31.0)
    assert e.news(0, False).ended


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (lambda e: e.done(), ExportState.DONE),
        (lambda e: e.revoke("cancelled"), ExportState.REVOKED),
        (lambda e: e.expire(1e9), ExportState.EXPIRED),
    ],
)
def test_an_ended_export_takes_nothing_more(end, state):
    e = export()
    e.announce(RECORDS[:1], 0.0)
    assert e.offers(RECORDS[0])
    assert end(e)
    assert e.state is state
    assert not e.offers(RECORDS[0])
    assert not e.announce(RECORDS[1:2], 0.0)
    assert not e.close(CLOSING, None, 0.0)
    assert not e.renew(0.0)
    assert not e.done()
    assert not e.revoke("again")
    assert not e.expire(1e9)
    assert e.state is state
    assert e.news(0, False).records == ()


def test_only_announced_blocks_of_their_generation_are_offered():
    e = export()
    e.announce(RECORDS[:1], 0.0)
    assert e.offers(RECORDS[0])
    assert not e.offers(replace(RECORDS[0], generation=2))
    assert not e.offers(RECORDS[1])


@pytest.mark.parametrize("again", [lambda e: e.announce(RECORDS, 0.0), lambda e: e.close(CLOSING, None, 0.0)])
def test_nothing_is_announced_after_the_closing_record(again):
    e = export()
    e.close(CLOSING, None, 0.0)
    with pytest.raises(AssertionError):
        again(e)


# -- Ingest ------------------------------------------------------------------------------------------------------------


def land(i, records):
    for r in records:
        i.landed(r.index)


def test_announcements_are_batched_and_pulled_once():
    i = ingest()
    i.announced(RECORDS[1::-1])
    i.announced(RECORDS[:3])
    assert i.take() == tuple(RECORDS[:3])
    i.announced(RECORDS)
    assert i.take() == tuple(RECORDS[3:])
    land(i, RECORDS)
    i.announced(RECORDS)
    assert i.take() == ()
    assert not i.complete
    i.closed(CLOSING)
    assert i.complete


def test_local_blocks_are_not_wanted():
    i = ingest(frozenset({0, 1, 2}))
    i.announced(RECORDS)
    assert i.take() == tuple(RECORDS[3:])
    i.closed(CLOSING)
    assert i.missing == {3, 4}


def test_all_local_completes_with_the_closing_record():
    i = Ingest(KEYS, 16, SIZE, frozenset(range(4)))
    assert not i.complete
    i.closed(replace(CLOSING, num_tokens=16))
    assert i.complete


def test_a_request_that_ended_needs_nothing():
    i = ingest()
    i.closed(replace(CLOSING, finished=True, num_tokens=3))
    assert i.complete


def test_a_block_that_did_not_arrive_is_pulled_again():
    i = ingest()
    i.announced(RECORDS)
    i.returned(i.take())
    assert i.take() == tuple(RECORDS)


def test_a_lost_block_waits_for_its_new_record():
    i = ingest()
    i.announced(RECORDS[:2])
    i.returned(i.take(), lost={1})
    assert i.take() == (RECORDS[0],)
    i.announced(RECORDS[:2])
    assert i.take() == (), "the old place is known to be of no use"
    newer = record(1, block_id=33, generation=7)
    i.announced([newer])
    assert i.take() == (newer,)


@pytest.mark.parametrize("lost", [frozenset(), {1}])
def test_a_newer_record_heard_in_flight_is_tried_next(lost):
    i = ingest()
    i.announced(RECORDS[:2])
    taken = i.take()
    newer = record(1, generation=2)
    i.announced([newer])
    assert i.take() == ()
    i.returned(taken, lost)
    assert i.take() == (RECORDS[0], newer)


@pytest.mark.parametrize("closed_first", [True, False])
def test_a_block_lost_for_good_fails_the_hand_off(closed_first):
    i = ingest()
    i.announced(RECORDS)
    taken = i.take()
    if closed_first:
        i.closed(CLOSING)
        with pytest.raises(TransferError, match=r"places \[3\]"):
            i.returned(taken, lost={3})
    else:
        i.returned(taken, lost={3})
        with pytest.raises(TransferError, match=r"places \[3\]"):
            i.closed(CLOSING)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (replace(RECORDS[1], key=KEYS[2]), "not that of our tokens"),
        (replace(RECORDS[1], key=b""), "not that of our tokens"),
        (replace(RECORDS[4], key=KEYS[0]), "not that of our tokens"),
        (replace(RECORDS[1], index=5), "18 tokens were asked for"),
        (replace(RECORDS[1], index=-1), "18 tokens were asked for"),
        (replace(RECORDS[1], num_tokens=3), "with 3 tokens, has 4"),
        (replace(RECORDS[4], num_tokens=3), "with 3 tokens, has 2"),
    ],
)
def test_records_that_cannot_be_are_refused(bad, message):
    with pytest.raises(TransferError, match=message):
        ingest().announced([bad])


@pytest.mark.parametrize("num_tokens", [17, 19])
def test_a_closing_record_of_other_tokens_is_refused(num_tokens):
    with pytest.raises(TransferError, match="18 were expected"):
        ingest().closed(replace(CLOSING, num_tokens=num_tokens))


# -- both together -----------------------------------------------------------------------------------------------------


class World:
    """An export, an ingest and a line between them that repeats, breaks and is slow; blocks may be lost at the source."""

    def __init__(self, num_blocks, num_tokens, local):
        self.keys = block_keys(root_key(b"m"), range(num_tokens), SIZE)
        self.num_tokens, self.num_blocks = num_tokens, num_blocks
        self.export = Export(KEY, 10.0, 0.0)
        self.ingest = Ingest(self.keys, num_tokens, SIZE, local)
        self.local = local
        self.computed = 0
        self.generation = 0
        self.valid = {}  # index -> the generation its bytes have now
        self.told, self.told_closing = 0, False
        self.in_flight = ()
        self.landed = []
        self.failed = False

    def make(self, index):
        self.generation += 1
        self.valid[index] = self.generation
        full = index < len(self.keys)
        tokens = SIZE if full else self.num_tokens % SIZE
        return BlockRecord(index, self.keys[index] if full else b"", index, self.generation, 1, tokens)

    def compute(self):
        if self.export.closing is None and self.computed < self.num_blocks:
            self.export.announce([self.make(self.computed)], 0.0)
            self.computed += 1

    def compute_again(self, n):
        """A block's memory is taken; while the export is open it may be computed anew."""
        if self.computed and self.export.closing is None:
            self.export.announce([self.make(n % self.computed)], 0.0)

    def take_away(self, n):
        """A block's memory is taken, and nobody computes it again."""
        if self.computed:
            self.generation += 1
            self.valid[n % self.computed] = self.generation

    def close(self):
        if self.computed == self.num_blocks and self.export.closing is None:
            self.export.close(Closing(self.num_tokens, (1,), False), None, 0.0)

    def deliver(self, n):
        """Some of what is new arrives, in order."""
        news = self.export.news(self.told, self.told_closing)
        part = news.records[: n % (len(news.records) + 1)] if n % 3 else news.records
        self.told += len(part)
        self.ingest.announced(part)
        if news.closing and len(part) == len(news.records):
            self.told_closing = True
            self.ingest.closed(news.closing)

    def reconnect(self):
        self.told, self.told_closing = 0, False

    def start(self):
        if not self.in_flight:
            self.in_flight = self.ingest.take()

    def finish(self, ok):
        records, self.in_flight = self.in_flight, ()
        lost = {r.index for r in records if self.valid[r.index] != r.generation}
        if lost or not ok:
            self.ingest.returned(records, lost)
            return
        for r in records:
            self.ingest.landed(r.index)
            self.landed.append(r.index)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["compute", "compute_again", "take_away", "close", "deliver", "reconnect", "start", "finish", "fail"]),
        st.integers(0, 30),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5), st.integers(0, 3), ACTIONS, st.sets(st.integers(0, 4)))
def test_any_interleaving_ends_with_each_block_pulled_once(full_blocks, rest, actions, local):
    num_tokens = max(1, full_blocks * SIZE + rest)
    num_blocks = -(-num_tokens // SIZE)
    world = World(num_blocks, num_tokens, frozenset(n for n in local if n < num_tokens // SIZE))
    steps = {
        "compute": lambda n: world.compute(),
        "compute_again": world.compute_again,
        "take_away": world.take_away,
        "close": lambda n: world.close(),
        "deliver": world.deliver,
        "reconnect": lambda n: world.reconnect(),
        "start": lambda n: world.start(),
        "finish": lambda n: world.finish(True),
        "fail": lambda n: world.finish(False),
    }
    try:
        for name, n in actions:
            steps[name](n)
            assert len(set(world.landed)) == len(world.landed)
        for _ in range(num_blocks):  # now everything goes well: it must come to its end
            world.compute()
        world.close()
        for _ in range(num_blocks + 8):
            world.deliver(0)
            world.start()
            world.finish(True)
    except TransferError:  # clean, and only where it is true
        newest = {r.index: r.generation for r in world.export.records}
        assert any(world.valid[index] != newest[index] for index in world.ingest.missing)
        return
    assert world.ingest.complete
    assert sorted(world.landed) == sorted(set(range(num_blocks)) - world.local)
