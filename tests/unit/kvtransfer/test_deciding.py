"""Spans, transport choice and codec: small deciding code."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.blocks import KvSource
from core.errors import DigestMismatchError, LayoutMismatchError, TransferError
from kvtransfer.choose import transport_order
from kvtransfer.codec import CODECS, check_codec, check_digest, digest_of, digests_of
from kvtransfer.spans import coalesce

HERE = ("loopback", "shm", "tcp", "grpc")


def spans(source, dest, blocks_max=100):
    return [tuple(span) for span in coalesce(source, dest, blocks_max)]


def test_neighbours_on_both_sides_become_one_span():
    assert spans([4, 5, 6], [1, 2, 3]) == [(0, 4, 1, 3)]
    assert spans([4, 5, 6], [1, 2, 9]) == [(0, 4, 1, 2), (2, 6, 9, 1)]
    assert spans([4, 6, 5], [1, 2, 3]) == [(0, 4, 1, 1), (1, 6, 2, 1), (2, 5, 3, 1)]
    assert spans([4, 5, 6], [1, 2, 3], 2) == [(0, 4, 1, 2), (2, 6, 3, 1)]
    assert spans([], []) == []


runs = st.tuples(st.integers(0, 90), st.integers(0, 90), st.integers(1, 30))
scattered = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=80)  # longer than what a loop cuts
neighbours = st.lists(runs, max_size=8).map(lambda cut: [(a + n, b + n) for a, b, length in cut for n in range(length)])


@given(scattered | neighbours, st.integers(1, 5))
def test_spans_cover_every_pair_once_in_order_and_are_as_long_as_they_can_be(pairs, blocks_max):
    source, dest = [a for a, _ in pairs], [b for _, b in pairs]
    covered = [
        (first + n, start + n, dest_start + n)
        for first, start, dest_start, count in coalesce(source, dest, blocks_max)
        for n in range(count)
    ]
    assert covered == [(place, *pair) for place, pair in enumerate(pairs)]
    found = list(coalesce(source, dest, blocks_max))
    assert all(span.num_blocks <= blocks_max for span in found)
    for one, following in pairwise(found):
        adjacent = (following.source, following.dest) == (one.source + one.num_blocks, one.dest + one.num_blocks)
        assert not adjacent or one.num_blocks == blocks_max


def source(transports=HERE, host="h1", path="/dev/shm/tandem-x", tcp=""):
    return KvSource("prefill-0", 1, "127.0.0.1:1", host, path, 4, tuple(transports), tcp)


@pytest.mark.parametrize(
    ("configured", "of", "failing", "expected"),
    [
        ("auto", source(), (), ("shm", "grpc")),
        ("auto", source(host="h2"), (), ("grpc",)),
        ("auto", source(path=""), (), ("grpc",)),
        ("auto", source(("grpc",)), (), ("grpc",)),
        ("auto", source(("shm",)), (), ("shm",)),
        ("auto", source(), ("shm",), ("grpc", "shm")),
        ("auto", source(tcp="h1:1"), (), ("shm", "tcp", "grpc")),
        ("auto", source(host="h2", tcp="h1:1"), (), ("tcp", "grpc")),
        ("auto", source(host="h2", tcp="h1:1"), ("tcp",), ("grpc", "tcp")),
        ("auto", source(("grpc",), host="h2", tcp="h1:1"), (), ("grpc",)),
        ("tcp", source(tcp="h1:1"), (), ("tcp", "grpc")),
        ("tcp", source(), (), ("grpc",)),
        ("shm", source(), (), ("shm", "grpc")),
        ("shm", source(host="h2"), (), ("grpc",)),
        ("loopback", source(), (), ("loopback", "grpc")),
        ("grpc", source(), (), ("grpc",)),
        ("grpc", source(), ("grpc",), ("grpc",)),
    ],
)
def test_order_of_transports(configured, of, failing, expected):
    assert transport_order(configured, HERE, "h1", of, failing) == expected


@pytest.mark.parametrize("of", [source(()), source(("shm",), host="h2"), source(("tcp",))])
def test_nothing_in_common_names_both_ends(of):
    with pytest.raises(TransferError, match=r"prefill-0: it offers .* here are grpc, loopback, shm, tcp"):
        transport_order("auto", HERE, "h1", of)


def test_digests():
    blocks = np.arange(64, dtype=np.uint8).reshape(4, 16)
    digests = digests_of(blocks, [3, 1])
    assert digests == [digest_of(blocks[3]), digest_of(blocks[1])]
    assert digest_of(np.frombuffer(b"", np.uint8)) == 0x2D06800538D394C2, "xxh3-64 of nothing, seed 0"
    check_digest(blocks[3], digests[0], 9)
    with pytest.raises(DigestMismatchError, match="block 9 "):
        check_digest(blocks[2], digests[0], 9)
    with pytest.raises(DigestMismatchError, match="without a digest"):
        check_digest(blocks[2], 0, 9)


def test_codecs():
    for name in (*CODECS, "auto"):
        check_codec(name)
    with pytest.raises(LayoutMismatchError, match="codec differs: raw, planes, int8 here, int3 there"):
        check_codec("int3")
