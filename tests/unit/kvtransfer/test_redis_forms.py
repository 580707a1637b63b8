"""Redis without a server: its URLs, the bytes of its layout, and the breaker in front of it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from kvtransfer.breaker import Breaker
from kvtransfer.redis_layout import BUCKETS, COMMAND_BUCKETS, RECORD_BYTES, Buckets, Layout, read_words, words_in
from kvtransfer.redis_url import RedisTarget, parse_redis_url


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("redis://localhost", RedisTarget("single", (("localhost", 6379),))),
        ("redis://h:7/3", RedisTarget("single", (("h", 7),), db=3)),
        ("redis://h?db=4&prefix=blue", RedisTarget("single", (("h", 6379),), db=4, prefix="blue")),
        ("redis://:p%40ss%2F@[::1]:7", RedisTarget("single", (("::1", 7),), login={"password": "p@ss/"})),
        ("redis://me:pw@h", RedisTarget("single", (("h", 6379),), login={"username": "me", "password": "pw"})),
        ("rediss://h", RedisTarget("single", (("h", 6379),), tls={"ssl_cert_reqs": "required", "ssl_check_hostname": True})),
        (
            "rediss://h?verify=none",
            RedisTarget("single", (("h", 6379),), tls={"ssl_cert_reqs": "none", "ssl_check_hostname": False}),
        ),
        ("unix:///run/r%20s.sock?db=1", RedisTarget("unix", path="/run/r s.sock", db=1)),
        ("redis+sentinel://a,b:7/main/2", RedisTarget("sentinel", (("a", 26379), ("b", 7)), service="main", db=2)),
        (
            "redis+sentinel://:m@a/main?sentinel_password=s",
            RedisTarget("sentinel", (("a", 26379),), service="main", login={"password": "m"}, sentinel_login={"password": "s"}),
        ),
        ("redis+cluster://a:1,b:2,c", RedisTarget("cluster", (("a", 1), ("b", 2), ("c", 6379)))),
    ],
)
def test_urls(url, target):
    assert parse_redis_url(url) == target
    assert "p@ss" not in str(target) + repr(target)
    assert "pw" not in str(target) + repr(target)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "begins with"),
        ("localhost:6379", "begins with"),
        ("http://h", "begins with"),
        ("redis+ring://h", "begins with"),
        ("redis://", "no HOST"),
        ("redis://h:port", "no HOST"),
        ("redis://h:0", "the port goes"),
        ("redis://h:70000", "the port goes"),
        ("redis://[::1", "cannot be used"),
        ("redis://h/one", "the database goes"),
        ("redis://h/1/2", "number of a database"),
        ("redis://a,b", "several hosts"),
        ("redis://me@h", "without a password"),
        ("redis://h?timeout=1", "'timeout' is not known"),
        ("redis://:secret#@h", "percent-encoded"),
        ("redis://:a/secret@h", "percent-encoded"),
        ("redis://:a?secret@h", "percent-encoded"),
        ("redis://:a#secret@h", "percent-encoded"),
        ("redis://h?prefix=a b", "`prefix` has"),
        ("redis://h?ca=x", "asks for with rediss"),
        ("rediss://h?ca=/no/such/file", "cannot read /no/such/file"),
        ("rediss://h?verify=maybe", "verify=maybe"),
        ("redis+sentinel://h", "asked for a service"),
        ("redis+cluster://h/1", "database 0"),
        ("unix://relative.sock", "absolute path"),
    ],
)
def test_urls_that_are_none(url, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_redis_url(url)
    assert "secret" not in str(caught.value)


def test_certificates_come_in_pairs(tmp_path):
    (tmp_path / "c.pem").write_text("x")
    with pytest.raises(ConfigError, match="belong together"):
        parse_redis_url(f"rediss://h?cert={tmp_path / 'c.pem'}")


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_a_plain_error(text):
    for url in (text, f"redis://{text}", f"redis+sentinel://h/{text}", f"rediss://h?{text}"):
        try:
            parse_redis_url(url)
        except ConfigError:
            continue


@pytest.mark.parametrize("shards", [1, 16])
def test_a_key_is_looked_up_where_it_is_written(shards):
    layout = Layout("t", shards)
    keys = random.Random(shards).randbytes(16 * 2500)
    written, lookups = layout.packed(keys), layout.lookup(keys)
    assert written.keys() == lookups.keys()
    assert sorted(place for lookup in lookups.values() for place in lookup.places) == list(range(2500))
    for shard, lookup in lookups.items():
        name = layout.prefixes[shard] + b"entries"
        rows = [written[shard][at : at + 9] for at in range(0, len(written[shard]), 9)]
        assert [row[:3] for row in rows] == lookup.buckets()
        assert [row[3:] for row in rows] == lookup.tags()
        assert all(int.from_bytes(row[:3], "little") < BUCKETS // shards for row in rows)
        parts = [lookup.buckets()[first : first + COMMAND_BUCKETS] for first in range(0, len(rows), COMMAND_BUCKETS)]
        commands = [(b"HMGET", name, *part) for part in parts]
        packed = [b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words) for words in commands]
        told = [b"*%d\r\n%s" % (len(words), text) for words, text in zip(commands, packed, strict=True)]
        assert lookup.commands() == told
    assert (
        len(
            {
                b"%d:%b%b" % (shard, bucket, tag)
                for shard, lookup in lookups.items()
                for bucket, tag in zip(lookup.buckets(), lookup.tags(), strict=True)
            }
        )
        == 2500
    )


def test_no_keys_are_no_lookups():
    assert Layout("t", 1).lookup(b"") == {} == Layout("t", 16).packed(b"")


@given(st.lists(st.tuples(st.sampled_from([b"aaaaaa", b"aaaaab", b"\0\0\0\0\0\0"]), st.integers(0, 3)), max_size=6))
def test_tags_are_found_at_records_alone(records):
    """With tags that overlap one another and the words between them."""
    bucket = b"".join(tag + (0x61616161 + number).to_bytes(4, "big") for tag, number in records)
    assert len(bucket) == RECORD_BYTES * len(records)
    for tag in (b"aaaaaa", b"aaaaab", b"\0\0\0\0\0\0"):
        expected = [(0x61616161 + number) >> 1 for found, number in records if found == tag]
        assert [number for number, _ in read_words(words_in(bucket, tag))] == expected


@given(st.lists(st.lists(st.integers(0, 2), max_size=3, unique=True), max_size=12), st.integers(0, 2**32), st.booleans())
def test_runs_are_what_each_bucket_says(holders, seed, damaged):
    """Read at once or one by one: the words of each key, until the first that has none."""
    dice = random.Random(seed)
    keys = dice.randbytes(16 * len(holders))
    lookup = Layout("t", 1).lookup(keys).get(0)
    if lookup is None:
        return
    buckets: list[bytes | None] = []
    for tag, numbers in zip(lookup.tags(), holders, strict=True):
        records = [tag + number.to_bytes(4, "big") for number in numbers] + [
            dice.randbytes(10) for _ in range(dice.randrange(3))
        ]
        buckets.append(b"".join(records) or None)
    if damaged and buckets[-1] is not None:
        buckets[-1] += b"tail"
    expected = [b"".join(number.to_bytes(4, "big") for number in numbers) for numbers in holders]
    expected = expected[: expected.index(b"")] if b"" in expected else expected
    arrived, size = Buckets(), dice.randrange(1, 13)
    for first in range(0, len(buckets), size):
        arrived.take(buckets[first : first + size])
    runs = lookup.read(arrived)
    assert [words for words, count in runs for _ in range(count)] == expected
    assert all(one != other for (one, _), (other, _) in pairwise(runs))


def test_the_breaker_lets_one_call_try():
    breaker = Breaker(pause_min_s=1.0, pause_max_s=4.0)
    assert all(breaker.allows(now) for now in (0.0, 0.0, 1.0))
    breaker.failed(1.0)
    breaker.failed(1.1)  # was under way
    assert not breaker.allows(1.9)
    assert breaker.allows(2.0)
    assert not breaker.allows(2.0), "one at a time"
    breaker.failed(2.2)
    assert not breaker.allows(4.1), "the pause has doubled"
    assert breaker.allows(4.2)
    breaker.failed(4.3)
    assert not breaker.allows(8.2)
    assert breaker.allows(8.3)
    breaker.failed(8.4)
    assert breaker.allows(12.4), "but not beyond its limit"
    breaker.succeeded()
    assert breaker.allows(12.4)
    breaker.failed(12.5)
    assert breaker.allows(13.5), "short again"
