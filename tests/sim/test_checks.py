"""The rules that a simulation is held to: they hold under faults, and what breaks one is found, named and made small."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.config import Config
from core.request import AttemptKey, FinishReason, TokenEvent
from sim.checks import BrokenRuleError
from sim.faults import Fault
from sim.run import simulate
from sim.sweep import MODEL, Story, failure_of, shrink, story_of
from sim.workload import Arrival
from sim.world import World
from worker.attempts import Peer

TREE = {
    "engine": {"block_size": 4, "kv_bytes": "1MiB", "max_running": 8, "max_step_tokens": 64},
    "sim": {
        "pools": [{"role": "prefill", "count": 2}, {"role": "decode", "count": 2}],
        "start_s": 1.0,
        "slo": {"ttft_s": 2.0, "tbt_s": 0.1},
    },
}
ARRIVALS = [Arrival(0.25 * n, 20 + n, 120) for n in range(20)]


def run(prepare=lambda world: None, *, faults=(), engine="counted"):
    tree = TREE | {"sim": TREE["sim"] | {"engine": engine}}
    config = Config.model_validate(tree)
    return simulate(config, ARRIVALS, "least_load", 3, faults=faults, checks=True, model=MODEL, prepare=prepare)


@pytest.mark.parametrize("seed", range(8))
def test_stories_hold_every_rule(seed):
    story_of(seed).play()


@pytest.mark.parametrize("engine", ["counted", "exact"])
def test_deaths_cost_time_and_no_request(engine):
    faults = [Fault(1.5, "kill", "decode-0"), Fault(2.0, "kill", "prefill-1"), Fault(2.5, "notice", "decode-1", 0.2)]
    result = run(faults=faults, engine=engine)
    assert result.report["completed"] == len(ARRIVALS)
    assert result.report["failovers"] > 0
    assert result.report["e2e_s"]["p99"] > run(engine=engine).report["e2e_s"]["p99"]


def test_a_partition_is_noticed_and_healed():
    result = run(faults=[Fault(1.0, "partition", "decode-0", 8.0)])
    assert result.report["completed"] == len(ARRIVALS)
    assert result.report["failovers"] > 0


def test_workers_of_whom_nothing_is_heard_are_replaced_and_most_reports_are_enough():
    config = Config.model_validate(TREE | {"cluster": {"heartbeat_s": 0.2, "dead_after_s": 1.5}})

    def lost(share: float) -> tuple[int, bool]:
        faults = [Fault(1.0, "lose_reports", for_s=6.0, share=share)]
        report = simulate(config, ARRIVALS, "least_load", 3, faults=faults, checks=True, model=MODEL).report
        return report["completed"], report["failovers"] > 0

    assert lost(1.0) == (len(ARRIVALS), True)
    assert lost(0.1) == (len(ARRIVALS), False)


@pytest.mark.parametrize("seed", [70028, 70048, 70198, 70134])
def test_what_once_broke_a_rule_does_not_again(seed):
    """A directory that was lost is not told what is gone; a puller whose last word was lost does not keep its export."""
    story_of(seed).play()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda world: _leak(world), "references, its holders have"),
        (lambda world: _lease(world), "keeps a lease of"),
        (lambda world: _twice(world), "ended"),
        (lambda world: _another_token(world), "another one than it must be"),
        (lambda world: _token(world, +1, 0), "was delivered where"),
        (lambda world: _token(world, 0, -9.0), "came before the one before it"),
        (lambda world: _drop_a_reference(world), "references, its holders have"),
        (lambda world: _free_twice(world), "on the free list twice"),
        (lambda world: _lose_a_block(world), "or nowhere"),
        (lambda world: _forget_a_key(world), "the key index and the blocks disagree"),
        (lambda world: _promise_twice(world), "references, its holders have"),
        (lambda world: _list_for_nothing(world), "and holds nothing of it|the two indexes|is owned by"),
        (lambda world: _disown(world), "the two indexes|is owned by"),
    ],
    ids=[
        *("leak", "lease", "end", "token", "gap", "early", "dropped", "free twice", "lost", "key", "promised"),
        *("listed", "disowned"),
    ],
)
def test_a_broken_rule_is_found_and_named(spoil, said):
    def prepare(world: World) -> None:
        world.events.at(3.0, spoil, world)

    with pytest.raises(BrokenRuleError, match=said):
        run(prepare)


def _leak(world: World) -> None:
    world.site.workers["decode-0"].inventory.allocate(1)


def _inventory(world: World):
    return world.site.workers["decode-0"].inventory


def _drop_a_reference(world: World) -> None:
    inventory = _inventory(world)
    inventory.release([next(block for block, count in enumerate(inventory.references()) if count)])


def _free_twice(world: World) -> None:
    inventory = _inventory(world)
    block = inventory.allocate(1)[0]
    inventory._free.append(block)
    inventory.release([block])


def _lose_a_block(world: World) -> None:
    inventory = _inventory(world)
    inventory.release(inventory.allocate(1))
    inventory._free.pop()


def _forget_a_key(world: World) -> None:
    inventory = _inventory(world)
    key = next(iter(inventory._by_key))
    inventory.release(inventory.match([key]))
    del inventory._by_key[key]


def _promise_twice(world: World) -> None:
    """A block that one attempt holds is given to another one too."""
    worker = world.site.workers["decode-0"]
    holders = [blocks for blocks in worker.held_blocks() if blocks]
    holders[0].append(holders[-1][0])
    worker.inventory.release(worker.inventory.allocate(1))


def _list_for_nothing(world: World) -> None:
    worker = world.site.workers["decode-0"]
    worker.table.admit(AttemptKey("nobody", 1), Peer("router-0", 1), world.events.now())


def _disown(world: World) -> None:
    table = world.site.workers["decode-0"].table
    owner, keys = next(iter(table._owned.items()))
    key = next(iter(keys))
    table.admit(AttemptKey("another", 1), owner, world.events.now())
    keys.discard(key)


def _token(world: World, ahead: int, later_s: float) -> None:
    request = next(each for each in world.users.live.values() if each.times)
    place = len(request.times) + ahead
    request.deliver((TokenEvent((request.name, 1), place, request.content.token(place), world.events.now() + later_s),))


def _lease(world: World) -> None:
    worker = world.site.workers["prefill-0"]
    blocks = worker.inventory.allocate(1)
    worker.inventory.lease(("nobody", 1), blocks, 1e9)
    worker.inventory.release(blocks)


def _twice(world: World) -> None:
    request = next(iter(world.users.live.values()))
    request.ends += 1


def _another_token(world: World) -> None:
    request = next(each for each in world.users.live.values() if each.times)
    place = len(request.times)
    token = TokenEvent((request.name, 1), place, request.content.token(place) + 1, world.events.now(), (), FinishReason.STOP)
    request.deliver((token._replace(finish_reason=None),))


def test_a_failing_story_shrinks_to_what_it_takes():
    def failure(story: Story) -> str:
        wrong = any(each.input_tokens == 33 for each in story.arrivals) and any(f.kind == "kill" for f in story.faults)
        return "wrong" if wrong else ""

    story = story_of(1)
    arrivals = (*story.arrivals[:10], Arrival(30.0, 33, 1), *story.arrivals[10:])
    faults = tuple(Fault(float(n), kind, "decode-0") for n, kind in enumerate(("slow", "kill", "partition", "kill")))
    small, error = shrink(replace(story, arrivals=arrivals, faults=faults), "wrong", failure)
    assert error == "wrong"
    assert [each.input_tokens for each in small.arrivals] == [33]
    assert [fault.kind for fault in small.faults] == ["kill"]


def test_a_story_is_the_same_whenever_it_is_told_and_says_what_went_wrong():
    assert story_of(5) == story_of(5)
    story = replace(story_of(5), tree=story_of(5).tree | {"engine": {"block_size": 4, "kv_bytes": 2**16, "max_running": 0}})
    assert "max_running" in failure_of(story)
