"""The gRPC front over real sessions: the SDK, hanging up, errors with status and trailing metadata."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest
from router_rig import PROMPT, Rig, rig, tokenizer
from scripted_worker import expected

from core.errors import PromptTooLongError
from core.service import Registration, serve
from router.service import InferenceServicer, StatusServicer
from tandem import AsyncClient
from tandem.sampling import SamplingParams
from tandem.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc


@contextlib.asynccontextmanager
async def grpc_front(r: Rig):
    servicers = (
        Registration("tandem.v1.Inference", inference_pb2_grpc.add_InferenceServicer_to_server, InferenceServicer(r.front)),
        Registration(
            "tandem.v1.Cluster",
            cluster_pb2_grpc.add_ClusterServicer_to_server,
            StatusServicer(lambda: cluster_pb2.ClusterSnapshot(model="scripted")),
        ),
    )
    async with serve("127.0.0.1:0", *servicers, grace_s=0, message_bytes_max=2**20) as server:
        yield server.address


async def test_the_sdk_gets_the_same_tokens():
    async with rig() as r, grpc_front(r) as address, AsyncClient(address) as client:
        result = await client.generate(list(PROMPT), SamplingParams(max_tokens=16, seed=7, ignore_eos=True, logprobs=1))
        assert list(result.token_ids) == expected(PROMPT, 7, 16)
        assert result.text == tokenizer().decode(expected(PROMPT, 7, 16))
        with pytest.raises(PromptTooLongError):
            await client.generate(list(PROMPT), SamplingParams(max_tokens=5000))
        await r.all_free()


async def test_a_client_that_hangs_up_frees_the_workers():
    async with rig(step_s=0.001) as r, grpc_front(r) as address:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            wanted = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=PROMPT))
            wanted.sampling.ignore_eos = True
            call = stub.Generate(wanted)
            await call.read()
            await call.read()
            call.cancel()
        await r.workers["decode-0"].until(lambda: not r.workers["decode-0"].held)
        async with asyncio.timeout(5):
            await r.front.drained()
        await r.all_free()


async def test_errors_carry_status_code_and_retry_after():
    async with rig(room=0, max_queue=0) as r, grpc_front(r) as address, grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as empty:
            await stub.Generate(inference_pb2.GenerateRequest()).read()
        assert empty.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert ("tandem-code", "invalid_request") in [tuple(pair) for pair in empty.value.trailing_metadata()]
        await r.workers["prefill-0"].die()
        r.announce()
        full = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[40]))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Generate(full).read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(refused.value.trailing_metadata())["tandem-retry-after-s"] == "1"
        huge = inference_pb2.GenerateRequest(text="x" * (2**20 + 1))
        with pytest.raises(grpc.aio.AioRpcError) as large:
            await stub.Generate(huge).read()
        assert large.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        model = await stub.GetModel(inference_pb2.GetModelRequest())
        assert (model.name, model.max_model_len, model.vocab_size) == ("scripted", 4096, 256)
        status = await cluster_pb2_grpc.ClusterStub(channel).GetStatus(cluster_pb2.GetStatusRequest())
        assert status.model == "scripted"
