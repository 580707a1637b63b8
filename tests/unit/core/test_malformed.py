"""Bytes that are no message of ours are the caller's mistake: INVALID_ARGUMENT, whatever the kind of method."""

import grpc
import pytest

from core.service import Registration, serve
from tandem.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc


class _Inference(inference_pb2_grpc.InferenceServicer):
    async def Generate(self, request, context):
        for _ in range(2):
            yield inference_pb2.GenerateResponse(started=inference_pb2.Started(request_id=request.text))

    async def Cancel(self, request, context):
        return inference_pb2.CancelResponse(found=request.request_id == "known")


SERVED = Registration("tandem.v1.Inference", inference_pb2_grpc.add_InferenceServicer_to_server, _Inference())
NO_UTF8 = b"\x0a\x03\xff\xfeb"  # field 1, a string in every message here
MALFORMED = {"truncated": b"\x0a\xff", "no such wire type": b"\xff\xff\xff\xff", "text that is not UTF-8": NO_UTF8}


async def _called(channel, method, raw):
    if method.endswith("Generate"):
        return [reply async for reply in channel.unary_stream(method)(raw)]
    return await channel.unary_unary(method)(raw)


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize(
    "method", ["/tandem.v1.Inference/Generate", "/tandem.v1.Inference/Cancel", "/grpc.health.v1.Health/Check"]
)
async def test_malformed_requests_are_refused(method, raw):
    async with serve("127.0.0.1:0", SERVED) as server, grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _called(channel, method, raw)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(refused.value.trailing_metadata())["tandem-code"] == "invalid_request"
    assert "UTF-8" in refused.value.details()


async def test_well_formed_requests_pass_whole_and_streamed():
    async with serve("127.0.0.1:0", SERVED) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        ids = [reply.started.request_id async for reply in stub.Generate(inference_pb2.GenerateRequest(text="ü"))]
        assert ids == ["ü", "ü"]
        assert (await stub.Cancel(inference_pb2.CancelRequest(request_id="known"))).found
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await cluster_pb2_grpc.ClusterStub(channel).GetStatus(cluster_pb2.GetStatusRequest())
        assert missing.value.code() is grpc.StatusCode.UNIMPLEMENTED
