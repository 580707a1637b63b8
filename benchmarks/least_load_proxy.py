"""A proxy that sends each request to the server with the fewest of its own under way, and looks at nothing else: what placement
costs at the least in this language, on uvloop and raw sockets. Run by `benchmarks.router_gateways`.

    python -m benchmarks.least_load_proxy ADDRESS ...
"""

from __future__ import annotations

import asyncio
import socket
import sys

import httptools
import uvloop


class Upstream(asyncio.Protocol):
    """One connection to a server, kept. Passes bytes on as they come and notices the end of the answer."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self._client: Client | None = None
        self._parser: httptools.HttpResponseParser | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, client: Client, raw: bytes) -> None:
        self._client, self._parser = client, httptools.HttpResponseParser(self)
        self.transport.write(raw)

    def data_received(self, data: bytes) -> None:
        assert self._client is not None
        assert self._parser is not None
        client = self._client
        client.transport.write(data)
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        assert self._client is not None
        self._client.answered(self)


class Server:
    def __init__(self, address: str) -> None:
        self.host, _, self.port = address.rpartition(":")
        self.busy = 0
        self.idle: list[Upstream] = []


class Client(asyncio.Protocol):
    servers: tuple[Server, ...] = ()

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._raw = b""
        self._server: Server | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self._raw += data
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        raw, self._raw = self._raw, b""
        server = self._server = min(self.servers, key=lambda each: each.busy)
        server.busy += 1
        if server.idle:
            server.idle.pop().ask(self, raw)
        else:
            self._task = asyncio.create_task(self._dial(server, raw), name="dial")

    async def _dial(self, server: Server, raw: bytes) -> None:
        _, upstream = await asyncio.get_running_loop().create_connection(Upstream, server.host, int(server.port))
        upstream.ask(self, raw)

    def answered(self, upstream: Upstream) -> None:
        assert self._server is not None
        self._server.busy -= 1
        self._server.idle.append(upstream)


async def main(addresses: list[str]) -> None:
    Client.servers = tuple(map(Server, addresses))
    server = await asyncio.get_running_loop().create_server(Client, "127.0.0.1", 0)
    print("{}:{}".format(*server.sockets[0].getsockname()), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
