"""Classes, tenants, limits and quotas as their users meet them: over real sessions, through SDK and HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from router_rig import PROMPT, Rig, request, rig, tokenizer
from scripted_worker import expected
from test_router_grpc import grpc_front

from core.config import RouterConfig
from core.cost_model import Fit, StepCost
from core.errors import DeadlineExceededError, InvalidRequestError, OverloadedError, QuotaExceededError, SloUnattainableError
from core.request import Slo
from router.frontend_types import FrontRequest, Started
from router.http import build_app
from router.web import web_server
from tandem import AsyncClient, SamplingParams

PARAMS = SamplingParams(max_tokens=16, seed=7, ignore_eos=True)
BODY = {"model": "scripted", "prompt": list(PROMPT), "max_tokens": 16, "seed": 7, "ignore_eos": True}
COST = Fit(
    StepCost(base_s=1e-3, prefill_token_s=1e-3, prefill_pair_s=0.0, decode_row_s=1e-3, decode_context_s=0.0), 100, 0.0, 0.0
)
"""20 tokens of prompt take 21 ms."""


def config(**fields: Any) -> RouterConfig:
    return RouterConfig.model_validate({"policy": "least_load", **fields})


@contextlib.asynccontextmanager
async def fronts(r: Rig) -> AsyncIterator[tuple[AsyncClient, httpx.AsyncClient]]:
    app = build_app(r.front, tokenizer(), bytes, 2**20)
    async with (
        grpc_front(r) as address,
        web_server(app, "127.0.0.1:0", 0.1) as http,
        AsyncClient(address, max_retries=0) as client,
        httpx.AsyncClient(base_url=f"http://{http}", timeout=30) as web,
    ):
        yield client, web


@contextlib.asynccontextmanager
async def one_running(r: Rig) -> AsyncIterator[None]:
    """Holds the only place there is until the block ends."""
    running = r.front.generate(request(max_tokens=4000, request_id="first"))
    assert isinstance(await anext(running), Started)
    try:
        yield
    finally:
        await running.aclose()


def reserved(r: Rig) -> list[str]:
    """Request ids in the order in which they got their places."""
    return list(dict.fromkeys(key.request_id for kind, key in r.workers["prefill-0"].seen if kind == "start_prefill"))


async def in_order(r: Rig, *asked: FrontRequest) -> list[str]:
    """All wait behind one that runs, in this order; then in which order they had their turn."""
    async with one_running(r):
        tasks = []
        for one in asked:
            tasks.append(asyncio.create_task(r.generate(one)))
            await r.until(lambda: len(r.dispatcher.queue) == len(tasks))
    for done in await asyncio.gather(*tasks):
        assert done.ids() == expected(PROMPT, 7, 16)
    await r.all_free()
    return reserved(r)[1:]


@pytest.mark.parametrize("policy", ["least_load", "goodput"])
async def test_classes_go_by_priority_and_a_call_may_add_its_own(policy):
    async with rig(room=1, step_s=0.001, config=config(policy=policy)) as r:
        order = await in_order(
            r,
            replace(request(request_id="batch"), slo_class="batch"),
            request(request_id="standard"),
            replace(request(request_id="chat"), slo_class="interactive"),
            replace(request(request_id="hurry"), priority=5),
        )
        assert order == ["chat", "hurry", "standard", "batch"]


async def test_within_a_class_the_tighter_limit_goes_first_and_fcfs_does_not_care():
    asked = [replace(request(request_id=f"{limit_s:g}"), slo=Slo(ttft_s=limit_s)) for limit_s in (50.0, 30.0, 40.0)]
    for name, expected_order in (("slack", ["30", "40", "50"]), ("fcfs", ["50", "30", "40"])):
        async with rig(room=1, step_s=0.001, config=config(queue=name)) as r:
            assert await in_order(r, *asked) == expected_order


async def test_quick_prompts_first_with_mlfq():
    async with rig(room=1, step_s=0.001, config=config(queue="mlfq")) as r:
        long = replace(request(request_id="long"), prompt=PROMPT * 20)
        async with one_running(r):
            tasks = [asyncio.create_task(r.generate(long))]
            await r.until(lambda: len(r.dispatcher.queue) == 1)
            tasks.append(asyncio.create_task(r.generate(request(request_id="short"))))
            await r.until(lambda: len(r.dispatcher.queue) == 2)
        await asyncio.gather(*tasks)
        assert reserved(r)[1:] == ["short", "long"]


async def test_a_tenant_that_floods_the_queue_does_not_delay_another():
    async with rig(room=1, step_s=0.0) as r:
        flood = [replace(request(request_id=f"flood{n}"), tenant="flood") for n in range(12)]
        other = [replace(request(request_id=f"other{n}"), tenant="other") for n in range(3)]
        order = await in_order(r, *flood, *other)
        assert max(order.index(f"other{n}") for n in range(3)) <= 6, "turn by turn, whoever came first"


async def test_weights_share_what_there_is():
    tenants = {"gold": {"weight": 3.0}, "plain": {}}
    async with rig(room=1, step_s=0.0, config=config(tenants=tenants)) as r:
        async with one_running_as(r, "plain"):
            tasks = []
            for number in range(16):
                for tenant in ("plain", "gold"):
                    one = replace(request(max_tokens=4, request_id=f"{tenant}-{number}"), tenant=tenant)
                    tasks.append(asyncio.create_task(r.generate(one)))
                    await r.until(lambda: len(r.dispatcher.queue) == len(tasks))
        await asyncio.gather(*tasks)
        first = reserved(r)[1:17]
        gold = sum(name.startswith("gold") for name in first)
        assert 11 <= gold <= 14, f"three quarters of 16, got {gold}: {first}"


@contextlib.asynccontextmanager
async def one_running_as(r: Rig, tenant: str) -> AsyncIterator[None]:
    running = r.front.generate(replace(request(max_tokens=40, request_id="first"), tenant=tenant))
    r.workers["decode-0"].step_s = 3600.0
    assert isinstance(await anext(running), Started)
    try:
        yield
    finally:
        r.workers["decode-0"].step_s = 0.0
        await running.aclose()


async def test_unknown_names_and_contradictions_are_refused_at_both_doors():
    tenants = {"gold": {}, "free": {}}
    async with rig(config=config(tenants=tenants)) as r, fronts(r) as (client, web):
        for options, says in (
            ({"tenant": "gold", "slo_class": "urgent"}, "choose one of batch, interactive, standard"),
            ({"tenant": "nobody"}, "name one of free, gold"),
            ({}, "names no tenant"),
            ({"tenant": "gold", "ttft_slo_s": 5.0, "deadline_s": 1.0}, "deadline_s"),
            ({"tenant": "gold", "tbt_slo_s": -1.0}, "tbt_slo_s must be a positive number"),
        ):
            with pytest.raises(InvalidRequestError, match=says):
                await client.generate(list(PROMPT), PARAMS, **options)  # type: ignore[arg-type]
            answer = await web.post("/v1/completions", json=BODY | options)
            assert answer.status_code == 400
            assert says in answer.json()["error"]["message"]
            assert answer.json()["error"]["param"] in ("slo_class", "tenant", "ttft_slo_s", "tbt_slo_s")
        good = await client.generate(list(PROMPT), PARAMS, tenant="gold", slo_class="interactive")
        assert list(good.token_ids) == expected(PROMPT, 7, 16)
        answer = await web.post(
            "/v1/completions", json=BODY, headers={"x-tandem-tenant": "free", "x-tandem-slo-class": "batch"}
        )
        assert answer.status_code == 200
        answer = await web.post("/v1/completions", json=BODY | {"tenant": "gold"}, headers={"x-tandem-tenant": "free"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tenant")
        assert {"gold", "free"} <= set(r.dispatcher.room.counters.snapshot())
        await r.all_free()


async def test_a_quota_is_a_429_that_says_when_to_come_again():
    tenants = {"a": {"tokens_per_s": 0.5, "burst_tokens": 30.0}, "b": {}}
    async with rig(config=config(tenants=tenants)) as r, fronts(r) as (client, web):
        await client.generate(list(PROMPT), PARAMS, tenant="a")  # 20 + 16 tokens: 6 more than there are
        with pytest.raises(QuotaExceededError, match="tenant a has used up its quota") as refused:
            await client.generate(list(PROMPT), PARAMS, tenant="a")
        assert refused.value.retry_after_s is not None
        assert 5 < refused.value.retry_after_s <= 14
        answer = await web.post("/v1/completions", json=BODY | {"tenant": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "quota_exceeded")
        assert 5 <= int(answer.headers["retry-after"]) <= 14
        assert (await web.post("/v1/completions", json=BODY | {"tenant": "b"})).status_code == 200
        assert r.stats.outcomes["quota_exceeded"] == 2
        await r.all_free()


async def test_what_would_miss_its_limits_is_refused_before_it_is_computed():
    async with rig(config=config(admission="reject")) as r, fronts(r) as (client, web):
        for worker in r.workers.values():
            worker.step_cost = COST
        r.announce()
        with pytest.raises(SloUnattainableError, match=r"first token would take .* the limit is 0.01 s") as refused:
            await client.generate(list(PROMPT), PARAMS, ttft_slo_s=0.01)
        assert refused.value.retry_after_s == 1.0
        answer = await web.post("/v1/completions", json=BODY | {"tbt_slo_s": 0.0005, "stream": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "slo_unattainable")
        assert "slowest tenth of its token gaps" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "1"
        assert not r.workers["decode-0"].seen, "nobody was asked"
        within = await client.generate(list(PROMPT), PARAMS, ttft_slo_s=5.0, tbt_slo_s=1.0)
        assert list(within.token_ids) == expected(PROMPT, 7, 16)
        await r.all_free()


async def test_a_refusal_is_explained_too():
    tenants = {"a": {"tokens_per_s": 0.5, "burst_tokens": 30.0}, "default": {}}
    async with rig(config=config(admission="reject", tenants=tenants)) as r, fronts(r) as (client, web):
        await client.generate(list(PROMPT), PARAMS, tenant="a", request_id="again")
        with pytest.raises(QuotaExceededError):
            await client.generate(list(PROMPT), PARAMS, tenant="a", request_id="again")
        known = await client.explain("again")
        assert known.outcome is not None
        assert (known.outcome.finish, known.prompt_tokens, len(known.decisions)) == ("quota_exceeded", len(PROMPT), 1)
        assert "has used up its quota" in known.decisions[0].reason
        assert known.decisions[0].placement is None
        for worker in r.workers.values():
            worker.step_cost = COST
        r.announce()
        for stream in (False, True):
            body = BODY | {"ttft_slo_s": 0.01, "stream": stream}
            answer = await web.post("/v1/completions", json=body, headers={"x-tandem-explain": "1"})
            assert answer.status_code == 429
            said = json.loads(answer.headers["x-tandem-explain"])
            assert said["outcome"]["finish"] == "slo_unattainable"
            assert "first token would take" in said["outcome"]["message"]
            assert (await client.explain(answer.headers["x-request-id"])).ttft_slo_s == 0.01
        await r.all_free()


async def test_who_waits_in_vain_is_told_when_its_limit_has_passed():
    async with rig(room=1, step_s=0.001, config=config(admission="reject")) as r:
        async with one_running(r):
            patient = asyncio.create_task(r.generate(replace(request(request_id="patient"), slo=Slo(ttft_s=20.0))))
            await r.until(lambda: len(r.dispatcher.queue) == 1)
            with pytest.raises(SloUnattainableError, match="no place came free in time"):
                await r.generate(replace(request(request_id="hasty"), slo=Slo(ttft_s=0.05)))
            assert "no place came free" in r.front.explain("hasty").outcome.message
            assert "patient" in r.dispatcher.queue
        assert (await patient).ids() == expected(PROMPT, 7, 16)
        await r.all_free()


async def test_admission_off_serves_late_rather_than_never():
    async with rig(room=1, step_s=0.001) as r:
        async with one_running(r):
            late = asyncio.create_task(r.generate(replace(request(request_id="late"), slo=Slo(ttft_s=0.001))))
            await r.until(lambda: len(r.dispatcher.queue) == 1)
        assert (await late).ids() == expected(PROMPT, 7, 16)
        await r.all_free()


async def test_a_deadline_ends_an_answer_that_takes_longer():
    async with rig() as r, fronts(r) as (client, _):
        never = asyncio.Event()
        r.workers["decode-0"].hook = lambda stage, key: never.wait() if stage == "token" else None
        with pytest.raises(DeadlineExceededError, match=r"not finished within 0\.3 s \(deadline_s\)"):
            await client.generate(list(PROMPT), PARAMS, deadline_s=0.3)
        await r.all_free()


async def test_batch_work_waits_for_a_gap_and_takes_it():
    async with rig(config=config(policy="goodput", aging_s=60.0)) as r:
        for worker in r.workers.values():
            worker.step_cost = COST  # two requests on the decode worker: 3 ms a gap
        r.announce()
        hold = asyncio.Event()
        r.workers["decode-0"].hook = lambda stage, key: hold.wait() if (stage, key.request_id) == ("token", "chat") else None
        chat = asyncio.create_task(r.generate(replace(request(request_id="chat"), slo=Slo(tbt_s=0.0025))))
        await r.workers["decode-0"].until(lambda: bool(r.workers["decode-0"].held))
        batch = asyncio.create_task(r.generate(replace(request(request_id="batch"), slo_class="batch")))
        await r.until(lambda: "batch" in r.dispatcher.queue)
        standard = await r.generate(replace(request(request_id="standard"), slo=Slo(tbt_s=1.0)))
        assert standard.ids() == expected(PROMPT, 7, 16), "it is not held up by the batch request before it"
        assert "batch" in r.dispatcher.queue
        hold.set()
        for task in (chat, batch):
            assert (await task).ids() == expected(PROMPT, 7, 16)
        await r.all_free()


async def test_one_tenant_leaves_room_in_the_queue_for_others():
    async with rig(room=1, step_s=0.001, max_queue=4, config=config(tenants={"a": {}, "b": {}, "default": {}})) as r:
        async with one_running(r):
            tasks = []
            for number in range(2):
                tasks.append(asyncio.create_task(r.generate(replace(request(request_id=f"a{number}"), tenant="a"))))
                await r.until(lambda: len(r.dispatcher.queue) == len(tasks))
            with pytest.raises(OverloadedError, match="2 requests of tenant a wait already"):
                await r.generate(replace(request(request_id="a2"), tenant="a"))
            tasks.append(asyncio.create_task(r.generate(replace(request(request_id="b0"), tenant="b"))))
            await r.until(lambda: len(r.dispatcher.queue) == 3)
        await asyncio.gather(*tasks)
        await r.all_free()
