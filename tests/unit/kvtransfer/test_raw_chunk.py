"""Chunks written by hand are the messages that protobuf would write, and those are read by hand."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.raw_chunk import data_head, data_of
from tandem.v1 import kv_pb2


@pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, 2**20, 2**21 - 1, 2**21])
def test_a_head_is_what_protobuf_writes(size):
    data = b"\x0a" * size
    assert data_head(size) + data == kv_pb2.ReadChunk(data=data).SerializeToString()


@given(st.binary(max_size=300), st.lists(st.integers(0, 2**32 - 1), max_size=3))
def test_every_chunk_gives_its_data(data, lengths):
    begins = [kv_pb2.Encoding(length=length) for length in lengths]
    assert data_of(kv_pb2.ReadChunk(data=data, begins=begins).SerializeToString()) == data


@given(st.binary(max_size=40))
def test_bytes_give_what_protobuf_finds_in_them(message):
    try:
        expected = kv_pb2.ReadChunk.FromString(message).data
    except DecodeError:
        with pytest.raises(DecodeError):
            data_of(message)
    else:
        assert data_of(message) == expected
