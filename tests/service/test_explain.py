"""A decision explained over every door: the SDK, gRPC metadata, an HTTP header, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio.to_thread
import grpc
import httpx
import pytest
from router_rig import PROMPT, Rig, rig, tokenizer

from core.service import Registration, serve
from router.http import build_app
from router.service import InferenceServicer
from router.web import web_server
from tandem import AsyncClient, Client, SamplingParams
from tandem.errors import NotFoundError
from tandem.v1 import inference_pb2, inference_pb2_grpc

pytestmark = pytest.mark.service

TANDEM = str(Path(sys.executable).with_name("tandem"))
PARAMS = SamplingParams(max_tokens=8, seed=7, ignore_eos=True)
ASKS = ("x-tandem-explain", "1")


@asynccontextmanager
async def doors(r: Rig) -> AsyncIterator[tuple[str, str]]:
    """gRPC and HTTP address."""
    inference = Registration(
        "tandem.v1.Inference", inference_pb2_grpc.add_InferenceServicer_to_server, InferenceServicer(r.front)
    )
    app = build_app(r.front, tokenizer(), lambda: b"", 2**20)
    async with (
        serve("127.0.0.1:0", inference, grace_s=0, message_bytes_max=2**20) as server,
        web_server(app, "127.0.0.1:0", 0.5) as http,
    ):
        yield server.address, http


async def test_the_sdk_explains_a_request_that_ended():
    async with rig() as r, doors(r) as (address, _), AsyncClient(address) as client:
        result = await client.generate(list(PROMPT), PARAMS, request_id="one", ttft_slo_s=2.0)
        known = await client.explain("one")
        assert (known.policy, known.slo_class, known.prompt_tokens, known.ttft_slo_s) == (
            "least_load", "standard", len(PROMPT), 2.0,
        )  # fmt: skip
        assert known.outcome is not None
        assert (known.outcome.finish, known.outcome.tokens, known.outcome.timing) == ("length", 8, result.timing)
        last = known.decisions[-1]
        assert last.placement == result.placement
        chosen = last.candidates[0]
        assert chosen.ttft_s == pytest.approx(chosen.overhead_s + chosen.queue_s + chosen.prefill_s)
        assert chosen.tpot_s > 0

        def blocking() -> None:
            with Client(address) as other:
                assert other.explain("one") == known
                with pytest.raises(NotFoundError, match=r"no decision on request 'two' is kept; .* has 1 now, of 1 requests"):
                    other.explain("two")

        await anyio.to_thread.run_sync(blocking)


async def test_a_first_token_that_waited_for_the_second_is_explained():
    async with rig(step_s=0.01) as r, doors(r) as (address, _), AsyncClient(address) as client:
        given = await client.generate(list(PROMPT), PARAMS, request_id="given", ttft_slo_s=20.0)
        kept = await client.generate(list(PROMPT), PARAMS, request_id="kept", ttft_slo_s=20.0, tbt_slo_s=0.001)
        assert kept.token_ids == given.token_ids
        chosen, timing = (await client.explain("kept")).decisions[-1].candidates[0], kept.timing
        assert chosen.held_s > 0
        assert chosen.ttft_s == pytest.approx(chosen.overhead_s + chosen.queue_s + chosen.prefill_s + chosen.held_s)
        assert timing.first_decode_s > 0
        assert timing.ttft_s >= timing.prefill_s + timing.first_decode_s
        assert (await client.explain("given")).decisions[-1].candidates[0].held_s == 0


async def test_other_choices_and_what_still_runs_are_explained_too():
    async with rig(step_s=0.002) as r, doors(r) as (address, _), AsyncClient(address) as client:
        params = SamplingParams(max_tokens=400, seed=7, ignore_eos=True, n=2)
        async with client.stream(list(PROMPT), params, request_id="pair") as stream:
            async for token in stream:
                if token.choice == 1:
                    break
            second = await client.explain("pair/1")
            assert second.outcome is None
            assert second.decisions[-1].reason == "its other choices run there"
            assert second.decisions[-1].placement == (await client.explain("pair")).decisions[-1].placement
        await r.until(lambda: r.front.live == 0)
        ended = (await client.explain("pair")).outcome
        assert ended is not None
        assert ended.finish == "cancelled"


async def test_metadata_and_headers_come_when_asked_for_and_only_then():
    async with rig() as r, doors(r) as (address, url):
        async with grpc.aio.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            wanted = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=PROMPT), request_id="g")
            wanted.sampling.max_tokens = 4
            for metadata in ((), (ASKS,)):
                call = stub.Generate(wanted, metadata=metadata)
                async for _ in call:
                    pass
                sent = dict(await call.trailing_metadata() or ())
                assert ("x-tandem-explain" in sent) is bool(metadata)
            said = json.loads(sent["x-tandem-explain"])
            assert (said["request_id"], said["outcome"]["tokens"]) == ("g", 4)
        async with httpx.AsyncClient(base_url=f"http://{url}") as http:
            name = (await http.get("/v1/models")).json()["data"][0]["id"]
            body = {"model": name, "prompt": list(PROMPT), "max_tokens": 4}
            plain = await http.post("/v1/completions", json=body)
            assert "x-tandem-explain" not in plain.headers
            whole = await http.post("/v1/completions", json=body, headers=[ASKS])
            assert json.loads(whole.headers["x-tandem-explain"])["outcome"]["finish"] == "length"
            stream = await http.post("/v1/completions", json=body | {"stream": True}, headers=[ASKS])
            at_start = json.loads(stream.headers["x-tandem-explain"])
            assert at_start["decisions"][0]["placement"] == {"prefill": "prefill-0", "decode": "decode-0"}
            assert "outcome" not in at_start, "a stream's header leaves before its end"


async def test_the_command_is_readable_and_gives_json():
    async with rig() as r, doors(r) as (address, _), AsyncClient(address) as client:
        await client.generate(list(PROMPT), PARAMS, request_id="one")
        run = partial(subprocess.run, capture_output=True, text=True, timeout=60, check=False)
        ask = [TANDEM, "explain", "--grpc", address]
        shown = await anyio.to_thread.run_sync(lambda: run([*ask, "one"], env={"COLUMNS": "140"}))
        assert shown.returncode == 0, shown.stderr
        for text in ("prefill-0 → decode-0", "least_load", "length after 8 tokens", "first token after it", "mean gap (TPOT)"):
            assert text in shown.stdout, shown.stdout
        narrow = await anyio.to_thread.run_sync(lambda: run([*ask, "one"], env={"COLUMNS": "80"}))
        assert "…" not in narrow.stdout, narrow.stdout
        as_json = await anyio.to_thread.run_sync(lambda: run([*ask, "one", "--json"]))
        tree = json.loads(as_json.stdout)
        assert tree["outcome"]["finish"] == "length"
        assert set(tree["errors"]) == {"ttft", "tpot"}
        unknown = await anyio.to_thread.run_sync(lambda: run([*ask, "nobody"]))
        assert unknown.returncode == 1
        assert "no decision on request 'nobody' is kept" in unknown.stderr
        assert len(unknown.stderr.splitlines()) == 1
