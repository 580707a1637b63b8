"""Prompts enter the engine at once, or after a fetch that may be cancelled, fail or take too long."""

from __future__ import annotations

import asyncio
import threading

import pytest

from core.blocks import root_key
from core.clock import ManualClock
from core.errors import OverloadedError
from core.inventory import Inventory
from core.request import AttemptKey, WorkItem
from kvtransfer.resident import Resident
from tandem.sampling import SamplingParams
from worker import arrivals as arrivals_module
from worker.arrivals import Arrivals

SIZE = 16


class StubbornResident(Resident):
    """Pays when told so; its fetches end when the test says, having brought `brings` blocks."""

    def __init__(self, inventory: Inventory, clock: ManualClock) -> None:
        self.inventory = inventory
        self.clock = clock
        self.pays, self.brings, self.takes_s = True, 2, 0.0
        self.asked: list[tuple[int, bytes, float]] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    def may_pay(self, blocks):
        return self.pays and blocks > 0

    def worth_asking(self, keys):
        return self.pays

    async def ensure(self, keys, tenant, deadline_s):
        self.asked.append((len(keys), tenant, deadline_s))
        await self.gate.wait()
        self.clock.advance(self.takes_s)
        if self.error is not None:
            raise self.error
        return self.inventory.allocate(self.brings)


class Rig:
    def __init__(self) -> None:
        self.inventory, self.clock = Inventory(16), ManualClock()
        self.resident = StubbornResident(self.inventory, self.clock)
        self.arrivals = Arrivals(self.resident, self.inventory, lambda salt: root_key(b"", salt), SIZE, 1.0, self.clock)
        self.entered: list[WorkItem] = []
        self.failed: list[tuple[AttemptKey, str]] = []
        self.refusal: OverloadedError | None = None

    def submit(self, item: WorkItem) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.held_at_submit = self.inventory.counts().active
        self.entered.append(item)

    def admit(self, item: WorkItem) -> None:
        self.arrivals.admit(item, self.submit, lambda key, error: self.failed.append((key, error.message)))

    async def settle(self) -> None:
        async with asyncio.timeout(5):
            while len(self.arrivals):  # noqa: ASYNC110
                await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
        assert self.inventory.counts().active == 0, "references are given back"


def item(tokens: int = 49, remaining_s: float = 0.0, request: str = "r") -> WorkItem:
    sampling = SamplingParams(max_tokens=4, seed=1)
    key, token_ids = AttemptKey(request, 1), tuple(range(tokens))
    return WorkItem(key, token_ids, tokens, sampling, cache_salt=b"salt", remaining_s=remaining_s)


@pytest.fixture
async def rig():
    return Rig()


async def test_what_gains_nothing_enters_at_once(rig):
    rig.resident.pays = False
    rig.admit(item())
    assert rig.entered == [item()]
    assert not rig.resident.asked


async def test_without_fetching_everything_enters_at_once(rig):
    rig.arrivals = Arrivals(None, rig.inventory, lambda salt: root_key(b"", salt), SIZE, 1.0, rig.clock)
    rig.admit(item())
    assert rig.entered == [item()]


@pytest.mark.parametrize(("tokens", "blocks"), [(49, 3), (48, 2), (33, 2), (17, 1)])
async def test_the_blocks_that_the_engine_can_use_are_fetched_first(rig, tokens, blocks):
    """One token at least is computed."""
    rig.admit(item(tokens))
    assert (rig.entered, len(rig.arrivals)) == ([], 1)
    rig.resident.gate.set()
    await rig.settle()
    assert rig.entered == [item(tokens)]
    assert rig.resident.asked == [(blocks, b"salt", 1.0)]
    assert rig.held_at_submit == 2, "held until the engine has the prompt"


async def test_keys_of_a_very_long_prompt_are_computed_off_the_loop(rig, monkeypatch):
    monkeypatch.setattr(arrivals_module, "INLINE_BLOCKS_MAX", 2)
    threads = []

    def root(salt):
        threads.append(threading.current_thread() is threading.main_thread())
        return root_key(b"", salt)

    rig.arrivals = Arrivals(rig.resident, rig.inventory, root, SIZE, 1.0, rig.clock)
    rig.resident.gate.set()
    rig.admit(item(33))
    rig.admit(item(49, request="long"))
    assert threads == [True], "of the short one, to see whether it pays"
    async with asyncio.timeout(5):
        while len(rig.entered) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await rig.settle()
    assert threads == [True, False]


async def test_too_short_a_prompt_is_never_looked_for(rig):
    rig.admit(item(16))
    assert rig.entered == [item(16)]


async def test_a_cancelled_prompt_never_enters(rig):
    rig.admit(item())
    await asyncio.sleep(0)
    rig.arrivals.cancel(item().key)
    rig.arrivals.cancel(item().key)
    assert len(rig.arrivals) == 0
    rig.resident.gate.set()
    await rig.settle()
    assert (rig.entered, rig.failed) == ([], [])


async def test_a_refusal_after_the_fetch_is_told(rig):
    rig.admit(item())
    rig.refusal = OverloadedError("too many")
    rig.resident.gate.set()
    await rig.settle()
    assert rig.failed == [(item().key, "too many")]


async def test_a_refusal_at_once_is_raised(rig):
    rig.resident.pays = False
    rig.refusal = OverloadedError("too many")
    with pytest.raises(OverloadedError):
        rig.admit(item())


async def test_a_mistake_of_ours_does_not_cost_the_request(rig, caplog):
    rig.resident.error = ZeroDivisionError("a mistake")
    rig.resident.gate.set()
    rig.admit(item())
    await rig.settle()
    assert rig.entered == [item()]
    assert "a mistake" in caplog.text


async def test_a_deadline_bounds_the_fetch_and_shrinks_by_it(rig):
    rig.resident.takes_s = 0.3
    rig.resident.gate.set()
    rig.admit(item(remaining_s=0.8))
    await rig.settle()
    assert rig.resident.asked == [(3, b"salt", 0.4)]
    assert rig.entered[0].remaining_s == pytest.approx(0.5)


async def test_only_so_many_prompts_wait_for_blocks(rig, monkeypatch):
    monkeypatch.setattr(arrivals_module, "FETCHING_MAX", 2)
    for n in range(3):
        rig.admit(item(request=f"r{n}"))
    assert [one.key.request_id for one in rig.entered] == ["r2"]
    rig.resident.gate.set()
    await rig.settle()
    assert len(rig.entered) == 3


async def test_closing_ends_every_fetch(rig):
    rig.admit(item(request="a"))
    rig.admit(item(request="b"))
    await asyncio.sleep(0)
    await rig.arrivals.close()
    assert (len(rig.arrivals), rig.entered) == (0, [])
