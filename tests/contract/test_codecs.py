"""Every codec: what it gives back, how long it gets, and what it does with bytes that no codec wrote."""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.blocks import KvLayout, root_key
from core.errors import LayoutMismatchError, TransferError
from kvtransfer.choose_codec import CodecCost, choose_codec, predicted_s
from kvtransfer.codecs import FACTORIES, Codec, make_codec, salt_of
from kvtransfer.encoding_error import EncodingError
from kvtransfer.int8 import from_float32, to_float32

FP32 = KvLayout(b"f" * 16, "float32", 2, 2, 32, 16)
BF16 = replace(FP32, dtype="bfloat16")
TINY = KvLayout(b"f" * 16, "bfloat16", 1, 1, 1, 1)  # scales would outweigh the numbers
LAYOUTS = {"fp32": FP32, "bf16": BF16, "tiny": TINY}
LOSSLESS = ["raw", "planes"]


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request) -> KvLayout:
    return request.param


@pytest.fixture(params=FACTORIES)
def codec(request, layout) -> Codec:
    return make_codec(request.param, layout)


def as_block(numbers: np.ndarray, layout: KvLayout) -> np.ndarray:
    out = np.empty(layout.block_bytes, np.uint8)
    from_float32(np.broadcast_to(np.asarray(numbers, np.float32), layout.shape).copy(), layout, out)
    return out


def kv_like(layout: KvLayout, seed: int = 0) -> np.ndarray:
    """Numbers as KV has them: a few channels of the keys far out, in every token."""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal(layout.shape, np.float32)
    numbers[:, 0, :, :, ::7] += 40 * rng.standard_normal(layout.shape[-1], np.float32)[::7]
    return as_block(numbers, layout)


def strange(layout: KvLayout) -> dict[str, np.ndarray]:
    bits = np.random.default_rng(1).integers(0, 256, layout.block_bytes, np.uint8)
    size = np.float32(np.finfo(np.float32).max)
    numbers = np.linspace(-1, 1, int(np.prod(layout.shape)), dtype=np.float32).reshape(layout.shape)
    special = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "denormal": np.float32(1e-42), "largest": size / 2}
    blocks = {
        "zeros": np.zeros(layout.block_bytes, np.uint8),
        "ones": np.full(layout.block_bytes, 255, np.uint8),
        "random": bits,
    }
    for name, value in special.items():
        changed = numbers.copy()
        changed.flat[::5] = value
        block = np.empty(layout.block_bytes, np.uint8)
        raw = changed.view(np.uint32)
        block.view(np.uint32 if layout.dtype == "float32" else np.uint16)[:] = (
            raw.ravel() if layout.dtype == "float32" else (raw.ravel() >> 16).astype(np.uint16)
        )
        blocks[name] = block
    return blocks


def there_and_back(codec: Codec, block: np.ndarray) -> np.ndarray:
    before = block.copy()
    data = codec.encode(block)
    assert np.array_equal(block, before), "the source is only read"
    assert data.dtype == np.uint8
    assert data.ndim == 1
    assert data.nbytes <= codec.encoded_bytes_max
    out = np.full_like(block, 0xAA)
    codec.decode(data, out)
    return out


def test_lossless_ones_keep_every_bit(codec, layout):
    if codec.lossy:
        pytest.skip("it does not claim to")
    for name, block in {**strange(layout), "kv": kv_like(layout)}.items():
        assert np.array_equal(there_and_back(codec, block), block), name


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), values=st.integers(1, 256), dtype=st.sampled_from(["float32", "bfloat16"]))
@example(seed=0, values=1, dtype="bfloat16")
@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_ones_keep_every_bit_of_anything(name, seed, values, dtype):
    layout = replace(FP32, dtype=dtype)
    block = np.random.default_rng(seed).integers(0, values, layout.block_bytes, np.uint8)
    assert np.array_equal(there_and_back(make_codec(name, layout), block), block)


def test_what_is_no_number_passes_a_lossy_codec_unchanged(codec, layout):
    for name in ("nan", "inf", "-inf", "largest"):
        block = strange(layout)[name]
        assert np.array_equal(there_and_back(codec, block), block), name


@pytest.mark.parametrize("layout", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_int8_is_off_by_half_a_step_at_most(layout, scale):
    block = as_block(to_float32(kv_like(layout), layout) * np.float32(scale), layout)
    before = to_float32(block, layout).astype(np.float64)
    after = to_float32(there_and_back(make_codec("int8", layout), block), layout).astype(np.float64)
    rounding = np.abs(before).max(axis=(3, 4), keepdims=True) * (2**-8 if layout.dtype == "bfloat16" else 2**-22)
    for half, axis in ((0, 2), (1, 3)):
        x = before[:, half]
        step = (x.max(axis=axis, keepdims=True) - x.min(axis=axis, keepdims=True)) / 255
        assert (np.abs(after[:, half] - x) <= 0.5001 * step + rounding[:, half]).all(), "kv"[half]
    assert not np.array_equal(before, after), "a lossy codec that loses nothing was not tried"


def test_int8_gives_each_channel_of_the_keys_its_own_scale():
    """One channel a thousand times the others costs those nothing: what quantising keys per token gets wrong."""
    numbers = np.random.default_rng(3).standard_normal(FP32.shape).astype(np.float32)
    numbers[:, 0, :, :, 5] *= 1000
    after = to_float32(there_and_back(make_codec("int8", FP32), as_block(numbers, FP32)), FP32)
    others = np.delete(np.abs(after - numbers)[:, 0], 5, axis=-1)
    assert others.max() < 0.02


@pytest.mark.parametrize("value", [0.0, 3.25, -1e-20])
def test_int8_keeps_what_is_constant(layout, value):
    block = as_block(np.float32(value), layout)
    assert np.array_equal(there_and_back(make_codec("int8", layout), block), block)


def test_int8_of_denormals_stays_within_a_step():
    numbers = np.random.default_rng(2).integers(0, 400, FP32.shape).astype(np.uint32).view(np.float32)
    after = to_float32(there_and_back(make_codec("int8", FP32), as_block(numbers, FP32)), FP32)
    assert np.abs(after - numbers).max() <= 400 * np.float32(1e-45)


@pytest.mark.parametrize(
    ("name", "layout", "most"), [("int8", FP32, 0.36), ("int8", BF16, 0.72), ("planes", FP32, 0.95), ("planes", BF16, 0.85)]
)
def test_kv_gets_smaller(name, layout, most):
    block = kv_like(layout)
    assert make_codec(name, layout).encode(block).nbytes <= most * block.nbytes


def test_what_was_cut_or_grew_is_refused_and_nothing_is_written_beyond_the_block(codec, layout):
    block = kv_like(layout)
    data = codec.encode(block)
    memory = np.full(layout.block_bytes + 64, 0xAA, np.uint8)
    for wrong in (data[:0], data[:1], data[:-1], data[: data.nbytes // 2], np.append(data, data[:1]), np.append(data, data)):
        if codec.name == "int8" and wrong.nbytes == layout.block_bytes:
            continue  # a block as it is, which only the digest can tell from ours
        with pytest.raises(EncodingError):
            codec.decode(np.ascontiguousarray(wrong), memory[: layout.block_bytes])
    assert (memory[layout.block_bytes :] == 0xAA).all()


@settings(max_examples=80, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(FACTORIES)), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_damage_is_refused_or_gives_a_block_of_the_right_size(data, name, dtype):
    """And nothing else: no other error, no warning (those fail tests here), no byte outside the block."""
    layout = replace(FP32, dtype=dtype)
    codec = make_codec(name, layout)
    damaged = codec.encode(kv_like(layout)).copy()
    places = st.integers(0, min(len(damaged), 2000) - 1) if data.draw(st.booleans()) else st.integers(0, len(damaged) - 1)
    for at in data.draw(st.lists(places, min_size=1, max_size=8)):
        damaged[at] = data.draw(st.integers(0, 255))
    memory = np.full(layout.block_bytes + 64, 0xAA, np.uint8)
    with contextlib.suppress(EncodingError):
        codec.decode(damaged, memory[: layout.block_bytes])
    assert (memory[layout.block_bytes :] == 0xAA).all()


def test_a_plane_that_inflates_without_end_is_refused():
    codec = make_codec("planes", BF16)
    half = BF16.block_bytes // 2
    small = zlib.compress(bytes(half * 100))
    assert len(small) < half, "its length alone would give it away"
    lengths = np.array([half, len(small)], "<u4").view(np.uint8)
    data = np.concatenate([lengths, np.zeros(half, np.uint8), np.frombuffer(small, np.uint8)])
    with pytest.raises(EncodingError, match="where"):
        codec.decode(data, np.empty(BF16.block_bytes, np.uint8))


def test_a_codec_of_another_version_is_refused_by_name():
    with pytest.raises(LayoutMismatchError, match="codec differs: raw, planes, int8 here, int2 there"):
        make_codec("int2", FP32)
    assert issubclass(EncodingError, TransferError)


def test_a_lossy_block_never_passes_for_exact():
    salts = {name: salt_of(make_codec(name, FP32)) for name in FACTORIES}
    assert salts == {"raw": "", "planes": "", "int8": "int8"}
    assert root_key(b"f", codec=salts["int8"]) != root_key(b"f")


COSTS = [CodecCost("raw", False, 1.0), CodecCost("planes", False, 0.75, 2e8, 4e8), CodecCost("int8", True, 0.3, 1e9, 1e9)]


@pytest.mark.parametrize(
    ("link_bytes_per_s", "lossy", "chosen"),
    [
        (1e10, True, "raw"),
        (1e9, True, "raw"),
        (2e8, True, "int8"),
        (2e8, False, "raw"),
        (1e7, False, "planes"),
        (1e6, True, "int8"),
    ],
)
def test_the_codec_with_the_shortest_predicted_time_is_chosen(link_bytes_per_s, lossy, chosen):
    assert choose_codec(98304, link_bytes_per_s, COSTS, lossy_allowed=lossy) == chosen


def test_stages_side_by_side_take_as_long_as_the_slowest():
    one = CodecCost("x", False, 0.5, 100.0, 50.0)
    assert predicted_s(100, 10.0, one) == 1.0 + 5.0 + 2.0
    assert predicted_s(100, 10.0, one, overlapped=True) == 5.0
    assert choose_codec(100, 1e9, [one, CodecCost("raw", False, 1.0)], lossy_allowed=True, overlapped=True) == "raw"
