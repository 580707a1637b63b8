"""Which blocks are fetched from whom, and where fetching stops paying."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.blocks import KvLayout, KvSource
from core.request import WorkerRole
from kvtransfer.directory import Holder, Located, NodeRecord, Tier
from kvtransfer.link_costs import ASSUMED, FORGET_S, LINKS_MAX, LinkCosts
from kvtransfer.residency import Here, LinkCost, Prices, plan

LAYOUT = KvLayout(b"\x01" * 16, "float32", 2, 2, 8, 16)
HERE = Here("here", "h1", LAYOUT)
MS = 0.001
SLOW_COMPUTE = 10 * MS
BLOCK_MS = LinkCost(1 * MS, LAYOUT.block_bytes / (1 * MS))  # a millisecond to begin, one more per block


def node(name, host="h1", layout=LAYOUT, epoch=1):
    return NodeRecord(KvSource(name, epoch, "127.0.0.1:1", host), layout, WorkerRole.PREFILL)


NODES = {
    "near": node("near"),
    "near2": node("near2"),
    "far": node("far", "h2"),
    "far2": node("far2", "h2"),
    "third": node("third", "h3"),
    "other": node("other", layout=replace(LAYOUT, fingerprint=b"\x02" * 16)),
    "blank": node("blank", layout=None),
    "here": node("here"),
    "young": node("young", epoch=2),
}


def dram(name, epoch=1):
    return Holder(name, epoch, Tier.DRAM)


def disk(name, epoch=1):
    return Holder(name, epoch, Tier.DISK)


def keys(count):
    return [bytes([n]) * 16 for n in range(count)]


def planned(*holders, compute_s=SLOW_COMPUTE, time_left_s=1.0, cost=BLOCK_MS):
    price = cost if callable(cost) else lambda holder, near: cost
    shares = plan(keys(len(holders)), Located(NODES, holders), HERE, Prices(price, compute_s, time_left_s))
    return {share.holder: share.places for share in shares}


def assumed(holder, near):
    return ASSUMED[near, holder.tier]


def test_one_holder_gives_everything():
    assert planned(*[(dram("near"),)] * 4) == {dram("near"): (0, 1, 2, 3)}


def test_several_sources_serve_one_prompt():
    found = planned((dram("near"),), (dram("near"),), (dram("far"),), (disk("third"),))
    assert found == {dram("near"): (0, 1), dram("far"): (2,), disk("third"): (3,)}


def test_a_long_prefix_is_spread_over_hosts_but_not_over_nodes_of_one_host():
    spread = planned(*[(dram("far"), dram("third"))] * 6)
    assert {holder.worker_id: len(places) for holder, places in spread.items()} == {"far": 3, "third": 3}
    assert planned(*[(dram("far"), dram("far2"))] * 6) == {dram("far"): (0, 1, 2, 3, 4, 5)}


@pytest.mark.parametrize(
    ("holders", "expected"),
    [
        ((dram("far"), dram("near")), dram("near")),
        ((disk("near"), dram("near2")), dram("near2")),
        ((disk("near"), dram("near")), dram("near")),
        ((disk("near"), dram("far")), dram("far")),
        ((dram("near2"), dram("near")), dram("near")),  # a draw: by name, so that plans are the same every time
    ],
)
def test_the_same_host_and_memory_come_first(holders, expected):
    assert planned(holders, cost=assumed) == {expected: (0,)}
    assert planned(holders[::-1], cost=assumed) == {expected: (0,)}


@pytest.mark.parametrize("unfit", [dram("other"), dram("blank"), dram("here"), dram("young"), dram("unknown")])
def test_nodes_that_cannot_help_are_not_asked(unfit):
    """Another layout, none yet, ourselves, another incarnation, one without a record."""
    assert planned((unfit,)) == {}
    assert planned((dram("near"),), (unfit,), (dram("near"),)) == {dram("near"): (0,)}
    assert planned((unfit, dram("far"))) == {dram("far"): (0,)}


@pytest.mark.parametrize(
    ("compute_s", "blocks"),
    [
        (0.5 * MS, 0),  # each block is computed before it would be here
        (1 * MS, 0),
        (1.2 * MS, 10),  # the first one does not pay, ten of them do: 12 ms against 11
        (1.09 * MS, 0),
        (float("inf"), 10),
    ],
)
def test_fetching_stops_where_computing_is_quicker(compute_s, blocks):
    found = planned(*[(dram("near"),)] * 10, compute_s=compute_s)
    assert sum(map(len, found.values())) == blocks


def test_a_slow_tail_is_computed():
    def price(holder, near):
        return BLOCK_MS if near else LinkCost(200 * MS, BLOCK_MS.bytes_per_s)

    mixed = [(dram("near"),)] * 10 + [(dram("far"),)] * 3
    assert planned(*mixed, cost=price) == {dram("near"): tuple(range(10))}
    long_tail = [(dram("near"),)] * 10 + [(dram("far"),)] * 30
    assert sum(map(len, planned(*long_tail, cost=price).values())) == 40


def test_nothing_is_planned_beyond_the_deadline():
    assert planned(*[(dram("near"),)] * 10, time_left_s=5.5 * MS) == {dram("near"): (0, 1, 2, 3)}
    assert planned((dram("near"),), time_left_s=1 * MS) == {}


any_holder = st.builds(Holder, st.sampled_from([*NODES, "unknown"]), st.integers(1, 2), st.sampled_from(Tier))
holder_lists = st.lists(st.lists(any_holder, max_size=4, unique=True).map(tuple), max_size=30)


@given(
    holder_lists,
    st.integers(0, 30),
    st.floats(0, 0.02),
    st.floats(0, 0.1),
    st.dictionaries(st.sampled_from([*NODES]), st.tuples(st.floats(0, 0.05), st.floats(1e3, 1e10)).map(lambda t: LinkCost(*t))),
)
def test_a_plan_is_a_prefix_of_blocks_that_are_there_each_once(holders, missing, compute_s, left_s, links):
    def price(holder, near):
        return links.get(holder.worker_id, ASSUMED[near, holder.tier])

    wanted = keys(missing)
    shares = plan(wanted, Located(NODES, holders), HERE, Prices(price, compute_s, left_s))
    places = [place for share in shares for place in share.places]
    assert sorted(places) == list(range(len(places))), "a prefix, each place once"
    assert len(places) <= min(len(wanted), len(holders))
    for share in shares:
        assert share.places, "nobody is asked for nothing"
        assert list(share.places) == sorted(share.places)
        record = NODES[share.holder.worker_id]
        assert (record.layout, record.source.epoch) == (LAYOUT, share.holder.epoch)
        assert share.holder.worker_id != "here"
        for place in share.places:
            assert share.holder in holders[place]
        alone_s = len(share.places) * LAYOUT.block_bytes / price(share.holder, record.source.host_id == "h1").bytes_per_s
        rounding = 1 + 1e-9
        assert alone_s <= len(places) * compute_s * rounding, "it pays"
        assert alone_s <= left_s * rounding


# -- what fetching takes


def test_links_nobody_used_are_priced_by_where_they_are():
    links = LinkCosts()
    assert links.cost(dram("near"), True, 0.0) == ASSUMED[True, Tier.DRAM]
    assert links.cost(disk("far"), False, 0.0) == ASSUMED[False, Tier.DISK]


def test_measured_links_follow_what_was_measured_and_are_forgotten():
    links = LinkCosts()
    for _ in range(40):
        links.observe(dram("near"), True, 10.0, 5 * MS, 2**24, 2**24 / 1e8)
    cost = links.cost(dram("near"), True, 10.0)
    assert cost.latency_s == pytest.approx(5 * MS, rel=0.01)
    assert cost.bytes_per_s == pytest.approx(1e8, rel=0.01)
    assert links.cost(disk("near"), True, 10.0) == ASSUMED[True, Tier.DISK], "a tier of its own"
    assert links.cost(dram("near"), True, 11.0 + FORGET_S) == ASSUMED[True, Tier.DRAM], "it gets its next chance"


def test_small_fetches_say_nothing_of_the_rate():
    links = LinkCosts()
    links.observe(dram("near"), True, 0.0, 3 * MS, 4096, 1.0)
    cost = links.cost(dram("near"), True, 0.0)
    assert cost.bytes_per_s == ASSUMED[True, Tier.DRAM].bytes_per_s
    assert ASSUMED[True, Tier.DRAM].latency_s < cost.latency_s < 3 * MS


def test_only_so_many_links_are_remembered():
    links = LinkCosts()
    for n in range(LINKS_MAX + 1):
        links.observe(dram(f"n{n}"), True, 0.0, 1.0, 0, 0.0)
    assert links.cost(dram("n0"), True, 0.0) == ASSUMED[True, Tier.DRAM]
    assert links.cost(dram("n1"), True, 0.0).latency_s > ASSUMED[True, Tier.DRAM].latency_s
