"""What every directory does, in each of its forms."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace

import pytest
from directory_rig import LAYOUT, TTL_S, disk, dram, keys, record, shown, until

from core.errors import StaleEpochError
from kvtransfer.directory import DirectoryError, DuplicateNodeError, Tier
from kvtransfer.local_directory import ClockedDirectory


@pytest.fixture
async def directory(make):
    return make()


def held(*holders: tuple[str, int, Tier]) -> set[tuple[str, int, Tier]]:
    return set(holders)


A_DRAM, A_DISK, B_DRAM = ("a", 1, Tier.DRAM), ("a", 1, Tier.DISK), ("b", 1, Tier.DRAM)


async def test_nothing_is_known_at_first(directory):
    assert shown(await directory.locate([])) == []
    assert shown(await directory.locate(keys(5))) == []
    assert await directory.nodes() == []


async def test_what_one_announces_all_find(make):
    one, other = make(), make()
    assert await one.join(record(), TTL_S) is False
    assert await one.join(record(), TTL_S) is True
    assert await one.announce("a", 1, dram(keys(3)) + disk(keys(4)[2:]), []) is True
    found = await other.locate(keys(6))
    assert shown(found) == [held(A_DRAM), held(A_DRAM), held(A_DRAM, A_DISK), held(A_DISK)]
    assert found.nodes == {"a": record()}
    assert await other.nodes() == [record()]
    assert await one.join(record(), TTL_S) is True


async def test_a_lookup_ends_at_the_first_key_nobody_holds(directory):
    await directory.join(record(), TTL_S)
    some = keys(40)
    await directory.announce("a", 1, dram(some[:20] + some[21:]), [])
    assert len((await directory.locate(some)).holders) == 20
    assert len((await directory.locate(some[21:])).holders) == 19
    assert shown(await directory.locate(some[20:])) == []


async def test_several_nodes_hold_the_same(make):
    one, other = make(), make()
    for directory, name in ((one, "a"), (other, "b")):
        await directory.join(record(name), TTL_S)
    await one.announce("a", 1, dram(keys(3)), [])
    await other.announce("b", 1, dram(keys(3)[1:]), [])
    for directory in (one, other):
        assert shown(await directory.locate(keys(3))) == [held(A_DRAM), held(A_DRAM, B_DRAM), held(A_DRAM, B_DRAM)]
    await one.announce("a", 1, [], dram(keys(2)))
    assert shown(await other.locate(keys(3)[1:])) == [held(B_DRAM), held(A_DRAM, B_DRAM)]
    assert shown(await other.locate(keys(3))) == []
    assert await one.nodes() == [record("a"), record("b")]


async def test_what_goes_is_not_found(directory):
    await directory.join(record(), TTL_S)
    await directory.announce("a", 1, dram(keys(3)) + disk(keys(3)), [])
    await directory.announce("a", 1, [], dram(keys(3)[:1]) + disk(keys(3)[1:]))
    assert shown(await directory.locate(keys(3))) == [held(A_DISK), held(A_DRAM), held(A_DRAM)]
    await directory.announce("a", 1, [], disk(keys(3)) + dram(keys(3)))
    assert shown(await directory.locate(keys(3))) == []
    await directory.announce("a", 1, [], dram(keys(9)))  # never was there
    await directory.announce("a", 1, dram(keys(2)), dram(keys(2)))  # removed and added again
    assert shown(await directory.locate(keys(3))) == [held(A_DRAM), held(A_DRAM)]


async def test_announcing_again_changes_nothing(directory):
    await directory.join(record(), TTL_S)
    for _ in range(3):
        assert await directory.announce("a", 1, dram(keys(5)), disk(keys(5))) is True
    assert shown(await directory.locate(keys(5))) == [held(A_DRAM)] * 5


async def test_who_has_not_joined_announces_nothing(directory):
    assert await directory.announce("a", 1, dram(keys(2)), []) is False
    assert await directory.announce("a", 1, [], []) is False
    await directory.join(record(epoch=2), TTL_S)
    assert await directory.announce("a", 1, dram(keys(2)), []) is False
    assert await directory.announce("a", 3, dram(keys(2)), []) is False
    assert shown(await directory.locate(keys(2))) == []


async def test_a_node_that_says_nothing_is_forgotten(make):
    directory, other = make(), make()
    assert await directory.join(record(), 0.2) is False
    await other.join(record("b"), TTL_S)
    await directory.announce("a", 1, dram(keys(3)), [])
    await other.announce("b", 1, dram(keys(1)), [])

    async def forgotten():
        return shown(await other.locate(keys(3))) == [held(B_DRAM)]

    await until(forgotten)
    assert await other.nodes() == [record("b")]
    assert await directory.announce("a", 1, dram(keys(3)), []) is False
    assert await directory.join(record(), TTL_S) is False
    assert shown(await other.locate(keys(3))) == [held(B_DRAM)], "what was announced before must be announced again"
    assert await directory.announce("a", 1, dram(keys(3)), []) is True
    assert len((await other.locate(keys(3))).holders) == 3


async def test_a_node_that_says_so_lives_on(directory):
    await directory.join(record(), 0.6)
    await directory.announce("a", 1, dram(keys(3)), [])
    ends = asyncio.get_running_loop().time() + 1.5
    while asyncio.get_running_loop().time() < ends:
        assert await directory.join(record(), 1.0) is True
        assert len((await directory.locate(keys(3))).holders) == 3


async def test_a_restarted_node_replaces_its_older_self(make):
    old, new = make(), make()
    await old.join(record(), TTL_S)
    await old.announce("a", 1, dram(keys(3)), [])
    assert await new.join(record(epoch=2, address="elsewhere:1"), TTL_S) is False
    assert shown(await new.locate(keys(3))) == []
    await new.announce("a", 2, dram(keys(2)), [])
    assert shown(await old.locate(keys(3))) == [held(("a", 2, Tier.DRAM))] * 2
    assert await old.announce("a", 1, dram(keys(3)), []) is False
    with pytest.raises(StaleEpochError, match="a epoch 1 was superseded by epoch 2"):
        await old.join(record(), TTL_S)
    await old.leave("a", 1)
    assert [found.source.epoch for found in await old.nodes()] == [2]
    big = 2**63 + 12345  # epochs may be anything in 64 bits
    assert await new.join(record(epoch=big), TTL_S) is False
    with pytest.raises(StaleEpochError):
        await new.join(record(epoch=big - 1), TTL_S)
    assert (await new.nodes())[0].source.epoch == big


async def test_two_nodes_with_one_name_are_not_two(make):
    one, other = make(), make()
    await one.join(record(), TTL_S)
    await one.announce("a", 1, dram(keys(2)), [])
    with pytest.raises(DuplicateNodeError, match=r"a epoch 1 is at a:1; twin:1 is refused.*id of its own"):
        await other.join(record(address="twin:1"), TTL_S)
    assert await one.join(record(), TTL_S) is True
    assert shown(await other.locate(keys(2))) == [held(A_DRAM)] * 2


async def test_a_record_may_become_richer(directory):
    await directory.join(record(layout=None), TTL_S)
    await directory.announce("a", 1, dram(keys(1)), [])
    assert (await directory.locate(keys(1))).nodes["a"].layout is None
    assert await directory.join(record(), TTL_S) is True
    assert (await directory.locate(keys(1))).nodes["a"].layout == LAYOUT
    moved = replace(record(), source=replace(record().source, num_blocks=128))
    await directory.join(moved, TTL_S)
    assert (await directory.locate(keys(1))).nodes == {"a": moved}


async def test_who_leaves_is_gone(make):
    one, other = make(), make()
    await one.join(record(), TTL_S)
    await one.announce("a", 1, dram(keys(3)), [])
    await other.locate(keys(3))
    await one.leave("a", 2)
    await one.leave("nobody", 1)
    assert len((await other.locate(keys(3))).holders) == 3
    await one.leave("a", 1)
    await one.leave("a", 1)
    assert shown(await other.locate(keys(3))) == []
    assert await other.nodes() == []
    assert await one.join(record(), TTL_S) is False
    assert shown(await other.locate(keys(3))) == []


async def test_ten_thousand_keys(make):
    one, other = make(), make()
    many = keys(10_000)
    for directory, name in ((one, "a"), (other, "b")):
        await directory.join(record(name), TTL_S)
    assert await one.announce("a", 1, dram(many), [])
    assert await other.announce("b", 1, disk(many[::7]), [])
    found = shown(await one.locate(many))
    assert found == [held(A_DRAM, ("b", 1, Tier.DISK)) if at % 7 == 0 else held(A_DRAM) for at in range(10_000)]
    assert await one.announce("a", 1, [], dram(many[5_000:]))
    assert len((await one.locate(many)).holders) == 5_000
    await other.leave("b", 1)
    assert shown(await one.locate(many)) == [held(A_DRAM)] * 5_000


async def test_many_nodes_hold_one_key(directory):
    for number in range(100):
        await directory.join(record(f"n{number}"), TTL_S)
        await directory.announce(f"n{number}", 1, dram(keys(2)), [])
    assert shown(await directory.locate(keys(3))) == [{(f"n{number}", 1, Tier.DRAM) for number in range(100)}] * 2


async def test_a_key_has_sixteen_bytes(directory):
    await directory.join(record(), TTL_S)
    for wrong in (b"", b"short", b"x" * 17):
        with pytest.raises(ValueError, match="16 bytes"):
            await directory.locate([*keys(2), wrong])
        with pytest.raises(ValueError, match="16 bytes"):
            await directory.announce("a", 1, dram([wrong]), [])
        with pytest.raises(ValueError, match="16 bytes"):
            await directory.announce("a", 1, [], disk([wrong]))
    with pytest.raises(ValueError, match="16 bytes"):
        await directory.locate([b"x" * 15, b"x" * 17])


async def test_names_may_be_anything(directory):
    strange = "wörker/0 {1} '\"\r\n\0$"
    await directory.join(record(strange), TTL_S)
    await directory.announce(strange, 1, dram(keys(2)), [])
    assert shown(await directory.locate(keys(2))) == [held((strange, 1, Tier.DRAM))] * 2
    assert (await directory.nodes())[0].source.worker_id == strange


async def test_calls_side_by_side(make):
    """Each in a task of its own, on two clients; every answer is one that some order of them gives."""
    one, other = make(), make()
    some = keys(64)
    await one.join(record(), TTL_S)

    async def write(at: int) -> None:
        assert await one.announce("a", 1, dram(some[at : at + 8]), [])

    async def read() -> None:
        found = shown(await other.locate(some))
        assert found == [held(A_DRAM)] * len(found)

    async with asyncio.TaskGroup() as group:
        for at in range(0, 64, 8):
            group.create_task(write(at))
            group.create_task(read())
            group.create_task(read())
    assert len((await other.locate(some)).holders) == 64


async def test_a_caller_may_go_away_at_any_time(directory):
    await directory.join(record(), TTL_S)
    await directory.announce("a", 1, dram(keys(500)), [])
    loop = asyncio.get_running_loop()
    cancelled = 0
    for at in range(40):
        task = loop.create_task(directory.locate(keys(500)))
        loop.call_later(at * 0.0002, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task
        cancelled += task.cancelled()
    assert cancelled or isinstance(directory, ClockedDirectory), "not one of them was cancelled on its way"
    assert shown(await directory.locate(keys(500))) == [held(A_DRAM)] * 500


async def test_an_announcement_cut_short_is_asked_for_again(directory):
    """Nobody knows how much of it arrived, so the next join asks for everything, and then all is well."""
    await directory.join(record(), TTL_S)
    task = asyncio.create_task(directory.announce("a", 1, dram(keys(5000)), []))
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert await directory.join(record(), TTL_S) is not task.cancelled()
    assert await directory.join(record(), TTL_S) is True
    assert await directory.announce("a", 1, dram(keys(3)), [])
    assert shown(await directory.locate(keys(3))) == [held(A_DRAM)] * 3


async def test_closed(make):
    directory, other = make(), make()
    await directory.join(record(), TTL_S)
    calls = [asyncio.create_task(directory.locate(keys(100))) for _ in range(4)]
    await asyncio.sleep(0)
    await directory.close()
    await directory.close()
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(result, DirectoryError) or shown(result) == []
    for call in (
        directory.join(record(), TTL_S),
        directory.leave("a", 1),
        directory.announce("a", 1, dram(keys(1)), []),
        directory.locate(keys(1)),
        directory.nodes(),
    ):
        with pytest.raises(DirectoryError):
            await call
    assert await other.nodes() == [record()], "to close is not to leave"


@pytest.mark.parametrize("seed", range(3))
async def test_all_forms_agree_with_plain_sets(make, seed):
    """Random joins, leaves, announcements and lookups from two clients, against a set of what must be found."""
    dice = random.Random(seed)
    clients = [make(), make()]
    some = keys(24, seed)
    epochs = dict.fromkeys("abc", 1)
    joined: set[str] = set()
    held_by: dict[str, set[tuple[bytes, Tier]]] = {name: set() for name in "abc"}
    for _ in range(120):
        name = dice.choice("abc")
        directory = clients[name == "c"]  # a node speaks through one client, its process'
        match dice.choice(("join", "restart", "leave", "announce", "announce", "announce", "locate", "locate")):
            case "join":
                assert await directory.join(record(name, epochs[name]), TTL_S) is (name in joined)
                joined.add(name)
            case "restart":
                epochs[name] += 1
                held_by[name].clear()
                assert await directory.join(record(name, epochs[name]), TTL_S) is False
                joined.add(name)
            case "leave":
                await directory.leave(name, epochs[name])
                held_by[name].clear()
                joined.discard(name)
            case "announce":
                added, removed = (
                    [(key, dice.choice(list(Tier))) for key in dice.sample(some, dice.randrange(9))] for _ in range(2)
                )
                assert await directory.announce(name, epochs[name], added, removed) is (name in joined)
                if name in joined:
                    held_by[name] = held_by[name] - set(removed) | set(added)
            case "locate":
                asked = some[dice.randrange(24) :]
                expected = [
                    {(name, epochs[name], tier) for name in "abc" for tier in Tier if (key, tier) in held_by[name]}
                    for key in asked
                ]
                until_miss = expected.index(set()) if set() in expected else len(expected)
                assert shown(await dice.choice(clients).locate(asked)) == expected[:until_miss]
