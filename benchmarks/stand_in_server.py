"""An OpenAI-compatible server that computes nothing and answers at once: what gateways are measured in front of.

    python -m benchmarks.stand_in_server MODEL

Prints its address. `/v1/completions` and `/v1/chat/completions` answer with `max_tokens` tokens, whole or as server-sent
events in one burst; `/health`, `/v1/models` and what gateways ask of an SGLang server before they trust it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any

import httptools
import uvloop

TOKEN = " the"


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive."""

    model = ""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._url, self._body = b"", b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:  # a gateway that asks whether this is HTTP/2
            self._transport.close()

    def on_url(self, url: bytes) -> None:
        self._url, self._body = url, b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path = self._url.decode().partition("?")[0]
        if not path.endswith("completions"):
            self._whole(self._about(path))
            return
        asked = json.loads(self._body)
        tokens = asked.get("max_tokens") or 1
        if asked.get("stream"):
            self._stream(tokens, chat="chat" in path)
        else:
            self._whole(self._answer(TOKEN * tokens, tokens, chat="chat" in path))

    def _about(self, path: str) -> dict[str, Any]:
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": self.model, "object": "model"}]}
        return {"status": "ok", "model_path": self.model, "served_model_name": self.model, "model_id": self.model}

    def _answer(self, text: str, tokens: int, *, chat: bool) -> dict[str, Any]:
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
        choice = {"index": 0, "finish_reason": "length", "logprobs": None, **said}
        return {"id": "x", "object": "text_completion", "created": 1, "model": self.model, "choices": [choice], "usage": usage}

    def _whole(self, value: dict[str, Any]) -> None:
        raw = json.dumps(value).encode()
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        self._transport.write(head.encode() + raw)

    def _stream(self, tokens: int, *, chat: bool) -> None:
        said: dict[str, Any] = {"delta": {"content": TOKEN}} if chat else {"text": TOKEN}
        event = {"id": "x", "object": "chunk", "created": 1, "model": self.model}
        raw = json.dumps(event | {"choices": [{"index": 0, **said}]}).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        self._transport.write(head)
        for piece in (*([b"data: " + raw + b"\n\n"] * tokens), b"data: [DONE]\n\n"):
            self._transport.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")  # a token is a write, as of a real server
        self._transport.write(b"0\r\n\r\n")


async def main(model: str) -> None:
    Connection.model = model
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    print("{}:{}".format(*server.sockets[0].getsockname()), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
