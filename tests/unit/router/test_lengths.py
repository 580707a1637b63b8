"""What answers that ended say of those to come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.lengths import GROUPS_MAX, REMEMBERED, UNKNOWN_TOKENS, Length, Lengths


def test_before_anything_ended_a_default_within_the_limit():
    assert Lengths().predict("a", 1000) == Length(UNKNOWN_TOKENS, UNKNOWN_TOKENS)
    assert Lengths().predict("a", 5) == Length(5, 5)


def test_a_group_is_known_by_its_own_and_a_new_one_by_everybodys():
    lengths = Lengths()
    for tokens in range(1, 101):
        lengths.ended("short", tokens)
    for _ in range(100):
        lengths.ended("long", 900)
    assert lengths.predict("short", 2000) == Length(51, 91)
    assert lengths.predict("new", 2000).median == 900


def test_what_is_longer_already_is_compared_with_longer_ones():
    lengths = Lengths()
    for tokens in [10] * 90 + [500] * 10:
        lengths.ended("a", tokens)
    assert lengths.predict("a", 2000).median == 10
    assert lengths.predict("a", 2000, so_far=10).median == 500
    assert lengths.predict("a", 2000, so_far=600) == Length(2000, 2000)


@given(st.lists(st.integers(1, 5000), max_size=300), st.integers(1, 4096), st.integers(0, 4095))
def test_predictions_stay_within_bounds(ended, tokens_max, so_far):
    lengths = Lengths()
    for tokens in ended:
        lengths.ended("g", tokens)
    median, p90 = lengths.predict("g", tokens_max, min(so_far, tokens_max - 1))
    assert 0 < median <= p90 <= tokens_max


@given(st.lists(st.integers(1, 50), min_size=1, max_size=400), st.integers(1, 60), st.integers(0, 59))
def test_the_latest_count_each_once_whatever_their_order(ended, tokens_max, so_far):
    lengths = Lengths()
    for tokens in ended:
        lengths.ended("g", tokens)
    longer = sorted(min(tokens, tokens_max) for tokens in ended[-REMEMBERED:] if tokens > so_far) or [tokens_max]
    p90 = longer[min(len(longer) - 1, len(longer) * 9 // 10)]
    assert lengths.predict("g", tokens_max, so_far) == Length(longer[len(longer) // 2], p90)


def test_groups_are_bounded():
    lengths = Lengths()
    for number in range(GROUPS_MAX + 100):
        lengths.ended(f"g{number}", 3)
    assert len(lengths._groups) <= GROUPS_MAX
