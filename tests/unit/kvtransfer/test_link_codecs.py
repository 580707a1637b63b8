"""Which codec a link gets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.blocks import KvLayout
from kvtransfer.choose_codec import CodecCost, predicted_s
from kvtransfer.codec import CODECS, LOSSY, agreed
from kvtransfer.codec_chooser import measure
from kvtransfer.codecs import FACTORIES, Codecs, make_codec
from kvtransfer.link_codecs import PULL_BYTES_MIN, RAW_EVERY, LinkCodecs
from kvtransfer.transport import PullResult

COSTS = (CodecCost("raw", False, 1.0), CodecCost("planes", False, 0.7, 80e6, 240e6))
SLOW, FAST = 5e6, 1e9  # bytes/s


def link(bytes_per_s: float, *, costs: tuple[CodecCost, ...] = COSTS) -> LinkCodecs:
    links = LinkCodecs(65_536)
    links.costs = costs
    links.observe("p", "tcp", raw(bytes_per_s))
    return links


def raw(bytes_per_s: float, num_bytes: int = PULL_BYTES_MIN) -> PullResult:
    return PullResult(num_bytes, num_bytes / bytes_per_s)


@pytest.mark.parametrize(("bytes_per_s", "chosen"), [(SLOW, "planes"), (FAST, "raw")])
def test_auto_takes_what_is_quicker_on_this_link(bytes_per_s, chosen):
    assert link(bytes_per_s).choose("p", "tcp", "auto") == chosen


def test_auto_goes_raw_while_it_knows_nothing():
    assert link(SLOW).choose("p", "grpc", "auto") == "raw"
    assert link(SLOW).choose("another", "tcp", "auto") == "raw"
    assert link(SLOW, costs=()).choose("p", "tcp", "auto") == "raw"
    small = LinkCodecs(65_536)
    small.costs = COSTS
    small.observe("p", "tcp", raw(SLOW, PULL_BYTES_MIN - 1))
    assert small.choose("p", "tcp", "auto") == "raw"


@pytest.mark.parametrize("wanted", ["auto", *CODECS])
@pytest.mark.parametrize("transport", ["shm", "loopback"])
def test_shared_memory_moves_raw(transport, wanted):
    links = link(SLOW)
    links.observe("p", transport, raw(SLOW))
    assert links.choose("p", transport, wanted) == "raw"


@pytest.mark.parametrize("wanted", CODECS)
def test_what_is_named_is_taken(wanted):
    assert LinkCodecs(65_536).choose("p", "tcp", wanted) == wanted


def test_a_link_is_measured_again_now_and_then_and_may_turn_out_quick():
    links = link(SLOW)
    for _ in range(RAW_EVERY):
        assert links.choose("p", "tcp", "auto") == "planes"
        links.observe("p", "tcp", PullResult(PULL_BYTES_MIN, 0.1, "planes", 1000))
    assert links.choose("p", "tcp", "auto") == "raw"
    for _ in range(3):
        links.observe("p", "tcp", raw(FAST))
    assert links.choose("p", "tcp", "auto") == "raw"


@given(st.floats(1e3, 1e12), st.lists(st.floats(1e3, 1e12), max_size=5))
def test_the_choice_is_never_slower_than_raw_by_its_own_reckoning(first, later):
    links, rate = link(first), first
    for bytes_per_s in later:
        links.observe("p", "tcp", raw(bytes_per_s))
        rate += 0.3 * (bytes_per_s - rate)
    chosen = next(cost for cost in COSTS if cost.name == links.choose("p", "tcp", "auto"))
    assert predicted_s(65_536, rate, chosen) <= predicted_s(65_536, rate, COSTS[0]) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("proposed", "accepted", "codec"),
    [("raw", "", "raw"), ("planes", "", "planes"), ("auto", "int8", "auto"), ("int8", "int8", "int8"), ("int8", "", "raw")],
)
def test_a_lossy_codec_needs_both_ends(proposed, accepted, codec):
    assert agreed(proposed, accepted) == codec


def test_the_names_are_those_of_the_codecs():
    layout = KvLayout(b"f" * 16, "float32", 2, 2, 8, 16)
    assert tuple(FACTORIES) == CODECS
    assert {name for name in CODECS if make_codec(name, layout).lossy} == LOSSY


def test_costs_are_measured_on_the_blocks_given():
    layout = KvLayout(b"f" * 16, "bfloat16", 2, 2, 8, 16)
    zeros = np.zeros((4, layout.block_bytes), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, zeros.shape, np.uint8)
    (plain, small), (_, large) = measure(Codecs(layout), zeros), measure(Codecs(layout), noise)
    assert (plain.name, plain.ratio, small.name) == ("raw", 1.0, "planes")
    assert small.ratio < 0.5 < 0.99 < large.ratio
    assert 0 < small.encode_bytes_per_s < float("inf")
