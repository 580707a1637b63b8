"""A served port answers health and reflection; a taken port is an error that says so."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from core.errors import ConfigError
from core.service import Registration, serve
from tandem.v1 import kv_pb2_grpc

KV = Registration("tandem.v1.Kv", kv_pb2_grpc.add_KvServicer_to_server, kv_pb2_grpc.KvServicer())


async def test_health_and_reflection_name_the_services():
    async with serve("127.0.0.1:0", KV) as server, grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "tandem.v1.Kv"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        await server.set_serving(False)
        reply = await health.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING

        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
        async for answer in call:
            names = {service.name for service in answer.list_services_response.service}
            break
        assert {"tandem.v1.Kv", "grpc.health.v1.Health"} <= names


async def test_a_taken_port_is_named():
    async with serve("127.0.0.1:0", KV) as server:
        with pytest.raises(ConfigError, match=server.address):
            async with serve(server.address, KV):
                pass
