"""Sends spans of requests to an OpenTelemetry collector (`router.traces`), in portions; never in the way of a request."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable

from prometheus_client.core import Metric

from core.samples import counter
from router.spans import Ended, export_of, parent_of

log = logging.getLogger(__name__)

WAITING_MAX = 2048
PORTION_MAX = 256
EVERY_S = 1.0
TIMEOUT_S = 5.0


class SpanExporter:
    """Used from the asyncio thread. What a collector that is slow or gone does not take is dropped, and counted."""

    def __init__(self, url: str, router_id: str) -> None:
        """`url`: of OTLP over HTTP, usually http://HOST:4318/v1/traces."""
        self.sent = self.dropped = 0
        self._url = url
        self._router_id = router_id
        self._waiting: deque[Ended] = deque()
        self._failing = False

    def ended(self, request_id: str, traceparent: str, took_s: float, why: Callable[[], str | None]) -> None:
        """A request is over; `why` is asked where its trace is sampled."""
        parent = parent_of(traceparent)
        if parent is not None and not parent.sampled:
            return
        if len(self._waiting) >= WAITING_MAX:
            self.dropped += 1
            return
        now_ns = time.time_ns()
        began_ns = now_ns - round(took_s * 1e9)
        self._waiting.append(Ended(request_id, why(), parent, secrets.token_hex(16), secrets.token_hex(8), began_ns, now_ns))

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            while self._waiting:
                await self.flush()

    async def flush(self) -> None:
        """Sends one portion."""
        portion = [self._waiting.popleft() for _ in range(min(PORTION_MAX, len(self._waiting)))]
        body = json.dumps(export_of(portion, self._router_id)).encode()
        error = await asyncio.to_thread(_post, self._url, body)
        if error is None:
            self.sent += len(portion)
        else:
            self.dropped += len(portion)
            if not self._failing:
                log.warning("spans cannot be sent to %s (router.traces): %s; they are dropped until they can", self._url, error)
        self._failing = error is not None

    def collect(self) -> Iterable[Metric]:
        yield counter("tandem_router_spans_sent_total", "Spans of requests that a collector took.", self.sent)
        yield counter("tandem_router_spans_dropped_total", "Spans of requests that it did not take in time.", self.dropped)


def _post(url: str, body: bytes) -> str | None:
    """What went wrong, if anything did."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            answer.read()
    except (OSError, ValueError, urllib.error.URLError) as error:
        return str(error)
    return None
