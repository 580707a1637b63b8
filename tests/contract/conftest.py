"""Fixtures that several suites here share."""

from __future__ import annotations

import pytest
from directory_rig import FORMS, directories, redis_cluster

from cli.redis_server import redis_server


@pytest.fixture(scope="module")
def urls():
    """Of a Redis server and of a Redis Cluster."""
    with redis_server() as server, redis_cluster() as cluster:
        yield {"redis": server.url, "redis cluster": cluster}


@pytest.fixture(params=FORMS)
async def make(request, urls):
    """Makes clients of one and the same, empty directory, in each of its forms."""
    async with directories(request.param, urls.get(request.param, "")) as make:
        yield make
