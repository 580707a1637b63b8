"""Block keys chain, separate tenants and models, and depend on nothing but what they name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.blocks import KvLayout, block_keys, blocks_for, root_key

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=70)


@given(tokens, st.integers(4, 16))
def test_only_full_blocks_have_keys_and_a_prefix_has_the_same_ones(ids, size):
    root = root_key(b"model")
    keys = block_keys(root, ids, size)
    assert len(keys) == len(ids) // size
    assert block_keys(root, ids[: size * 2], size) == keys[:2]
    assert all(len(key) == 16 for key in keys)


@given(tokens, st.integers(0, 4))
def test_keys_can_be_continued_from_a_known_prefix(ids, known):
    keys = block_keys(root_key(b"m"), ids, 8)
    known = min(known, len(keys))
    parent = keys[known - 1] if known else root_key(b"m")
    assert keys[:known] + block_keys(parent, ids, 8, parent_blocks=known) == keys


def test_roots_differ_by_model_tenant_and_codec():
    roots = {root_key(b"a"), root_key(b"b"), root_key(b"a", b"t"), root_key(b"a", b"", "t"), root_key(b"at")}
    assert len(roots) == 5


def test_a_changed_token_changes_every_later_key():
    one, two = block_keys(root_key(b"m"), range(64), 16), block_keys(root_key(b"m"), [9, *range(1, 64)], 16)
    assert not set(one) & set(two)


def test_keys_stay_what_they_are():
    """Disks and other releases know blocks by them."""
    keys = block_keys(root_key(b"m"), [*range(31), 2**32 - 1], 16)
    assert [key.hex() for key in keys] == ["f372a9f4fb1a23599491ff11053ee824", "09d7a67575bdc000c975b8d987e02e28"]


@pytest.mark.parametrize(
    ("token_id", "error"), [(-1, OverflowError), (2**32, OverflowError), (1.5, TypeError), ("7", TypeError)]
)
def test_what_is_no_token_id_has_no_key(token_id, error):
    with pytest.raises(error):
        block_keys(root_key(b"m"), [*range(15), token_id], 16)


def test_layout_counts_bytes_and_names_the_difference():
    layout = KvLayout(b"f", "bfloat16", 32, 8, 128, 16)
    assert layout.token_bytes == 131_072  # Llama-3-8B in bf16
    assert layout.block_bytes == 16 * 131_072
    assert layout.mismatch(layout) is None
    assert "kv_heads differs: 8 here, 4 there" in str(layout.mismatch(KvLayout(b"f", "bfloat16", 32, 4, 128, 16)))


def test_blocks_for_rounds_up():
    assert [blocks_for(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
