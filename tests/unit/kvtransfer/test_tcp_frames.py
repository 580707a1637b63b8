"""The words of the tcp transport: what is packed comes back, and no bytes whatever do worse than a TransferError."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LayoutMismatchError, LeaseExpiredError, StaleEpochError, TransferError
from core.request import AttemptKey
from kvtransfer import tcp_frames as frames
from kvtransfer.tcp_frames import FrameError, Status
from kvtransfer.tcp_wire import after
from kvtransfer.transport import BlocksGoneError

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
nonces = st.binary(min_size=16, max_size=16)
secrets = st.binary(max_size=40)
places = st.lists(st.tuples(u32, u32, u64), max_size=20)


def parsed_request(data: bytes) -> frames.Request:
    head = frames.parse_request_head(data[: frames.REQUEST_HEAD_BYTES])
    assert head.body_bytes <= frames.REQUEST_BODY_BYTES_MAX
    body = data[frames.REQUEST_HEAD_BYTES :][: head.body_bytes]
    return frames.parse_request(head, body + bytes(head.body_bytes - len(body)))


@given(u32, st.floats(0.001, 4e6), u64, u64, st.builds(AttemptKey, st.text(max_size=50), u32), places)
def test_requests_come_back(seq, timeout_s, epoch, block_bytes, key, blocks):
    request = parsed_request(frames.request(seq, timeout_s, epoch, block_bytes, key, blocks))
    head = request.head
    assert (head.seq, head.epoch, head.block_bytes, head.count, request.key) == (seq, epoch, block_bytes, len(blocks), key)
    assert head.timeout_s == pytest.approx(timeout_s, abs=0.001)
    assert (head.codec, request.digests.size) == ("raw", 0)
    columns = (request.indices.tolist(), request.block_ids.tolist(), request.generations.tolist())
    assert list(zip(*columns, strict=True)) == blocks


@given(u32, st.sampled_from(["planes", "int8"]), st.lists(st.tuples(u32, u32, u64, u64), max_size=20))
def test_requests_for_encoded_blocks_carry_digests(seq, codec, blocks):
    request = parsed_request(frames.request(seq, 1.0, 7, 4096, AttemptKey("r", 1), blocks, codec))
    assert request.head.codec == codec
    columns = (request.indices, request.block_ids, request.generations, request.digests)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == blocks


@given(st.lists(st.tuples(u32, u64), max_size=20))
def test_tables_of_encodings_come_back(encodings):
    data = frames.table(encodings)
    assert len(data) == frames.table_bytes(len(encodings))
    assert frames.parse_table(data) == encodings


@given(st.data())
def test_damaged_requests_are_refused_or_mean_something_bounded(data):
    good = frames.request(1, 1.0, 2, 3, AttemptKey("request", 1), [(0, 1, 2), (3, 4, 5)])
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        request = parsed_request(bytes(raw))
    except FrameError:
        return
    assert len(request.block_ids) == request.head.count <= frames.BLOCKS_MAX


@given(st.binary(min_size=frames.REQUEST_HEAD_BYTES, max_size=frames.REQUEST_HEAD_BYTES + 200))
def test_noise_is_no_request(raw):
    with pytest.raises(FrameError):
        parsed_request(raw)


@given(st.binary(max_size=60), st.sampled_from([frames.REPLY_MAGIC, frames.TRAILER_MAGIC]), u32)
def test_noise_is_no_reply(tail, magic, seq):
    raw = (magic + seq.to_bytes(4, "little") + tail + bytes(64))[: frames.REPLY_HEAD_BYTES]  # the worst: it begins right
    try:
        head = frames.parse_reply_head(raw, magic, seq)
    except FrameError:
        return
    assert head.count <= frames.BLOCKS_MAX
    assert head.detail_bytes <= frames.DETAIL_BYTES_MAX
    if head.status is not Status.OK:
        assert isinstance(frames.error_of(head, tail, "p"), TransferError)


def said(raw: bytes, magic: bytes, seq: int) -> TransferError | None:
    head = frames.parse_reply_head(raw[: frames.REPLY_HEAD_BYTES], magic, seq)
    detail = raw[frames.REPLY_HEAD_BYTES :]
    assert len(detail) == head.detail_bytes
    return None if head.status is Status.OK else frames.error_of(head, detail, "prefill-0")


@given(u32, st.lists(u32, min_size=1, max_size=frames.BLOCKS_MAX))
def test_indices_of_gone_blocks_come_back(seq, indices):
    for raw, magic in (
        (frames.refusal(seq, BlocksGoneError(indices)), frames.REPLY_MAGIC),
        (frames.trailer(seq, indices), frames.TRAILER_MAGIC),
    ):
        error = said(raw, magic, seq)
        assert isinstance(error, BlocksGoneError)
        assert error.indices == tuple(indices)
    assert said(frames.trailer(seq, []), frames.TRAILER_MAGIC, seq) is None
    assert said(frames.reply(seq, 3), frames.REPLY_MAGIC, seq) is None


@pytest.mark.parametrize("kind", [StaleEpochError, LeaseExpiredError, LayoutMismatchError, TransferError])
def test_refusals_keep_their_kind_and_reason(kind):
    error = said(frames.refusal(9, kind("what was wrong" + "x" * 9000)), frames.REPLY_MAGIC, 9)
    assert type(error) is kind
    assert error.message.startswith("prefill-0: what was wrong")


@given(u64, secrets, secrets, nonces, nonces)
def test_the_handshake_needs_one_secret_on_both_ends(epoch, ours, theirs, server_nonce, nonce):
    assert frames.parse_greeting(frames.greeting(server_nonce)) == server_nonce
    said_hello = frames.hello(epoch, theirs, server_nonce, nonce)
    answer = frames.welcome(Status.OK, epoch, ours, server_nonce, nonce)
    if ours.rstrip(b"\0") == theirs.rstrip(b"\0"):  # HMAC pads keys with zeros; secrets come from text files, stripped
        assert frames.parse_hello(said_hello, ours, server_nonce) == (epoch, nonce)
        frames.check_welcome(answer, epoch, theirs, server_nonce, nonce)
        return
    with pytest.raises(FrameError, match="secret_file"):
        frames.parse_hello(said_hello, ours, server_nonce)
    with pytest.raises(FrameError, match="secret_file"):
        frames.check_welcome(answer, epoch, theirs, server_nonce, nonce)


def test_a_handshake_cannot_be_played_back():
    recorded = frames.hello(1, b"secret", b"a" * 16, b"n" * 16)
    with pytest.raises(FrameError, match="secret"):
        frames.parse_hello(recorded, b"secret", b"b" * 16)


def test_another_epoch_and_another_version_are_named():
    with pytest.raises(StaleEpochError, match="epoch 8, the ticket of epoch 7"):
        frames.check_welcome(frames.welcome(Status.STALE_EPOCH, 8, b"", b"a" * 16, b"b" * 16), 7, b"", b"a" * 16, b"b" * 16)
    with pytest.raises(FrameError, match="version 513"):
        frames.parse_greeting(b"TKVB\x01\x02" + bytes(18))
    with pytest.raises(FrameError, match="does not speak our transfer protocol"):
        frames.parse_greeting(b"HTTP/1.1 400 Bad Request")


@given(st.lists(st.binary(max_size=8), max_size=8), st.integers(0, 70))
def test_what_is_left_of_buffers(buffers, done):
    whole = b"".join(buffers)
    left = after(buffers, done)
    assert b"".join(map(bytes, left)) == whole[done:]
    assert not left or len(left[0]) > 0


def test_blocks_begin_on_a_cache_line_of_the_stream():
    assert (frames.GREETING_BYTES + frames.WELCOME_BYTES) % 64 == 0
    assert len(frames.reply(1, 2)) % 64 == 0
    assert len(frames.trailer(1, [])) % 64 == 0
